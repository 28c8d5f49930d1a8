"""Attention of few queries on NVIDIA Hopper: programs of one or two warps, integer tensor cores (Gluon, inline PTX).

The portable kernels, exact.py and decode.py, compute the same partials from the same bytes; which run is decided in
gpu_kernels.py. What a page holds is layout.py's; the numbers here are its 64-token sub-pages ("tiles").

- A program never meets another. All (request, kv head, row block) segments of the batch are laid end to end, first those of
  exact tokens (exact_hopper.py), then those of packed ones, each `tiles + SEGMENT_COST` long, and cut into equal runs, one a
  program (stream-K), so ragged batches have no tail. A segment within one run leaves one partial, a segment cut by run
  borders one in each run.
- Eight query rows are one warp's work, sixteen that of two (if unpack_hopper.max_warps allows it), which share what is
  unpacked: each computes the scores of half the tokens and the outputs of half the channels, so the weights of a tile pass
  through shared memory.
- Queries are rotated by the program that needs them, while its first tile is on its way (queries_hopper.py).
- Scores   S[16, 64] = Q[16, D] K[D, 64] by mma.sync m16n8k32 in s8: of each 16 rows the first 8 hold the high bytes of a
  16-bit fixed-point q of 8 rows, the others its low bytes, so that 256 hi + lo joins them in the lane that holds both.
  Keys are unpacked in parts of the channels (unpack_hopper.key_parts): all of a tile's at once would not fit the registers.
- Outputs  O[16, D] += P[16, 64] V[64, D] in the same way: p is 15-bit fixed point below a maximum that moves only when a
  tile overflows it. s32 accumulators are exact, so nothing else rescales them. Rounding is dithered by position: with a
  sink that takes most of the weight, a tail of many p below half a unit still counts.
- The registers of S are those of P: only the order of the 64 tokens differs, and that order is stored in the page
  (layout.token_positions). Every convert_layout says assert_trivial: it renames registers and moves nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

from ..cache_format import CacheFormat
from ..layout import SUB_PAGE_TOKENS
from .common_hopper import ex2, in_register, lg2, split_bytes
from .cpu_kernels import ExactBlocks
from .exact_hopper import attend_exact
from .hadamard_hopper import scaled_signs
from .plan import EXACT_TOKENS, RUN_FIELDS, load_entry, load_run
from .queries_hopper import load_queries, rotated_queries, sum_of_fixed
from .unpack_hopper import (
    first_table,
    in_key_order,
    key_asm,
    key_channel_dims,
    key_parts,
    key_width,
    lane_before,
    load_keys,
    load_values,
    max_warps,
    top_field_sums,
    value_asm,
    value_channel,
)

SEGMENT_COST = 5  # tiles that entering a segment costs: query, first copies, first maximum (H200, 2026-11-24)


@functools.cache
def _layouts(row_sets: int, warps: int) -> tuple[gl.NVMMADistributedLayout, gl.DistributedLinearLayout, ...]:
    """Scores and outputs [16 * row_sets, ..]; p [8 * row_sets, 64 positions]; a lane's part of each row's sum [8 * row_sets,
    4 * warps]."""
    lanes = [[1, 0], [2, 0], [4, 0]]
    sets = [[8, 0]] * (row_sets - 1)
    # of each 16 positions, which a lane of one warp holds in one row, each warp has its share
    share = 16 // warps
    p = gl.DistributedLinearLayout(
        reg_bases=[[0, 1 << i] for i in range(4) if 1 << i < share] + sets,
        lane_bases=[[0, 16], [0, 32], *lanes],
        warp_bases=[[0, 1 << i] for i in range(4) if 1 << i >= share],
        block_bases=[],
        shape=[8 * row_sets, 64],
    )
    sums = gl.DistributedLinearLayout(
        reg_bases=sets,
        lane_bases=[[0, warps], [0, 2 * warps], *lanes],
        warp_bases=[[0, 1 << i] for i in range(2) if 1 << i < warps],
        block_bases=[],
        shape=[8 * row_sets, 4 * warps],
    )
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, warps], instr_shape=[16, 8]), p, sums


# A weight n is read from bytes 1 and 2 of n + 2^15 + 128 + 1/2 as fp32, whose byte 0 is a fraction. From n = 32,640 on, the
# first whose high byte is not one of a signed product, that is 2^16 or more. A moved maximum is placed at 2^13.
_WEIGHT = gl.constexpr(32768.0 + 128.0 + 0.5)
_OVERFLOW = gl.constexpr(0x47800000)
_PLACE = gl.constexpr(13.0)
_SHIFT = gl.constexpr(
    # the low part without its carry is the top byte of a second word
    "{ .reg .b32 h, w; shr.s32 h, $3, 8; add.s32 h, $2, h; shl.b32 w, $3, 24; shf.r.clamp.b32 w, w, h, $4; "
    "shr.u32 $1, w, 24; shr.s32 $0, h, $4; }"
)


@gluon.jit
def _copy_plane(
    smem, base, mask, ROWS: gl.constexpr, WIDTH: gl.constexpr, LANE_BYTES: gl.constexpr, SHARES: gl.constexpr = 1
):
    """Start the copy of ROWS x WIDTH bytes. Of their blocks of 8 rows, the first 1 / SHARES land in every SHARES-th place:
    one of as many warps, each of which multiplies every SHARES-th block, gets them."""
    ACROSS: gl.constexpr = max(1, WIDTH // LANE_BYTES)
    L: gl.constexpr = gl.BlockedLayout([1, min(LANE_BYTES, WIDTH)], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    if SHARES > 1:
        r = r // (8 * SHARES) * 8 + r // 8 % SHARES * (ROWS // SHARES) + r % 8
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    async_copy.async_copy_global_to_shared(smem, base + r[:, None] * WIDTH + c[None, :], mask=mask)


@gluon.jit
def _copy_tile(
    k0, k1, v0, v1, n, page, t, t1,
    D: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr, BLOCK_TILES: gl.constexpr,
):  # fmt: skip
    """Start the copy of tile t, if it is below t1, from its page to a stage of shared memory."""
    K0: gl.constexpr = D * (2 if KEY_BITS == 3 else KEY_BITS) // 8
    V0: gl.constexpr = D * (2 if VALUE_BITS == 3 else VALUE_BITS) // 8
    KEYS: gl.constexpr = 8 * D * KEY_BITS  # bytes of all keys of a tile
    VALUES: gl.constexpr = 8 * D * VALUE_BITS
    TILE: gl.constexpr = KEYS + VALUES + 256
    base = page + (t % BLOCK_TILES) * TILE
    ok = t < t1
    _copy_plane(k0, base, ok, 64, K0, 16, gl.num_warps())
    if KEY_BITS == 3:
        _copy_plane(k1, base + 64 * K0, ok, 64, D // 8, 16, gl.num_warps())
    _copy_plane(v0, base + KEYS, ok, V0, 64, 16)
    if VALUE_BITS == 3:
        _copy_plane(v1, base + KEYS + 64 * V0, ok, D // 8, 64, 16)
    L: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    scales = (base + KEYS + VALUES).to(gl.pointer_type(gl.float16))
    async_copy.async_copy_global_to_shared(n, scales + gl.arange(0, 128, layout=L), mask=ok)
    async_copy.commit_group()


@gluon.jit
def _by_position(s, R: gl.constexpr, W: gl.constexpr, LP: gl.constexpr):
    """Scores [16 R, 64 tokens] s32, rows (high, low bytes) of 8 -> 256 high + low [8 R, 64 positions]."""
    s = s.reshape([R, 2, 8, 8 // W, W, 4, 2]).permute([0, 2, 5, 4, 3, 6, 1]).reshape([8 * R, 64, 2])
    hi, lo = gl.split(s)
    return gl.convert_layout(hi, LP, assert_trivial=True) * 256 + gl.convert_layout(lo, LP, assert_trivial=True)


@gluon.jit
def _lane_sums(p, R: gl.constexpr, W: gl.constexpr, LSUM: gl.constexpr):
    return gl.convert_layout(gl.sum(p.reshape([8 * R, 4 * W, 16 // W]), 2), LSUM, assert_trivial=True)


@gluon.jit
def _largest(weights, smem, R: gl.constexpr, W: gl.constexpr):
    """The largest of a program's weights [8 R, 64]. smem [W, 32] int32."""
    if W == 1:
        return gl.max(weights.reshape([512 * R]), 0)
    else:
        # a lane's own, then every warp reads all: one barrier instead of a reduction's two
        own = gl.max(gl.max(weights.reshape([R, 8, 4, W, 16 // W]), 4), 0)
        smem.store(own.permute([2, 0, 1]).reshape([W, 32]))
        L: gl.constexpr = gl.BlockedLayout([W, 1], [1, 32], [1, W], [0, 1])
        return gl.max(smem.load(L).reshape([32 * W]), 0)


@gluon.jit
def _weight_bytes(weights, smem, R: gl.constexpr, W: gl.constexpr, L: gl.constexpr):
    """[8 R, 64] words for split_bytes -> their bytes [16 R, 64], in every warp. smem [64 R, 16] int8."""
    high, low = split_bytes(weights, 1)
    if W == 1:
        return _join_halves(high, low, R, 64, L)
    else:
        # sixteen bytes, which are a lane's part of one mma operand, lie together
        x = _stacked(high, low, R, 64).reshape([R, 2, 8, 4, 2, 2, 4]).permute([0, 4, 2, 3, 5, 1, 6])
        smem.store(x.reshape([64 * R, 16]))
        LALL: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, W], [1, 0])
        x = smem.load(LALL).reshape([R, 2, 8, 4, 2, 2, 4]).permute([0, 5, 2, 3, 1, 4, 6]).reshape([16 * R, 64])
        return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def _halves(a, R: gl.constexpr, N: gl.constexpr):
    """[16 R, N] -> the high and the low part of each row, [8 R, N]."""
    return gl.split(a.reshape([R, 2, 8, N]).permute([0, 2, 3, 1]).reshape([8 * R, N, 2]))


@gluon.jit
def _whole(a, R: gl.constexpr, N: gl.constexpr):
    hi, lo = _halves(a, R, N)
    return hi.to(gl.float32) * 256.0 + lo.to(gl.float32)


@gluon.jit
def _stacked(hi, lo, R: gl.constexpr, N: gl.constexpr):
    """[8 * R, N] twice -> [16 * R, N]: of each 16 rows, 8 of the first and 8 of the second."""
    return gl.join(hi, lo).reshape([R, 8, N, 2]).permute([0, 3, 1, 2]).reshape([16 * R, N])


@gluon.jit
def _join_halves(hi, lo, R: gl.constexpr, N: gl.constexpr, L: gl.constexpr):
    return gl.convert_layout(_stacked(hi, lo, R, N), L, assert_trivial=True)


@gluon.jit
def _shifted(a, shift, R: gl.constexpr, N: gl.constexpr, L: gl.constexpr):
    """Rows of 256 high + low divided by 2^shift [8 * R], rounded down."""
    hi, lo = _halves(a, R, N)
    shift = gl.convert_layout(shift, gl.SliceLayout(1, hi.type.layout))[:, None] + gl.zeros_like(hi)
    hi, lo = gl.inline_asm_elementwise(
        _SHIFT, "=r,=r,r,r,r", [hi, lo, shift], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return _join_halves(hi, lo, R, N, L)


@gluon.jit
def _segment(x, x_end, begin, tiles, COST: gl.constexpr):
    """(segment, t0, t1, take): the segment that x lies in, its tiles t0 .. t1 that belong to this run (none while the run
    ends within the cost of entering), and how far that takes the run."""
    segment = (x - begin) // (tiles + COST)
    start = x - begin - segment * (tiles + COST)
    take = gl.minimum(tiles + COST - start, x_end - x)
    return segment, gl.maximum(start - COST, 0), start + take - COST, take


@gluon.jit
def _next_request(b, end, num_entries, cost_ptr):
    """The first entry behind b that is not empty, or the last."""
    b += 1
    while (b < num_entries - 1) & (gl.load(cost_ptr + gl.minimum(b, num_entries - 1) + 1) == end):
        b += 1
    return gl.minimum(b, num_entries - 1)


@gluon.jit(do_not_specialize=["num_requests", "stride_table", "stride_exact_table"])
def _decode_kernel(
    query_ptr,         # [num_tokens, num_heads, D]
    key_ptr,           # [num_tokens, KV_HEADS, D], the step's own
    value_ptr,
    cache_ptr,         # uint8, pages
    block_table_ptr,   # [num_requests, ...] int32
    exact_ptr,         # [num_blocks, KV_HEADS, EXACT_BLOCK, 2 * D]
    exact_table_ptr,   # [num_requests, ...] int32, 0 = null block
    frame_ptr,         # [KV_HEADS, 3, D] fp32: centre, scale, 1 / scale
    signs_ptr,         # [D] fp32, scaled_signs
    tiles_ptr,         # [2 * num_requests] int32: units of exact tokens, then tiles of packed ones
    cost_ptr,          # [2 * num_requests + 1] int32, cost of the segments before each
    runs_ptr,          # [num_runs, RUN_FIELDS] int32
    query_start_ptr,   # [num_requests + 1] int32
    seq_lens_ptr,      # [num_requests] int32
    out_ptr,           # [2 * num_runs + 2 * num_requests * HEADS, 8 * R, D] fp32 partials: exact raw, packed rotated
    lse_ptr,           # [.., 8 * R] fp32, in bits (log2)
    scale, unit,
    num_requests, num_runs,
    stride_table, stride_exact_table,
    stride_q_token: gl.int64, stride_q_head: gl.int64, stride_k_token: gl.int64, stride_k_head: gl.int64,
    stride_v_token: gl.int64, stride_v_head: gl.int64,
    stride_block: gl.int64, stride_head: gl.int64,
    stride_exact: gl.int64, stride_exact_head: gl.int64,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROW_BLOCKS: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
    KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr, TRELLIS: gl.constexpr, VALUE_STEP: gl.constexpr,
    KEY_ASM: gl.constexpr, VALUE_ASM: gl.constexpr, KEY_TABLE: gl.constexpr, VALUE_TABLE: gl.constexpr,
    KEY_SHAPE: gl.constexpr, KEY_AXES: gl.constexpr,
    BLOCK_TILES: gl.constexpr, RESIDUAL: gl.constexpr, SINKS: gl.constexpr, EXACT_BLOCK: gl.constexpr,
    HAS_FRAME: gl.constexpr, EXACT_STAGES: gl.constexpr,
    STAGES: gl.constexpr, FIELDS: gl.constexpr, COST: gl.constexpr, KEY_PARTS: gl.constexpr,
    MMA: gl.constexpr, LP: gl.constexpr, LSUM: gl.constexpr, LKEY: gl.constexpr, LQUERY: gl.constexpr,
):  # fmt: skip
    K0: gl.constexpr = D * (2 if KEY_BITS == 3 else KEY_BITS) // 8  # bytes a token of the first key plane
    V0: gl.constexpr = D * (2 if VALUE_BITS == 3 else VALUE_BITS) // 8
    PART: gl.constexpr = D // KEY_PARTS  # channels of which the keys are in registers at once
    HEADS: gl.constexpr = KV_HEADS * ROW_BLOCKS
    W: gl.constexpr = gl.num_warps()
    LQ: gl.constexpr = gl.DotOperandLayout(0, MMA, LQUERY)
    LK: gl.constexpr = gl.DotOperandLayout(1, MMA, LKEY)
    LV: gl.constexpr = gl.DotOperandLayout(1, MMA, 16)
    LPA: gl.constexpr = gl.DotOperandLayout(0, MMA, 16)
    LROW: gl.constexpr = gl.SliceLayout(1, LP)
    LPOS: gl.constexpr = gl.SliceLayout(0, LP)
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    FLAT1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    QUERY_SHARED: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [1, 0])

    gdc_launch_dependents()
    run = gl.program_id(0)
    num_entries = 2 * num_requests
    x, x_end, b, tiles, begin, end, query0, queries, context = load_run(runs_ptr + run * FIELDS)
    key_table = in_register(KEY_TABLE)
    value_table = lane_before() if TRELLIS else in_register(VALUE_TABLE)
    slot = 0
    # the line's first part: exact tokens
    while (x < x_end) & (b < num_requests):
        segment, t0, t1, take = _segment(x, x_end, begin, tiles, COST)
        if t1 > t0:
            head = segment // ROW_BLOCKS
            row0 = (segment % ROW_BLOCKS) * (8 * R)
            out, lse = attend_exact(
                t0, t1, row0, query0, queries, context, head, exact_table_ptr + b.to(gl.int64) * stride_exact_table,
                query_ptr, key_ptr, value_ptr, exact_ptr, frame_ptr, scale,
                stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
                stride_exact, stride_exact_head,
                GROUP, 8 * R, D, EXACT_BLOCK, RESIDUAL, SINKS, HAS_FRAME, EXACT_STAGES, MMA,
            )  # fmt: skip
            if (t0 == 0) & (t1 == tiles):
                index = 2 * num_runs + b * HEADS + segment
            else:
                index = 2 * run + slot
            g = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
            col = gl.arange(0, D, layout=gl.SliceLayout(0, MMA))
            valid = ((row0 + g) // GROUP < queries) & (g < 8 * R)
            gl.store(out_ptr + (index * (8 * R) + g).to(gl.int64)[:, None] * D + col[None, :], out, mask=valid[:, None])
            gl.store(lse_ptr + index * (8 * R) + g, lse, mask=valid)
        slot = 1
        x += take
        if x >= end:
            b = _next_request(b, end, num_entries, cost_ptr)
            tiles, begin, end, query0, queries, context = load_entry(
                b, tiles_ptr, cost_ptr, query_start_ptr, seq_lens_ptr, num_requests
            )
    # its second part: packed tokens
    if x < x_end:
        k0 = gl.allocate_shared_memory(gl.uint8, [STAGES, 64, K0], FLAT2)
        v0 = gl.allocate_shared_memory(gl.uint8, [STAGES, V0, 64], FLAT2)
        n = gl.allocate_shared_memory(gl.float16, [STAGES, 128], FLAT1)
        if KEY_BITS == 3:
            k1 = gl.allocate_shared_memory(gl.uint8, [STAGES, 64, D // 8], FLAT2)
        else:
            k1 = k0
        if VALUE_BITS == 3:
            v1 = gl.allocate_shared_memory(gl.uint8, [STAGES, D // 8, 64], FLAT2)
        else:
            v1 = v0
        if 16 * R * D > 64 * K0:
            q_smem = gl.allocate_shared_memory(gl.int8, [16 * R, D], QUERY_SHARED)
        else:
            # where the last tile in flight is not yet on its way
            q_smem = k0.index(STAGES - 1)._reinterpret(gl.int8, [16 * R, D], QUERY_SHARED)
        # what warps exchange
        p_smem = gl.allocate_shared_memory(gl.int8, [64 * R, 16], FLAT2)
        top_smem = gl.allocate_shared_memory(gl.int32, [W, 32], FLAT2)
        while x < x_end:
            request = b - num_requests
            segment, t0, t1, take = _segment(x, x_end, begin, tiles, COST)
            if t1 > t0:
                head = segment // ROW_BLOCKS
                table = block_table_ptr + request.to(gl.int64) * stride_table
                exact_table = exact_table_ptr + request.to(gl.int64) * stride_exact_table
                pages = cache_ptr + head * stride_head
                plain_end = context
                if RESIDUAL > 0:
                    plain_end = context - RESIDUAL + 1
                row0 = (segment % ROW_BLOCKS) * (8 * R)
                raw_query, signs = load_queries(
                    query_ptr, signs_ptr, frame_ptr, row0, query0, queries, head, stride_q_token, stride_q_head,
                    GROUP, 8 * R, D, HAS_FRAME,
                )  # fmt: skip
                for s in gl.static_range(STAGES - 1):
                    page = gl.load(table + gl.minimum(t0 + s, tiles - 1) // BLOCK_TILES).to(gl.int64)
                    _copy_tile(
                        k0.index(s), k1.index(s), v0.index(s), v1.index(s), n.index(s),
                        pages + page * stride_block, t0 + s, t1, D, KEY_BITS, VALUE_BITS, BLOCK_TILES,
                    )  # fmt: skip
                page = gl.load(table + gl.minimum(t0 + STAGES - 1, tiles - 1) // BLOCK_TILES).to(gl.int64)

                fixed, query_scale = rotated_queries(raw_query, signs, unit)
                # rows (high bytes, low bytes) of 8 queries each
                q_high, q_low = split_bytes(fixed, 0)
                q_smem.store(in_key_order(_stacked(q_high, q_low, R, D), KEY_SHAPE, KEY_AXES))
                q = ()
                for part in gl.static_range(KEY_PARTS):
                    q = q + (q_smem.slice(part * PART, PART, 1).load(LQ),)
                # half the sum of the coordinates, for the 1/2 that every level lacks, in the rows of the low bytes
                half = sum_of_fixed(fixed) >> 1
                half = gl.join(half * 0, half).reshape([R, 8, 2]).permute([0, 2, 1]).reshape([16 * R])
                c0 = gl.convert_layout(half, gl.SliceLayout(1, MMA))[:, None] + gl.zeros([16 * R, 64], gl.int32, layout=MMA)
                qs = gl.convert_layout(query_scale, LROW)
                r8 = gl.arange(0, 8 * R, layout=LROW)

                m = gl.full([8 * R], -1e30, gl.float32, layout=LROW)
                norm = gl.zeros([8 * R, 4 * W], gl.float32, layout=LSUM)
                acc = gl.zeros([16 * R, D], gl.int32, layout=MMA)
                ones = gl.zeros([16 * R, 8], gl.int32, layout=MMA)
                # the queries are out of it by now
                last: gl.constexpr = STAGES - 1
                _copy_tile(
                    k0.index(last), k1.index(last), v0.index(last), v1.index(last), n.index(last),
                    pages + page * stride_block, t0 + last, t1, D, KEY_BITS, VALUE_BITS, BLOCK_TILES,
                )  # fmt: skip
                page = gl.load(table + gl.minimum(t0 + STAGES, tiles - 1) // BLOCK_TILES).to(gl.int64)
                at_stage = 0
                for t in range(t0, t1):
                    async_copy.wait_group(STAGES - 1)
                    scales = n.index(at_stage)
                    scores = c0
                    for part in gl.static_range(KEY_PARTS):
                        plane = k0.index(at_stage).slice(part * (K0 // KEY_PARTS), K0 // KEY_PARTS, 1)
                        keys = load_keys(plane, k1.index(at_stage), key_table, PART, KEY_BITS, KEY_ASM, LK)
                        scores = mma_v2(q[part], keys, scores)
                    key_scale = scales.slice(0, 64).load(LPOS).to(gl.float32)
                    y = _by_position(scores, R, W, LP).to(gl.float32) * key_scale[None, :]
                    p = ex2(y * qs[:, None] - m[:, None])
                    lane_sum = _lane_sums(p, R, W, LSUM)
                    norm1 = norm + lane_sum
                    value_scale = scales.slice(64, 64).load(LPOS).to(gl.float32)
                    pos = gl.arange(0, 64, layout=LPOS)
                    rounding = (pos & 15).to(gl.float32) * 0.0625 + (_WEIGHT - 0.46875)
                    weights = (p * value_scale[None, :] + rounding[None, :]).to(gl.int32, bitcast=True)
                    top = _largest(weights, top_smem, R, W)
                    masked = (t + 1) * 64 > plain_end
                    if SINKS > 0:
                        masked = masked | (t * 64 < SINKS)
                    # rare: a larger score than any before, or a tile of which not every token is read packed
                    if (top >= _OVERFLOW) | masked:
                        y = y * qs[:, None]
                        value_scale = scales.slice(64, 64).load(LPOS).to(gl.float32)
                        if masked:
                            position = t * 64 + ((pos >> 1) & 7) * 8 + ((pos >> 4) & 3) * 2 + (pos & 1)
                            packed = position < context
                            if (RESIDUAL > 0) | (SINKS > 0):
                                exact = (position < SINKS) | ((position > context - RESIDUAL) & (RESIDUAL > 0))
                                block = gl.load(exact_table + position // EXACT_BLOCK, mask=packed & exact, other=0)
                                packed = packed & (block == 0)
                            # what lies there may be anything
                            y = gl.where(packed[None, :], y, float("-inf"))
                            value_scale = gl.where(packed, value_scale, 0.0)
                        # whole steps, so that sums are rescaled by shifts
                        highest = gl.floor(gl.max(y + lg2(value_scale)[None, :], 1) + (0.5 - _PLACE))
                        m1 = gl.maximum(m, highest)
                        p = ex2(y - m1[:, None])
                        lane_sum = _lane_sums(p, R, W, LSUM)
                        norm1 = norm * gl.convert_layout(ex2(m - m1), gl.SliceLayout(1, LSUM))[:, None] + lane_sum
                        weights = (p * value_scale[None, :] + rounding[None, :]).to(gl.int32, bitcast=True)
                        if t > t0:
                            shift = gl.minimum(m1 - m, 31.0).to(gl.int32)
                            acc = _shifted(acc, shift, R, D, MMA)
                            ones = _shifted(ones, shift, R, 8, MMA)
                        m = m1
                    norm = norm1
                    values = load_values(
                        v0.index(at_stage), v1.index(at_stage), value_table, D, VALUE_BITS, TRELLIS, VALUE_ASM, LV
                    )
                    p8 = _weight_bytes(weights, p_smem, R, W, LPA)
                    _copy_tile(
                        k0.index(at_stage), k1.index(at_stage), v0.index(at_stage), v1.index(at_stage), n.index(at_stage),
                        pages + page * stride_block, t + STAGES, t1, D, KEY_BITS, VALUE_BITS, BLOCK_TILES,
                    )  # fmt: skip
                    page = gl.load(table + gl.minimum(t + STAGES + 1, tiles - 1) // BLOCK_TILES).to(gl.int64)
                    acc = mma_v2(p8, values, acc)
                    ones = mma_v2(p8, gl.full([64, 8], 1, gl.int8, layout=LV), ones)
                    at_stage = gl.where(at_stage == STAGES - 1, 0, at_stage + 1)
                async_copy.wait_group(0)

                if VALUE_BITS == 2:
                    acc = top_field_sums(acc, D, TRELLIS)
                out = _whole(acc, R, D)
                LO: gl.constexpr = out.type.layout
                sums = _whole(ones, R, 8)
                # all eight columns are equal
                sums = gl.convert_layout(gl.max(sums, 1), gl.SliceLayout(1, LO))[:, None]
                norm_row = gl.convert_layout(gl.sum(norm, 1), LROW)
                seen = norm_row > 0.0
                inverse = gl.convert_layout(gl.where(seen, VALUE_STEP / norm_row, 0.0), gl.SliceLayout(1, LO))[:, None]
                col = gl.arange(0, D, layout=gl.SliceLayout(0, LO))
                if TRELLIS:
                    # fields 2 and 3 were read 16 times too large; fields 0 and 1 hold n + 8
                    upper = col >= D // 2
                    weight, shift = gl.where(upper, 0.0625, 1.0), gl.where(upper, 0.5, -7.5)
                    out = (out * weight[None, :] + sums * shift[None, :]) * inverse
                    col = value_channel(col, D)
                elif VALUE_BITS == 2:
                    # field f of a byte was read 4^f times too large; fields 0 to 2 hold idx, field 3 holds idx - 2
                    field = col // (D // 4)
                    weight = gl.where(field == 0, 1.0, gl.where(field == 1, 0.25, gl.where(field == 2, 0.0625, 0.015625)))
                    shift = gl.where(field == 3, 0.5, -1.5)
                    out = (out * weight[None, :] + sums * shift[None, :]) * inverse
                else:
                    out = (out + sums * 0.5) * inverse
                if (t0 == 0) & (t1 == tiles):
                    index = 2 * num_runs + b * HEADS + segment
                else:
                    index = 2 * run + slot
                g = gl.arange(0, 8 * R, layout=gl.SliceLayout(1, LO))
                valid = (row0 + g) // GROUP < queries
                gl.store(out_ptr + (index * (8 * R) + g).to(gl.int64)[:, None] * D + col[None, :], out, mask=valid[:, None])
                lse = gl.where(seen, m + lg2(norm_row), float("-inf"))
                gl.store(lse_ptr + index * (8 * R) + r8, lse, mask=(row0 + r8) // GROUP < queries)
            slot = 1
            x += take
            if x >= end:
                b = _next_request(b, end, num_entries, cost_ptr)
                tiles, begin, end, query0, queries, context = load_entry(
                    b, tiles_ptr, cost_ptr, query_start_ptr, seq_lens_ptr, num_requests
                )


def supports(cache_format: CacheFormat) -> bool:
    """Whether the kernel has this format: rows of whole words for every lane, tensors of powers of two."""
    return cache_format.head_size in (64, 128, 256) and not (cache_format.head_size == 64 and cache_format.key_bits == 3)


@dataclass(frozen=True)
class Tuning:
    """Warps of a program and registers of a thread, programs an SM, tiles and units of exact tokens in flight."""

    warps: int
    max_registers: int
    programs_per_sm: int
    stages: int
    exact_stages: int


# warps an SM, as many as barely spill in the loop, by head size, sets of rows and warps of a program (H200, 2026-11-26); its
# four schedulers have registers of their own and want equally many, since runs are equally long
_SM_WARPS = {(64, 1, 1): 16, (128, 1, 1): 12, (256, 1, 1): 8, (64, 2, 2): 12, (128, 2, 2): 8, (64, 2, 1): 8}
_SM_REGISTERS = 65536
_SM_SHARED_BYTES = 228 * 1024
_PROGRAM_SHARED_BYTES = 1024  # that a program takes beside what it asks for
_SCRATCH_BYTES = 512  # that Triton asks for beside what the kernel does


@functools.cache
def tuning(cache_format: CacheFormat, row_sets: int) -> Tuning:
    """As many programs an SM as _SM_WARPS says, or as find room for their tiles."""
    head_size, tile = cache_format.head_size, cache_format.layout.sub_page_bytes
    warps = min(row_sets, max_warps(head_size, cache_format.value_bits, cache_format.is_trellis))
    wanted = _SM_WARPS[head_size, row_sets, warps] // warps
    # beside tiles: what warps exchange (p_smem, top_smem), queries that a tile's keys have no room for (q_smem)
    exchanged = (warps > 1) * (1024 * row_sets + 128 * warps) + (row_sets > 1) * 32 * head_size
    own = _PROGRAM_SHARED_BYTES + _SCRATCH_BYTES + exchanged
    programs = min(wanted, _SM_SHARED_BYTES // (2 * tile + own))
    even = 4 // warps
    programs = programs // even * even if programs >= 2 * even else programs
    # as many in flight as do not make fewer programs
    room = _SM_SHARED_BYTES // programs - own
    stages = min(2 * warps, room // tile)
    exact_stages = max(1, min(3, room // (EXACT_TOKENS * head_size * 4)))
    registers = min(255, _SM_REGISTERS // (32 * programs * warps) // 8 * 8)
    return Tuning(warps, registers, programs, stages, exact_stages)


def row_sets(num_rows: int, head_size: int) -> int:
    """Blocks of eight query rows that share one pass over the keys and values of a kv head."""
    return 2 if num_rows > 8 and head_size <= 128 else 1


@functools.cache
def _constants(cache_format: CacheFormat) -> tuple[tuple, ...]:
    """(key PTX, value PTX, shape and axes of the channels' order behind a dimension of rows)."""
    shape, axes = key_channel_dims(cache_format.head_size, cache_format.key_bits)
    axes = (0, *(axis + 1 for axis in axes))
    return key_asm(cache_format.key_codebook), value_asm(cache_format.value_codebook), shape, axes


@functools.cache
def num_runs(cache_format: CacheFormat, row_sets: int, device: torch.device) -> int:
    """Programs of one launch: as many as the device holds at once."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * tuning(cache_format, row_sets).programs_per_sm


def attend(
    cache_format: CacheFormat,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale_log2: float,
    row_blocks: int,
    tiles: torch.Tensor,
    cost: torch.Tensor,
    runs: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_frame: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Partials of every query over its request's exact tokens (raw) and packed ones (rotated), in the plan's runs.

    The next kernel may be launched with launch_pdl: it must wait (gdc_wait) before it reads what this one writes.

    Args: query [num_tokens, num_heads, head_size], key, value [num_tokens, num_kv_heads, head_size] fp16 or bf16; cache
          [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; block_table, exact_table [num_requests, ...],
          query_start_loc [num_requests + 1], seq_lens [num_requests] int32; scale_log2: softmax scale * log2(e); tiles [2 *
          num_requests], cost [2 * num_requests + 1], runs [num_runs, RUN_FIELDS] int32 from plan_runs; out [2 * num_runs +
          2 * num_requests * num_kv_heads * row_blocks, 8 * row_sets, head_size] and lse [.., 8 * row_sets] fp32 (log2;
          -inf: nothing seen); key_frame [num_kv_heads, 3, head_size] fp32

    Raises: ValueError if the tokens of an exact block do not follow one another without gaps.
    """
    head_size, sets = cache_format.head_size, out.shape[1] // 8
    if exact and exact.cache.stride()[2:] != (2 * head_size, 1):
        raise ValueError(f"strides of exact blocks must end in {2 * head_size}, 1, got {exact.cache.stride()}")
    tuned = tuning(cache_format, sets)
    mma, lp, lsum = _layouts(sets, tuned.warps)
    key_ptx, value_ptx, shape, axes = _constants(cache_format)
    width = key_width(head_size, cache_format.key_bits)
    blocks = exact.cache.stride() if exact else (0, 0, 0)
    _decode_kernel[(runs.shape[0],)](
        query,
        key,
        value,
        cache,
        block_table,
        exact.cache if exact else query,
        exact_table if exact else block_table,
        lse if key_frame is None else key_frame,
        scaled_signs(head_size, out.device),
        tiles,
        cost,
        runs,
        query_start_loc,
        seq_lens,
        out,
        lse,
        scale_log2,
        scale_log2 * float(cache_format.key_codebook.step),
        seq_lens.shape[0],
        runs.shape[0],
        block_table.stride(0),
        exact_table.stride(0) if exact else 0,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.stride(0),
        cache.stride(1),
        blocks[0],
        blocks[1],
        KV_HEADS=cache.shape[1],
        GROUP=query.shape[1] // cache.shape[1],
        ROW_BLOCKS=row_blocks,
        R=sets,
        D=head_size,
        KEY_BITS=cache_format.key_bits,
        VALUE_BITS=cache_format.value_bits,
        TRELLIS=cache_format.is_trellis,
        VALUE_STEP=float(cache_format.value_codebook.step),
        KEY_ASM=key_ptx,
        VALUE_ASM=value_ptx,
        KEY_TABLE=first_table(cache_format.key_codebook),
        VALUE_TABLE=first_table(cache_format.value_codebook),
        KEY_SHAPE=(16 * sets, *shape),
        KEY_AXES=axes,
        BLOCK_TILES=cache.shape[2] // SUB_PAGE_TOKENS,
        RESIDUAL=exact.residual_tokens if exact else 0,
        SINKS=exact.sink_tokens if exact else 0,
        EXACT_BLOCK=exact.cache.shape[2] if exact else 1,
        HAS_FRAME=key_frame is not None,
        EXACT_STAGES=tuned.exact_stages,
        STAGES=tuned.stages,
        FIELDS=RUN_FIELDS,
        COST=SEGMENT_COST,
        KEY_PARTS=key_parts(head_size, cache_format.key_bits),
        MMA=mma,
        LP=lp,
        LSUM=lsum,
        LKEY=width,
        LQUERY=width,
        num_warps=tuned.warps,
        maxnreg=tuned.max_registers,
    )
