"""Answers from vLLM with the attention backend POWERQUANT, all requests of a batch at once."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from ..calibration import first_line
from ..errors import PowerQuantConfigError, PowerQuantEngineError, PowerQuantError
from ..plugin import NAME, register
from ..sparse.protocols import Prompt
from .chat import render
from .choose import Settings
from .result import GenerationResult, Stopwatch
from .sampling import Sampling

try:
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMError
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError
except ImportError as error:
    raise PowerQuantError(
        f"backend vllm: {error}; run: pip install 'vllm-powerquant[cuda]' (NVIDIA GPU) or 'vllm-powerquant[cpu]'"
    ) from None

# between two looks at whether vLLM's engine process lives
_WATCH_SECONDS = 0.5


class VllmBackend:
    """vLLM's engine. Its pages are allocated once for all requests: what one answer holds of them is not told."""

    def __init__(self, settings: Settings) -> None:
        """Raises: PowerQuantError, with vLLM's words, if it does not start"""
        self.settings = settings
        options: dict[str, Any] = dict(settings.options)
        if settings.compress:
            register()
            options |= {"attention_backend": NAME, "additional_config": {"powerquant": settings.given}}
        if settings.load_in_4bit:
            options["quantization"] = "bitsandbytes"
        try:
            self.llm = LLM(settings.source.path, dtype=settings.dtype, **options)
        except PowerQuantError:
            raise
        except (VLLMError, ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            raise PowerQuantError(f"vLLM did not start: {first_line(error)}") from error
        self._engine = self.llm.llm_engine
        self._numbers = itertools.count()
        # by request: what the engine said of it that was not read yet
        self._outputs: dict[str, deque] = {}
        self._stepping = threading.Lock()
        _wake_when_dead(self._engine.engine_core)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, GenerationResult]:
        clock = Stopwatch()
        number = self._submit(prompt, sampling)
        text, count, output, reason = [], 0, None, None
        try:
            while reason is None:
                output = self._next(number)
                (part,) = output.outputs
                if part.token_ids:
                    clock.token()
                count += len(part.token_ids)
                reason = part.finish_reason
                if part.text:
                    text.append(part.text)
                    yield from clock.handing_over(part.text)
        finally:
            self._forget(number)
        return self._result(clock, "".join(text), count, output, reason)

    def batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GenerationResult]:
        # every request is handed in before the first step
        numbers, clocks = [], []
        try:
            for prompt in prompts:
                clocks.append(Stopwatch())
                numbers.append(self._submit(prompt, sampling))
            results: list[GenerationResult | None] = [None] * len(prompts)
            texts: list[list[str]] = [[] for _ in prompts]
            counts = [0] * len(prompts)
            while waiting := [i for i, result in enumerate(results) if result is None]:
                for i in waiting:
                    for output in self._drain(numbers[i]):
                        (part,) = output.outputs
                        if part.token_ids:
                            clocks[i].token()
                        counts[i] += len(part.token_ids)
                        texts[i].append(part.text)
                        if part.finish_reason is not None:
                            results[i] = self._result(clocks[i], "".join(texts[i]), counts[i], output, part.finish_reason)
                if any(result is None for result in results):
                    self._step()
            return results
        finally:
            for number in numbers:
                self._forget(number)

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        self.llm = self._engine = None

    def _submit(self, prompt: Prompt, sampling: Sampling) -> str:
        tokenizer = self.llm.get_tokenizer()
        if prompt.messages is not None:
            text = render(tokenizer, prompt.messages, prompt.add_generation_prompt, self.settings.source.name)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        elif prompt.token_ids is not None:
            ids = list(prompt.token_ids)
        else:
            ids = tokenizer(prompt.text, add_special_tokens=prompt.special_tokens)["input_ids"]
        if not ids:
            raise PowerQuantConfigError("the prompt is empty; give at least one token")
        params = SamplingParams(**sampling.as_vllm(), output_kind=RequestOutputKind.DELTA)
        number = f"powerquant-{next(self._numbers)}"
        with self._stepping:
            try:
                self._engine.add_request(number, {"prompt_token_ids": ids}, params)
            except (VLLMError, ValueError) as error:
                raise PowerQuantConfigError(f"vLLM refuses the request: {first_line(error)}") from None
            self._outputs[number] = deque()
        return number

    def _step(self) -> None:
        with self._stepping:
            try:
                outputs = self._engine.step()
            except EngineDeadError as error:
                self._outputs.clear()
                raise PowerQuantEngineError(
                    f"vLLM's engine died, its log says why; make another Engine ({first_line(error)})"
                ) from error
            for output in outputs:
                if output.request_id in self._outputs:
                    self._outputs[output.request_id].append(output)

    def _next(self, number: str) -> Any:
        while not self._outputs[number]:
            self._step()
        return self._outputs[number].popleft()

    def _drain(self, number: str) -> list[Any]:
        outputs = list(self._outputs[number])
        self._outputs[number].clear()
        return outputs

    def _forget(self, number: str) -> None:
        """Also ends it where it is not finished."""
        with self._stepping:
            if self._outputs.pop(number, None) is not None and self._engine is not None:
                self._engine.abort_request([number])

    def _result(self, clock: Stopwatch, text: str, count: int, output: Any, reason: str) -> GenerationResult:
        seconds = clock.seconds
        return GenerationResult(
            text=text,
            backend="vllm",
            model=self.settings.source.name,
            finish_reason=reason,
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.num_cached_tokens,
            completion_tokens=count,
            seconds=seconds,
            seconds_to_first_token=clock.first or seconds,
            attention="fused" if self.settings.compress else "exact",
        )


def _wake_when_dead(core: Any) -> None:
    """Have a step end with EngineDeadError when vLLM's engine process is gone.

    vLLM 0.32's synchronous client notices that (resources.engine_dead) but leaves whoever waits for an answer waiting.
    """
    if not hasattr(core, "outputs_queue") or not hasattr(core, "resources"):
        return  # the engine runs in this process
    seen = weakref.ref(core)

    def watch() -> None:
        while (client := seen()) is not None:
            if client.resources.engine_dead:
                client.outputs_queue.put_nowait(EngineDeadError())
                return
            del client
            time.sleep(_WATCH_SECONDS)

    threading.Thread(target=watch, name="vLLM engine watch", daemon=True).start()
