"""Options: defaults, both sources, refusals and the generated table."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from vllm_powerquant.config import OTHER_ENV_NAMES, PRESETS, PowerQuantConfig, options, options_markdown
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError

DEFAULTS = {
    "key_bits": 4,
    "value_bits": 2,
    "value_codec": "scalar",
    "residual_tokens": 128,
    "residual_block_size": 16,
    "sink_tokens": 4,
    "protected_layers": 0,
    "calibration": "",
}

ACCEPTED = [
    ("key_bits", (2, 3, 4, 8)),
    ("value_bits", (2, 3, 4, 8)),
    ("residual_tokens", (0, 1, 100, 128, 4096)),
    ("residual_block_size", (8, 16, 32, 64)),
    ("sink_tokens", (0, 4, 16)),
    ("protected_layers", (0, 1, 40)),
    ("value_codec", ("scalar", "trellis")),
]
REFUSED = [
    ("key_bits", (0, 1, 5, 6, 7, 16, -4)),
    ("value_bits", (0, 1, 5, 6, 7, 16, -2)),
    ("residual_tokens", (-1, 4097)),
    ("residual_block_size", (0, 4, 12, 24, 128, -16)),
    ("sink_tokens", (-1, 17)),
    ("protected_layers", (-1,)),
    ("value_codec", ("", "Trellis", "tcq", "2")),
]


def flatten(cases):
    return [pytest.param(field, value, id=f"{field}-{value}") for field, values in cases for value in values]


def env_name(field):
    return f"POWERQUANT_{field.upper()}"


def refusal(environ=None, additional=None) -> str:
    with pytest.raises(PowerQuantConfigError) as caught:
        PowerQuantConfig.from_sources(environ or {}, additional)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_error_kinds():
    assert issubclass(PowerQuantConfigError, PowerQuantError) and issubclass(PowerQuantConfigError, ValueError)
    assert issubclass(PowerQuantUnsupportedError, PowerQuantError)
    assert issubclass(PowerQuantUnsupportedError, NotImplementedError)


@pytest.mark.parametrize("additional", [None, {}], ids=["none", "empty"])
def test_defaults(additional):
    config = PowerQuantConfig.from_sources({"PATH": "/usr/bin", "VLLM_PLUGINS": "x"}, additional)
    assert dataclasses.asdict(config) == DEFAULTS
    assert config == PowerQuantConfig()


def test_frozen_hashable_and_picklable():
    config = PowerQuantConfig(key_bits=8)
    assert {config: 1}[PowerQuantConfig(key_bits=8)] == 1
    assert hash(config) != hash(PowerQuantConfig())
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.key_bits = 2


@pytest.mark.parametrize("field, value", flatten(ACCEPTED))
def test_accepts_from_each_source(field, value):
    expected = PowerQuantConfig(**{field: value})
    env = {env_name(field): str(value)}
    assert PowerQuantConfig.from_sources(env) == expected
    assert PowerQuantConfig.from_sources({}, {field: value}) == expected
    assert PowerQuantConfig.from_sources(env, json.loads(json.dumps({field: value}))) == expected
    assert getattr(expected, field) == value


@pytest.mark.parametrize("field, value", flatten(REFUSED))
def test_refuses_from_each_source(field, value):
    allowed = next(o.allowed for o in options() if o.field == field)
    with pytest.raises(PowerQuantConfigError, match=f"^{field} must be .*, got {value!r}$"):
        PowerQuantConfig(**{field: value})
    message = refusal({env_name(field): str(value)})
    assert message.startswith(f"{env_name(field)} must be {allowed}") and message.endswith(f", got {value!r}")
    message = refusal({}, {field: value})
    assert message.startswith(f"{field} in --additional-config") and message.endswith(f", got {value!r}")


def test_bad_value_message():
    assert refusal({"POWERQUANT_VALUE_BITS": "banana"}) == "POWERQUANT_VALUE_BITS must be 2, 3, 4 or 8, got 'banana'"


@pytest.mark.parametrize("text", ["", " ", "4 ", " 4", "4.0", "+4", "0x4", "1_6", "\u0664", "four", "true", "9" * 5000])
def test_environment_takes_plain_integers_only(text):
    assert refusal({"POWERQUANT_KEY_BITS": text}).startswith("POWERQUANT_KEY_BITS must be 2, 3, 4 or 8, got ")


@pytest.mark.parametrize("value", ["4", "banana", True, False, 4.0, None, [4], {"bits": 4}], ids=repr)
def test_additional_takes_json_integers_only(value):
    message = refusal({}, {"key_bits": value})
    assert message.startswith("key_bits in --additional-config")
    assert "an integer, without quotes" in message and message.endswith(f", got {value!r}")


@pytest.mark.parametrize("value", ["4", True, 4.0, None], ids=repr)
def test_constructor_takes_integers_only(value):
    with pytest.raises(PowerQuantConfigError, match="^key_bits must be"):
        PowerQuantConfig(key_bits=value)


def test_bool_is_no_integer_where_one_is_allowed():
    refusal({}, {"protected_layers": True})
    refusal({}, {"residual_tokens": False})


@pytest.mark.parametrize("additional", [[("key_bits", 4)], "key_bits", 4, True], ids=repr)
def test_additional_must_be_an_object(additional):
    assert refusal({}, additional).startswith('"powerquant" in --additional-config must be an object')


def test_presets():
    assert PowerQuantConfig.from_sources({"POWERQUANT_PRESET": "quality"}) == PowerQuantConfig(value_bits=4)
    assert PowerQuantConfig.from_sources({}, {"preset": "max-context"}) == PowerQuantConfig(
        key_bits=3, value_codec="trellis"
    )
    assert PowerQuantConfig.from_sources({"POWERQUANT_PRESET": "balanced"}) == PowerQuantConfig()
    mixed = PowerQuantConfig.from_sources({"POWERQUANT_PRESET": "quality", "POWERQUANT_VALUE_BITS": "3"}, {"key_bits": 8})
    assert mixed == PowerQuantConfig(key_bits=8, value_bits=3)
    for values in PRESETS.values():
        PowerQuantConfig(**values)
    assert refusal({"POWERQUANT_PRESET": "best"}) == ("POWERQUANT_PRESET must be quality, balanced, max-context, got 'best'")
    assert refusal({}, {"preset": 4}).endswith("must be quality, balanced, max-context, got 4")
    assert "give one of them" in refusal({"POWERQUANT_PRESET": "quality"}, {"preset": "balanced"})


def test_sources_that_agree_pass():
    config = PowerQuantConfig.from_sources({"POWERQUANT_KEY_BITS": "3"}, {"key_bits": 3, "value_bits": 4})
    assert (config.key_bits, config.value_bits) == (3, 4)


def test_sources_that_disagree_are_both_named():
    message = refusal({"POWERQUANT_KEY_BITS": "4"}, {"key_bits": 3})
    assert "POWERQUANT_KEY_BITS is 4" in message
    assert "key_bits in --additional-config" in message and "is 3" in message


def test_disagreement_with_a_default_is_refused():
    refusal({"POWERQUANT_VALUE_BITS": "2"}, {"value_bits": 4})
    refusal({"POWERQUANT_VALUE_BITS": "4"}, {"value_bits": 2})


def test_wrong_type_in_one_source_is_reported_as_such():
    assert refusal({"POWERQUANT_KEY_BITS": "banana"}, {"key_bits": 4}).startswith("POWERQUANT_KEY_BITS must be")
    assert refusal({"POWERQUANT_KEY_BITS": "4"}, {"key_bits": "4"}).startswith("key_bits in --additional-config")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("POWERQUANT_KEYBITS", "POWERQUANT_KEY_BITS"),
        ("POWERQUANT_VALUE_BIT", "POWERQUANT_VALUE_BITS"),
        ("POWERQUANT_RESIDUAL_TOKEN", "POWERQUANT_RESIDUAL_TOKENS"),
        ("POWERQUANT_RESIDUAL_BLOCKSIZE", "POWERQUANT_RESIDUAL_BLOCK_SIZE"),
        ("POWERQUANT_SINKS_TOKENS", "POWERQUANT_SINK_TOKENS"),
        ("POWERQUANT_PROTECT_LAYERS", "POWERQUANT_PROTECTED_LAYERS"),
        ("POWERQUANT_key_bits", "POWERQUANT_KEY_BITS"),
        ("POWERQUANT_CACHEDIR", "POWERQUANT_CACHE_DIR"),
    ],
)
def test_unknown_variable_gets_a_suggestion(name, meant):
    message = refusal({name: "4"})
    assert message.startswith(f"unknown environment variable: {name} (did you mean {meant}?); known: ")
    assert all(env_name(field) in message for field in DEFAULTS)
    assert all(other in message for other in OTHER_ENV_NAMES)


@pytest.mark.parametrize(
    "key, meant", [("keybits", "key_bits"), ("key-bits", "key_bits"), ("POWERQUANT_KEY_BITS", "key_bits")]
)
def test_unknown_key_gets_a_suggestion(key, meant):
    message = refusal({}, {key: 4})
    assert f"{key} (did you mean {meant}?); known: {', '.join(DEFAULTS)}" in message


def test_all_unknown_names_are_listed_and_far_ones_get_no_suggestion():
    message = refusal({"POWERQUANT_ZZZ": "1", "POWERQUANT_KEYBITS": "4"})
    assert "POWERQUANT_KEYBITS (did you mean POWERQUANT_KEY_BITS?), POWERQUANT_ZZZ; known:" in message


def test_other_names_are_allowed_in_the_environment_only():
    assert PowerQuantConfig.from_sources(dict.fromkeys(OTHER_ENV_NAMES, "anything")) == PowerQuantConfig()
    refusal({}, {"cache_dir": "x"})


def test_sink_limit_follows_the_residual_block_size():
    env = {"POWERQUANT_SINK_TOKENS": "20"}
    assert refusal(env) == "POWERQUANT_SINK_TOKENS must be 0 to residual_block_size (16), got 20"
    assert PowerQuantConfig.from_sources(env, {"residual_block_size": 32}).sink_tokens == 20
    refusal({"POWERQUANT_SINK_TOKENS": "9", "POWERQUANT_RESIDUAL_BLOCK_SIZE": "8"})


def test_bad_limit_of_another_option_is_the_one_reported():
    assert refusal({}, {"residual_block_size": "16", "sink_tokens": 4}).startswith("residual_block_size in")


def test_sources_are_not_changed():
    env, additional = {"POWERQUANT_KEY_BITS": "3"}, {"key_bits": 3}
    PowerQuantConfig.from_sources(env, additional)
    assert (env, additional) == ({"POWERQUANT_KEY_BITS": "3"}, {"key_bits": 3})


def test_describe():
    assert dict(PowerQuantConfig(key_bits=8).describe()) == DEFAULTS | {"key_bits": 8}
    assert [name for name, _ in PowerQuantConfig().describe()] == list(DEFAULTS)


def test_text_options():
    path = "/some where/12.safetensors"
    assert PowerQuantConfig.from_sources({"POWERQUANT_CALIBRATION": path}).calibration == path
    assert PowerQuantConfig.from_sources({}, {"calibration": "12"}).calibration == "12"
    assert PowerQuantConfig.from_sources({"POWERQUANT_CALIBRATION": "12"}).calibration == "12"
    assert "calibration in --additional-config" in (message := refusal({}, {"calibration": 12}))
    assert message.endswith("must be a file (text), got 12")
    assert "give one of them" in refusal({"POWERQUANT_CALIBRATION": "a"}, {"calibration": "b"})


def test_a_trellis_is_for_two_bits():
    message = refusal({"POWERQUANT_VALUE_CODEC": "trellis", "POWERQUANT_VALUE_BITS": "4"})
    assert message == "POWERQUANT_VALUE_CODEC trellis is for values of 2 bits, but value_bits is 4; leave one out"
    assert "value_bits is 4 by the preset quality" in refusal({"POWERQUANT_PRESET": "quality"}, {"value_codec": "trellis"})
    assert PowerQuantConfig.from_sources({"POWERQUANT_PRESET": "quality"}, {"value_codec": "scalar"}).value_bits == 4


def test_options_list_every_field():
    rows = list(options())
    assert {row.field: row.default for row in rows} == DEFAULTS
    assert [row.env for row in rows] == [env_name(field) for field in DEFAULTS]
    assert all(row.allowed and row.help for row in rows)


def test_module_prints_the_table():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vllm_powerquant.config"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == options_markdown() + "\n"
    assert len(done.stdout.splitlines()) == 2 + len(DEFAULTS)
    assert "| `sink_tokens` | `POWERQUANT_SINK_TOKENS` | 4 | 0 to residual_block_size |" in done.stdout
    assert "| `calibration` | `POWERQUANT_CALIBRATION` | none | a file |" in done.stdout


def test_import_reads_no_environment():
    code = (
        "import os, sys; os.environ['POWERQUANT_KEY_BITS'] = 'banana'; import vllm_powerquant.config as c; "
        "assert c.PowerQuantConfig().key_bits == 4; assert not {'torch', 'vllm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
