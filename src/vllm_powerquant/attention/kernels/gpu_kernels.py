"""The GPU kernels as vllm_backend.py sees them, like cpu_kernels.py's. Which kernel serves what is decided here."""

from __future__ import annotations

import functools

import torch

from ..cache_format import CacheFormat
from .cpu_kernels import ExactBlocks
from .prefill import attend_chunks, flash_attention, flash_attention_version
from .rows import PortableRows
from .step import StepPlan
from .store import store

_flash_version = functools.cache(flash_attention_version)


class GpuKernels:
    """The GPU kernels for one cache format and attention shape.

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
        max_row_queries: int = 1,
        hopper: bool = True,
    ) -> None:
        self.format, self.device = cache_format, device
        rows = PortableRows
        if hopper and device.type == "cuda":
            # not importable in the interpreter
            from . import rows_hopper

            if rows_hopper.supports(cache_format, device):
                rows = rows_hopper.HopperRows
        self.rows = rows(cache_format, num_heads, num_kv_heads, max_requests, max_row_queries, device)

    def store(
        self,
        cache: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor | None,
        key_centre: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_slot_mapping: torch.Tensor | None = None,
    ) -> None:
        """As CpuKernels.store, on the device."""
        store(self.format, cache, key, value, slot_mapping, key_centre, exact, exact_slot_mapping)

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
        key_centre: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_block_table: torch.Tensor | None = None,
    ) -> None:
        """Attention of each request's chunk: raw keys and values inside it, packed pages and exact blocks before it.

        Args: as CpuKernels.attend; query, key, value and out may have more rows than the plan has tokens
        """
        if cache is None:
            tokens = plan.num_tokens
            keys, values = exact.cache.transpose(1, 2).split(self.format.head_size, dim=-1)
            flash_attention(
                _flash_version(self.format.head_size, query.dtype, self.device),
                query[:tokens],
                keys,
                values,
                out[:tokens],
                plan.query_start_loc,
                plan.max_query_len,
                plan.max_seq_len,
                causal=True,
                seq_lens=plan.seq_lens,
                block_table=exact_block_table,
                scale=scale,
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
                key_centre,
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
                key_centre,
                exact,
                exact_block_table[n:] if exact else None,
            )
