"""Attention of row requests (few queries each) with the kernels for NVIDIA Hopper: the counterpart of rows.py."""

from __future__ import annotations

import functools

import torch
import triton

from ..cache_format import CacheFormat
from . import decode_hopper
from .common import LOG2_E
from .cpu_kernels import ExactBlocks
from .merge_hopper import launch_shape, merge_runs
from .plan import RUN_FIELDS, plan_runs
from .step import StepPlan, warm_up_step


def supports(cache_format: CacheFormat, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels run on this device and have this format and model dtype."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return decode_hopper.supports(cache_format)


class _Buffers:
    """What the kernels of one layer pass to each other; shared by all layers. CUDA graphs keep the addresses."""

    def __init__(self, head_size: int, num_parts: int, device: torch.device) -> None:
        """Args: num_parts: rows of partials"""
        self.parts = torch.empty(num_parts, head_size, dtype=torch.float32, device=device)
        self.lse = torch.empty(num_parts, dtype=torch.float32, device=device)

    @staticmethod
    @functools.cache
    def of(head_size: int, num_parts: int, device: torch.device) -> _Buffers:
        """The one set of a shape, made on first use."""
        return _Buffers(head_size, num_parts, device)


class HopperRows:
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
        self.max_requests, self.max_row_queries = max_requests, max_row_queries
        self.num_heads, self.num_kv_heads, self.group = num_heads, num_kv_heads, num_heads // num_kv_heads
        parts = max(self._num_parts(max_requests, q) * 8 * self._row_sets(q) for q in {1, max_row_queries})
        self.buffers = _Buffers.of(cache_format.head_size, parts, device)

    def _row_sets(self, max_queries: int) -> int:
        """Sets of eight rows that one pass over a kv head serves."""
        return decode_hopper.row_sets(max_queries * self.group, self.format.head_size)

    def _row_blocks(self, max_queries: int) -> int:
        """Passes over a kv head."""
        return triton.cdiv(max_queries * self.group, 8 * self._row_sets(max_queries))

    def _num_parts(self, num_requests: int, max_queries: int) -> int:
        runs = decode_hopper.num_runs(self.format, self._row_sets(max_queries), self.device)
        return 2 * runs + 2 * num_requests * self.num_kv_heads * self._row_blocks(max_queries)

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
        buffers, n = self.buffers, plan.num_rows
        # kernels are compiled for a number of queries: one, or the most there can be
        longest = 1 if plan.max_row_queries == 1 else self.max_row_queries
        if n > self.max_requests or plan.max_row_queries > longest:
            raise ValueError(
                f"at most {self.max_requests} requests of {self.max_row_queries} queries, got {n} of {plan.max_row_queries}"
            )
        sets, row_blocks = self._row_sets(longest), self._row_blocks(longest)
        tiles, cost, runs = self._runs(plan, sets, row_blocks, exact, exact_table)
        count = self._num_parts(n, longest)
        parts = buffers.parts[: count * 8 * sets].view(count, 8 * sets, self.format.head_size)
        lse = buffers.lse[: count * 8 * sets].view(count, 8 * sets)
        # The merge is launched while the programs before it still run (programmatic dependent launch) and waits for them
        # where it needs their partials; what it reads before was there when they started. Nothing may come between the two.
        decode_hopper.attend(
            self.format,
            query,
            key,
            value,
            cache,
            block_table,
            plan.row_starts,
            plan.row_seq_lens,
            scale * LOG2_E,
            row_blocks,
            tiles,
            cost,
            runs,
            parts,
            lse,
            key_frame,
            exact,
            exact_table,
        )
        merge_runs(
            parts,
            lse,
            out,
            cost,
            tiles,
            plan.row_starts,
            longest,
            runs.shape[0],
            self.num_kv_heads,
            row_blocks,
            decode_hopper.SEGMENT_COST,
        )

    def _runs(
        self, plan: StepPlan, sets: int, row_blocks: int, exact: ExactBlocks | None, exact_table: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tiles, cost, runs), made by the first layer of a step; in a CUDA graph that layer's launch is replayed."""
        key = (sets, row_blocks, exact_table.data_ptr() if exact else 0)
        if key not in plan.runs:
            tiles = torch.empty(2 * plan.num_rows, dtype=torch.int32, device=self.device)
            cost = torch.empty(2 * plan.num_rows + 1, dtype=torch.int32, device=self.device)
            num_runs = decode_hopper.num_runs(self.format, sets, self.device)
            runs = torch.empty(num_runs, RUN_FIELDS, dtype=torch.int32, device=self.device)
            plan_runs(
                plan.row_starts,
                plan.row_seq_lens,
                tiles,
                cost,
                runs,
                self.num_kv_heads * row_blocks,
                decode_hopper.SEGMENT_COST,
                self.max_requests,
                exact.residual_tokens if exact else 0,
                exact.sink_tokens if exact else 0,
                exact.cache.shape[2] if exact else 1,
                exact_table,
            )
            plan.runs[key] = (tiles, cost, runs)
        return plan.runs[key]

    def warm_up(
        self, dtype: torch.dtype, cache: torch.Tensor, exact: ExactBlocks | None, key_frame: torch.Tensor | None = None
    ) -> None:
        """Compile every variant of the kernels that a step can ask for, so that none is compiled while requests wait.

        Args: cache, exact, key_frame: as in a step, of one block at least; nothing is read from them
        """
        variants = {}
        for queries in {1, self.max_row_queries}:
            runs = decode_hopper.num_runs(self.format, self._row_sets(queries), self.device)
            for n in range(1, self.max_requests + 1):
                segments = n * self.num_kv_heads * self._row_blocks(queries)
                variants[queries, launch_shape(runs, segments)] = n
        for (queries, _), n in variants.items():
            warm_up_step(self, n, queries, dtype, cache, exact, key_frame)
