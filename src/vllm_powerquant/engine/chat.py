"""Messages to a prompt's text by a tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..calibration import first_line
from ..errors import PowerQuantConfigError


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, model: str) -> str:
    """Special tokens spelled out. Raises: PowerQuantConfigError without a template, or if it refuses the messages"""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise PowerQuantConfigError(f"{model} has no chat template; give `generate` a prompt as text")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise PowerQuantConfigError(f"the model's chat template refuses these messages: {first_line(error)}") from None
