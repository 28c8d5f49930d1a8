"""Chat messages to a prompt, as transformers renders a model's Jinja template; for templates that the engine refuses."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PowerQuantConfigError, PowerQuantEngineError
from .header import Header


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    header: Header | None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt's text, special tokens spelled out.

    Args:    header: of the model file, whose vocabulary spells bos_token and the like
             variables: what else the template reads, e.g. tools
    Raises:  PowerQuantConfigError where the template is malformed or refuses the messages; PowerQuantEngineError without
             jinja2
    """
    try:
        import jinja2
    except ImportError as error:
        raise PowerQuantEngineError(
            "this model's chat template is rendered with jinja2, which is not installed; "
            "run: pip install 'vllm-powerquant[sparse]'"
        ) from error
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = {name: header.token(entry) if header else "" for name, entry in names.items()}
    values = {"tools": None, "documents": None, **tokens, **variables}
    try:
        compiled = _environment().from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
    except jinja2.TemplateError as error:
        raise PowerQuantConfigError(f"the chat template cannot be rendered for these messages: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PowerQuantConfigError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error


def _environment() -> Any:
    """Jinja as transformers sets it up; a template comes with a model, so it runs in the sandbox."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training; they are rendered as they are."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment
