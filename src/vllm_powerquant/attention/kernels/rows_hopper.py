"""Attention of row requests (few queries each) with the kernels for NVIDIA Hopper: the counterpart of rows.py."""

from __future__ import annotations

import functools

import torch
import triton

from ..cache_format import CacheFormat
from . import decode_hopper, exact_hopper
from .common import LOG2_E
from .cpu_kernels import ExactBlocks
from .exact import attend_exact
from .merge_hopper import merge_runs, num_warps
from .plan import plan_runs
from .queries import rotate_queries, rotation_signs
from .step import StepPlan, warm_up_step
from .unpack_hopper import key_channel_order


def supports(cache_format: CacheFormat, device: torch.device) -> bool:
    """Whether the kernels run on this device and have this format."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return decode_hopper.supports(cache_format)


class _Buffers:
    """What the kernels of one layer pass to each other; shared by all layers. CUDA graphs keep the addresses."""

    def __init__(self, head_size: int, num_rows: int, num_exact: int, num_parts: int, device: torch.device) -> None:
        """Args: num_rows = tokens * heads; num_exact, num_parts: rows of partials"""
        self.high = torch.empty(num_rows, head_size, dtype=torch.int8, device=device)
        self.low = torch.empty(num_rows, head_size, dtype=torch.int8, device=device)
        self.offset = torch.empty(num_rows, dtype=torch.int32, device=device)
        self.scale = torch.empty(num_rows, dtype=torch.float32, device=device)
        self.exact = torch.empty(num_exact, head_size, dtype=torch.float32, device=device)
        self.exact_lse = torch.empty(num_exact, dtype=torch.float32, device=device)
        self.parts = torch.empty(num_parts, head_size, dtype=torch.float32, device=device)
        self.lse = torch.empty(num_parts, dtype=torch.float32, device=device)

    @staticmethod
    @functools.cache
    def of(head_size: int, num_rows: int, num_exact: int, num_parts: int, device: torch.device) -> _Buffers:
        """The one set of a shape, made on first use."""
        return _Buffers(head_size, num_rows, num_exact, num_parts, device)


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
        d = cache_format.head_size
        queries = {1, max_row_queries}
        parts = max(self._num_parts(max_requests, q) * 8 * self._row_sets(q) for q in queries)
        exact = max(self._exact_splits(n, q) * n * q for q in queries for n in range(1, max_requests + 1))
        num_rows = max_requests * max_row_queries * num_heads
        self.buffers = _Buffers.of(d, num_rows, exact * num_heads, parts, device)
        order = key_channel_order(d, cache_format.key_bits)
        self.matrix = rotation_signs(d, tuple(order), device)

    def _row_sets(self, max_queries: int) -> int:
        """Sets of eight rows that one pass over a kv head serves."""
        return decode_hopper.row_sets(max_queries * self.group, self.format.head_size)

    def _row_blocks(self, max_queries: int) -> int:
        """Passes over a kv head."""
        return triton.cdiv(max_queries * self.group, 8 * self._row_sets(max_queries))

    def _num_parts(self, num_requests: int, max_queries: int) -> int:
        runs = decode_hopper.num_runs(self.format, self._row_sets(max_queries), self.device)
        return 2 * runs + num_requests * self.num_kv_heads * self._row_blocks(max_queries)

    def _exact_splits(self, num_requests: int, max_queries: int) -> int:
        programs = num_requests * self.num_kv_heads * triton.cdiv(max_queries * self.group, 16)
        return exact_hopper.num_splits(programs, self.device)

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
        key_centre: torch.Tensor | None,
        exact: ExactBlocks | None,
        exact_table: torch.Tensor | None,
    ) -> None:
        """As GpuKernels.attend, of the plan's row requests alone."""
        buffers, d, n = self.buffers, self.format.head_size, plan.num_rows
        rows = query.shape[0] * self.num_heads
        if n > self.max_requests or rows > buffers.scale.shape[0]:
            raise ValueError(f"at most {self.max_requests} requests and {buffers.scale.shape[0]} rows, got {n} and {rows}")
        # kernels are compiled for a number of queries: one, or the most there can be
        longest = 1 if plan.max_row_queries == 1 else self.max_row_queries
        starts, seq_lens = plan.row_starts, plan.row_seq_lens
        log2_scale = scale * LOG2_E
        small = exact_hopper.supports(d, query.dtype)
        splits = self._exact_splits(n, longest) if small else 1
        exact_out = buffers.exact[: splits * rows].view(splits, rows, d)
        exact_lse = buffers.exact_lse[: splits * rows].view(splits, rows)
        queries = (buffers.high[:rows], buffers.low[:rows], buffers.offset[:rows], buffers.scale[:rows])
        high, low, offset, q_scale = queries
        unit = log2_scale * d**-0.5 * float(self.format.key_codebook.step)
        sets, row_blocks = self._row_sets(longest), self._row_blocks(longest)
        tiles, cost = self._runs(plan, row_blocks, exact, exact_table)
        # From here each kernel is launched while the one before still runs (programmatic dependent launch) and waits for
        # it where it needs what that one wrote. Every kernel waits before it ends, so that the last has waited for all.
        # The rotation is launched plainly: when it starts, the store and the plan are done, which the others read before
        # they wait. Nothing may be launched between it and the merge.
        rotate_queries(query, self.matrix, unit, high, q_scale, low, offset, overlap=True)
        runs = decode_hopper.num_runs(self.format, sets, self.device)
        count = self._num_parts(n, longest)
        parts = buffers.parts[: count * 8 * sets].view(count, 8 * sets, d)
        lse = buffers.lse[: count * 8 * sets].view(count, 8 * sets)
        decode_hopper.attend_packed(
            self.format,
            queries,
            cache,
            block_table,
            starts,
            seq_lens,
            self.group,
            row_blocks,
            cost,
            tiles,
            runs,
            self.max_requests,
            parts,
            lse,
            exact.residual_tokens if exact else 0,
            exact.sink_tokens if exact else 0,
            exact.cache.shape[2] if exact else 1,
            exact_table,
        )
        attend_kept = exact_hopper.attend_exact if small else attend_exact
        attend_kept(
            query,
            key,
            value,
            exact_out,
            exact_lse,
            starts,
            seq_lens,
            longest,
            log2_scale,
            key_centre,
            exact,
            exact_table,
        )
        merge_runs(
            parts,
            lse,
            exact_out,
            exact_lse,
            out,
            cost,
            tiles,
            starts,
            longest,
            runs,
            self.num_kv_heads,
            row_blocks,
            decode_hopper.SEGMENT_COST,
        )

    def _runs(
        self, plan: StepPlan, row_blocks: int, exact: ExactBlocks | None, exact_table: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tiles, cost) of the step, made by the first layer of it; in a CUDA graph that layer's launch is replayed."""
        key = (row_blocks, exact_table.data_ptr() if exact else 0)
        if key not in plan.runs:
            tiles = torch.empty(plan.num_rows, dtype=torch.int32, device=self.device)
            # the packed kernel looks one element further
            cost = torch.empty(plan.num_rows + 2, dtype=torch.int32, device=self.device)
            plan_runs(
                plan.row_starts,
                plan.row_seq_lens,
                tiles,
                cost,
                self.num_kv_heads * row_blocks,
                decode_hopper.SEGMENT_COST,
                self.max_requests,
                exact.residual_tokens if exact else 0,
                exact.cache.shape[2] if exact else 1,
                exact_table,
            )
            plan.runs[key] = (tiles, cost)
        return plan.runs[key]

    def warm_up(self, dtype: torch.dtype, cache: torch.Tensor, exact: ExactBlocks | None) -> None:
        """Compile every variant of the kernels that a step can ask for, so that none is compiled while requests wait.

        Args: cache, exact: as in a step, of one block at least; nothing is read from them
        """
        variants = {}
        for queries in {1, self.max_row_queries}:
            runs = decode_hopper.num_runs(self.format, self._row_sets(queries), self.device)
            for n in range(1, self.max_requests + 1):
                segments = n * self.num_kv_heads * self._row_blocks(queries)
                variants[queries, self._exact_splits(n, queries), num_warps(runs, segments)] = n
        for (queries, *_), n in variants.items():
            warm_up_step(self, n, queries, dtype, cache, exact)
