"""Options of the compressed KV cache: names, environment variables, defaults and validation.

`python -m vllm_powerquant.config` prints them as a markdown table. Standard library only; the environment is
an argument, never read here.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm_powerquant.errors import PowerQuantConfigError

ENV_PREFIX = "POWERQUANT_"

# Names with our prefix that are read elsewhere; they are no options of the cache.
OTHER_ENV_NAMES = ("POWERQUANT_CACHE_DIR", "POWERQUANT_ENGINE", "POWERQUANT_MODEL_GGUF")

# Options that a preset sets where neither source gives them; the measured cost of each stands in docs/serving.md.
PRESET, PRESET_ENV, DEFAULT_PRESET = "preset", "POWERQUANT_PRESET", "balanced"
PRESETS = {"quality": {"value_bits": 4}, DEFAULT_PRESET: {}, "max-context": {"key_bits": 3, "value_codec": "trellis"}}

# Where `additional` of PowerQuantConfig.from_sources comes from, for messages.
ADDITIONAL_CONFIG = "--additional-config '{\"powerquant\": {...}}'"


@dataclass(frozen=True)
class OneOf:
    """Accepts the listed integers."""

    values: tuple[int, ...]

    def accepts(self, value: int, values: Mapping[str, int]) -> bool:
        return value in self.values

    def text(self, values: Mapping[str, int] | None = None) -> str:
        *head, last = map(str, self.values)
        return f"{', '.join(head)} or {last}"


@dataclass(frozen=True)
class Between:
    """Accepts integers from `low` to `high`, both included; `high` may name an option; None: no limit."""

    low: int
    high: int | str | None = None

    def accepts(self, value: int, values: Mapping[str, int]) -> bool:
        high = values[self.high] if isinstance(self.high, str) else self.high
        return self.low <= value and (high is None or value <= high)

    def text(self, values: Mapping[str, int] | None = None) -> str:
        if self.high is None:
            return f"{self.low} or more"
        if isinstance(self.high, str) and values is not None:
            return f"{self.low} to {self.high} ({values[self.high]})"
        return f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Choice:
    """Accepts the listed names."""

    values: tuple[str, ...]

    def accepts(self, value: str, values: Mapping[str, int]) -> bool:
        return value in self.values

    def text(self, values: Mapping[str, int] | None = None) -> str:
        *head, last = self.values
        return f"{', '.join(head)} or {last}"


@dataclass(frozen=True)
class Text:
    """Accepts any text; what it means is checked where it is used."""

    what: str

    def accepts(self, value: str, values: Mapping[str, int]) -> bool:
        return True

    def text(self, values: Mapping[str, int] | None = None) -> str:
        return self.what


def _option(default: int | str, env: str, allowed: OneOf | Between | Choice | Text, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"env": env, "allowed": allowed, "help": help})


@dataclass(frozen=True, kw_only=True)
class PowerQuantConfig:
    """Every option of the compressed KV cache; each is an integer or text, checked on construction.

    Raises: PowerQuantConfigError if a value is of the wrong type or outside what the option allows.
    """

    key_bits: int = _option(4, "POWERQUANT_KEY_BITS", OneOf((2, 3, 4, 8)), "bits of one key coordinate")
    value_bits: int = _option(2, "POWERQUANT_VALUE_BITS", OneOf((2, 3, 4, 8)), "bits of one value coordinate")
    value_codec: str = _option(
        "scalar",
        "POWERQUANT_VALUE_CODEC",
        Choice(("scalar", "trellis")),
        "how 2-bit values are coded (other widths: scalar); `trellis` has a fifth less error in the same bytes",
    )
    residual_tokens: int = _option(
        128,
        "POWERQUANT_RESIDUAL_TOKENS",
        Between(0, 4096),
        "newest tokens of a request also kept in 16 bits; 0 switches this off",
    )
    residual_block_size: int = _option(
        16,
        "POWERQUANT_RESIDUAL_BLOCK_SIZE",
        OneOf((8, 16, 32, 64)),
        "tokens of one 16-bit block; 16 fits the memory of a packed block best",
    )
    sink_tokens: int = _option(
        4,
        "POWERQUANT_SINK_TOKENS",
        Between(0, "residual_block_size"),
        "first tokens of a request also kept in 16 bits; 0 switches this off",
    )
    protected_layers: int = _option(
        0, "POWERQUANT_PROTECTED_LAYERS", Between(0), "first N and last N layers kept in the model's own type"
    )
    calibration: str = _option(
        "",
        "POWERQUANT_CALIBRATION",
        Text("a file"),
        "what `powerquant calibrate` wrote for this model: keys are packed centred and scaled by it",
    )

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        _check(values, names={name: name for name in values})

    @classmethod
    def from_sources(cls, environ: Mapping[str, str], additional: Mapping[str, Any] | None = None) -> Self:
        """Options from the environment and from vLLM's additional config; what neither gives has its default.

        Args:
            environ: environment variables, e.g. `os.environ`; names without our prefix are ignored.
            additional: the "powerquant" object of `--additional-config`, keyed by field name; numbers are JSON
                integers (a quoted one is refused).
        Raises: PowerQuantConfigError for an unknown name, a bad value, or two sources that disagree.
        """
        if additional is None:
            additional = {}
        if not isinstance(additional, Mapping):
            raise PowerQuantConfigError(
                f'"powerquant" in --additional-config must be an object such as {{"key_bits": 4}}, got {additional!r}'
            )
        table = {option.field: option for option in options()}
        env_names = [option.env for option in table.values()]
        refuse_unknown(
            (name for name in environ if name.startswith(ENV_PREFIX)),
            known=[*env_names, PRESET_ENV, *OTHER_ENV_NAMES],
            what="environment variable",
        )
        refuse_unknown(additional, known=[*table, PRESET], what=f"option in {ADDITIONAL_CONFIG}")

        preset, name = _given(PRESET, PRESET_ENV, DEFAULT_PRESET, environ, additional)
        if not isinstance(preset, str) or preset not in PRESETS:
            raise PowerQuantConfigError(f"{name} must be {', '.join(PRESETS)}, got {preset!r}")
        values, names = {}, {}
        for field, option in table.items():
            default = PRESETS[preset].get(field, option.default)
            values[field], names[field] = _given(field, option.env, default, environ, additional)
        _check(values, names)
        explicit = names["value_codec"] != "value_codec"
        if explicit and values["value_codec"] == "trellis" and values["value_bits"] != 2:
            by = f" by the preset {preset}" if names["value_bits"] == "value_bits" else ""
            raise PowerQuantConfigError(
                f"{names['value_codec']} trellis is for values of 2 bits, but value_bits is {values['value_bits']}{by}; "
                "leave one out"
            )
        return cls(**values)

    def describe(self) -> list[tuple[str, int | str]]:
        """(field, value) of every option in order, for a log line."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


