"""Joins the partials of each query: those over packed pages, rotated back, and the one over exact positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16
CHUNK = 64  # output channels of one product: bounds the shared memory that the matrix takes


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_splits_kernel(
    part_ptr,       # [num_splits, num_rows, D] fp32, rotated
    lse_ptr,        # [num_splits, num_rows] fp32
    exact_ptr,      # [num_rows, D] fp32, raw
    exact_lse_ptr,  # [num_rows] fp32
    matrix_ptr,     # [D, D] int8: coordinate by channel
    out_ptr,        # [num_tokens, NUM_HEADS, D]
    num_rows, num_splits, inverse_root,
    stride_token: tl.int64, stride_head: tl.int64,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    real = row < num_rows
    k = tl.arange(0, PADDED)
    keep = real[:, None] & (k < D)[None, :]
    exact_lse = tl.load(exact_lse_ptr + row, mask=real, other=0.0)
    total = tl.zeros([M, PADDED], tl.float32)
    weight = tl.zeros([M], tl.float32)
    base = exact_lse
    at = row.to(tl.int64)
    for _ in range(0, num_splits):
        lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
        part = tl.load(part_ptr + at[:, None] * D + k[None, :], mask=keep & (lse > float("-inf"))[:, None], other=0.0)
        above = tl.maximum(base, lse)
        stay, add = tl.exp2(base - above), tl.exp2(lse - above)
        total = total * stay[:, None] + part * add[:, None]
        weight = weight * stay + add
        base = above
        at += num_rows
    add = tl.exp2(exact_lse - base)
    inverse = 1.0 / (weight + add)
    # two fp16 halves of a row in units of its largest coordinate: exact to 2^-22
    unit = tl.maximum(tl.max(tl.abs(total), 1), 1e-30)
    total = total / unit[:, None]
    high = total.to(tl.float16)
    low = (total - high.to(tl.float32)).to(tl.float16)
    to = out_ptr + (row // NUM_HEADS).to(tl.int64) * stride_token + (row % NUM_HEADS) * stride_head
    for start in tl.static_range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        m = tl.load(matrix_ptr + k[:, None] * D + d[None, :], mask=(k < D)[:, None] & (d < D)[None, :], other=0)
        m = m.to(tl.float16)
        raw = (tl.dot(high, m) + tl.dot(low, m)) * (unit * inverse_root)[:, None]
        keep = real[:, None] & (d < D)[None, :]
        exact = tl.load(exact_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=keep, other=0.0)
        out = (raw + exact * add[:, None]) * inverse[:, None]
        tl.store(to[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=keep)


def merge_splits(
    parts: torch.Tensor,
    lse: torch.Tensor,
    exact: torch.Tensor,
    exact_lse: torch.Tensor,
    matrix: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Join decode.py's partials with exact.py's.

    Args: parts [num_splits, num_rows, head_size], lse [num_splits, num_rows] fp32; exact [num_rows, head_size], exact_lse
          [num_rows] fp32; matrix [head_size, head_size] int8, sqrt(head_size) times the rotation (coordinate by channel);
          out [num_tokens, num_heads, head_size], num_rows = num_tokens * num_heads
    """
    num_tokens, num_heads, head_size = out.shape
    _merge_splits_kernel[(triton.cdiv(num_tokens * num_heads, ROWS),)](
        parts,
        lse,
        exact,
        exact_lse,
        matrix,
        out,
        lse.shape[1],
        lse.shape[0],
        head_size**-0.5,
        out.stride(0),
        out.stride(1),
        NUM_HEADS=num_heads,
        D=head_size,
        PADDED=triton.next_power_of_2(head_size),
        CHUNK=CHUNK,
        M=ROWS,
        num_warps=4,
    )
