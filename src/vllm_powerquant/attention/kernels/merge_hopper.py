"""Joins the partials of decode_hopper.py and exact_hopper.py, rotated back in registers (Gluon)."""

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from ..rotation import random_signs
from .plan import run_of, run_start

MAX_WARPS = 8


@gluon.jit
def _butterflies(x, BITS: gl.constexpr):
    """BITS steps of the Hadamard transform of [ROWS, D]: each takes the lowest bit of the channel and puts it on top."""
    for _ in gl.static_range(BITS):
        a, b = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
        x = gl.join(a + b, a - b).permute([0, 2, 1]).reshape([x.shape[0], x.shape[1]])
    return x


@gluon.jit(do_not_specialize=["num_requests", "num_rows"])
def _merge_kernel(
    part_ptr,         # [2 * num_runs + num_requests * HEADS, BLOCK_ROWS, D] fp32, rotated
    lse_ptr,          # [.., BLOCK_ROWS] fp32
    exact_ptr,        # [EXACT_PARTS, num_rows, D] fp32, raw
    exact_lse_ptr,    # [EXACT_PARTS, num_rows] fp32
    signs_ptr,        # [D] fp32: +-1 / sqrt(D)
    out_ptr,          # [num_tokens, num_heads, D]
    cost_ptr,         # [num_requests + 1] int32
    tiles_ptr,        # [num_requests] int32
    query_start_ptr,  # [num_requests + 1] int32
    num_requests, num_runs, num_rows,
    stride_token: gl.int64, stride_head: gl.int64,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROW_BLOCKS: gl.constexpr, BLOCK_ROWS: gl.constexpr, D: gl.constexpr,
    COST: gl.constexpr, MAX_QUERIES: gl.constexpr, EXACT_PARTS: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr,
    LANE_BITS: gl.constexpr, REG_BITS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    HEADS: gl.constexpr = KV_HEADS * ROW_BLOCKS
    BLOCK: gl.constexpr = MAX_QUERIES * GROUP
    LANES: gl.constexpr = 32 // ROWS
    WIDTH: gl.constexpr = D // LANES
    # a lane holds WIDTH consecutive channels of one row; warps share out the partials
    L3: gl.constexpr = gl.BlockedLayout([1, 1, WIDTH], [1, ROWS, LANES], [WARPS, 1, 1], [2, 1, 0])
    L2: gl.constexpr = gl.SliceLayout(0, L3)
    LROW: gl.constexpr = gl.SliceLayout(1, L2)
    LD: gl.constexpr = gl.SliceLayout(0, L2)
    LPART: gl.constexpr = gl.SliceLayout(2, L3)  # [PARTS, ROWS]
    i = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=LROW)
    j = i % BLOCK
    head = i // BLOCK % KV_HEADS
    b = i // (BLOCK * KV_HEADS)
    inside = b < num_requests
    start = gl.load(query_start_ptr + b, mask=inside, other=0)
    end = gl.load(query_start_ptr + b + 1, mask=inside, other=0)
    total = gl.load(cost_ptr + num_requests)
    tiles = gl.load(tiles_ptr + b, mask=inside, other=0)
    segment = head * ROW_BLOCKS + j // BLOCK_ROWS
    before = gl.load(cost_ptr + b, mask=inside, other=0) + segment * (tiles + COST)
    real = start + j // GROUP < end
    token = (start + j // GROUP).to(gl.int64)
    query_head = head * GROUP + j % GROUP
    row = token * (KV_HEADS * GROUP) + query_head
    d = gl.arange(0, D, layout=LD)
    gdc_wait()
    # the exact partials first: their addresses are known at once
    base = gl.full([ROWS], float("-inf"), gl.float32, layout=LROW)
    weight = gl.zeros([ROWS], gl.float32, layout=LROW)
    raw = gl.zeros([ROWS, D], gl.float32, layout=L2)
    for e in gl.static_range(EXACT_PARTS):
        exact_lse = gl.load(exact_lse_ptr + e * num_rows + row, mask=real, other=0.0)
        exact = gl.load(exact_ptr + (e * num_rows + row)[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
        above = gl.maximum(base, exact_lse)
        # a split without tokens and nothing before it
        safe = gl.where(above == float("-inf"), 0.0, above)
        stay = gl.exp2(base - safe)
        add = gl.exp2(exact_lse - safe)
        raw = raw * stay[:, None] + exact * add[:, None]
        weight = weight * stay + add
        base = above
    first = run_of(before + COST, total, num_runs)
    last = run_of(before + COST + tiles - 1, total, num_runs)
    later = run_start(first, total, num_runs) < before
    count = gl.where(real & (tiles > 0), last - first + 1, 0)
    c = gl.arange(0, PARTS, layout=gl.SliceLayout(1, LPART))
    LR: gl.constexpr = gl.SliceLayout(0, LPART)
    first = gl.convert_layout(first, LR)[None, :]
    later = gl.convert_layout(later.to(gl.int32), LR)[None, :]
    parts = gl.convert_layout(count, LR)[None, :]
    before = gl.convert_layout(before, LR)[None, :]
    own = gl.convert_layout(2 * num_runs + b * HEADS + segment, LR)[None, :]
    sub = gl.convert_layout(j % BLOCK_ROWS, LR)[None, :]
    d3 = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    # each of PARTS places sums up its own share, so that warps meet once, at the end
    base3 = gl.full([PARTS, ROWS], -1e30, gl.float32, layout=LPART)
    weight3 = gl.zeros([PARTS, ROWS], gl.float32, layout=LPART)
    acc3 = gl.zeros([PARTS, ROWS, D], gl.float32, layout=L3)
    for at in range(0, gl.max(count, 0), PARTS):
        k = at + c[:, None]
        run = first + k
        index = gl.where(parts == 1, own, 2 * run + gl.where(k == 0, later, 0))
        # runs may be empty when there are more of them than tiles
        held = (k < parts) & (
            gl.maximum(run_start(run, total, num_runs), before + COST) < run_start(run + 1, total, num_runs)
        )
        slot = index.to(gl.int64) * BLOCK_ROWS + sub
        lse = gl.load(lse_ptr + slot, mask=held, other=float("-inf"))
        part = gl.load(part_ptr + slot[:, :, None] * D + d3[None, None, :], mask=held[:, :, None], other=0.0)
        above3 = gl.maximum(base3, lse)
        stay3 = gl.exp2(base3 - above3)
        w = gl.exp2(lse - above3)
        acc3 = acc3 * stay3[:, :, None] + part * w[:, :, None]
        weight3 = weight3 * stay3 + w
        base3 = above3
    above = gl.maximum(base, gl.convert_layout(gl.max(base3, 0), LROW))
    share = gl.exp2(base3 - gl.convert_layout(above, LR)[None, :])
    rotated = gl.sum(acc3 * share[:, :, None], 0)
    stay = gl.exp2(base - above)
    raw = raw * stay[:, None]
    weight = weight * stay + gl.convert_layout(gl.sum(weight3 * share, 0), LROW)
    # channel bits in registers first, then those that were spread over lanes
    x = _butterflies(rotated, REG_BITS)
    TURN: gl.constexpr = max(WIDTH, LANES)
    LTURN: gl.constexpr = gl.BlockedLayout([1, TURN], [32 * TURN // D, D // TURN], [1, WARPS], [1, 0])
    x = gl.convert_layout(x, LTURN)
    x = _butterflies(x, LANE_BITS)
    x = gl.convert_layout(x, L2)
    signs = gl.load(signs_ptr + d)
    out = (x * signs[None, :] + raw) / gl.where(real, weight, 1.0)[:, None]
    to = out_ptr + token * stride_token + query_head * stride_head
    gl.store(to[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@functools.cache
def _signs(head_size: int, device: torch.device) -> torch.Tensor:
    return (random_signs(head_size) * head_size**-0.5).to(device)


def num_warps(num_runs: int, num_segments: int) -> int:
    """A warp for each few partials that a segment has, about."""
    return min(MAX_WARPS, max(1, triton.next_power_of_2(num_runs // num_segments + 2) // 4))


def merge_runs(
    parts: torch.Tensor,
    lse: torch.Tensor,
    exact: torch.Tensor,
    exact_lse: torch.Tensor,
    out: torch.Tensor,
    cost: torch.Tensor,
    tiles: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    num_runs: int,
    num_kv_heads: int,
    row_blocks: int,
    segment_cost: int,
) -> None:
    """Join decode_hopper.py's partials with exact_hopper.py's.

    Args: parts [2 * num_runs + num_requests * num_kv_heads * row_blocks, 8 * R, head_size], lse [.., 8 * R] fp32; exact [n,
          num_rows, head_size], exact_lse [n, num_rows] fp32, num_rows = num_tokens * num_heads; cost [num_requests + 1],
          tiles [num_requests] int32 from plan_runs; out [num_tokens, num_heads, head_size]
    """
    num_requests, num_heads, head_size = tiles.shape[0], out.shape[1], out.shape[2]
    num_rows = num_requests * max_query_len * num_heads
    warps = num_warps(num_runs, num_requests * num_kv_heads * row_blocks)
    if warps == MAX_WARPS:
        # few segments with many partials each: a row a program, for more programs
        rows, in_flight = 1, 8
    else:
        rows, in_flight = 4, 4 if warps > 1 else 2
    lanes = 32 // rows
    _merge_kernel[(triton.cdiv(num_rows, rows),)](
        parts,
        lse,
        exact,
        exact_lse,
        _signs(head_size, out.device),
        out,
        cost,
        tiles,
        query_start_loc,
        num_requests,
        num_runs,
        exact.shape[1],
        out.stride(0),
        out.stride(1),
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        ROW_BLOCKS=row_blocks,
        BLOCK_ROWS=parts.shape[1],
        D=head_size,
        COST=segment_cost,
        MAX_QUERIES=max_query_len,
        EXACT_PARTS=exact.shape[0],
        ROWS=rows,
        PARTS=warps * max(1, in_flight * 128 // max(head_size, 128)),
        LANE_BITS=lanes.bit_length() - 1,
        REG_BITS=(head_size // lanes).bit_length() - 1,
        WARPS=warps,
        num_warps=warps,
        launch_pdl=True,
    )
