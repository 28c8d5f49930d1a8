"""Attention of row requests (few queries each) with the portable kernels: on any GPU, and in Triton's interpreter."""

from __future__ import annotations

import functools

import torch

from ..cache_format import CacheFormat
from .common import LOG2_E
from .cpu_kernels import ExactBlocks
from .decode import attend_packed
from .exact import attend_exact
from .merge import merge_splits
from .queries import rotate_queries, rotation_signs
from .step import StepPlan, warm_up_step

MAX_SPLITS = 32


class _Buffers:
    """What the kernels of one layer pass to each other; shared by all layers. CUDA graphs keep the addresses."""

    def __init__(self, head_size: int, num_rows: int, num_parts: int, device: torch.device) -> None:
        """Args: num_rows = tokens * heads; num_parts: rows of all splits"""
        self.query = torch.empty(num_rows, head_size, dtype=torch.float16, device=device)
        self.scale = torch.empty(num_rows, dtype=torch.float32, device=device)
        self.exact = torch.empty(num_rows, head_size, dtype=torch.float32, device=device)
        self.exact_lse = torch.empty(num_rows, dtype=torch.float32, device=device)
        self.parts = torch.empty(num_parts, head_size, dtype=torch.float32, device=device)
        self.lse = torch.empty(num_parts, dtype=torch.float32, device=device)

    @staticmethod
    @functools.cache
    def of(head_size: int, num_rows: int, num_parts: int, device: torch.device) -> _Buffers:
        """The one set of a shape, made on first use."""
        return _Buffers(head_size, num_rows, num_parts, device)


class PortableRows:
    """Launches for one cache format and attention shape; arguments as for GpuKernels."""

    def __init__(
        self,
        cache_format: CacheFormat,
        num_heads: int,
        num_kv_heads: int,
        max_requests: int,
        max_row_queries: int,
        device: torch.device,
    ) -> None:
        self.format, self.device = cache_format, device
        self.max_row_queries = max_row_queries
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        most = max(self._num_splits(n) * n for n in range(1, max_requests + 1))
        queries = max_row_queries * num_heads
        self.buffers = _Buffers.of(cache_format.head_size, max_requests * queries, most * queries, device)
        self.matrix = rotation_signs(cache_format.head_size, device)

    def _num_splits(self, num_requests: int) -> int:
        """Splits of each context: enough programs to fill the device."""
        if self.device.type != "cuda":
            return 3
        programs = 4 * torch.cuda.get_device_properties(self.device).multi_processor_count
        return max(1, min(MAX_SPLITS, programs // (num_requests * self.num_kv_heads)))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        cache: torch.Tensor,
        plan: StepPlan,
        block_table: torch.Tensor,
        scale: float,
        key_frame: torch.Tensor | None,
        exact: ExactBlocks | None,
        exact_table: torch.Tensor | None,
    ) -> None:
        """As GpuKernels.attend, of the plan's row requests alone."""
        buffers, d, rows = self.buffers, self.format.head_size, query.shape[0] * self.num_heads
        starts, seq_lens, longest = plan.row_starts, plan.row_seq_lens, plan.max_row_queries
        exact_out, exact_lse = buffers.exact[:rows], buffers.exact_lse[:rows]
        log2_scale = scale * LOG2_E
        attend_exact(
            query, key, value, exact_out, exact_lse, starts, seq_lens, longest, log2_scale, key_frame, exact, exact_table
        )
        coordinates, q_scale = buffers.query[:rows], buffers.scale[:rows]
        rotate_queries(query, self.matrix, log2_scale * d**-0.5, coordinates, q_scale, key_frame)
        splits = self._num_splits(plan.num_rows)
        parts, lse = buffers.parts[: splits * rows].view(splits, rows, d), buffers.lse[: splits * rows].view(splits, rows)
        attend_packed(
            self.format,
            coordinates,
            q_scale,
            cache,
            block_table,
            starts,
            seq_lens,
            longest,
            self.num_heads // self.num_kv_heads,
            parts,
            lse,
            exact,
            exact_table,
        )
        merge_splits(parts, lse, exact_out, exact_lse, self.matrix, out)

    def warm_up(
        self, dtype: torch.dtype, cache: torch.Tensor, exact: ExactBlocks | None, key_frame: torch.Tensor | None = None
    ) -> None:
        """Compile every variant of the kernels that a step can ask for; arguments as for HopperRows.warm_up."""
        for queries in range(1, self.max_row_queries + 1):
            warm_up_step(self, 1, queries, dtype, cache, exact, key_frame)
