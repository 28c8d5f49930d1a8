"""Launchers of the CPU kernels (cpu/*.cpp): every Python-side decision, and the arguments they share with C++."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from ...errors import PowerQuantUnsupportedError
from ..cache_format import CacheFormat
from ..rotation import outer_matrix, outer_order, random_signs, rotation_matrix
from ..trellis import ring_length
from .cpu_build import build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Pointer, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Format(ctypes.Structure):
    _fields_ = [
        ("head_size", _I32),
        ("outer_order", _I32),
        ("key_bits", _I32),
        ("value_bits", _I32),
        ("value_ring", _I32),
        ("key_plane", _I64 * 2),
        ("value_plane", _I64 * 2),
        ("key_scale", _I64),
        ("value_scale", _I64),
        ("sub_page_bytes", _I64),
        ("signs", _Pointer),
        ("outer", _Pointer),
        ("key_levels", _Pointer),
        ("value_levels", _Pointer),
        ("key_step", _F32),
        ("value_step", _F32),
        ("key_scale_factor", _F32),
        ("value_scale_factor", _F32),
    ]


class _Pages(ctypes.Structure):
    _fields_ = [
        ("data", _Pointer),
        ("block_stride", _I64),
        ("head_stride", _I64),
        ("token_stride", _I64),
        ("block_size", _I64),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [("data", _Pointer), ("token_stride", _I64), ("head_stride", _I64)]


class _StoreArgs(ctypes.Structure):
    _fields_ = [
        ("format", ctypes.POINTER(_Format)),
        ("key", _Rows),
        ("value", _Rows),
        ("dtype", _I32),
        ("num_kv_heads", _I32),
        ("num_tokens", _I64),
        ("slots", _Pointer),
        ("cache", _Pages),
        ("key_frame", _Pointer),
        ("exact_slots", _Pointer),
        ("exact", _Pages),
    ]


class _AttendArgs(ctypes.Structure):
    _fields_ = [
        ("format", ctypes.POINTER(_Format)),
        ("query", _Rows),
        ("key", _Rows),
        ("value", _Rows),
        ("out", _Pointer),
        ("out_token_stride", _I64),
        ("out_head_stride", _I64),
        ("dtype", _I32),
        ("num_requests", _I32),
        ("num_heads", _I32),
        ("num_kv_heads", _I32),
        ("query_start", _Pointer),
        ("query_lens", _Pointer),
        ("seq_lens", _Pointer),
        ("cache", _Pages),
        ("block_table", _Pointer),
        ("block_table_stride", _I64),
        ("exact", _Pages),
        ("exact_table", _Pointer),
        ("exact_table_stride", _I64),
        ("residual_tokens", _I32),
        ("sink_tokens", _I32),
        ("key_frame", _Pointer),
        ("scale", _F32),
    ]


class _DequantizeArgs(ctypes.Structure):
    _fields_ = [
        ("format", ctypes.POINTER(_Format)),
        ("cache", _Pages),
        ("block_table", _Pointer),
        ("exact", _Pages),
        ("exact_table", _Pointer),
        ("residual_tokens", _I32),
        ("sink_tokens", _I32),
        ("key_frame", _Pointer),
        ("num_kv_heads", _I32),
        ("dtype", _I32),
        ("context", _I64),
        ("first", _I64),
        ("count", _I64),
        ("keys", _Pointer),
        ("values", _Pointer),
    ]


# A chunk this long is worth matrix products: its context is dequantized, a segment at a time, for torch's attention.
CHUNK_QUERIES = 64
SEGMENT_TOKENS = 4096  # bounds the workspace: 2 * num_kv_heads * head_size elements a token


@dataclass(frozen=True)
class BatchPlan:
    """A step's requests, split by how they are attended; made once a step and used by every layer.

    rows: requests of few queries, which read packed pages directly: (indices, query_start, query_lens, seq_lens), each [n],
          indices int64 (None: all requests in order), the rest int32
    chunks: (request, first query token, query tokens, context tokens) of requests with CHUNK_QUERIES queries or more
    """

    rows: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]
    chunks: tuple[tuple[int, int, int, int], ...]
    every: tuple[None, torch.Tensor, torch.Tensor, torch.Tensor]  # all requests as rows

    @classmethod
    def of(cls, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, max_query_len: int | None = None) -> BatchPlan:
        """Args: query_start_loc [num_requests + 1] int32, seq_lens [num_requests] int32 (the chunk included)"""
        starts, lens = query_start_loc[:-1].int(), query_start_loc.diff().int()
        seq_lens = seq_lens.int()
        every = (None, starts, lens, seq_lens)
        if max_query_len is not None and max_query_len < CHUNK_QUERIES:
            return cls(every, (), every)
        long = lens >= CHUNK_QUERIES
        indices = (~long).nonzero().flatten()
        chunks = tuple(
            (r, int(starts[r]), int(lens[r]), int(seq_lens[r] - lens[r])) for r in long.nonzero().flatten().tolist()
        )
        if not chunks:
            return cls(every, (), every)
        return cls((indices, starts[indices], lens[indices], seq_lens[indices]), chunks, every)


@dataclass(frozen=True)
class ExactBlocks:
    """Blocks that hold the newest and the first tokens of each request exactly, beside their packed copies.

    cache [num_blocks, num_kv_heads, block_size, 2 * head_size] of the model's dtype: keys, then values; block 0 is the null
    block and means "read the packed copy".
    """

    cache: torch.Tensor
    residual_tokens: int
    sink_tokens: int


class CpuKernels:
    """The compiled kernels for one cache format. Compiles them on first use; raises KernelBuildError if that fails."""

    def __init__(self, cache_format: CacheFormat) -> None:
        self.format = cache_format
        self._library = _load()
        layout, keys, values = cache_format.layout, cache_format.key_codebook, cache_format.value_codebook
        order = outer_order(cache_format.head_size)
        # the struct holds addresses only: keep what they point to
        self._held = (
            random_signs(cache_format.head_size).contiguous(),
            outer_matrix(order).contiguous(),
            torch.tensor(keys.levels, dtype=torch.int8, device="cpu"),
            torch.tensor(values.levels, dtype=torch.int8, device="cpu"),
        )
        signs, outer, key_levels, value_levels = (tensor.data_ptr() for tensor in self._held)
        self._format = _Format(
            head_size=cache_format.head_size,
            outer_order=order,
            key_bits=cache_format.key_bits,
            value_bits=cache_format.value_bits,
            value_ring=ring_length(cache_format.head_size) if cache_format.is_trellis else 0,
            key_plane=(_I64 * 2)(*layout.key_plane_offsets),
            value_plane=(_I64 * 2)(*layout.value_plane_offsets),
            key_scale=layout.key_scale_offset,
            value_scale=layout.value_scale_offset,
            sub_page_bytes=layout.sub_page_bytes,
            signs=signs,
            outer=outer,
            key_levels=key_levels,
            value_levels=value_levels,
            key_step=float(keys.step),
            value_step=float(values.step),
            key_scale_factor=float(cache_format.scale_factor(keys)),
            value_scale_factor=float(cache_format.scale_factor(values)),
        )

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
        """Write tokens into their packed pages (unless None) and, with `exact`, into their exact blocks.

        Args: cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; key, value [n, num_kv_heads, head_size];
              slot_mapping, exact_slot_mapping [n] int64, below 0: padding (exact slots of block 0 are not written either);
              key_frame [num_kv_heads, 3, head_size] fp32: see reference.in_frame
        """
        num_tokens = (exact_slot_mapping if cache is None else slot_mapping).shape[0]
        arguments = _StoreArgs(
            format=ctypes.pointer(self._format),
            key=_rows(key),
            value=_rows(value),
            dtype=_dtype(key, value),
            num_kv_heads=key.shape[1],
            num_tokens=num_tokens,
            slots=_address(slot_mapping, torch.int64),
            cache=self._packed(cache),
            key_frame=_address(key_frame, torch.float32),
            exact_slots=_address(exact_slot_mapping if exact else None, torch.int64),
            exact=_exact_pages(exact, key.dtype),
        )
        if num_tokens:
            self._library.pq_store(ctypes.byref(arguments))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        cache: torch.Tensor | None,
        plan: BatchPlan,
        block_table: torch.Tensor,
        scale: float,
        key_frame: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_block_table: torch.Tensor | None = None,
    ) -> None:
        """Attention of each request's chunk: raw keys and values inside it, packed pages and exact blocks before it.

        Without a cache every position before the chunk must have an exact block.

        Args: query, out [n, num_heads, head_size]; key, value [n, num_kv_heads, head_size]; block_table, exact_block_table
              [num_requests, ...] int32; cache as for `store`
        """
        rows, chunks = (plan.every, ()) if cache is None else (plan.rows, plan.chunks)
        self._attend_rows(query, key, value, out, cache, rows, block_table, scale, key_frame, exact, exact_block_table)
        for request, start, length, context in chunks:
            part = slice(start, start + length)
            self._attend_chunk(
                query[part],
                key[part],
                value[part],
                out[part],
                cache,
                context,
                block_table[request],
                scale,
                key_frame,
                exact,
                exact_block_table[request] if exact else None,
            )

    def _attend_rows(
        self, query, key, value, out, cache, rows, block_table, scale, key_frame, exact, exact_block_table
    ) -> None:
        indices, query_start, query_lens, seq_lens = rows
        if not len(seq_lens):
            return
        if indices is not None:
            block_table = block_table[indices]
            exact_block_table = exact_block_table[indices] if exact else None
        arguments = _AttendArgs(
            format=ctypes.pointer(self._format),
            query=_rows(query),
            key=_rows(key),
            value=_rows(value),
            out=out.data_ptr(),
            out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
            dtype=_dtype(query, key, value, out),
            num_requests=seq_lens.shape[0],
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            query_start=_address(query_start, torch.int32),
            query_lens=_address(query_lens, torch.int32),
            seq_lens=_address(seq_lens, torch.int32),
            cache=self._packed(cache),
            block_table=_address(block_table, torch.int32),
            block_table_stride=block_table.stride(0),
            exact=_exact_pages(exact, key.dtype),
            exact_table=_address(exact_block_table if exact else None, torch.int32),
            exact_table_stride=exact_block_table.stride(0) if exact else 0,
            residual_tokens=exact.residual_tokens if exact else 0,
            sink_tokens=exact.sink_tokens if exact else 0,
            key_frame=_address(key_frame, torch.float32),
            scale=scale,
        )
        self._library.pq_attend(ctypes.byref(arguments))

    def _attend_chunk(
        self, query, key, value, out, cache, context, block_table, scale, key_frame, exact, exact_block_table
    ) -> None:
        """A long chunk of one request: itself and segments of its context by torch's attention, joined by their sums."""
        length, num_heads, head_size = query.shape
        num_kv_heads = key.shape[1]
        group = num_heads // num_kv_heads
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [heads, length, head_size]
        if key_frame is not None:
            centre, factor, inverse = (row[:, None] for row in key_frame.unbind(1))
            key = ((key.float() - centre) * factor).to(query.dtype)
            query = query * inverse.repeat_interleave(group, dim=0).to(query.dtype)
        own_key, own_value = (x.repeat_interleave(group, dim=0) for x in (key, value))
        own, log_sum = _flash(query, own_key, own_value, scale, causal=True)
        if not context:
            out.copy_(own.transpose(0, 1))
            return
        # the context's keys are in rotated space; heads of a group follow each other, so a kv head's queries are one run
        matrix = rotation_matrix(head_size)
        rotated = (query.float() @ matrix.T).to(query.dtype).reshape(num_kv_heads, group * length, head_size)
        total, total_log_sum = None, None
        for first in range(0, context, SEGMENT_TOKENS):
            count = min(SEGMENT_TOKENS, context - first)
            keys, values = self.dequantize(
                cache, block_table, context, first, count, query.dtype, key_frame, exact, exact_block_table
            )
            part, part_log_sum = _flash(rotated, keys, values, scale, causal=False)
            part = part.reshape(num_heads, length, head_size).float()
            part_log_sum = part_log_sum.reshape(num_heads, length)
            if total is None:
                total, total_log_sum = part, part_log_sum
            else:
                total, total_log_sum = _join(total, total_log_sum, part, part_log_sum)
        total, _ = _join(total @ matrix, total_log_sum, own.float(), log_sum)
        out.copy_(total.transpose(0, 1))

    def workspace(self, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """Where contexts are dequantized, shared by all layers of a shape: [2, num_kv_heads * SEGMENT_TOKENS * head_size].

        Made and touched on first use; vLLM counts what is resident once the model is loaded, so call this before.
        """
        return _workspace(num_kv_heads * SEGMENT_TOKENS * self.format.head_size, dtype)

    def dequantize(
        self,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        context: int,
        first: int,
        count: int,
        dtype: torch.dtype,
        key_frame: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_block_table: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens first .. first + count of one request's context, exact ones from their blocks, in rotated space.

        Args:    first a multiple of 64; block_table, exact_block_table [blocks] int32 of this request
        Returns: keys, values [num_kv_heads, count, head_size] of dtype, in the shared workspace: valid until the next call
        """
        keys, values = self.workspace(cache.shape[1], dtype)[:, : cache.shape[1] * count * self.format.head_size].view(
            2, cache.shape[1], count, self.format.head_size
        )
        arguments = _DequantizeArgs(
            format=ctypes.pointer(self._format),
            cache=self._packed(cache),
            block_table=_address(block_table, torch.int32),
            exact=_exact_pages(exact, dtype),
            exact_table=_address(exact_block_table if exact else None, torch.int32),
            residual_tokens=exact.residual_tokens if exact else 0,
            sink_tokens=exact.sink_tokens if exact else 0,
            key_frame=_address(key_frame, torch.float32),
            num_kv_heads=cache.shape[1],
            dtype=_dtype(keys),
            context=context,
            first=first,
            count=count,
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )
        self._library.pq_dequantize(ctypes.byref(arguments))
        return keys, values

    def _packed(self, cache: torch.Tensor | None) -> _Pages:
        if cache is None:
            return _Pages()
        slot_bytes = self.format.layout.slot_bytes
        if cache.dtype != torch.uint8 or cache.shape[3] != slot_bytes or cache.stride()[2:] != (slot_bytes, 1):
            raise ValueError(
                f"cache must be uint8 [blocks, kv heads, tokens, {slot_bytes}] with contiguous pages, "
                f"got {cache.dtype} {tuple(cache.shape)} with strides {cache.stride()}"
            )
        self.format.layout.page_bytes(cache.shape[2])
        return _Pages(cache.data_ptr(), cache.stride(0), cache.stride(1), 0, cache.shape[2])


@functools.cache
def _workspace(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(2, elements, dtype=dtype, device="cpu").fill_(0)


def _flash(query, key, value, scale, causal) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU attention with its log-sum-exp: [heads, n, head_size] -> out [heads, n, head_size], [heads, n] fp32."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], 0.0, causal, scale=scale
    )
    return out[0], log_sum[0].float()


def _join(a, a_log_sum, b, b_log_sum) -> tuple[torch.Tensor, torch.Tensor]:
    """Two attentions over disjoint tokens, [heads, n, head_size] fp32 with log-sums [heads, n], as one; a is overwritten."""
    log_sum = torch.logaddexp(a_log_sum, b_log_sum)
    weight_a, weight_b = ((x - log_sum).exp()[..., None] for x in (a_log_sum, b_log_sum))
    return a.mul_(weight_a).addcmul_(b, weight_b), log_sum


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    for name, arguments in (("pq_store", _StoreArgs), ("pq_attend", _AttendArgs), ("pq_dequantize", _DequantizeArgs)):
        getattr(library, name).argtypes = [ctypes.POINTER(arguments)]
        getattr(library, name).restype = None
    return library


def _dtype(*tensors: torch.Tensor) -> int:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise PowerQuantUnsupportedError(
            f"keys, values, queries and outputs must share one of float32, bfloat16, float16, got {dtypes}"
        )
    return _DTYPES[dtypes.pop()]


def _rows(tensor: torch.Tensor) -> _Rows:
    if tensor.stride(2) != 1:
        raise ValueError(f"the last dimension must be contiguous, got strides {tensor.stride()}")
    return _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _address(tensor: torch.Tensor | None, dtype: torch.dtype) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.stride(-1) != 1:
        raise ValueError(f"expected a contiguous {dtype} tensor, got {tensor.dtype} with strides {tensor.stride()}")
    return tensor.data_ptr()


def _exact_pages(exact: ExactBlocks | None, dtype: torch.dtype) -> _Pages:
    if exact is None:
        return _Pages()
    cache = exact.cache
    if cache.dtype != dtype or cache.stride(3) != 1:
        raise ValueError(f"exact blocks must be contiguous {dtype} rows, got {cache.dtype} with strides {cache.stride()}")
    block, head, token = (stride * cache.element_size() for stride in cache.stride()[:3])
    return _Pages(cache.data_ptr(), block, head, token, cache.shape[2])
