"""Shared by the tests: error measures with their limits, and small batches over random pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels.cpu_kernels import BatchPlan, ExactBlocks

# Where the Triton kernels' tests put their tensors; without a GPU they run in Triton's interpreter (conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Kernel against the float64 reference on the same bytes. Fixed point (15 bits) leaves 1e-4 or so; fp16 outputs 2e-4,
# bf16 outputs 2e-3.
ARITHMETIC_LIMIT = {torch.float32: 4e-4, torch.float16: 6e-4, torch.bfloat16: 2.5e-3}


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of got - want over the RMS of want."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@dataclass
class Batch:
    """Requests with random contents in randomly placed pages; the context is not stored yet.

    Uncompressed buffers start as NaN and pages as 0xA5, so anything read before it is written shows.
    """

    format: CacheFormat
    contexts: list[int]
    queries: list[int]
    num_kv_heads: int
    group: int
    dtype: torch.dtype
    block_size: int = 128
    exact_block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        lengths = [c + q for c, q in zip(self.contexts, self.queries, strict=True)]
        per_request = -(-max(lengths) // self.block_size)
        exact_per_request = -(-max(lengths) // self.exact_block_size)
        heads, d = self.num_kv_heads, self.format.head_size
        blocks, exact_blocks = len(lengths) * per_request, len(lengths) * exact_per_request
        self.block_table = (torch.randperm(blocks, generator=g) + 1).view(-1, per_request).int()
        self.exact_table = (torch.randperm(exact_blocks, generator=g) + 1).view(-1, exact_per_request).int()
        self.cache = torch.full((blocks + 1, heads, self.block_size, self.format.layout.slot_bytes), 0xA5, dtype=torch.uint8)
        self.exact_cache = torch.full((exact_blocks + 1, heads, self.exact_block_size, 2 * d), torch.nan, dtype=self.dtype)
        self.keys = [torch.randn(n, heads, d, generator=g).to(self.dtype) for n in lengths]
        self.values = [torch.randn(n, heads, d, generator=g).to(self.dtype) for n in lengths]
        self.query = torch.randn(sum(self.queries), heads * self.group, d, generator=g).to(self.dtype)
        self.out = torch.full_like(self.query, torch.nan)

    def slots(self, request: int, exact: bool = False) -> torch.Tensor:
        """Slots of all tokens of a request in the packed or the exact pages: [context + queries] int64."""
        table, size = (self.exact_table, self.exact_block_size) if exact else (self.block_table, self.block_size)
        position = torch.arange(len(self.keys[request]))
        return table[request].long()[position // size] * size + position % size

    def exact_blocks(self, residual_tokens: int, sink_tokens: int) -> ExactBlocks:
        return ExactBlocks(self.exact_cache, residual_tokens, sink_tokens)

    def chunk(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The scheduled tokens of all requests: [sum(queries), num_kv_heads, head_size]."""
        return torch.cat([x[c:] for x, c in zip(tensors, self.contexts, strict=True)])

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan.of(torch.tensor([0, *self.queries]).cumsum(0), torch.tensor([len(x) for x in self.keys]))


def key_frame(num_kv_heads: int, head_size: int, seed: int = 3) -> torch.Tensor:
    """A frame [num_kv_heads, 3, head_size] whose every part shows: reference.in_frame."""
    g = torch.Generator().manual_seed(seed)
    centre = 2 * torch.randn(num_kv_heads, head_size, generator=g)
    scale = torch.randint(-1, 2, (num_kv_heads, head_size), generator=g).float().exp2()
    return torch.stack((centre, scale, 1 / scale), 1)


def expected(batch: Batch, exact: ExactBlocks | None = None, frame: torch.Tensor | None = None) -> torch.Tensor:
    """Each request's chunk by reference.attend in float64: [sum(queries), num_heads, head_size]."""
    out, start = [], 0
    for r, (context, queries) in enumerate(zip(batch.contexts, batch.queries, strict=True)):
        out.append(
            reference.attend(
                batch.format,
                batch.query[start : start + queries],
                batch.keys[r][context:],
                batch.values[r][context:],
                batch.cache,
                batch.block_table[r],
                context,
                batch.format.head_size**-0.5,
                frame,
                exact.cache if exact else None,
                batch.exact_table[r] if exact else None,
                exact.residual_tokens if exact else 0,
                exact.sink_tokens if exact else 0,
            )
        )
        start += queries
    return torch.cat(out)
