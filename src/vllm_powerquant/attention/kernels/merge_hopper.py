"""Joins the partials of decode_hopper.py: exact ones, and packed ones, which it rotates back in registers (Gluon)."""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from .common_hopper import ex2
from .hadamard_hopper import butterflies, scaled_signs
from .plan import run_of, run_start

MAX_WARPS = 4


@gluon.jit
def _located(
    entry, segment, real, total, num_runs, tiles_ptr, cost_ptr, HEADS: gl.constexpr, COST: gl.constexpr, L: gl.constexpr
):
    """Where the partials of each row [ROWS] lie, for one entry of the plan (exact or packed tokens).

    Args: entry, segment, real: the row's entry, segment of it, and whether there is such a row
    Returns, in layout L: first run; 1 if its partial is not that run's first; number of partials; where the segment begins;
    and the partial's place if there is only one
    """
    tiles = gl.load(tiles_ptr + entry, mask=real, other=0)
    begin = gl.load(cost_ptr + entry, mask=real, other=0) + segment * (tiles + COST)
    first = run_of(begin + COST, total, num_runs)
    last = run_of(begin + COST + tiles - 1, total, num_runs)
    later = run_start(first, total, num_runs) < begin
    count = gl.where(real & (tiles > 0), last - first + 1, 0)
    return (
        gl.convert_layout(first, L),
        gl.convert_layout(later.to(gl.int32), L),
        gl.convert_layout(count, L),
        gl.convert_layout(begin, L),
        gl.convert_layout(2 * num_runs + entry * HEADS + segment, L),
    )