@dataclass(frozen=True)
class Option:
    """One row of the option table."""

    field: str
    env: str
    default: int | str
    allowed: str
    help: str


def options() -> Iterator[Option]:
    """Every option of PowerQuantConfig, in order."""
    for field in dataclasses.fields(PowerQuantConfig):
        yield Option(
            field=field.name,
            env=field.metadata["env"],
            default=field.default,
            allowed=field.metadata["allowed"].text(),
            help=field.metadata["help"],
        )


def options_markdown() -> str:
    """The option table of docs/serving.md."""
    rows = ["| Option | Environment variable | Default | Allowed | Meaning |", "|---|---|---|---|---|"]
    rows += [
        f"| `{o.field}` | `{o.env}` | {'none' if o.default == '' else o.default} | {o.allowed} | {o.help} |"
        for o in options()
    ]
    return "\n".join(rows)


def _given(
    field: str, env: str, default: int | str, environ: Mapping[str, str], additional: Mapping[str, Any]
) -> tuple[Any, str]:
    """(value, how the user spelled its name) from whichever source gives it. Raises if both do and differ."""
    given = []
    if env in environ:
        given.append((_parse(environ[env]) if isinstance(default, int) else environ[env], env))
    if field in additional:
        given.append((additional[field], f"{field} in {ADDITIONAL_CONFIG}"))
    # a value of the wrong type is reported as such, not as a disagreement
    wrong = [pair for pair in given if not _is_like(default, pair[0])]
    if len(given) == 2 and not wrong and given[0][0] != given[1][0]:
        (env_value, env_name), (additional_value, additional_name) = given
        raise PowerQuantConfigError(
            f"{env_name} is {env_value!r} but {additional_name} is {additional_value!r}; give one of them"
        )
    return (wrong or given or [(default, field)])[0]


def _parse(text: str) -> int | str:
    """The integer an environment variable spells, or the text itself, which `_check` then refuses."""
    # int() alone would also take '1_6', ' 4' and other scripts' digits
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _is_like(default: int | str, value: Any) -> bool:
    """Whether a value has an option's type; true and false are no integers."""
    return isinstance(value, type(default)) and not isinstance(value, bool)


def _check(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse a bad value; `names` says how the user spelled each field."""
    fields = dataclasses.fields(PowerQuantConfig)
    # types first: a limit may be another option's value
    for field in fields:
        value = values[field.name]
        if not _is_like(field.default, value):
            # the environment has only text, elsewhere a quoted number or true is a mistake of type
            kind = "an integer, without quotes" if isinstance(field.default, int) else "text"
            hint = "" if names[field.name] == field.metadata["env"] else f" ({kind})"
            raise PowerQuantConfigError(
                f"{names[field.name]} must be {field.metadata['allowed'].text()}{hint}, got {value!r}"
            )
    for field in fields:
        allowed = field.metadata["allowed"]
        if not allowed.accepts(values[field.name], values):
            raise PowerQuantConfigError(f"{names[field.name]} must be {allowed.text(values)}, got {values[field.name]!r}")


def refuse_unknown(given: Iterable[str], known: list[str], what: str) -> None:
    """Raises: PowerQuantConfigError that names what is not known, the closest known name, and all that are"""
    unknown = sorted(set(given) - set(known), key=str)
    if not unknown:
        return
    # compare without the prefix, which would make every name look alike
    plain = {_plain(name): name for name in known}
    found = []
    for name in unknown:
        close = difflib.get_close_matches(_plain(str(name)), plain, n=1)
        found.append(f"{name} (did you mean {plain[close[0]]}?)" if close else f"{name}")
    raise PowerQuantConfigError(f"unknown {what}: {', '.join(found)}; known: {', '.join(known)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").removeprefix(ENV_PREFIX.lower())


if __name__ == "__main__":
    print(options_markdown())
