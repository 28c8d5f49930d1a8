"""Queries for the portable packed kernel: rotated, scaled by their largest coordinate, in fp16."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..rotation import hadamard_transform
from .common import dot

ROWS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_queries_kernel(
    query_ptr,   # [num_tokens, NUM_HEADS, D]
    matrix_ptr,  # [D, D] int8, +-1: output coordinate by input channel
    frame_ptr,   # [NUM_HEADS / GROUP, 3, D] fp32: centre, scale, 1 / scale
    out_ptr,     # [num_tokens * NUM_HEADS, D] fp16
    scale_ptr,   # [num_tokens * NUM_HEADS] fp32
    num_rows,
    unit,
    stride_token: tl.int64, stride_head: tl.int64,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_FRAME: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    source = query_ptr + (row // NUM_HEADS).to(tl.int64) * stride_token + (row % NUM_HEADS) * stride_head
    k = tl.arange(0, PADDED)
    x = tl.zeros([ROWS, PADDED], tl.float32)
    for start in tl.static_range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        q = tl.load(source[:, None] + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
        if HAS_FRAME:
            inverse = frame_ptr + (row % NUM_HEADS // GROUP) * (3 * D) + 2 * D
            # a power of two: exact
            q = q * tl.load(inverse[:, None] + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0).to(q.dtype)
        m = tl.load(matrix_ptr + k[None, :] * D + d[:, None], mask=(k < D)[None, :] & (d < D)[:, None], other=0)
        x += dot(q, m.to(tl.float32).to(q.dtype))
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    to = row.to(tl.int64)[:, None] * D + k[None, :]
    tl.store(scale_ptr + row, largest * unit, mask=in_rows)
    tl.store(out_ptr + to, (x / largest[:, None]).to(tl.float16), mask=in_rows[:, None] & (k < D)[None, :])


def rotate_queries(
    query: torch.Tensor,
    matrix: torch.Tensor,
    unit: float,
    out: torch.Tensor,
    scale: torch.Tensor,
    key_frame: torch.Tensor | None = None,
) -> None:
    """Rows of `matrix` times each query in the keys' frame, as out * scale / unit.

    A score in bits is then <out, level + 1/2> * scale * (the key's stored scale).

    Args: query [num_tokens, num_heads, head_size]; matrix [head_size, head_size] int8 +-1, sqrt(head_size) times a rotation;
          unit: softmax scale * log2(e) / sqrt(head_size); out [num_tokens * num_heads, head_size] fp16; scale [num_tokens *
          num_heads] fp32; key_frame [num_kv_heads, 3, head_size] fp32
    """
    num_tokens, num_heads, head_size = query.shape
    padded = triton.next_power_of_2(head_size)
    num_rows = num_tokens * num_heads
    _rotate_queries_kernel[(triton.cdiv(num_rows, ROWS),)](
        query,
        matrix,
        matrix if key_frame is None else key_frame,
        out,
        scale,
        num_rows,
        unit,
        query.stride(0),
        query.stride(1),
        NUM_HEADS=num_heads,
        GROUP=1 if key_frame is None else num_heads // key_frame.shape[0],
        HAS_FRAME=key_frame is not None,
        D=head_size,
        PADDED=padded,
        CHUNK=min(64, padded),
        ROWS=ROWS,
        num_warps=4,
    )


@functools.cache
def rotation_signs(head_size: int, device: torch.device) -> torch.Tensor:
    """sqrt(head_size) times the rotation: [head_size, head_size] int8, entries +-1, coordinate by channel."""
    with torch.device("cpu"):
        return hadamard_transform(torch.eye(head_size, dtype=torch.float32)).T.to(torch.int8).contiguous().to(device)