@gluon.jit
def _fetch(
    place, sub, at, total, num_runs, part_ptr, lse_ptr,
    BLOCK_ROWS: gl.constexpr, COST: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, L3: gl.constexpr,
):  # fmt: skip
    """Partials at .. at + PARTS of each row: lse [PARTS, ROWS], -inf where there is none, and [PARTS, ROWS, D].

    Args: place: from _located; sub [ROWS]: the row's place in a partial's block
    """
    L: gl.constexpr = gl.SliceLayout(2, L3)
    first, later, count, begin, own = place
    k = at + gl.arange(0, PARTS, layout=gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    run = first[None, :] + k
    index = gl.where(count[None, :] == 1, own[None, :], 2 * run + gl.where(k == 0, later[None, :], 0))
    # runs may be empty when there are more of them than tiles
    held = (k < count[None, :]) & (
        gl.maximum(run_start(run, total, num_runs), begin[None, :] + COST) < run_start(run + 1, total, num_runs)
    )
    slot = index.to(gl.int64) * BLOCK_ROWS + sub[None, :]
    lse = gl.load(lse_ptr + slot, mask=held, other=float("-inf"))
    part = gl.load(part_ptr + slot[:, :, None] * D + d[None, None, :], mask=held[:, :, None], other=0.0)
    # or each load would be issued where its result is used, one after the other
    gl.thread_barrier()
    return lse, part


@gluon.jit
def _add(base, weight, acc, lse, part, WARPS: gl.constexpr, L3: gl.constexpr):
    """Sums of a warp so far [WARPS, ROWS, ..], relative to base, and what _fetch returns -> the sums with it."""
    SHARE: gl.constexpr = lse.shape[0] // WARPS
    L: gl.constexpr = gl.SliceLayout(2, L3)
    lse = lse.reshape([SHARE, WARPS, lse.shape[1]])
    part = part.reshape([SHARE, WARPS, part.shape[1], part.shape[2]])
    above = gl.maximum(base, gl.convert_layout(gl.max(lse, 0), L, assert_trivial=True))
    stay = ex2(base - above)
    add = ex2(lse - gl.convert_layout(above, gl.SliceLayout(0, lse.type.layout), assert_trivial=True)[None, :, :])
    weight = weight * stay + gl.convert_layout(gl.sum(add, 0), L, assert_trivial=True)
    add = gl.convert_layout(add, gl.SliceLayout(3, part.type.layout), assert_trivial=True)
    return (
        above,
        weight,
        acc * stay[:, :, None] + gl.convert_layout(gl.sum(part * add[:, :, :, None], 0), L3, assert_trivial=True),
    )


@gluon.jit(do_not_specialize=["num_requests"])
def _merge_kernel(
    part_ptr,         # [2 * num_runs + 2 * num_requests * HEADS, BLOCK_ROWS, D] fp32: exact ones raw, packed ones rotated
    lse_ptr,          # [.., BLOCK_ROWS] fp32
    signs_ptr,        # [D] fp32, scaled_signs
    out_ptr,          # [num_tokens, num_heads, D]
    cost_ptr,         # [2 * num_requests + 1] int32
    tiles_ptr,        # [2 * num_requests] int32
    query_start_ptr,  # [num_requests + 1] int32
    num_requests, num_runs,
    stride_token: gl.int64, stride_head: gl.int64,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROW_BLOCKS: gl.constexpr, BLOCK_ROWS: gl.constexpr, D: gl.constexpr,
    COST: gl.constexpr, MAX_QUERIES: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, MANY: gl.constexpr,
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
    LR: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L3))
    i = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=LROW)
    j = i % BLOCK
    head = i // BLOCK % KV_HEADS
    b = i // (BLOCK * KV_HEADS)
    inside = b < num_requests
    start = gl.load(query_start_ptr + b, mask=inside, other=0)
    end = gl.load(query_start_ptr + b + 1, mask=inside, other=0)
    total = gl.load(cost_ptr + 2 * num_requests)
    segment = head * ROW_BLOCKS + j // BLOCK_ROWS
    sub = gl.convert_layout(j % BLOCK_ROWS, LR)
    real = start + j // GROUP < end
    exact = _located(b, segment, real, total, num_runs, tiles_ptr, cost_ptr, HEADS, COST, LR)
    packed = _located(num_requests + b, segment, real, total, num_runs, tiles_ptr, cost_ptr, HEADS, COST, LR)
    exact_count, packed_count = gl.max(exact[2], 0), gl.max(packed[2], 0)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, L2))
    signs = gl.load(signs_ptr + d)
    gdc_wait()
    # each warp sums up its own share
    LPART: gl.constexpr = gl.SliceLayout(2, L3)
    base_e = gl.full([WARPS, ROWS], -1e30, gl.float32, layout=LPART)
    weight_e = gl.zeros([WARPS, ROWS], gl.float32, layout=LPART)
    acc_e = gl.zeros([WARPS, ROWS, D], gl.float32, layout=L3)
    base_p, weight_p, acc_p = base_e, weight_e, acc_e
    lse_e, part_e = _fetch(exact, sub, 0, total, num_runs, part_ptr, lse_ptr, BLOCK_ROWS, COST, WARPS, D, L3)
    done = 0
    if MANY > PARTS:
        # a long context first, with more in flight
        done = packed_count // MANY * MANY
        for at in range(0, done, MANY):
            lse, part = _fetch(packed, sub, at, total, num_runs, part_ptr, lse_ptr, BLOCK_ROWS, COST, MANY, D, L3)
            base_p, weight_p, acc_p = _add(base_p, weight_p, acc_p, lse, part, WARPS, L3)
    for at in range(done, packed_count, PARTS):
        lse, part = _fetch(packed, sub, at, total, num_runs, part_ptr, lse_ptr, BLOCK_ROWS, COST, PARTS, D, L3)
        base_p, weight_p, acc_p = _add(base_p, weight_p, acc_p, lse, part, WARPS, L3)
    base_e, weight_e, acc_e = _add(base_e, weight_e, acc_e, lse_e, part_e, WARPS, L3)
    for at in range(WARPS, exact_count, WARPS):
        lse_e, part_e = _fetch(exact, sub, at, total, num_runs, part_ptr, lse_ptr, BLOCK_ROWS, COST, WARPS, D, L3)
        base_e, weight_e, acc_e = _add(base_e, weight_e, acc_e, lse_e, part_e, WARPS, L3)
    # warps meet once, at the end
    above = gl.maximum(gl.max(base_e, 0), gl.max(base_p, 0))[None, :]
    share_e = ex2(base_e - above)
    share_p = ex2(base_p - above)
    weight = gl.convert_layout(gl.sum(weight_e * share_e, 0) + gl.sum(weight_p * share_p, 0), LROW)
    raw = gl.sum(acc_e * share_e[:, :, None], 0)
    # channel bits in registers first, then those that were spread over lanes
    x = butterflies(gl.sum(acc_p * share_p[:, :, None], 0), REG_BITS)
    TURN: gl.constexpr = max(WIDTH, LANES)
    LTURN: gl.constexpr = gl.BlockedLayout([1, TURN], [32 * TURN // D, D // TURN], [1, WARPS], [1, 0])
    x = gl.convert_layout(x, LTURN)
    x = butterflies(x, LANE_BITS)
    x = gl.convert_layout(x, L2)
    out = (x * signs[None, :] + raw) / gl.where(real, weight, 1.0)[:, None]
    token = (start + j // GROUP).to(gl.int64)
    to = out_ptr + token * stride_token + (head * GROUP + j % GROUP) * stride_head
    gl.store(to[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])


def launch_shape(num_runs: int, num_segments: int) -> tuple[int, int]:
    """(warps, rows) of a program, by how many runs a segment spans (H200, 2026-11-26)."""
    runs = num_runs // num_segments
    if runs < 2:
        return 1, 4
    return (1, 1) if runs < 16 else (MAX_WARPS, 1)


def merge_runs(
    parts: torch.Tensor,
    lse: torch.Tensor,
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
    """Join decode_hopper.py's partials, of a step in which every request has at most max_query_len queries.

    Args: parts [2 * num_runs + 2 * num_requests * num_kv_heads * row_blocks, 8 * R, head_size], lse [.., 8 * R] fp32;
          cost [2 * num_requests + 1], tiles [2 * num_requests] int32 from plan_runs; out [num_tokens, num_heads, head_size]
    """
    num_requests, num_heads, head_size = tiles.shape[0] // 2, out.shape[1], out.shape[2]
    num_rows = num_requests * max_query_len * num_heads
    warps, rows = launch_shape(num_runs, num_requests * num_kv_heads * row_blocks)
    in_flight = 2 if rows == 4 else (4 if warps > 1 else 8)  # partials a warp
    parts_at_once = warps * max(1, in_flight * 128 // max(head_size, 128))
    lanes = 32 // rows
    _merge_kernel[(triton.cdiv(num_rows, rows),)](
        parts,
        lse,
        scaled_signs(head_size, out.device),
        out,
        cost,
        tiles,
        query_start_loc,
        num_requests,
        num_runs,
        out.stride(0),
        out.stride(1),
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        ROW_BLOCKS=row_blocks,
        BLOCK_ROWS=parts.shape[1],
        D=head_size,
        COST=segment_cost,
        MAX_QUERIES=max_query_len,
        ROWS=rows,
        PARTS=parts_at_once,
        MANY=4 * parts_at_once if warps == MAX_WARPS else 0,
        LANE_BITS=lanes.bit_length() - 1,
        REG_BITS=(head_size // lanes).bit_length() - 1,
        WARPS=warps,
        num_warps=warps,
        launch_pdl=True,
    )
