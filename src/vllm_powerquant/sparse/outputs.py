"""What a request asks for and what it returns, under the names of vLLM's SamplingParams and RequestOutput."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """vLLM's fields that a server gets as they are; it refuses by name what it does not do. Defaults are vLLM's."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context holds
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] | None = None

    @classmethod
    def of(cls, params: Any) -> SamplingParams:
        """From None, a mapping, one of these or vLLM's object.

        Raises: PowerQuantConfigError for an unknown field, PowerQuantUnsupportedError for one of vLLM's that is set and has
                no counterpart in the OpenAI protocol
        """
        if params is None:
            return cls()
        if isinstance(params, cls):
            return params
        known = {entry.name for entry in fields(cls)}
        if isinstance(params, Mapping):
            unknown = sorted(map(str, set(params) - known))
            if unknown:
                raise PowerQuantConfigError(
                    f"unknown sampling parameter: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
                )
            return cls(**params)
        if not hasattr(params, "temperature"):
            raise PowerQuantConfigError(f"sampling_params must be a SamplingParams or a mapping, got {params!r}")
        for name, default in _other_fields(params, known).items():
            value = getattr(params, name)
            if value != default:
                raise PowerQuantUnsupportedError(f"sampling parameter {name} is not supported by the engine, got {value!r}")
        # vLLM turns None into empty lists
        return cls(**{name: getattr(params, name) for name in known if hasattr(params, name)})

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their default: servers refuse those they do not know."""
        given = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            empty = value is None or (isinstance(value, str | Sequence | Mapping) and not value)
            if value != entry.default and not empty:
                given[entry.name] = value
        if "logit_bias" in given:
            given["logit_bias"] = {str(token): value for token, value in given["logit_bias"].items()}
        for name in ("stop", "stop_token_ids", "bad_words"):
            if name in given and not isinstance(given[name], str):
                given[name] = list(given[name])
        return given


# of vLLM's object, without meaning for a request
_INTERNAL = {"output_kind", "skip_clone", "stream_interval", "output_text_buffer_length", "spaces_between_special_tokens"}


def _other_fields(params: Any, known: set[str]) -> dict[str, Any]:
    """Fields of vLLM's object that SamplingParams lacks, with their defaults."""
    names = getattr(type(params), "__struct_fields__", ())
    names = [name for name in names if name not in known | _INTERNAL and not name.startswith("_")]
    if not names:
        return {}
    defaults = type(params)()
    return {name: getattr(defaults, name) for name in names}


@dataclass(frozen=True)
class Logprob:
    """Of one token at one position; vLLM's fields."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One answer; vLLM's fields."""

    index: int
    text: str
    token_ids: Sequence[int]  # empty where the server returns none
    cumulative_logprob: float | None = None  # of the tokens, where logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # by position, by token
    finish_reason: str | None = None  # "stop", "length"
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers; vLLM's fields."""

    request_id: str
    prompt: str | None  # None for token ids and for messages that the server renders
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Any = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True)
class Types:
    """The classes of what is returned."""

    request: type = RequestOutput
    completion: type = CompletionOutput
    logprob: type = Logprob

    @classmethod
    def choose(cls, vllm: bool | None) -> Types:
        """vLLM's own classes (True), this module's (False), or vLLM's where the process has imported it (None).

        Importing vLLM takes seconds and loads torch, so it is never done for the classes alone.
        """
        if vllm is None:
            vllm = "vllm" in sys.modules
        if not vllm:
            return cls()
        try:
            from vllm.logprobs import Logprob
            from vllm.outputs import CompletionOutput, RequestOutput
        except ImportError as error:
            raise PowerQuantUnsupportedError(f"vLLM's classes cannot be imported: {error}; use vllm_types=False") from error
        return cls(RequestOutput, CompletionOutput, Logprob)


@dataclass
class Choice:
    """One answer while it comes in."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, part: Choice) -> None:
        self.text += part.text
        self.token_ids += part.token_ids
        if part.logprobs is not None:
            self.logprobs = (self.logprobs or []) + part.logprobs
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + (part.cumulative_logprob or 0.0)
        self.finish_reason = part.finish_reason or self.finish_reason
        self.stop_reason = part.stop_reason if part.stop_reason is not None else self.stop_reason


@dataclass
class Answer:
    """The answers to one prompt, or the new part of them."""

    request_id: str = ""
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    choices: dict[int, Choice] = field(default_factory=dict)

    def add(self, part: Answer) -> None:
        self.request_id = self.request_id or part.request_id
        if self.prompt_token_ids is None:
            self.prompt_token_ids = part.prompt_token_ids
        for index, choice in part.choices.items():
            self.choices.setdefault(index, Choice()).add(choice)

    def output(self, types: Types, finished: bool) -> Any:
        """As `types.request`; later changes of this object do not show in it."""
        outputs = []
        for index, choice in sorted(self.choices.items()):
            logprobs = None
            if choice.logprobs is not None:
                logprobs = [{token: types.logprob(**asdict(p)) for token, p in row.items()} for row in choice.logprobs]
            outputs.append(
                types.completion(
                    index=index,
                    text=choice.text,
                    token_ids=list(choice.token_ids),
                    cumulative_logprob=choice.cumulative_logprob,
                    logprobs=logprobs,
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
            )
        return types.request(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=None,
            outputs=outputs,
            finished=finished,
        )
