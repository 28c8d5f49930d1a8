"""Attention of few queries over packed pages on NVIDIA Hopper: one warp a program, integer tensor cores (Gluon, inline PTX).

The portable kernel, decode.py, computes the same partials from the same bytes; which of the two runs is decided in
gpu_kernels.py. What a page holds is layout.py's; the numbers here are its 64-token sub-pages ("tiles").

- A program is one warp and never meets another: no barrier, no shared maximum. All (request, kv head, row block) segments of
  the batch, each `num_tiles + SEGMENT_COST` long, are laid end to end and cut into equal runs, one a program (stream-K), so
  ragged batches have no tail. A segment within one run leaves one partial, a segment cut by run borders one in each run.
- Scores   S[16, 64] = Q[16, D] K[D, 64] by mma.sync m16n8k32 in s8: of each 16 rows the first 8 hold the high bytes of a
  16-bit fixed-point q, the others its low bytes, so that 256 hi + lo joins them in the lane that holds both.
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
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..cache_format import CacheFormat
from ..layout import SUB_PAGE_TOKENS
from .plan import run_start
from .unpack_hopper import key_asm, key_parts, key_width, load_keys, load_values, value_asm

SEGMENT_COST = 4  # tiles that entering a segment costs: query, first copies, first maximum (H200, 2026-11-22)

_MMA = {rows: gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]) for rows in (1, 2)}
# p [8 * R, 64 positions]: a lane holds 16 consecutive positions of one row in each block of 8
_P = {
    r: gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8]] + [[8, 0]] * (r - 1),
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[8 * r, 64],
    )
    for r in (1, 2)
}
# a lane's part of each row's sum [8 * R, 4]
_SUM = {
    r: gl.DistributedLinearLayout(
        reg_bases=[[8, 0]] * (r - 1),
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[],
        block_bases=[],
        shape=[8 * r, 4],
    )
    for r in (1, 2)
}
# the bits of 2^23 + 128 + the largest p; a moved maximum is placed at 2^13
_OVERFLOW = gl.constexpr(0x4B000000 + 128 + 32639)
_PLACE = gl.constexpr(13.0)
_SPLIT_P = gl.constexpr(
    # four words whose low 16 bits are p + 128 -> four high bytes, four signed low bytes
    "{ .reg .b32 s, t, u; prmt.b32 s, $2, $3, 0x5140; prmt.b32 t, $4, $5, 0x5140; prmt.b32 $0, s, t, 0x7632; "
    "prmt.b32 u, s, t, 0x5410; xor.b32 $1, u, 0x80808080; }"
)


@gluon.jit
def _ex2(x):
    # without the guards for denormal results that gl.exp2 has
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _copy_plane(smem, base, mask, ROWS: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    async_copy.async_copy_global_to_shared(smem, base + r[:, None] * WIDTH + c[None, :], mask=mask)


@gluon.jit
def _by_position(s, R: gl.constexpr, LP: gl.constexpr):
    """Scores [16 R, 64 tokens] s32, rows (high, low bytes) of 8 -> 256 high + low [8 R, 64 positions]."""
    s = s.reshape([R, 2, 8, 8, 4, 2]).permute([0, 2, 4, 3, 5, 1]).reshape([8 * R, 64, 2])
    hi, lo = gl.split(s)
    return gl.convert_layout(hi, LP, assert_trivial=True) * 256 + gl.convert_layout(lo, LP, assert_trivial=True)


@gluon.jit
def _halves(a, R: gl.constexpr, N: gl.constexpr):
    """[16 R, N] -> the high and the low part of each row, [8 R, N]."""
    return gl.split(a.reshape([R, 2, 8, N]).permute([0, 2, 3, 1]).reshape([8 * R, N, 2]))


@gluon.jit
def _whole(a, R: gl.constexpr, N: gl.constexpr):
    hi, lo = _halves(a, R, N)
    return hi.to(gl.float32) * 256.0 + lo.to(gl.float32)


@gluon.jit
def _join_halves(hi, lo, R: gl.constexpr, N: gl.constexpr, L: gl.constexpr):
    both = gl.join(hi, lo).reshape([R, 8, N, 2]).permute([0, 3, 1, 2]).reshape([16 * R, N])
    return gl.convert_layout(both, L, assert_trivial=True)


@gluon.jit
def _rescale(a, factor, R: gl.constexpr, N: gl.constexpr, L: gl.constexpr):
    """Multiply rows by factor [8 R], exact to half a unit of the low part."""
    hi, lo = _halves(a, R, N)
    f = (hi.to(gl.float32) * 256.0 + lo.to(gl.float32)) * gl.convert_layout(factor, gl.SliceLayout(1, hi.type.layout))[
        :, None
    ]
    high = gl.floor(f * 0.00390625 + 0.5)
    low = gl.floor(f - high * 256.0 + 0.5)
    return _join_halves(high.to(gl.int32), low.to(gl.int32), R, N, L)


@gluon.jit(do_not_specialize=["num_requests", "stride_table", "stride_exact_table"])
def _packed_kernel(
    q_high_ptr,        # [num_tokens * num_heads, D] int8, channels in the order of key_channel_order
    q_low_ptr,         # the same
    q_offset_ptr,      # [num_tokens * num_heads] int32, half the sum of a query's 16-bit coordinates
    q_scale_ptr,       # [num_tokens * num_heads] fp32
    cache_ptr,         # uint8, pages
    block_table_ptr,   # [num_requests, ...] int32
    cost_ptr,          # [num_requests + 1] int32, cost of the segments before each request
    tiles_ptr,         # [num_requests] int32
    query_start_ptr,   # [num_requests + 1] int32
    seq_lens_ptr,      # [num_requests] int32
    exact_table_ptr,   # [num_requests, ...] int32
    out_ptr,           # [2 * num_runs + num_requests * HEADS, 8 * R, D] fp32 partials
    lse_ptr,           # [.., 8 * R] fp32, in bits (log2)
    num_requests, num_runs,
    stride_table, stride_exact_table,
    stride_block: gl.int64, stride_head: gl.int64,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROW_BLOCKS: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
    KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr, VALUE_STEP: gl.constexpr,
    KEY_ASM: gl.constexpr, VALUE_ASM: gl.constexpr,
    BLOCK_TILES: gl.constexpr, RESIDUAL: gl.constexpr, SINKS: gl.constexpr, EXACT_BLOCK: gl.constexpr,
    STAGES: gl.constexpr, REQUESTS: gl.constexpr, COST: gl.constexpr, SHARE_QUERY: gl.constexpr, KEY_PARTS: gl.constexpr,
    MMA: gl.constexpr, LP: gl.constexpr, LSUM: gl.constexpr, LKEY: gl.constexpr, LQUERY: gl.constexpr,
):  # fmt: skip
    K0: gl.constexpr = D * (2 if KEY_BITS == 3 else KEY_BITS) // 8  # bytes a token of the first key plane
    V0: gl.constexpr = D * (2 if VALUE_BITS == 3 else VALUE_BITS) // 8
    KEYS: gl.constexpr = 8 * D * KEY_BITS  # bytes of all keys of a tile
    VALUES: gl.constexpr = 8 * D * VALUE_BITS
    TILE: gl.constexpr = KEYS + VALUES + 256
    PART: gl.constexpr = D // KEY_PARTS  # channels of which the keys are in registers at once
    HEADS: gl.constexpr = KV_HEADS * ROW_BLOCKS
    LQ: gl.constexpr = gl.DotOperandLayout(0, MMA, LQUERY)
    LK: gl.constexpr = gl.DotOperandLayout(1, MMA, LKEY)
    LV: gl.constexpr = gl.DotOperandLayout(1, MMA, 16)
    LPA: gl.constexpr = gl.DotOperandLayout(0, MMA, 16)
    LROW: gl.constexpr = gl.SliceLayout(1, LP)
    LPOS: gl.constexpr = gl.SliceLayout(0, LP)
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    FLAT1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LC_K0: gl.constexpr = gl.BlockedLayout([1, min(16, K0)], [32 // max(1, K0 // 16), max(1, K0 // 16)], [1, 1], [1, 0])
    LC_K1: gl.constexpr = gl.BlockedLayout([1, min(16, D // 8)], [32 // max(1, D // 128), max(1, D // 128)], [1, 1], [1, 0])
    LC_V: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [1, 1], [1, 0])
    LC_N: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    LB: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])

    gdc_launch_dependents()
    run = gl.program_id(0)
    total = gl.load(cost_ptr + num_requests)
    x = run_start(run, total, num_runs)
    x_end = run_start(run + 1, total, num_runs)
    if x < x_end:
        i = gl.arange(0, REQUESTS, layout=LB)
        ends = gl.load(cost_ptr + 1 + i, mask=i < num_requests, other=0x7FFFFFFF)
        b = gl.sum((ends <= x).to(gl.int32), 0)
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
        if SHARE_QUERY:
            q_smem = gl.allocate_shared_memory(gl.int8, [16 * R, D], gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
        slot = 0
        while x < x_end:
            tiles = gl.load(tiles_ptr + b)
            first = gl.load(cost_ptr + b)
            segment = (x - first) // (tiles + COST)
            start = x - first - segment * (tiles + COST)
            take = gl.minimum(tiles + COST - start, x_end - x)
            t0 = gl.maximum(start - COST, 0)
            t1 = start + take - COST
            if t1 > t0:
                head = segment // ROW_BLOCKS
                query0 = gl.load(query_start_ptr + b)
                query1 = gl.load(query_start_ptr + b + 1)
                context = gl.load(seq_lens_ptr + b) - (query1 - query0)
                table = block_table_ptr + b.to(gl.int64) * stride_table
                exact_table = exact_table_ptr + b.to(gl.int64) * stride_exact_table
                pages = cache_ptr + head * stride_head
                plain_end = context
                if RESIDUAL > 0:
                    plain_end = context - RESIDUAL + 1
                for s in gl.static_range(STAGES - 1):
                    t = gl.minimum(t0 + s, tiles - 1)
                    page = gl.load(table + t // BLOCK_TILES).to(gl.int64)
                    base = pages + page * stride_block + (t % BLOCK_TILES) * TILE
                    ok = t0 + s < t1
                    _copy_plane(k0.index(s), base, ok, 64, K0, LC_K0)
                    if KEY_BITS == 3:
                        _copy_plane(k1.index(s), base + 64 * K0, ok, 64, D // 8, LC_K1)
                    _copy_plane(v0.index(s), base + KEYS, ok, V0, 64, LC_V)
                    if VALUE_BITS == 3:
                        _copy_plane(v1.index(s), base + KEYS + 64 * V0, ok, D // 8, 64, LC_V)
                    async_copy.async_copy_global_to_shared(
                        n.index(s),
                        (base + KEYS + VALUES).to(gl.pointer_type(gl.float16)) + gl.arange(0, 128, layout=LC_N),
                        mask=ok,
                    )
                    async_copy.commit_group()

                # only the queries come from the kernel before
                gdc_wait()
                # rows (high bytes, low bytes) of 8 queries each; row j of the block is query j // GROUP, head j % GROUP
                LQROW: gl.constexpr = gl.SliceLayout(1, LQ)
                row0 = (segment % ROW_BLOCKS) * (8 * R)
                r16 = gl.arange(0, 16 * R, layout=LQROW)
                j = row0 + (r16 // 16) * 8 + r16 % 8
                token = query0 + j // GROUP
                row = (token * KV_HEADS + head) * GROUP + j % GROUP
                is_low = (r16 % 16) >= 8
                q = ()
                for part in gl.static_range(KEY_PARTS):
                    d = part * PART + gl.arange(0, PART, layout=gl.SliceLayout(0, LQ))
                    at = row[:, None] * D + d[None, :]
                    real = (token < query1)[:, None] & (d >= 0)[None, :]
                    high = gl.load(q_high_ptr + at, mask=real & ~is_low[:, None], other=0)
                    low = gl.load(q_low_ptr + at, mask=real & is_low[:, None], other=0)
                    if SHARE_QUERY:
                        q_smem.slice(part * PART, PART, 1).store(high | low)
                    else:
                        q = q + (high | low,)
                LMROW: gl.constexpr = gl.SliceLayout(1, MMA)
                r16 = gl.arange(0, 16 * R, layout=LMROW)
                j = row0 + (r16 // 16) * 8 + r16 % 8
                token = query0 + j // GROUP
                row = (token * KV_HEADS + head) * GROUP + j % GROUP
                offset = gl.load(q_offset_ptr + row, mask=(token < query1) & (r16 % 16 >= 8), other=0)
                c0 = offset[:, None] + gl.zeros([16 * R, 64], gl.int32, layout=MMA)
                r8 = gl.arange(0, 8 * R, layout=LROW)
                token = query0 + (row0 + r8) // GROUP
                row = (token * KV_HEADS + head) * GROUP + (row0 + r8) % GROUP
                qs = gl.load(q_scale_ptr + row, mask=token < query1, other=0.0)

                m = gl.full([8 * R], -1e30, gl.float32, layout=LROW)
                norm = gl.zeros([8 * R, 4], gl.float32, layout=LSUM)
                acc = gl.zeros([16 * R, D], gl.int32, layout=MMA)
                ones = gl.zeros([16 * R, 8], gl.int32, layout=MMA)
                t = gl.minimum(t0 + STAGES - 1, tiles - 1)
                page = gl.load(table + t // BLOCK_TILES).to(gl.int64)
                into = STAGES - 1
                at_stage = 0
                for t in range(t0, t1):
                    async_copy.wait_group(STAGES - 2)
                    ahead = t + STAGES - 1
                    base = pages + page * stride_block + (ahead % BLOCK_TILES) * TILE
                    ok = ahead < t1
                    _copy_plane(k0.index(into), base, ok, 64, K0, LC_K0)
                    if KEY_BITS == 3:
                        _copy_plane(k1.index(into), base + 64 * K0, ok, 64, D // 8, LC_K1)
                    _copy_plane(v0.index(into), base + KEYS, ok, V0, 64, LC_V)
                    if VALUE_BITS == 3:
                        _copy_plane(v1.index(into), base + KEYS + 64 * V0, ok, D // 8, 64, LC_V)
                    async_copy.async_copy_global_to_shared(
                        n.index(into),
                        (base + KEYS + VALUES).to(gl.pointer_type(gl.float16)) + gl.arange(0, 128, layout=LC_N),
                        mask=ok,
                    )
                    async_copy.commit_group()
                    page = gl.load(table + gl.minimum(ahead + 1, tiles - 1) // BLOCK_TILES).to(gl.int64)

                    scales = n.index(at_stage)
                    scores = c0
                    for part in gl.static_range(KEY_PARTS):
                        plane = k0.index(at_stage).slice(part * (K0 // KEY_PARTS), K0 // KEY_PARTS, 1)
                        keys = load_keys(plane, k1.index(at_stage), PART, KEY_BITS, KEY_ASM, LK)
                        if SHARE_QUERY:
                            scores = mma_v2(q_smem.slice(part * PART, PART, 1).load(LQ), keys, scores)
                        else:
                            scores = mma_v2(q[part], keys, scores)
                    key_scale = scales.slice(0, 64).load(LPOS).to(gl.float32)
                    y = _by_position(scores, R, LP).to(gl.float32) * key_scale[None, :]
                    p = _ex2(y * qs[:, None] - m[:, None])
                    lane_sum = gl.convert_layout(gl.sum(p.reshape([8 * R, 4, 16]), 2), LSUM, assert_trivial=True)
                    norm1 = norm + lane_sum
                    value_scale = scales.slice(64, 64).load(LPOS).to(gl.float32)
                    pos = gl.arange(0, 64, layout=LPOS)
                    dither = (pos & 15).to(gl.float32) * 0.0625 - 0.46875
                    # 2^23 + 128: the low 16 bits are the fixed point
                    fixed = (p * value_scale[None, :] + dither[None, :] + 8388736.0).to(gl.int32, bitcast=True)
                    top = gl.max(fixed.reshape([512 * R]), 0)
                    masked = (t + 1) * 64 > plain_end
                    if SINKS > 0:
                        masked = masked | (t * 64 < SINKS)
                    # rare: a larger score than any before, or a tile of which not every token is read packed
                    if (top > _OVERFLOW) | masked:
                        position = t * 64 + ((pos >> 1) & 7) * 8 + ((pos >> 4) & 3) * 2 + (pos & 1)
                        packed = position < context
                        if (RESIDUAL > 0) | (SINKS > 0):
                            exact = (position < SINKS) | ((position > context - RESIDUAL) & (RESIDUAL > 0))
                            block = gl.load(exact_table + position // EXACT_BLOCK, mask=packed & exact, other=0)
                            packed = packed & (block == 0)
                        packed = packed[None, :]
                        y = y * qs[:, None]
                        value_scale = scales.slice(64, 64).load(LPOS).to(gl.float32)
                        highest = gl.max(gl.where(packed, y + gl.log2(value_scale)[None, :], -1e30), 1) - _PLACE
                        m1 = gl.maximum(m, highest)
                        factor = gl.exp2(m - m1)
                        p = gl.where(packed, gl.exp2(y - m1[:, None]), 0.0)
                        lane_sum = gl.convert_layout(gl.sum(p.reshape([8 * R, 4, 16]), 2), LSUM, assert_trivial=True)
                        norm1 = norm * gl.convert_layout(factor, gl.SliceLayout(1, LSUM))[:, None] + lane_sum
                        fixed = gl.where(packed, p * value_scale[None, :] + dither[None, :], 0.0) + 8388736.0
                        fixed = fixed.to(gl.int32, bitcast=True)
                        acc = _rescale(acc, factor, R, D, MMA)
                        ones = _rescale(ones, factor, R, 8, MMA)
                        m = m1
                    norm = norm1
                    p_high, p_low = gl.inline_asm_elementwise(
                        _SPLIT_P, "=r,=r,r,r,r,r", [fixed], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
                    )
                    p8 = _join_halves(p_high, p_low, R, 64, LPA)
                    values = load_values(v0.index(at_stage), v1.index(at_stage), D, VALUE_BITS, VALUE_ASM, LV)
                    acc = mma_v2(p8, values, acc)
                    ones = mma_v2(p8, gl.full([64, 8], 1, gl.int8, layout=LV), ones)
                    into = gl.where(into == STAGES - 1, 0, into + 1)
                    at_stage = gl.where(at_stage == STAGES - 1, 0, at_stage + 1)
                async_copy.wait_group(0)

                out = _whole(acc, R, D)
                LO: gl.constexpr = out.type.layout
                sums = _whole(ones, R, 8)
                # all eight columns are equal
                sums = gl.convert_layout(gl.max(sums, 1), gl.SliceLayout(1, LO))[:, None]
                norm_row = gl.convert_layout(gl.sum(norm, 1), LROW)
                seen = norm_row > 0.0
                inverse = gl.convert_layout(gl.where(seen, VALUE_STEP / norm_row, 0.0), gl.SliceLayout(1, LO))[:, None]
                col = gl.arange(0, D, layout=gl.SliceLayout(0, LO))
                if VALUE_BITS == 2:
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
                valid = query0 + (row0 + g) // GROUP < query1
                gl.store(out_ptr + (index * (8 * R) + g).to(gl.int64)[:, None] * D + col[None, :], out, mask=valid[:, None])
                lse = gl.where(seen, m + gl.log2(norm_row), float("-inf"))
                gl.store(lse_ptr + index * (8 * R) + r8, lse, mask=query0 + (row0 + r8) // GROUP < query1)
            slot = 1
            x += take
            if x >= gl.load(cost_ptr + b + 1):
                b += 1
                while (b < num_requests - 1) & (gl.load(cost_ptr + b + 1) == gl.load(cost_ptr + b)):
                    b += 1
    gdc_wait()


def supports(cache_format: CacheFormat) -> bool:
    """Whether the kernel has this format: rows of whole words for every lane, tensors of powers of two."""
    return cache_format.head_size in (64, 128, 256) and not (cache_format.head_size == 64 and cache_format.key_bits == 3)


@dataclass(frozen=True)
class Tuning:
    """Registers of a program, programs an SM, tiles in flight, and whether queries lie in shared memory."""

    max_registers: int
    warps_per_sm: int
    stages: int
    share_query: bool


_SM_REGISTERS = 65536
_SM_SHARED_BYTES = 228 * 1024
_PROGRAM_SHARED_BYTES = 1024  # that a program takes beside what it asks for


@functools.cache
def tuning(cache_format: CacheFormat, row_sets: int) -> Tuning:
    """As many programs an SM as barely spill in the loop (H200, 2026-11-24) and find room for their tiles.

    Runs are equally long, so an SM's four schedulers want equally many programs.
    """
    head_size, stages, share_query = cache_format.head_size, 2, row_sets == 2
    warps = {64: 16, 128: 12, 256: 8}[head_size * row_sets]
    shared = stages * cache_format.layout.sub_page_bytes + _PROGRAM_SHARED_BYTES + share_query * 16 * row_sets * head_size
    fitting = min(warps, _SM_SHARED_BYTES // shared)
    warps = fitting // 4 * 4 if fitting >= 8 else fitting
    return Tuning(min(255, _SM_REGISTERS // (32 * warps) // 8 * 8), warps, stages, share_query)


def row_sets(num_rows: int, head_size: int) -> int:
    """Blocks of eight queries that share one pass over the keys and values of a kv head."""
    return 2 if num_rows > 8 and head_size <= 128 else 1


@functools.cache
def _constants(cache_format: CacheFormat) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return key_asm(cache_format.key_codebook), value_asm(cache_format.value_codebook)


@functools.cache
def num_runs(cache_format: CacheFormat, row_sets: int, device: torch.device) -> int:
    """Programs of one launch: as many as the device holds at once."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * tuning(cache_format, row_sets).warps_per_sm


