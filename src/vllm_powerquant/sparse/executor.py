"""Runs models on the sparse engine from Python: starts it, watches it, talks to it, stops it.

    with SparseEngine("model.gguf") as engine:
        for output in engine.generate(["Hello", "The sky is"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

The engine is a child process with an OpenAI server on a free port of this machine. `url=` names another server instead.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import PowerQuantConfigError, PowerQuantEngineError, PowerQuantError
from .build import Say, find_engine
from .chat_template import render
from .header import Header, read_header
from .http import Address, AnswerTimeout, ConnectionLost, Http, ServerError
from .outputs import Answer, SamplingParams, Types
from .process import EngineProcess
from .protocols import OpenAI, PowerInfer, Prompt, ServerProtocol

__all__ = ["SamplingParams", "SparseEngine"]

HOST = "127.0.0.1"
PROTOCOLS = ("openai", "powerinfer")
# how long a lost connection waits for the engine's end, which it most likely is
_DEATH_SECONDS = 5.0
_DRAIN_SECONDS = 5
# that an engine may take beyond its drain to give up what is left and to end
_END_SECONDS = 5
# requests under way at another server
_PARALLEL_ELSEWHERE = 16
# what the engine says of a template that it can't render
_NOT_RENDERED = "chat template is not rendered here"
# of a server that is there, to a question that needs no model
_FIRST_ANSWER_SECONDS = 30.0
_API_KEY_ENV = "POWERINFER_API_KEY"
_CLOSED = "this SparseEngine is closed"

Result = TypeVar("Result")


@dataclass
class _Run:
    """One life of the engine, or the server in its place."""

    address: Address
    protocol: ServerProtocol
    process: EngineProcess | None = None
    restart: bool = False  # it replaces one that died
    answered: bool = False


class SparseEngine:
    """A model served by the sparse engine, or by another server.

    It may be used from several threads. If the engine dies it is started again, once: a second death counts as the first one
    where a request was answered in between. Requests that the engine was working on are sent again, unless a part of their
    answer was handed out already: these raise PowerQuantEngineError with the engine's last lines.

    The engine ends with this object (`close`, leaving `with`, garbage collection), with this process, however it ends, and
    not with the thread that made it.

    Args:
        model: GGUF or PWRI file; with `url`, the model's name at the server (None: the only one it has)
        threads: None: one for each physical core
        slots: sequences computed at once
        context: tokens of one sequence, prompt and answer; None: the model's
        kv: keys and values as "f16" or "packed" (keys in 4, values in 2 bits)
        chat_template: in place of the model's own: Jinja text, rendered here, or the engine's name of one (chatml, llama2,
            llama3, vicuna, bamboo)
        api_key: what the engine asks of its clients, or what `url` asks for
        url: an OpenAI-compatible server to use instead of an engine of our own, like http://HOST:PORT
        protocol: of `url`: "openai", or "powerinfer" for upstream's /completion (see protocols.PowerInfer for its limits)
        start_timeout: seconds in which the engine must have loaded the model
        drain_seconds: time that `close` leaves the engine for what it is working on
        request_timeout: seconds for which the server may send nothing, without streaming those of a whole answer; None: any
        vllm_types: True: outputs are vLLM's classes; False: this package's of the same fields; None: vLLM's where it
            is imported already
        say: gets lines of progress while the engine is compiled
        options: other flags of the engine: dense=True is --dense, prompt_ffn="sparse" is --prompt-ffn sparse
    Raises:
        PowerQuantConfigError: an option or the model file is refused, in the engine's words
        PowerQuantEngineError: the engine can't be built or started, or the server can't be reached
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        threads: int | None = None,
        slots: int = 8,
        context: int | None = None,
        kv: str = "f16",
        chat_template: str | None = None,
        api_key: str | None = None,
        url: str | None = None,
        protocol: str = "openai",
        start_timeout: float = 600.0,
        drain_seconds: int = _DRAIN_SECONDS,
        request_timeout: float | None = None,
        vllm_types: bool | None = None,
        say: Say = None,
        **options: str | int | bool,
    ):
        # guards what follows, never held while a model is loaded
        self._changed = threading.Condition()
        self._run: _Run | None = None
        self._restarting = False
        self._closed = False
        self._vllm_types = vllm_types
        self._api_key = api_key
        self._request_timeout = request_timeout
        named = chat_template is not None and "{" not in chat_template
        self._chat_template = None if named else chat_template
        self._header: Header | None = None
        if type(drain_seconds) is not int or drain_seconds < 0:
            raise PowerQuantConfigError(f"drain_seconds must be an integer of 0 or more, got {drain_seconds!r}")
        if protocol not in PROTOCOLS:
            raise PowerQuantConfigError(f"protocol must be {' or '.join(PROTOCOLS)}, got {protocol!r}")
        if url is not None:
            given = {"threads": threads, "context": context, "chat_template": chat_template if named else None, **options}
            given = [name for name, value in given.items() if value is not None]
            if given or slots != 8 or kv != "f16" or drain_seconds != _DRAIN_SECONDS:
                raise PowerQuantConfigError(
                    f"an option of the engine is of no use with url: {', '.join(given) or 'slots, kv, drain_seconds'}"
                )
            self._run = self._connect(Address.parse(url), None if model is None else str(model), protocol)
            return
        if protocol != "openai":
            raise PowerQuantConfigError("protocol is for a server that url names; the engine speaks OpenAI's")
        if model is None:
            raise PowerQuantConfigError("name a model file, or a server by url")
        path = Path(model).expanduser()
        self._header = read_header(path)
        self._slots, self._start_timeout = slots, start_timeout
        self._server = find_engine(say)
        flags = {
            "slots": slots,
            "kv": kv,
            "threads": threads,
            "context": context,
            "chat_template": chat_template if named else None,
            "drain_seconds": drain_seconds,
            **options,
        }
        self._arguments = ["--model", str(path.absolute()), "--host", HOST, "--port", "0", *_flags(flags)]
        # also called when the interpreter ends
        self._processes: list[EngineProcess] = []
        self._finalizer = weakref.finalize(self, _stop, self._processes, drain_seconds + _END_SECONDS)
        self._run = self._start()

    @property
    def url(self) -> str:
        """Of the server, e.g. for openai.OpenAI(base_url=f"{url}/v1")."""
        return self._current().address.url

    @property
    def model_name(self) -> str | None:
        """The model's name at the server."""
        return getattr(self._current().protocol, "model", None)

    def generate(self, prompts: Any, sampling_params: Any = None) -> list[Any]:
        """Continue prompts, all at once as far as the engine's slots go.

        Args:
            prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of such
            sampling_params: SamplingParams, vLLM's, a mapping, or a list of one for each prompt
        Returns: RequestOutput by prompt, in order
        Raises:  PowerQuantConfigError for what the server refuses (status 4xx); PowerQuantUnsupportedError for parameters
                 without a counterpart; PowerQuantEngineError where the engine fails
        """
        single = isinstance(prompts, str | Mapping) or _is_token_ids(prompts)
        return self._batch([Prompt.of(prompt) for prompt in ([prompts] if single else prompts)], sampling_params)

    def chat(self, messages: Any, sampling_params: Any = None, *, add_generation_prompt: bool = True) -> list[Any]:
        """Answer conversations.

        Args:    messages: [{"role": ..., "content": ...}, ...], or a list of such lists
        Returns, raises: as generate. `prompt` is None where the server renders the messages.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        prompts = [self._chat_prompt(turns, add_generation_prompt) for turns in ([messages] if single else messages)]
        return self._batch(prompts, sampling_params)

    def stream(
        self, prompt: Any, sampling_params: Any = None, *, delta: bool = False, add_generation_prompt: bool = True
    ) -> Iterator[Any]:
        """Yield a RequestOutput for each part of an answer as it comes; the last one is `finished`.

        Args:    prompt: as for generate, or messages
                 delta: texts and token ids are what is new, not all so far
        Raises:  as generate. Leaving the loop early cancels the request.
        """
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            prompt = self._chat_prompt(prompt, add_generation_prompt)
        return self._stream(Prompt.of(prompt), SamplingParams.of(sampling_params), delta)

    def close(self) -> None:
        """Stop the engine, also one that is being started; what it is working on may take `drain_seconds` to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            run = self._run
        if run is not None and run.process is not None:
            self._finalizer()

    def __enter__(self) -> SparseEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # requests

    def _chat_prompt(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Prompt:
        if self._chat_template is not None:
            return self._rendered(self._chat_template, messages, add_generation_prompt)
        return Prompt(messages=list(messages), add_generation_prompt=add_generation_prompt)

    def _rendered(self, template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Prompt:
        # the template spells the tokens that begin a text
        text = render(template, messages, self._header, add_generation_prompt)
        return Prompt(text=text, special_tokens=self._header is None)

    def _rendered_here(self, prompt: Prompt, error: ServerError) -> Prompt | None:
        """The prompt as text where the engine does not render the model's template itself."""
        if prompt.messages is None or self._header is None or _NOT_RENDERED not in str(error):
            return None
        template = self._header.chat_template
        return self._rendered(template, prompt.messages, prompt.add_generation_prompt) if template else None

    def _batch(self, prompts: list[Prompt], sampling_params: Any) -> list[Any]:
        if isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str):
            if len(sampling_params) != len(prompts):
                raise PowerQuantConfigError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts")
            all_params = [SamplingParams.of(params) for params in sampling_params]
        else:
            all_params = [SamplingParams.of(sampling_params)] * len(prompts)
        if not prompts:
            return []
        types = Types.choose(self._vllm_types)
        calls = _Calls()
        parallel = self._current().protocol.parallel
        with ThreadPoolExecutor(min(parallel, len(prompts)), "powerinfer request") as pool:
            futures = [pool.submit(self._answer, *job, calls) for job in zip(prompts, all_params, strict=True)]
            try:
                # the first failure, whichever prompt's it is
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result().output(types, finished=True) for future in futures]
            except BaseException:
                # one failed, or Ctrl-C: the others' answers are for nobody
                calls.abort()
                pool.shutdown(cancel_futures=True)
                raise

    def _answer(self, prompt: Prompt, params: SamplingParams, calls: _Calls) -> Answer:
        def ask(run: _Run) -> Answer:
            http = calls.track(self._http(run.address))
            try:
                try:
                    return run.protocol.answer(http, prompt, params)
                except ServerError as error:
                    text = self._rendered_here(prompt, error)
                    if text is None:
                        raise
                    return run.protocol.answer(http, text, params)
            except ConnectionLost as error:
                if calls.aborted:
                    raise PowerQuantEngineError("the request was given up") from error
                raise

        return self._retrying(ask)

    def _stream(self, prompt: Prompt, params: SamplingParams, delta: bool) -> Iterator[Any]:
        types = Types.choose(self._vllm_types)
        whole = Answer(prompt=prompt.text)

        def begin(run: _Run) -> tuple[_Run, Iterator[Answer], Answer | None]:
            try:
                parts = run.protocol.parts(self._http(run.address), prompt, params)
                return run, parts, next(parts, None)
            except ServerError as error:
                text = self._rendered_here(prompt, error)
                if text is None:
                    raise
                whole.prompt = text.text
                parts = run.protocol.parts(self._http(run.address), text, params)
                return run, parts, next(parts, None)

        run, parts, part = self._retrying(begin)
        with contextlib.closing(parts):
            while part is not None:
                whole.add(part)
                if delta:
                    part.request_id, part.prompt, part.prompt_token_ids = (
                        whole.request_id,
                        whole.prompt,
                        whole.prompt_token_ids,
                    )
                finished = len(whole.choices) == params.n and all(c.finish_reason for c in whole.choices.values())
                yield (part if delta else whole).output(types, finished)
                try:
                    part = next(parts, None)
                except ServerError as error:
                    raise _named(error) from error
                except ConnectionLost as error:
                    self._died(run)
                    length = sum(len(choice.text) for choice in whole.choices.values())
                    raise self._explained(run, error, f" after {length} characters of the answer") from error

    def _retrying(self, ask: Callable[[_Run], Result]) -> Result:
        """What `ask` returns; asks again after a restart if the engine died meanwhile."""
        for attempt in (1, 2):
            run = self._current()
            try:
                result = ask(run)
            except ServerError as error:
                raise _named(error) from error
            except ConnectionLost as error:
                died = self._died(run)
                if attempt == 2 or not died:
                    raise self._explained(run, error) from error
                continue
            run.answered = True
            return result
        raise AssertionError("unreachable")

    # the server

    def _http(self, address: Address) -> Http:
        return Http(address, self._api_key, self._request_timeout)

    def _connect(self, address: Address, model: str | None, protocol: str) -> _Run:
        http = Http(address, self._api_key, _FIRST_ANSWER_SECONDS)
        try:
            if protocol == "openai":
                return _Run(address, OpenAI.find(http, model, _PARALLEL_ELSEWHERE))
            with contextlib.suppress(ServerError):
                http.get("/props")
            return _Run(address, PowerInfer())
        except (AnswerTimeout, ConnectionLost) as error:
            raise PowerQuantEngineError(f"no server can be reached: {error}") from error
        except ServerError as error:
            raise PowerQuantEngineError(f"{address.url}: {error}") from error

    def _start(self, restart: bool = False) -> _Run:
        """A new engine, listening and healthy."""
        environment = dict(os.environ)
        environment.pop(_API_KEY_ENV, None)
        if self._api_key:
            # not among the arguments, which every user of the machine can read
            environment[_API_KEY_ENV] = self._api_key
        process = EngineProcess(self._server, self._arguments, environment)
        with self._changed:
            if self._closed:
                raise PowerQuantEngineError(_CLOSED)
            self._processes[:] = [*(one for one in self._processes if one.alive), process]
        process.start(self._start_timeout)
        address = Address(HOST, process.port)
        http = Http(address, self._api_key, _FIRST_ANSWER_SECONDS)
        try:
            http.get("/health")
            # more than its slots, so that none is idle between two requests
            return _Run(address, OpenAI.find(http, None, self._slots + 2), process, restart)
        except (ServerError, AnswerTimeout, ConnectionLost) as error:
            died = process.wait(1)
            process.stop(0)
            raise PowerQuantEngineError(process.death_text() if died else f"the engine is not healthy: {error}") from error

    def _current(self) -> _Run:
        """The live engine; starts it again if it died. Other threads wait for that."""
        with self._changed:
            while True:
                if self._closed:
                    raise PowerQuantEngineError(_CLOSED)
                run = self._run
                if run.process is None or run.process.alive:
                    return run
                if os.getpid() != run.process.owner:
                    raise PowerQuantEngineError(
                        "the engine belongs to the process that started it: make another SparseEngine here"
                    )
                if run.restart and not run.answered:
                    raise PowerQuantEngineError(run.process.death_text("died again after it was restarted"))
                if not self._restarting:
                    break
                self._changed.wait()
            self._restarting = True
        try:
            self._run = self._start(restart=True)
        except PowerQuantError as error:
            if self._closed:
                raise PowerQuantEngineError(_CLOSED) from error
            raise
        finally:
            with self._changed:
                self._restarting = False
                self._changed.notify_all()
        return self._run

    def _died(self, run: _Run) -> bool:
        return run.process is not None and run.process.wait(_DEATH_SECONDS)

    def _explained(self, run: _Run, error: ConnectionLost, when: str = "") -> PowerQuantEngineError:
        if run.process is None or run.process.alive:
            return PowerQuantEngineError(f"the connection failed{when}: {error}")
        return PowerQuantEngineError(run.process.death_text(f"died{when}"))


class _Calls:
    """Requests that are given up together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._https: list[Http] = []
        self.aborted = False

    def track(self, http: Http) -> Http:
        with self._lock:
            if self.aborted:
                http.abort()
            self._https.append(http)
        return http

    def abort(self) -> None:
        with self._lock:
            self.aborted = True
            for http in self._https:
                http.abort()


def _stop(processes: list[EngineProcess], patience: float) -> None:
    for process in processes:
        process.stop(patience)


def _named(error: ServerError) -> Exception:
    """The kind of error for what a server said."""
    return PowerQuantConfigError(str(error)) if error.status in (400, 404, 405, 413, 415, 422) else error


def _flags(options: Mapping[str, Any]) -> list[str]:
    """--prompt-ffn sparse for prompt_ffn="sparse", --dense for dense=True; None and False are left out."""
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, int) for item in value)
