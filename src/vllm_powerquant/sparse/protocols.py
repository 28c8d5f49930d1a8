"""What servers are asked and what they answer: OpenAI's protocol, and /completion of upstream PowerInfer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError
from .http import Http, ServerError
from .outputs import Answer, Choice, Logprob, SamplingParams

_TOKEN_ID = "token_id:"
_numbers = itertools.count()


@dataclass(frozen=True)
class Prompt:
    """One of: text, token ids, messages."""

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[Mapping[str, Any]] | None = None
    special_tokens: bool = True  # whether the tokenizer adds those that begin a text
    add_generation_prompt: bool = True

    @classmethod
    def of(cls, value: Any) -> Prompt:
        """From text, token ids, or vLLM's {"prompt": ...} and {"prompt_token_ids": ...}. Raises PowerQuantConfigError."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise PowerQuantConfigError(
                    f"a prompt must be text that UTF-8 can hold, got {error.object!r:.200}"
                ) from None
            return cls(text=value)
        if isinstance(value, Mapping) and set(value) <= {"prompt", "prompt_token_ids"} and value:
            return cls.of(value["prompt_token_ids"] if "prompt_token_ids" in value else value["prompt"])
        if is_token_ids(value):
            return cls(token_ids=list(value))
        raise PowerQuantConfigError(f"a prompt must be text or a list of token ids that is not empty, got {value!r:.200}")


def is_token_ids(value: Any) -> bool:
    """Whether this is one prompt's token ids: not empty, not bytes, no truth values among them."""
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray) or not value:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


class ServerProtocol(Protocol):
    """What the executor asks of a server. Raises (all methods): ServerError, ConnectionLost, PowerQuantUnsupportedError"""

    parallel: int  # requests that it works on at once

    def answer(self, http: Http, prompt: Prompt, params: SamplingParams) -> Answer: ...

    def parts(self, http: Http, prompt: Prompt, params: SamplingParams) -> Iterator[Answer]:
        """The answer as it comes: each one is what is new."""
        ...


class OpenAI:
    """POST /v1/completions and /v1/chat/completions.

    This project's engine and vLLM also return token ids (`return_token_ids`, `return_tokens_as_token_ids`); from other
    servers outputs have no token ids, and logprobs, which are by token id, are refused.
    """

    def __init__(self, model: str, owner: str, parallel: int, context: int | None):
        self.model = model
        self.with_ids = owner in ("powerinfer", "vllm")
        self.parallel = parallel
        # null would be 16 to this project's engine, which cuts what is more than its context; vLLM takes null for the most
        self.most_tokens = context if owner == "powerinfer" else None

    @classmethod
    def find(cls, http: Http, model: str | None, parallel: int) -> OpenAI:
        """Asks /v1/models. Raises PowerQuantConfigError if it has no such model."""
        try:
            data = json.loads(http.get("/v1/models"))["data"]
            models = {entry["id"]: entry for entry in data}
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                502, f"{http.address.url}/v1/models is not a list of models: is this an OpenAI server?"
            ) from error
        if model is None and len(models) == 1:
            model = next(iter(models))
        if model not in models:
            raise PowerQuantConfigError(f"model must be one of the server's: {', '.join(models)}; got {model!r}")
        entry = models[model]
        return cls(model, entry.get("owned_by", ""), parallel, entry.get("max_model_len"))

    def answer(self, http: Http, prompt: Prompt, params: SamplingParams) -> Answer:
        path, body = self._request(prompt, params)
        value = http.post(path, body)
        answer = self._part(value, prompt.messages is not None, params.logprobs or 0)
        answer.prompt = prompt.text
        return answer

    def parts(self, http: Http, prompt: Prompt, params: SamplingParams) -> Iterator[Answer]:
        path, body = self._request(prompt, params)
        for event in http.events(path, {**body, "stream": True}):
            if event.get("choices"):
                yield self._part(event, prompt.messages is not None, params.logprobs or 0)

    def _request(self, prompt: Prompt, params: SamplingParams) -> tuple[str, dict[str, Any]]:
        chat = prompt.messages is not None
        body: dict[str, Any] = {"model": self.model, "temperature": params.temperature, **params.changed()}
        logprobs = body.pop("logprobs", None)
        body["max_tokens"] = params.max_tokens if params.max_tokens is not None else self.most_tokens
        if params.logprobs is not None and not self.with_ids:
            raise PowerQuantUnsupportedError(
                "logprobs are by token id, which this server does not return; this project's engine and vLLM do"
            )
        if self.with_ids:
            body["return_token_ids"] = True
        if params.logprobs is not None:
            body["return_tokens_as_token_ids"] = True
            body |= {"logprobs": True, "top_logprobs": logprobs or 0} if chat else {"logprobs": params.logprobs}
        if chat:
            body["messages"] = [dict(message) for message in prompt.messages]
            if not prompt.add_generation_prompt:
                body["add_generation_prompt"] = False
            return "/v1/chat/completions", body
        body["prompt"] = prompt.text if prompt.token_ids is None else prompt.token_ids
        if not prompt.special_tokens:
            body["add_special_tokens"] = False
        return "/v1/completions", body

    @staticmethod
    def _part(value: Mapping[str, Any], chat: bool, count: int) -> Answer:
        """Of a whole response or of one chunk; `count`: alternatives that were asked for."""
        answer = Answer(request_id=str(value.get("id", "")), prompt_token_ids=value.get("prompt_token_ids"))
        for choice in value.get("choices", ()):
            if chat:
                message = choice.get("delta") or choice.get("message") or {}
                text = message.get("content") or ""
                rows = _chat_logprobs(choice.get("logprobs"), count)
            else:
                text = choice.get("text") or ""
                rows = _logprobs(choice.get("logprobs"), count)
                answer.prompt_token_ids = choice.get("prompt_token_ids") or answer.prompt_token_ids
            part = Choice(
                text=text,
                token_ids=list(choice.get("token_ids") or ()),
                finish_reason=choice.get("finish_reason"),
                stop_reason=choice.get("stop_reason"),
            )
            if rows is not None:
                part.logprobs = [row for row, _ in rows]
                part.cumulative_logprob = sum(sampled for _, sampled in rows)
            answer.choices[choice.get("index", 0)] = part
        return answer


