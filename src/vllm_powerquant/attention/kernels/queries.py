"""Queries for the packed kernels: rotated, scaled by their largest coordinate, in fp16 or 16-bit fixed point."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..rotation import hadamard_transform
from .common import dot

ROWS = 16
FIXED_MAX = 32512.0  # of the fixed point: its high byte stays within +-127


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_queries_kernel(
    query_ptr,   # [num_tokens, NUM_HEADS, D]
    matrix_ptr,  # [D, D] int8, +-1: output coordinate by input channel
    high_ptr,    # [num_tokens * NUM_HEADS, D] fp16, or int8 (FIXED)
    low_ptr,     # the same, int8; only with FIXED
    offset_ptr,  # [num_tokens * NUM_HEADS] int32; only with FIXED
    scale_ptr,   # [num_tokens * NUM_HEADS] fp32
    num_rows,
    unit,
    stride_token: tl.int64, stride_head: tl.int64,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, FIXED: tl.constexpr,
    MAX: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    source = query_ptr + (row // NUM_HEADS).to(tl.int64) * stride_token + (row % NUM_HEADS) * stride_head
    k = tl.arange(0, PADDED)
    x = tl.zeros([ROWS, PADDED], tl.float32)
    for start in tl.static_range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        q = tl.load(source[:, None] + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
        m = tl.load(matrix_ptr + k[None, :] * D + d[:, None], mask=(k < D)[None, :] & (d < D)[:, None], other=0)
        x += dot(q, m.to(tl.float32).to(q.dtype))
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    x = x * (MAX / largest)[:, None]
    to = row.to(tl.int64)[:, None] * D + k[None, :]
    keep = in_rows[:, None] & (k < D)[None, :]
    tl.store(scale_ptr + row, largest * (unit / MAX), mask=in_rows)
    if FIXED:
        fixed = tl.floor(x + 0.5).to(tl.int32)
        low = ((fixed + 128) & 255) - 128
        tl.store(high_ptr + to, ((fixed - low) >> 8).to(tl.int8), mask=keep)
        tl.store(low_ptr + to, low.to(tl.int8), mask=keep)
        tl.store(offset_ptr + row, tl.sum(fixed, 1) >> 1, mask=in_rows)
    else:
        tl.store(high_ptr + to, x.to(tl.float16), mask=keep)


def rotate_queries(
    query: torch.Tensor,
    matrix: torch.Tensor,
    unit: float,
    high: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Rows of `matrix` times each query, as high * scale / unit (or (256 high + low) * scale / unit, with `low` given).

    A score in bits is then <coordinates, level + 1/2> * scale * (the key's stored scale).

    Args: query [num_tokens, num_heads, head_size]; matrix [head_size, head_size] int8 +-1, sqrt(head_size) times a rotation;
          unit: softmax scale * log2(e) * codebook step / sqrt(head_size); high [num_tokens * num_heads, head_size] fp16, or
          int8 with low, of the same shape; offset [num_tokens * num_heads] int32, half the sum of the coordinates;
          scale [num_tokens * num_heads] fp32; overlap: the next kernel may start before this one ends (NVIDIA Hopper)
    """
    num_tokens, num_heads, head_size = query.shape
    padded = triton.next_power_of_2(head_size)
    num_rows = num_tokens * num_heads
    fixed = low is not None
    _rotate_queries_kernel[(triton.cdiv(num_rows, ROWS),)](
        query,
        matrix,
        high,
        low if fixed else high,
        offset if fixed else scale,
        scale,
        num_rows,
        unit,
        query.stride(0),
        query.stride(1),
        NUM_HEADS=num_heads,
        D=head_size,
        PADDED=padded,
        CHUNK=min(64, padded),
        FIXED=fixed,
        MAX=FIXED_MAX if fixed else 1.0,
        ROWS=ROWS,
        OVERLAP=overlap,
        num_warps=4,
    )


@functools.cache
def rotation_signs(head_size: int, order: tuple[int, ...] | None, device: torch.device) -> torch.Tensor:
    """sqrt(head_size) times the rotation, coordinates (rows) in `order`: [head_size, head_size] int8, entries +-1."""
    with torch.device("cpu"):
        matrix = hadamard_transform(torch.eye(head_size, dtype=torch.float32)).T
        return matrix[list(order or range(head_size))].to(torch.int8).contiguous().to(device)
