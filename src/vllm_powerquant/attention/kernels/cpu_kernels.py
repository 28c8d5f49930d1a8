"""Launchers of the CPU kernels (cpu/*.cpp): every Python-side decision, and the arguments they share with C++."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from ...errors import PowerQuantUnsupportedError
from ..cache_format import CacheFormat
from ..rotation import outer_matrix, outer_order, random_signs
from .cpu_build import build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Pointer, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Format(ctypes.Structure):
    _fields_ = [
        ("head_size", _I32),
        ("outer_order", _I32),
        ("key_bits", _I32),
        ("value_bits", _I32),
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
        ("key_centre", _Pointer),
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
        ("seq_lens", _Pointer),
        ("cache", _Pages),
        ("block_table", _Pointer),
        ("block_table_stride", _I64),
        ("exact", _Pages),
        ("exact_table", _Pointer),
        ("exact_table_stride", _I64),
        ("residual_tokens", _I32),
        ("sink_tokens", _I32),
        ("key_centre", _Pointer),
        ("scale", _F32),
    ]


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
        key_centre: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_slot_mapping: torch.Tensor | None = None,
    ) -> None:
        """Write tokens into their packed pages (unless None) and, with `exact`, into their exact blocks.

        Args: cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; key, value [n, num_kv_heads, head_size];
              slot_mapping, exact_slot_mapping [n] int64, below 0: padding (exact slots of block 0 are not written either)
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
            key_centre=_address(key_centre, torch.float32),
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
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        scale: float,
        key_centre: torch.Tensor | None = None,
        exact: ExactBlocks | None = None,
        exact_block_table: torch.Tensor | None = None,
    ) -> None:
        """Attention of each request's chunk: raw keys and values inside it, packed pages and exact blocks before it.

        Without a cache every position before the chunk must have an exact block.

        Args: query, out [n, num_heads, head_size]; key, value [n, num_kv_heads, head_size]; query_start_loc
              [num_requests + 1] int32; seq_lens [num_requests] int32 (the chunk included); block_table, exact_block_table
              [num_requests, ...] int32; cache as for `store`
        """
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
            query_start=_address(query_start_loc, torch.int32),
            seq_lens=_address(seq_lens, torch.int32),
            cache=self._packed(cache),
            block_table=_address(block_table, torch.int32),
            block_table_stride=block_table.stride(0),
            exact=_exact_pages(exact, key.dtype),
            exact_table=_address(exact_block_table if exact else None, torch.int32),
            exact_table_stride=exact_block_table.stride(0) if exact else 0,
            residual_tokens=exact.residual_tokens if exact else 0,
            sink_tokens=exact.sink_tokens if exact else 0,
            key_centre=_address(key_centre, torch.float32),
            scale=scale,
        )
        self._library.pq_attend(ctypes.byref(arguments))

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
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    for name, arguments in (("pq_store", _StoreArgs), ("pq_attend", _AttendArgs)):
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
