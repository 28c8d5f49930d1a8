"""The GPU kernels as vllm_backend.py sees them, like cpu_kernels.py's. Which kernel serves what is decided here."""

from __future__ import annotations

import functools

import torch
import triton

from ..cache_format import CacheFormat
from .cpu_kernels import ExactBlocks
from .flash import attend_pages, clear_tails, flash_attention_version
from .prefill import PAGE_TOKENS, Workspace, attend_chunks
from .rows import PortableRows
from .rows_hopper import HopperRows
from .rows_hopper import supports as hopper_supports
from .step import StepPlan
from .store import store
from .store_nvidia import LARGE_BATCH

_flash_version = functools.cache(flash_attention_version)


class GpuKernels:
    """The GPU kernels for one cache format, attention shape and model dtype.

    max_requests: most row requests of a step, padding included; max_row_queries: most queries of one. hopper: False takes
    the portable kernels on a Hopper GPU as well.
    """

    def __init__(
        self,
        cache_format: CacheFormat,
        num_heads: int,
        num_kv_heads: int,
        max_requests: int,
        device: torch.device,
        dtype: torch.dtype,
        max_row_queries: int = 1,
        hopper: bool = True,
    ) -> None:
        self.format, self.device = cache_format, device
        rows = HopperRows if hopper and hopper_supports(cache_format, dtype, device) else PortableRows
        self.rows = rows(cache_format, num_heads, num_kv_heads, max_requests, max_row_queries, device)
        self.max_row_queries = max_row_queries
        self._warm: set[tuple] = set()

    @staticmethod
    @functools.cache
    def of(
        cache_format: CacheFormat,
        num_heads: int,
        num_kv_heads: int,
        max_requests: int,
        device: torch.device,
        dtype: torch.dtype,
        max_row_queries: int = 1,
    ) -> GpuKernels:
        """The one object of a shape, for all its layers."""
        return GpuKernels(cache_format, num_heads, num_kv_heads, max_requests, device, dtype, max_row_queries)

    def warm_up(
        self,
        workspace: Workspace,
        block_size: int,
        exact_block_size: int | None,
        exact: tuple[int, int],
        key_frame: torch.Tensor | None = None,
    ) -> None:
        """Compile what a step can ask for, once, so that nothing is compiled while requests wait.

        Args: block_size: tokens of a packed block; exact_block_size: of an exact one, None without; exact: residual_tokens
              and sink_tokens; key_frame: any one, if layers have one
        """
        dtype, heads, d = workspace.keys.dtype, self.rows.num_kv_heads, self.format.head_size
        variant = (dtype, block_size, exact_block_size, exact, key_frame is not None)
        if variant in self._warm:
            return
        self._warm.add(variant)
        slot_bytes = self.format.layout.slot_bytes
        cache = torch.zeros(1, heads, block_size, slot_bytes, dtype=torch.uint8, device=self.device)
        blocks = None
        if exact_block_size is not None:
            rows = torch.zeros(1, heads, exact_block_size, 2 * d, dtype=dtype, device=self.device)
            blocks = ExactBlocks(rows, *exact)
        self.rows.warm_up(dtype, cache, blocks, key_frame)
        self._warm_up_store(dtype, cache, blocks, key_frame)
        # a chunk by itself, one behind a block of context, and one behind more than the workspace holds
        for context in (0, block_size, workspace.num_pages * PAGE_TOKENS + block_size):
            n = self.max_row_queries + 1
            starts = torch.tensor([0, n], dtype=torch.int32, device=self.device)
            lens = torch.tensor([context + n], dtype=torch.int32, device=self.device)
            step = StepPlan.of(starts, lens, [n], [context + n], self.max_row_queries, workspace)
            query = torch.zeros(n, self.rows.num_heads, d, dtype=dtype, device=self.device)
            key = torch.zeros(n, heads, d, dtype=dtype, device=self.device)
            table = torch.zeros(
                1,
                triton.cdiv(context + n, min(block_size, exact_block_size or block_size)),
                dtype=torch.int32,
                device=self.device,
            )
            self.attend(query, key, key, torch.empty_like(query), cache, step, table, d**-0.5, key_frame, blocks, table)

    def warm_up_protected(self, dtype: torch.dtype, block_size: int) -> None:
        """As warm_up, for protected layers, whose pages of block_size tokens are in the model's own type."""
        if (dtype, block_size) in self._warm:
            return
        self._warm.add((dtype, block_size))
        heads, d = self.rows.num_kv_heads, self.format.head_size
        rows = torch.zeros(1, heads, block_size, 2 * d, dtype=dtype, device=self.device)
        self._warm_up_store(dtype, None, ExactBlocks(rows, 0, 0), None)
        nothing = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
        clear_tails(rows.transpose(1, 2)[..., d:], nothing[0], nothing)

    def _warm_up_store(
        self, dtype: torch.dtype, cache: torch.Tensor | None, exact: ExactBlocks | None, key_frame: torch.Tensor | None
    ) -> None:
        """Few tokens and many, all of them padding."""
        heads = self.rows.num_kv_heads
        for tokens in (1, triton.cdiv(LARGE_BATCH, heads)):
            key = torch.zeros(tokens, heads, self.format.head_size, dtype=dtype, device=self.device)
            padding = torch.full((tokens,), -1, dtype=torch.int64, device=self.device)
            slots, exact_slots = (padding if x is not None else None for x in (cache, exact))
            self.store(cache, key, key, slots, key_frame, exact, exact_slots)

    def store(
        self,
        cache: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor | None,
        key_frame: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_slot_mapping: torch.Tensor | None = None,
    ) -> None:
        """As CpuKernels.store, on the device."""
        store(self.format, cache, key, value, slot_mapping, key_frame, exact, exact_slot_mapping)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        cache: torch.Tensor | None,
        plan: StepPlan,
        block_table: torch.Tensor,
        scale: float,
        key_frame: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_block_table: torch.Tensor | None = None,
    ) -> None:
        """Attention of each request's chunk: raw keys and values inside it, packed pages and exact blocks before it.

        Args: as CpuKernels.attend; query, key, value and out may have more rows than the plan has tokens
        """
        if cache is None:
            tokens = plan.num_tokens
            attend_pages(
                _flash_version(self.format.head_size, query.dtype, self.device),
                query[:tokens],
                out[:tokens],
                exact.cache,
                exact_block_table,
                plan.query_start_loc,
                plan.seq_lens,
                plan.max_query_len,
                plan.max_seq_len,
                scale,
            )
            return
        n, tokens = plan.num_rows, plan.num_row_tokens
        if tokens:
            self.rows.attend(
                query[:tokens],
                key[:tokens],
                value[:tokens],
                out[:tokens],
                cache,
                plan,
                block_table[:n],
                scale,
                key_frame,
                exact,
                exact_block_table[:n] if exact else None,
            )
        if plan.chunks is not None:
            end = tokens + plan.chunks.num_tokens
            attend_chunks(
                self.format,
                query[tokens:end],
                key[tokens:end],
                value[tokens:end],
                out[tokens:end],
                cache,
                block_table[n:],
                plan.chunk_query_start_loc,
                plan.seq_lens[n:],
                plan.chunks,
                scale,
                key_frame,
                exact,
                exact_block_table[n:] if exact else None,
            )
