"""Queries for decode_hopper.py, rotated and put in 16-bit fixed point by the program that needs them (Gluon)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hadamard_hopper import butterflies

# lanes that share a row
_LANE_BITS = gl.constexpr(2)
_LANES = gl.constexpr(4)
_MAX = gl.constexpr(32512.0)  # of the fixed point: its high byte stays within +-127
# added to a number below 2^15, this leaves it as fixed point, plus 128, in the low 16 bits
_ROUND = gl.constexpr(12582912.0 + 128.0)
_ROUND_BITS = gl.constexpr(0x4B400000 + 128)


@gluon.jit
def sum_of_fixed(x):
    """Sum over each row of the fixed point in rotated_queries' words."""
    return gl.sum(x - _ROUND_BITS, 1)


@gluon.jit
def load_queries(
    query_ptr, signs_ptr, frame_ptr, first, query0, queries, head, stride_token, stride_head,
    GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, HAS_FRAME: gl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS of a kv head's queries: row j is token query0 + j // GROUP, head j % GROUP of the group.

    Args: signs_ptr: scaled_signs; frame_ptr [num_kv_heads, 3, D]: centre, scale, 1 / scale
    Returns: queries [ROWS, D], zero in rows past the last; signs [D], times 1 / scale
    """
    # a lane holds consecutive channels of a row
    L: gl.constexpr = gl.BlockedLayout([1, D // _LANES], [32 // _LANES, _LANES], [gl.num_warps(), 1], [1, 0])
    j = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    in_chunk = j // GROUP
    token = query0 + in_chunk
    at = token.to(gl.int64) * stride_token + (head * GROUP + j % GROUP) * stride_head
    q = gl.load(query_ptr + at[:, None] + d[None, :], mask=(in_chunk < queries)[:, None] & (d >= 0)[None, :], other=0.0)
    signs = gl.load(signs_ptr + d)
    if HAS_FRAME:
        signs *= gl.load(frame_ptr + head * (3 * D) + 2 * D + d)
    return q, signs


@gluon.jit
def rotated_queries(q, signs, unit):
    """What load_queries returns -> fixed [ROWS, D] int32, channels in order, for split_bytes, and scale [ROWS] fp32.

    A score in bits is <fixed, level + 1/2> * scale * (the key's stored scale).

    Args: unit: softmax scale * log2(e) * codebook step
    """
    L: gl.constexpr = q.type.layout
    LANE_BITS: gl.constexpr = _LANE_BITS
    REG_BITS: gl.constexpr = q.shape[1].bit_length() - 1 - LANE_BITS
    x = q.to(gl.float32) * signs[None, :]
    # channel bits in registers first, then those that were spread over lanes
    x = butterflies(x, REG_BITS)
    x = butterflies(gl.convert_layout(x, L), LANE_BITS)
    largest = gl.maximum(gl.max(gl.abs(x), 1), 1e-30)
    fixed = (x * (_MAX / largest)[:, None] + _ROUND).to(gl.int32, bitcast=True)
    return fixed, largest * (unit / _MAX)
