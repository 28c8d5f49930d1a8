"""What a generation gives: its text, and what was measured of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """An answer and its figures; None is what the backend does not tell, nothing is estimated.

    Bytes are of this answer's own cache at its end. `kv_bytes` is everything that it holds: packed slots, exact rows,
    tables and buffers.
    """

    text: str
    backend: str  # transformers, vllm, sparse
    model: str
    finish_reason: str  # stop: the model's end or a stop text; length: max_tokens or the context
    prompt_tokens: int | None
    cached_tokens: int | None = None  # of the prompt, which an earlier answer had left in the cache
    completion_tokens: int
    seconds: float  # from handing in the prompt to the last token
    seconds_to_first_token: float
    kv_bytes: int | None = None
    uncompressed_kv_bytes: int | None = None  # of the same tokens in the model's own type
    tokens_compressed: int | None = None  # read from packed slots
    tokens_exact: int | None = None  # read in the model's own type: window, sinks
    attention: str | None = None  # fused: on packed slots; dequantized: on a buffer of decoded ones; exact: uncompressed
    gpu_memory_before: int | None = None  # bytes that PyTorch holds, the weights among them; None without a GPU
    gpu_memory_peak: int | None = None
    gpu_memory_after: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first one; None for fewer than two."""
        seconds = self.seconds - self.seconds_to_first_token
        return (self.completion_tokens - 1) / seconds if self.completion_tokens > 1 and seconds > 0 else None

    @property
    def compression_ratio(self) -> float | None:
        """Uncompressed bytes over bytes held."""
        return self.uncompressed_kv_bytes / self.kv_bytes if self.kv_bytes and self.uncompressed_kv_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; with tokens_per_second and compression_ratio."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second, "compression_ratio": self.compression_ratio}

    def summary(self) -> str:
        """One line."""
        rate = f", {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        first = f"first after {self.seconds_to_first_token:.2f} s"
        line = f"{self.completion_tokens} tokens in {self.seconds:.2f} s ({first}{rate})"
        if self.compression_ratio:
            line += f"; KV cache {megabytes(self.kv_bytes)}, {beside(self.compression_ratio)}"
        return line

    def rows(self) -> list[tuple[str, str]]:
        """(what, figure) of a report, those that the backend tells."""
        count, cached = self.prompt_tokens, f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        rows = [
            ("model", f"{self.model}, backend {self.backend}"),
            (
                "tokens",
                f"{'' if count is None else f'{count} of the prompt{cached}, '}{self.completion_tokens} of the answer",
            ),
            ("ended by", {"stop": "the model or a stop text", "length": "its length"}.get(self.finish_reason, "")),
            ("first token", f"{self.seconds_to_first_token:.3f} s"),
            ("decoding", f"{self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""),
            ("in all", f"{self.seconds:.3f} s"),
        ]
        if self.kv_bytes is not None:
            ratio = self.compression_ratio
            words = f", {beside(ratio)}" if ratio else ""
            words += f" ({megabytes(self.uncompressed_kv_bytes)})" if ratio and ratio != 1 else ""
            rows.append(("KV cache", f"{megabytes(self.kv_bytes)}{words}"))
        if self.tokens_compressed is not None:
            rows.append(("tokens in it", f"{self.tokens_compressed} compressed, {self.tokens_exact} exact"))
        rows.append(("attention", self.attention or ""))
        if self.gpu_memory_peak is not None:
            before, peak, after = map(megabytes, (self.gpu_memory_before, self.gpu_memory_peak, self.gpu_memory_after))
            rows.append(("GPU memory", f"{before} before, {peak} at its peak, {after} after"))
        return [(name, figure) for name, figure in rows if figure]

    def print_report(self, file: TextIO | None = None) -> None:
        """The figures, a line each, to a file (None: stdout)."""
        for name, figure in self.rows():
            print(f"{name + ':':<14}{figure}", file=file or sys.stdout)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def beside(ratio: float) -> str:
    """Bytes held, in words; ratio: uncompressed bytes over them."""
    if ratio == 1:
        return "uncompressed"
    # what a short answer's exact rows and tables take may be more than what is saved
    return f"{ratio:.2f} times less than uncompressed" if ratio > 1 else f"{1 / ratio:.2f} times as much as uncompressed"


class TextStream(Iterator[str]):
    """Pieces of an answer as they come; `result` holds the whole once they have all been taken.

    The pieces add up to `result.text`. Leaving early (`close`, or dropping the object) gives the rest up.
    """

    def __init__(self, pieces: Generator[str, None, GenerationResult]) -> None:
        self._pieces = pieces
        self.result: GenerationResult | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.result = end.value
            raise StopIteration from None

    def close(self) -> None:
        self._pieces.close()

    def finish(self) -> GenerationResult:
        """Take what is left, and the result."""
        for _ in self:
            pass
        return self.result


class Stopwatch:
    """Seconds that a backend worked, without those in which whoever reads its pieces was at work."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.first: float | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def token(self) -> None:
        """The first call notes the time to the first token."""
        if self.first is None:
            self.first = self.seconds

    def handing_over(self, piece: str) -> Iterator[str]:
        """For `yield from`: the piece, with the clock stopped meanwhile."""
        stopped = time.perf_counter()
        yield piece
        self._begin += time.perf_counter() - stopped