def attend_packed(
    cache_format: CacheFormat,
    query: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    group: int,
    row_blocks: int,
    cost: torch.Tensor,
    tiles: torch.Tensor,
    runs: int,
    max_requests: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    residual_tokens: int = 0,
    sink_tokens: int = 0,
    exact_block_size: int = 1,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Partials of every query over its request's packed context, rotated.

    Args: query: high, low [num_rows, head_size] int8, offset [num_rows] int32 and scale [num_rows] fp32 of rotate_queries;
          cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; cost, tiles from plan_runs; max_requests: of any
          step; out [2 * runs +
          num_requests * num_kv_heads * row_blocks, 8 * row_sets, head_size] and lse [.., 8 * row_sets] fp32
    """
    head_size, sets = cache_format.head_size, out.shape[1] // 8
    exact = exact_table is not None
    tuned = tuning(cache_format, sets)
    key_ptx, value_ptx = _constants(cache_format)
    width = key_width(head_size, cache_format.key_bits)
    _packed_kernel[(runs,)](
        *query,
        cache,
        block_table,
        cost,
        tiles,
        query_start_loc,
        seq_lens,
        exact_table if exact else block_table,
        out,
        lse,
        seq_lens.shape[0],
        runs,
        block_table.stride(0),
        exact_table.stride(0) if exact else 0,
        cache.stride(0),
        cache.stride(1),
        KV_HEADS=cache.shape[1],
        GROUP=group,
        ROW_BLOCKS=row_blocks,
        R=sets,
        D=head_size,
        KEY_BITS=cache_format.key_bits,
        VALUE_BITS=cache_format.value_bits,
        VALUE_STEP=float(cache_format.value_codebook.step),
        KEY_ASM=key_ptx,
        VALUE_ASM=value_ptx,
        BLOCK_TILES=cache.shape[2] // SUB_PAGE_TOKENS,
        RESIDUAL=residual_tokens if exact else 0,
        SINKS=sink_tokens if exact else 0,
        EXACT_BLOCK=exact_block_size,
        STAGES=tuned.stages,
        REQUESTS=max(32, triton.next_power_of_2(max_requests)),
        COST=SEGMENT_COST,
        SHARE_QUERY=tuned.share_query,
        KEY_PARTS=key_parts(head_size, cache_format.key_bits),
        MMA=_MMA[sets],
        LP=_P[sets],
        LSUM=_SUM[sets],
        LKEY=width,
        LQUERY=width,
        num_warps=1,
        maxnreg=tuned.max_registers,
        launch_pdl=True,
    )
