"""Answers from the sparse engine, a process of its own that reads GGUF and PWRI files."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from ..errors import PowerQuantEngineError, PowerQuantUnsupportedError
from ..sparse.executor import SparseEngine
from ..sparse.outputs import SamplingParams
from ..sparse.protocols import Prompt
from .choose import Settings
from .result import GenerationResult, Stopwatch
from .sampling import Sampling

_DEFAULT_SLOTS = 8
# what its packed cache is, the only one that it has
_PACKED = {
    "key_bits": 4,
    "value_bits": 2,
    "value_codec": "scalar",
    "residual_tokens": 128,
    "sink_tokens": 4,
    "protected_layers": 0,
    "calibration": "",
}


class SparseBackend:
    """An engine process. What its cache of one answer holds it does not tell."""

    def __init__(self, settings: Settings) -> None:
        """Raises: PowerQuantUnsupportedError for another cache than K4/V2 or f16; as SparseEngine"""
        self.settings = settings
        if settings.compress:
            values = {name: getattr(settings.cache, name) for name in _PACKED}
            if wrong := [f"{name} {value!r}" for name, value in values.items() if value != _PACKED[name]]:
                raise PowerQuantUnsupportedError(
                    "backend sparse packs keys in 4 and values in 2 bits beside 128 newest and 4 first exact tokens, "
                    f"nothing else, got {', '.join(wrong)}; leave it out, or give compress=False for 16 bits"
                )
        kv = "packed" if settings.compress else "f16"
        self.slots = settings.options.get("slots", _DEFAULT_SLOTS)
        self.engine = SparseEngine(settings.source.path, kv=kv, vllm_types=False, **settings.options)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, GenerationResult]:
        # it works on while its pieces are read, so the clock does not stop
        clock = Stopwatch()
        params = SamplingParams(**sampling.as_vllm())
        parts = self.engine.stream(prompt if prompt.messages is None else prompt.messages, params, delta=True)
        text, count, output, reason = [], 0, None, None
        try:
            for output in parts:
                (part,) = output.outputs
                if part.token_ids:
                    clock.token()
                count += len(part.token_ids)
                reason = part.finish_reason or reason
                if part.text:
                    text.append(part.text)
                    yield part.text
        finally:
            parts.close()
        seconds = clock.seconds
        ids = output.prompt_token_ids if output else None
        return GenerationResult(
            text="".join(text),
            backend="sparse",
            model=self.settings.source.name,
            finish_reason=reason or "length",
            prompt_tokens=None if ids is None else len(ids),
            cached_tokens=output.num_cached_tokens if output else None,
            completion_tokens=count,
            seconds=seconds,
            seconds_to_first_token=clock.first or seconds,
            attention="fused" if self.settings.compress else "exact",
        )

    def batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GenerationResult]:
        given_up = threading.Event()

        def answer(prompt: Prompt) -> Any:
            pieces = self.stream(prompt, sampling)
            while not given_up.is_set():
                try:
                    next(pieces)
                except StopIteration as end:
                    return end.value
            pieces.close()
            raise PowerQuantEngineError("the request was given up")

        if not prompts:
            return []
        # two more than its slots, so that none is idle between two requests
        with ThreadPoolExecutor(min(len(prompts), self.slots + 2), "sparse request") as pool:
            futures = [pool.submit(answer, prompt) for prompt in prompts]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                # one failed, or Ctrl-C: the others' answers are for nobody
                given_up.set()
                pool.shutdown(cancel_futures=True)
                raise

    def close(self) -> None:
        self.engine.close()
