"""exact.py's attention as a part of decode_hopper.py's programs: a segment's exact tokens, sixteen at a time (Gluon).

Sixteen query rows of a kv head are the rows of every product. A unit is sixteen tokens that lie together: of the sinks'
blocks, of the window's, or of the step's own keys and values, in this order. What of them is not to be seen is not copied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .common_hopper import ex2, lg2
from .plan import UNIT


@gluon.jit
def _unit(unit, sink_units, exact_units, num_sinks, window, context, queries):
    """(first, low, high): a unit's tokens are first .. first + UNIT, positions or places in the step's own chunk, of which
    low .. high are to be seen."""
    is_sink = unit < sink_units
    is_own = unit >= exact_units
    first = gl.where(is_sink, unit, gl.where(is_own, unit - exact_units, window // UNIT + unit - sink_units)) * UNIT
    low = gl.where(is_sink | is_own, 0, window)
    high = gl.where(is_sink, num_sinks, gl.where(is_own, queries, context))
    return first, low, high


@gluon.jit
def _block(table, first, wanted, EXACT_BLOCK: gl.constexpr, L: gl.constexpr):
    """The exact block of a unit's positions, 0 where there is none; [UNIT] in layout L where a unit is several blocks."""
    if EXACT_BLOCK >= UNIT:
        return gl.load(table + first // EXACT_BLOCK, mask=wanted, other=0)
    else:
        position = first + gl.arange(0, UNIT, layout=L)
        return gl.load(table + position // EXACT_BLOCK, mask=wanted & (position >= 0), other=0)


@gluon.jit
def attend_exact(
    unit0, unit1, row0, start, queries, context, head, table,
    query_ptr,   # [num_tokens, num_heads, D]
    key_ptr,     # [num_tokens, num_kv_heads, D]
    value_ptr,
    exact_ptr,   # [num_blocks, num_kv_heads, EXACT_BLOCK, 2 * D], the last two dimensions without gaps
    frame_ptr,   # [num_kv_heads, 3, D] fp32
    scale,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_block, stride_block_head,
    GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, EXACT_BLOCK: gl.constexpr, RESIDUAL: gl.constexpr,
    SINKS: gl.constexpr, HAS_FRAME: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Attention of rows row0 .. row0 + ROWS of a kv head over units unit0 .. unit1 of a request.

    Args: start: the request's first query token; table: its exact blocks; scale: softmax scale * log2(e)
    Returns: out [16, D] fp32, raw; lse [16] fp32 in bits, -inf for a row that sees nothing here
    """
    LQ: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    LROW: gl.constexpr = gl.SliceLayout(1, MMA)
    LCOL: gl.constexpr = gl.SliceLayout(0, MMA)
    # 16 bytes a lane
    LC2: gl.constexpr = gl.BlockedLayout([1, 8], [max(1, 128 // D), min(32, D // 4)], [gl.num_warps(), 1], [1, 0])
    LC: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    LBLOCK: gl.constexpr = gl.SliceLayout(1, LC2)
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty
    HAS_EXACT: gl.constexpr = RESIDUAL + SINKS > 0
    num_sinks = gl.minimum(SINKS, context)
    window = context
    if RESIDUAL > 0:
        window = gl.maximum(context - RESIDUAL + 1, num_sinks)
    sink_units = (num_sinks + UNIT - 1) // UNIT
    exact_units = sink_units + gl.where(window < context, (context + UNIT - 1) // UNIT - window // UNIT, 0)
    blocks_at = exact_ptr + head * stride_block_head
    keys_at = key_ptr + start.to(gl.int64) * stride_k_token + head * stride_k_head
    values_at = value_ptr + start.to(gl.int64) * stride_v_token + head * stride_v_head
    r2 = gl.arange(0, UNIT, layout=gl.SliceLayout(1, LC2))
    c2 = gl.arange(0, 2 * D, layout=gl.SliceLayout(0, LC2))
    r1 = gl.arange(0, UNIT, layout=gl.SliceLayout(1, LC))
    c1 = gl.arange(0, D, layout=gl.SliceLayout(0, LC))

    # keys and values of a unit side by side, as in an exact block
    smem = gl.allocate_shared_memory(DTYPE, [STAGES, UNIT, 2 * D], SWIZZLE)
    LQROW: gl.constexpr = gl.SliceLayout(1, LQ)
    r = gl.arange(0, 16, layout=LQROW)
    j = row0 + r
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LQ))
    at = query_ptr + (start + j // GROUP).to(gl.int64) * stride_q_token + (head * GROUP + j % GROUP) * stride_q_head
    real = (j // GROUP < queries) & (r < ROWS)
    q = gl.load(at[:, None] + d[None, :], mask=real[:, None] & (d >= 0)[None, :], other=0.0)
    first, low, high = _unit(unit0, sink_units, exact_units, num_sinks, window, context, queries)
    block = _block(table, first, unit0 < exact_units, EXACT_BLOCK, LBLOCK)
    first, low, high = _unit(unit0 + 1, sink_units, exact_units, num_sinks, window, context, queries)
    next_block = _block(table, first, unit0 + 1 < gl.minimum(unit1, exact_units), EXACT_BLOCK, LBLOCK)
    for stage in gl.static_range(STAGES):
        # tokens that are not read have no weight, but 0 * NaN would count
        smem.index(stage).store(gl.zeros([UNIT, 2 * D], DTYPE, layout=LC2))
    minus = gl.zeros([16], gl.float32, layout=LROW)
    if HAS_FRAME:
        centre = gl.load(frame_ptr + head * (3 * D) + d)
        minus = gl.convert_layout(gl.sum(q.to(gl.float32) * centre[None, :], 1), LROW) * scale
    in_chunk = (row0 + gl.arange(0, 16, layout=LROW)) // GROUP
    highest = gl.full([16], float("-inf"), gl.float32, layout=LROW)
    norm = gl.zeros([16], gl.float32, layout=LROW)
    acc = gl.zeros([16, D], gl.float32, layout=MMA)
    at_stage = 0
    # a round copies a unit and, STAGES rounds later, attends to it
    for unit in range(unit0 - STAGES, unit1):
        if unit >= unit0:
            async_copy.wait_group(STAGES - 1)
            k = smem.index(at_stage).slice(0, D, 1).permute([1, 0]).load(LB)
            s = mma_v2(q, k, gl.zeros([16, UNIT], gl.float32, layout=MMA)) * scale - minus[:, None]
            first1, low1, high1 = _unit(unit, sink_units, exact_units, num_sinks, window, context, queries)
            i = first1 + gl.arange(0, UNIT, layout=LCOL)
            here = (i >= low1) & (i < high1)
            if HAS_EXACT:
                here = here & (_block(table, first1, unit < exact_units, EXACT_BLOCK, LCOL) + (unit >= exact_units) > 0)
            last = gl.where(unit < exact_units, 0x7FFFFFFF, in_chunk)
            s = gl.where(here[None, :] & (i[None, :] <= last[:, None]), s, float("-inf"))
            above = gl.maximum(highest, gl.max(s, 1))
            base = gl.where(above == float("-inf"), 0.0, above)
            p = ex2(s - base[:, None])
            factor = ex2(highest - base)
            norm = norm * factor + gl.sum(p, 1)
            highest = above
            acc = acc * factor[:, None]
            v = smem.index(at_stage).slice(D, D, 1).load(LB)
            p_high = p.to(DTYPE)
            acc = mma_v2(gl.convert_layout(p_high, LQ), v, acc)
            if DTYPE == gl.bfloat16:
                # p as two numbers, so that its rounding does not count
                p_low = (p - p_high.to(gl.float32)).to(DTYPE)
                acc = mma_v2(gl.convert_layout(p_low, LQ), v, acc)
        _copy_unit(
            smem.index(at_stage), unit + STAGES, unit1, block, sink_units, exact_units, num_sinks, window, context,
            queries, blocks_at, keys_at, values_at, stride_block, stride_k_token, stride_v_token, r2, c2, r1, c1,
            D, EXACT_BLOCK, HAS_EXACT,
        )  # fmt: skip
        block = next_block
        ahead = unit + STAGES + 2
        first, low, high = _unit(ahead, sink_units, exact_units, num_sinks, window, context, queries)
        next_block = _block(table, first, ahead < gl.minimum(unit1, exact_units), EXACT_BLOCK, LBLOCK)
        at_stage = gl.where(at_stage == STAGES - 1, 0, at_stage + 1)
    async_copy.wait_group(0)
    any_seen = norm > 0.0
    out = acc / gl.where(any_seen, norm, 1.0)[:, None]
    return out, gl.where(any_seen, highest + lg2(norm), float("-inf"))


@gluon.jit
def _copy_unit(
    smem, unit, unit1, block, sink_units, exact_units, num_sinks, window, context, queries, blocks_at, keys_at, values_at,
    stride_block, stride_k_token, stride_v_token, r2, c2, r1, c1,
    D: gl.constexpr, EXACT_BLOCK: gl.constexpr, HAS_EXACT: gl.constexpr,
):  # fmt: skip
    """Start the copy of a unit below unit1 to smem [UNIT, 2 * D]; rows that are not to be seen then hold something finite.

    Only one copy of a group may write a byte, with data or with the zeros that a masked one may leave.
    """
    first, low, high = _unit(unit, sink_units, exact_units, num_sinks, window, context, queries)
    if unit < exact_units:
        if HAS_EXACT:
            at = blocks_at + block.to(gl.int64) * stride_block + first % EXACT_BLOCK * (2 * D)
            i = first + r2
            wanted = (i >= low) & (i < high) & (block > 0)
            if EXACT_BLOCK < UNIT:
                rows = at + r2 % EXACT_BLOCK * (2 * D)
            else:
                rows = at + r2 * (2 * D)
            async_copy.async_copy_global_to_shared(
                smem, rows[:, None] + c2[None, :], mask=wanted[:, None] & (c2 >= 0)[None, :]
            )
    elif unit < unit1:
        own = first + r1
        seen = (own < high)[:, None] & (c1 >= 0)[None, :]
        keys = keys_at + own.to(gl.int64) * stride_k_token
        values = values_at + own.to(gl.int64) * stride_v_token
        async_copy.async_copy_global_to_shared(smem.slice(0, D, 1), keys[:, None] + c1[None, :], mask=seen)
        async_copy.async_copy_global_to_shared(smem.slice(D, D, 1), values[:, None] + c1[None, :], mask=seen)
    async_copy.commit_group()
