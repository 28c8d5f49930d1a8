"""Rings of the trellis codec, encoded inside store_nvidia.py's kernel by four lanes each: trellis.encode in inline PTX."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..trellis import LIMIT, UNIT
from .hadamard import join_columns, split_columns, tree_sum
from .quantize import level

# trellis.py's limit and unit; what, added and taken off again, rounds to an integer
_LIMIT, _UNIT, _ROUND = gl.constexpr(LIMIT), gl.constexpr(float(UNIT)), gl.constexpr(1.5 * 2.0**23)


def ring_ptx() -> str:
    """trellis.encode of a ring, by four lanes, one for each symbol that it may end with.

    $1 .. $8: coordinates as pairs of int16, the same in the four lanes -> $0: of the channels 4 l .. 4 l + 3 of lane l,
    symbols in bits 0 to 7 and n + 8 in bits 8 to 23. m0 .. m3 are the least errors so far, times 4, by the current symbol,
    which is in their last two bits; so the minimum of four sums has the symbol before there. c0 .. c3 keep these, a byte a
    channel.
    """
    levels = sorted({level(symbol, before) - 8 for symbol in range(4) for before in range(4)})
    error = {n: f"e{i}" for i, n in enumerate(levels)}
    lines = [
        ".reg .pred q;",
        ".reg .b32 start, x, t, r, u, m0, m1, m2, m3, n0, n1, n2, n3, c0, c1, c2, c3, now, all, lane;",
        ".reg .b32 " + ", ".join(error.values()) + ";",
        "mov.u32 lane, %tid.x;",
        "and.b32 start, lane, 3;",
    ]
    for symbol in range(4):
        lines += [f"setp.eq.u32 q, start, {symbol};", f"selp.b32 m{symbol}, {symbol}, {2**26 + symbol}, q;"]
    for i in range(16):
        pair = f"${1 + i // 2}"
        lines += [f"shr.s32 x, {pair}, 16;"] if i % 2 else [f"shl.b32 x, {pair}, 16;", "shr.s32 x, x, 16;"]
        for n in levels:
            middle = UNIT // 2 * (2 * n + 1)
            lines += [f"mad.lo.s32 {error[n]}, x, {-8 * middle}, {4 * middle * middle};"]
        for symbol in range(4):
            lines += [f"add.s32 n{symbol}, m0, {error[level(symbol, 0) - 8]};"]
            for before in range(1, 4):
                lines += [f"add.s32 t, m{before}, {error[level(symbol, before) - 8]};", f"min.s32 n{symbol}, n{symbol}, t;"]
        # the last two bits of n0 .. n3 in a byte
        lines += [
            "shl.b32 t, n1, 2;",
            "lop3.b32 r, n0, t, 3, 0xE4;",
            "shl.b32 t, n3, 2;",
            "lop3.b32 t, n2, t, 3, 0xE4;",
            "shl.b32 t, t, 4;",
            "lop3.b32 r, r, t, 15, 0xE4;",
        ]
        kept = f"c{i // 4}"
        lines += [
            f"and.b32 {kept}, r, 255;"
            if i % 4 == 0
            else f"prmt.b32 {kept}, {kept}, r, {(0x3240, 0x3410, 0x4210)[i % 4 - 1]:#x};"
        ]
        for symbol in range(4):
            lines += [f"and.b32 m{symbol}, n{symbol}, -4;"] + [f"or.b32 m{symbol}, m{symbol}, {symbol};"] * (symbol > 0)
    lines += ["mov.b32 t, m0;"]
    for symbol in range(1, 4):
        lines += [f"setp.eq.u32 q, start, {symbol};", f"selp.b32 t, m{symbol}, t, q;"]
    for distance in (1, 2):
        lines += [f"shfl.sync.bfly.b32 r, t, {distance}, 0x1F, 0xFFFFFFFF;", "min.s32 t, t, r;"]
    # each lane goes back from its own end; the best one's symbols, from the last, are then everyone's
    lines += ["mov.b32 now, start;", "mov.b32 all, 0;"]
    for i in range(15, -1, -1):
        lines += [
            "shl.b32 all, all, 2;",
            "or.b32 all, all, now;",
            "shl.b32 r, now, 1;",
            *([f"add.u32 r, r, {8 * (i % 4)};"] if i % 4 else []),
            f"shr.u32 now, c{i // 4}, r;",
            "and.b32 now, now, 3;",
        ]
    lines += [
        "lop3.b32 t, lane, t, 3, 0xD8;",  # the lane whose start is the best
        "shfl.sync.idx.b32 all, all, t, 0x1F, 0xFFFFFFFF;",
        # symbols from this lane's first channel on, and those before them
        "shl.b32 r, start, 3;",
        "shf.r.wrap.b32 u, all, all, r;",
        "shf.l.wrap.b32 t, u, u, 2;",
        "and.b32 $0, u, 255;",
        # k, then b with its bits spread: n + 8 = k + 4 b
        "shr.u32 r, t, 1;",
        "lop3.b32 u, u, r, 0x55, 0x78;",
        "and.b32 t, t, 0x55;",
        "mul.lo.u32 t, t, 3;",
        "xor.b32 t, t, u;",
    ]
    for i in range(4):
        lines += [
            f"shr.u32 r, u, {2 * i};",
            "and.b32 r, r, 3;",
            f"shl.b32 r, r, {8 + 4 * i};",
            "or.b32 $0, $0, r;",
            f"shr.u32 r, t, {2 * i};",
            "and.b32 r, r, 3;",
            f"shl.b32 r, r, {10 + 4 * i};",
            "or.b32 $0, $0, r;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def ring_bytes(h, inverse, lane, LANES: gl.constexpr, GROUP: gl.constexpr, PTX: gl.constexpr):
    """2-bit values of the trellis: bytes, and <h, n + 1/2>."""
    TOKENS: gl.constexpr = inverse.shape[0]
    COUNT: gl.constexpr = len(h)
    PAIRS: gl.constexpr = COUNT * LANES // 2
    ROWS: gl.constexpr = 8 * gl.num_warps()  # rings that the program encodes at once, each in four lanes
    RINGS: gl.constexpr = TOKENS * PAIRS // 8
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LRING: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 4, 1], [gl.num_warps(), 1, 1], [2, 1, 0])
    pairs = ()
    for k in gl.static_range(0, COUNT, 2):
        pairs = pairs + (_rounded(h[k] * inverse) & 0xFFFF | _rounded(h[k + 1] * inverse) << 16,)
    tile = join_columns(pairs, 0, COUNT // 2).reshape([TOKENS, LANES, COUNT // GROUP, GROUP // 2])
    tile = tile.permute(0, 2, 1, 3).reshape([TOKENS, PAIRS])
    shared = gl.allocate_shared_memory(gl.int32, [TOKENS, PAIRS], FLAT2, tile)
    rings = shared._reinterpret(gl.int32, [RINGS // ROWS, ROWS, 8], FLAT2)
    quarters = gl.allocate_shared_memory(gl.int32, [RINGS // ROWS, ROWS, 4], FLAT2)
    for i in range(RINGS // ROWS):
        x = rings.index(i).load(gl.SliceLayout(1, LRING))[:, None, :] + gl.zeros([ROWS, 4, 8], gl.int32, layout=LRING)
        x0, x1, x2, x3, x4, x5, x6, x7 = _eighths(x, ROWS)
        quarter = gl.inline_asm_elementwise(
            PTX, "=r,r,r,r,r,r,r,r,r", [x0, x1, x2, x3, x4, x5, x6, x7], dtype=gl.int32, is_pure=False, pack=1
        )
        quarters.index(i).store(quarter)
    words = quarters._reinterpret(gl.int32, [TOKENS, COUNT // 4 * LANES], FLAT2)
    LWORD: gl.constexpr = gl.BlockedLayout([1, GROUP // 4], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    quarter = ()  # of each four columns
    terms = ()
    for p in gl.static_range(COUNT // GROUP):
        piece = words.slice(p * LANES * (GROUP // 4), LANES * (GROUP // 4), 1).load(LWORD)
        piece = split_columns(piece.reshape([TOKENS, LANES, GROUP // 4]), GROUP // 4)
        for g in gl.static_range(GROUP // 4):
            word = gl.convert_layout(piece[g], inverse.type.layout, assert_trivial=True)
            quarter = quarter + (word,)
            for j in gl.static_range(4):
                grid = ((word >> (8 + 4 * j)) & 15).to(gl.float32) - 7.5
                terms = terms + (h[p * GROUP + g * 4 + j] * grid,)
    column_bytes = ()
    for k in gl.static_range(COUNT // 4):
        byte = (quarter[k // 4] >> (k % 4 * 2)) & 3
        for field in gl.static_range(1, 4):
            byte = byte | ((quarter[field * (COUNT // 16) + k // 4] >> (k % 4 * 2)) & 3) << (2 * field)
        column_bytes = column_bytes + (byte,)
    return column_bytes, tree_sum(terms, lane, COUNT, LANES, GROUP)


@gluon.jit
def _rounded(t):
    """Coordinates in units of trellis.py, int32."""
    t = gl.where(t > -_LIMIT, t, -_LIMIT)
    t = gl.where(t < _LIMIT, t, _LIMIT)
    return ((t * _UNIT + _ROUND) - _ROUND).to(gl.int32)


@gluon.jit
def _eighths(x, ROWS: gl.constexpr):
    """[ROWS, 4, 8] -> eight [ROWS, 4]."""
    even, odd = gl.split(x.reshape([ROWS, 4, 4, 2]))
    e0, e1 = gl.split(even.reshape([ROWS, 4, 2, 2]))
    o0, o1 = gl.split(odd.reshape([ROWS, 4, 2, 2]))
    x0, x4 = gl.split(e0)
    x2, x6 = gl.split(e1)
    x1, x5 = gl.split(o0)
    x3, x7 = gl.split(o1)
    return x0, x1, x2, x3, x4, x5, x6, x7