_Row = tuple[dict[int, Logprob], float]  # of one position; the sampled token's


def _logprobs(value: Mapping[str, Any] | None, count: int) -> list[_Row] | None:
    if not value:
        return None
    rows = []
    tops = value.get("top_logprobs") or itertools.repeat({})
    for token, logprob, top in zip(value["tokens"], value["token_logprobs"], tops, strict=False):
        rows.append(_row(_number(token), logprob, {_number(name): x for name, x in (top or {}).items()}, count))
    return rows


def _chat_logprobs(value: Mapping[str, Any] | None, count: int) -> list[_Row] | None:
    if not value:
        return None
    rows = []
    for entry in value.get("content") or ():
        top = {_number(item["token"]): item["logprob"] for item in entry.get("top_logprobs") or ()}
        rows.append(_row(_number(entry["token"]), entry["logprob"], top, count))
    return rows


def _row(token: int, logprob: float | None, top: dict[int, float | None], count: int) -> _Row:
    # null: minus infinity, which JSON lacks
    values = {number: float("-inf") if x is None else x for number, x in {token: logprob, **top}.items()}
    likeliest = sorted(values, key=lambda number: -values[number])
    # the sampled token may stand behind the `count` likeliest without being the next one
    ranks = {number: rank for rank, number in enumerate(likeliest, 1) if rank <= count}
    return {number: Logprob(x, ranks.get(number)) for number, x in values.items()}, values[token]


def _number(token: str) -> int:
    if not token.startswith(_TOKEN_ID):
        raise ServerError(502, f"the server names the token {token!r} where its id was asked for")
    return int(token.removeprefix(_TOKEN_ID))


class PowerInfer:
    """POST /completion of upstream PowerInfer (and of llama.cpp's server of its time).

    Refused, because the protocol has no place for it: several answers (n), logprobs, min_p, min_tokens, stop_token_ids,
    bad_words, special tokens in the text, stop strings in the text. Messages become text before they come here. One request
    at a time: its batching of several gives wrong text.
    """

    parallel = 1
    # our name -> theirs
    _NAMES = {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "presence_penalty": "presence_penalty",
        "frequency_penalty": "frequency_penalty",
        "repetition_penalty": "repeat_penalty",
        "ignore_eos": "ignore_eos",
    }

    def answer(self, http: Http, prompt: Prompt, params: SamplingParams) -> Answer:
        answer = self._part(http.post("/completion", self._body(prompt, params)))
        answer.request_id = f"completion-{next(_numbers)}"
        answer.prompt = prompt.text
        return answer

    def parts(self, http: Http, prompt: Prompt, params: SamplingParams) -> Iterator[Answer]:
        number = f"completion-{next(_numbers)}"
        for event in http.events("/completion", {**self._body(prompt, params), "stream": True}):
            part = self._part(event)
            part.request_id = number
            yield part
            if event.get("stop"):
                return

    def _body(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        if prompt.messages is not None:
            raise PowerQuantUnsupportedError(
                "PowerInfer's server has no chat endpoint; with SparseEngine(chat_template=...) messages are rendered here"
            )
        mapped = {*self._NAMES, "seed", "stop", "max_tokens", "logit_bias"}
        refused = sorted(set(params.changed()) - mapped)
        if refused:
            raise PowerQuantUnsupportedError(
                f"PowerInfer's /completion has no counterpart of {', '.join(refused)}; leave it out"
            )
        # all of them: its defaults are others
        body: dict[str, Any] = {theirs: getattr(params, ours) for ours, theirs in self._NAMES.items()}
        body["prompt"] = prompt.text if prompt.token_ids is None else prompt.token_ids
        body["n_predict"] = -1 if params.max_tokens is None else params.max_tokens
        body["repeat_last_n"] = -1  # penalties over the whole text, as everywhere else
        body["seed"] = -1 if params.seed is None else params.seed
        body["stream"] = False
        if params.stop:
            body["stop"] = [params.stop] if isinstance(params.stop, str) else list(params.stop)
        if params.logit_bias:
            body["logit_bias"] = [[int(token), value] for token, value in params.logit_bias.items()]
        return body

    @staticmethod
    def _part(value: Mapping[str, Any]) -> Answer:
        choice = Choice(text=str(value.get("content", "")))
        if value.get("stop"):
            if value.get("stopped_word"):
                choice.finish_reason, choice.stop_reason = "stop", value.get("stopping_word") or None
            elif value.get("stopped_eos"):
                choice.finish_reason = "stop"
            else:
                choice.finish_reason = "length"
        return Answer(choices={0: choice})
