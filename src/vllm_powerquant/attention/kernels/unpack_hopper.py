"""Packed bytes to signed level bytes in registers, for decode_hopper.py: inline PTX by bit width, and its loads (Gluon).

The portable counterpart is unpack.py. Bytes are looked up with `prmt`, whose selectors are nibbles: codes are turned into
nibbles eight at a time, and where the order of the result does not matter (keys: any order of channels that the queries
share, key_channel_order) it is left as it falls.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _byte_table(levels: list[int]) -> tuple[int, int]:
    """Eight bytes as two little-endian words."""
    low, high = (sum((b & 255) << 8 * i for i, b in enumerate(part)) for part in (levels[:4], (levels + [0] * 8)[4:8]))
    return low, high


def _magnitudes(codebook) -> list[int]:
    """Levels of a symmetric codebook's positive half, ascending; -(n + 1/2) = ~n + 1/2 gives the others."""
    half = len(codebook.levels) // 2
    return list(codebook.levels[half:])


def _asm(body: list[str], registers: str, constants: dict[str, int]) -> str:
    moves = [f"mov.b32 {name}, {value};" for name, value in constants.items()]
    return "{ .reg .b32 " + ", ".join([*registers.split(), *constants]) + "; " + " ".join(moves + body) + " }"


def first_table(codebook) -> int:
    """The word of bytes that key_asm's and value_asm's instructions for 3 and 4 bits take as their last operand, signed."""
    bits = codebook.bits
    low, _ = _byte_table({3: list(codebook.levels), 4: _magnitudes(codebook)}.get(bits, []))
    return low - (low >> 31 << 32)


def key_asm(codebook) -> tuple[str, ...]:
    """PTX that turns packed key words into signed level bytes, by bit width (8: none is needed).

    4 bits: word -> channels A, channels Z. 2 bits: word -> 4 registers, each fields (f, f + 2) of two bytes. 3 bits: the
    same from a low and a high word, for the even and for the odd bits of the high word.
    """
    bits = codebook.bits
    if bits == 8:
        return ()
    if bits == 4:
        _, high = _byte_table(_magnitudes(codebook))
        body = [
            "and.b32 m, $2, 0x77777777;",
            "prmt.b32 x, $3, b, m;",
            "shr.u32 t, m, 16;",
            "prmt.b32 y, $3, b, t;",
            "prmt.b32 s, $2, $2, 0xBA98;",
            "xor.b32 $0, x, s;",
            "shl.b32 t, $2, 4;",
            "prmt.b32 u, t, t, 0xBA98;",
            "xor.b32 $1, y, u;",
        ]
        return (_asm(body, "m x y t s u", {"b": high}),)
    low, high = _byte_table(list(codebook.levels))
    if bits == 2:
        body = [
            # the table is the second one, which may be a constant
            "lop3.b32 m, $4, 0x33333333, 0x44444444, 0xEA;",
            "prmt.b32 $0, m, a, m;",
            "shr.u32 m, m, 16;",
            "prmt.b32 $1, m, a, m;",
            "shr.u32 t, $4, 2;",
            "lop3.b32 m, t, 0x33333333, 0x44444444, 0xEA;",
            "prmt.b32 $2, m, a, m;",
            "shr.u32 m, m, 16;",
            "prmt.b32 $3, m, a, m;",
        ]
        return (_asm(body, "m t", {"a": low}),)
    return tuple(_asm(_three_bit_selectors(odd, "$4", "$5", "$0", "$1", "$2", "$3"), "m t h", {"b": high}) for odd in (0, 1))


def _three_bit_selectors(odd: int, low: str, high: str, *outs: str) -> list[str]:
    """Nibbles of 3-bit codes -> table bytes: fields (0, 2) of two bytes, of the other two, then fields (1, 3).

    $6 is first_table. Bit 2f + odd of a high byte is the third bit of field f.
    """
    first, second = ("shl.b32 h, {}, 2;", "mov.b32 h, {};") if not odd else ("shl.b32 h, {}, 1;", "shr.u32 h, {}, 1;")
    return [
        first.format(high),
        "and.b32 h, h, 0x44444444;",
        f"lop3.b32 m, {low}, 0x33333333, h, 0xEA;",
        f"prmt.b32 {outs[0]}, $6, b, m;",
        "shr.u32 m, m, 16;",
        f"prmt.b32 {outs[1]}, $6, b, m;",
        f"shr.u32 t, {low}, 2;",
        second.format(high),
        "and.b32 h, h, 0x44444444;",
        "lop3.b32 m, t, 0x33333333, h, 0xEA;",
        f"prmt.b32 {outs[2]}, $6, b, m;",
        "shr.u32 m, m, 16;",
        f"prmt.b32 {outs[3]}, $6, b, m;",
    ]


def value_asm(codebook) -> tuple[str, ...]:
    """PTX that turns four positions of packed value columns into signed bytes, one register a field (8 bits: none).

    A trellis: two columns, the second of which follows the first in its ring; see _trellis_asm.

    2 bits: fields 0 to 2 with their weight 4^f, which is divided out of the sums, and the byte itself, which is field 3 once
    the sums of the others are taken off (top_field_sums). 3 and 4 bits go through the levels' table.
    """
    bits = codebook.bits
    if bits == 8:
        return ()
    if codebook.kind == "trellis":
        return (_trellis_asm(),)
    if bits == 2:
        masks = ("0x03030303", "0x0C0C0C0C", "0x30303030")
        return (" ".join([*(f"and.b32 ${i}, $4, {mask};" for i, mask in enumerate(masks)), "mov.b32 $3, $4;"]),)
    if bits == 4:
        _, high = _byte_table(_magnitudes(codebook))
        body = [
            # n -> n - 8 where n >= 8, else 7 - n
            "not.b32 n, $2;",
            "and.b32 z, n, 0x88888888;",
            "shr.u32 t, z, 3;",
            "sub.u32 t, z, t;",
            "xor.b32 m, $2, t;",
            "and.b32 m, m, 0x77777777;",
            "prmt.b32 x, $3, b, m;",
            "shr.u32 m, m, 16;",
            "prmt.b32 y, $3, b, m;",
            "prmt.b32 m, x, y, 0x6420;",
            "shl.b32 t, n, 4;",
            "prmt.b32 t, t, t, 0xBA98;",
            "xor.b32 $0, m, t;",
            "prmt.b32 m, x, y, 0x7531;",
            "prmt.b32 t, n, n, 0xBA98;",
            "xor.b32 $1, m, t;",
        ]
        return (_asm(body, "n z t m x y", {"b": high}),)
    _, high = _byte_table(list(codebook.levels))
    unzip = [
        "prmt.b32 $0, p, q, 0x6420;",
        "prmt.b32 $2, p, q, 0x7531;",
        "prmt.b32 $1, v, w, 0x6420;",
        "prmt.b32 $3, v, w, 0x7531;",
    ]
    return tuple(
        _asm(_three_bit_selectors(odd, "$4", "$5", "p", "q", "v", "w") + unzip, "m t h p q v w", {"b": high})
        for odd in (0, 1)
    )


def _trellis_asm() -> str:
    """Columns $8 and $9 of symbols, of even and odd channels of a ring: an even one's channel before is in the lane $10.

    a and b are k and k ^ 3 (p & 1) of trellis.py for all fields of a byte, b of fields 2 and 3 with its high bit flipped. Of
    each column: n + 8 of field 0 and of field 1; bytes whose upper half is n of field 2 and of field 3, and whose lower half
    is n + 8 of fields 0 and 1.
    """
    lines = ["shfl.sync.idx.b32 p, $9, $10, 0x1F, 0xFFFFFFFF;"]
    for column, (now, before) in enumerate((("$8", "p"), ("$9", "$8"))):
        out = [f"${column + 2 * field}" for field in range(4)]
        lines += [
            f"shr.u32 t, {before}, 1;",
            f"lop3.b32 a, {now}, t, 0x55555555, 0x78;",
            f"shl.b32 t, {before}, 1;",
            f"lop3.b32 t, t, {before}, 0xAAAAAAAA, 0xE4;",
            "lop3.b32 b, a, t, 0xA0A0A0A0, 0x96;",
            "shl.b32 t, b, 2;",
            f"lop3.b32 {out[2]}, a, t, 0x33333333, 0xE4;",
            "shr.u32 t, a, 2;",
            f"lop3.b32 {out[3]}, t, b, 0x33333333, 0xE4;",
            f"and.b32 {out[0]}, {out[2]}, 0x0F0F0F0F;",
            f"and.b32 {out[1]}, {out[3]}, 0x0F0F0F0F;",
        ]
    return _asm(lines, "p t a b", {})


def key_parts(head_size: int, bits: int) -> int:
    """Parts of the channels whose keys are unpacked one after the other: the fewer at once, the fewer registers."""
    if bits == 3:
        return 1
    # a lane takes at least four bytes of a part, and a product of integers 32 channels
    return max(1, min(4, head_size * bits // 128, head_size // 32))


def max_warps(head_size: int, value_bits: int, trellis: bool = False) -> int:
    """Warps that can share out load_values' columns: each has some blocks of 8 of those that a load brings.

    Of a trellis they come in pairs.
    """
    if trellis:
        return head_size // 64
    loaded_together = {2: head_size // 4, 3: head_size // 8, 4: head_size // 2, 8: head_size}[value_bits]
    return loaded_together // 8


def key_channel_dims(head_size: int, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, axes): channels [0, head_size) reshaped and permuted are in the order in which the kernel multiplies them."""
    parts = key_parts(head_size, bits)
    if bits == 8:
        return (head_size,), (0,)
    if bits == 4:
        # half a head, part, byte: a word's low halves of bytes, then its high halves
        return (2, parts, head_size // 2 // parts), (1, 0, 2)
    # field (high bit, low bit), part, word, byte (high bit, low bit): a word's bytes (f, f + 2) of bytes 0, 1, then of bytes
    # 2, 3; f = 0 then f = 1. With 3 bits, the words of the even and of the odd bits of the high word are the parts.
    parts = parts if bits == 2 else 2
    return (2, 2, parts, head_size // 16 // parts, 2, 2), (2, 1, 4, 3, 5, 0)


def key_channel_order(head_size: int, bits: int) -> list[int]:
    """Channel of each coordinate in the order in which the kernel multiplies them."""
    shape, axes = key_channel_dims(head_size, bits)
    return torch.arange(head_size).reshape(shape).permute(axes).flatten().tolist()


@gluon.jit
def in_key_order(x, SHAPE: gl.constexpr, AXES: gl.constexpr):
    """Columns of x [N, D] in the order of key_channel_order; SHAPE, AXES: key_channel_dims with N in front."""
    return x.reshape(SHAPE).permute(AXES.value).reshape(x.shape)


def key_width(head_size: int, key_bits: int) -> int:
    """Consecutive key bytes of a token, and of a part, that one lane holds."""
    return 4 if key_bits == 3 else min(16, head_size // key_parts(head_size, key_bits) * key_bits // 32)


_LANE_BEFORE = gl.constexpr("{ .reg .b32 t; mov.u32 t, %tid.x; add.s32 t, t, 28; and.b32 t, t, 31; add.s32 $0, t, $1; }")


@gluon.jit
def _cat_rows(a, b):
    """[k, n] and [k, n] -> [2k, n]."""
    return gl.join(a, b).permute([2, 0, 1]).reshape([2 * a.shape[0], a.shape[1]])


@gluon.jit
def _cat_columns(a, b):
    """[k, n] and [k, n] -> [k, 2n]."""
    return gl.join(a, b).permute([0, 2, 1]).reshape([a.shape[0], 2 * a.shape[1]])


# Words of codes to level bytes. A table is four operands, since the others are four bytes each.


@gluon.jit
def _two_bits(w, ASM: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASM[0], "=r,=r,=r,=r,r", [w], dtype=(gl.int8, gl.int8, gl.int8, gl.int8), is_pure=True, pack=4
    )


@gluon.jit
def _trellis(w0, w1, lane_before, ASM: gl.constexpr):
    lane_before = gl.full(w0.shape, lane_before, gl.int32, w0.type.layout)
    return gl.inline_asm_elementwise(
        ASM[0],
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r",
        [w0, w1, lane_before],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _three_bits(low, high, table, ASM: gl.constexpr, ODD: gl.constexpr):
    table = gl.full(low.shape, table, gl.int32, low.type.layout)
    return gl.inline_asm_elementwise(
        ASM[ODD],
        "=r,=r,=r,=r,r,r,r,r,r,r",
        [low, high, table],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _four_bits(w, table, ASM: gl.constexpr):
    table = gl.full(w.shape, table, gl.int32, w.type.layout)
    return gl.inline_asm_elementwise(ASM[0], "=r,=r,r,r,r,r,r", [w, table], dtype=(gl.int8, gl.int8), is_pure=True, pack=4)


@gluon.jit
def load_keys(k0, k1, table, D: gl.constexpr, BITS: gl.constexpr, ASM: gl.constexpr, L: gl.constexpr):
    """Keys of a tile, or of a part of its D channels, as signed level bytes [D, 64] in the order of key_channel_order.

    Args: table: first_table
    """
    if BITS == 8:
        return gl.convert_layout(k0.permute([1, 0]).load(L).to(gl.int8, bitcast=True), L, assert_trivial=True)
    elif BITS == 4:
        w = k0.permute([1, 0]).load(L)
        a, z = _four_bits(w, table, ASM)
        return gl.convert_layout(_cat_rows(a, z), L, assert_trivial=True)
    elif BITS == 2:
        w = k0.permute([1, 0]).load(L)
        x0, x1, x2, x3 = _two_bits(w, ASM)
        return gl.convert_layout(_cat_rows(_cat_rows(x0, x1), _cat_rows(x2, x3)), L, assert_trivial=True)
    else:
        W: gl.constexpr = D // 4
        w0, w1 = gl.split(k0.permute([1, 0]).load(L).reshape([2, W // 2, 64]).permute([1, 2, 0]))
        h = k1.permute([1, 0]).load(w0.type.layout)
        x0, x1, x2, x3 = _three_bits(w0, h, table, ASM, 0)
        y0, y1, y2, y3 = _three_bits(w1, h, table, ASM, 1)
        x = _cat_rows(_cat_rows(x0, x1), _cat_rows(x2, x3))
        y = _cat_rows(_cat_rows(y0, y1), _cat_rows(y2, y3))
        return gl.convert_layout(_cat_rows(x, y), L, assert_trivial=True)


@gluon.constexpr_function
def _ring_layout(head_size, warps):
    """Columns [64 positions, head_size / 4] of a tile's symbols: two neighbours a lane, the 16 of a ring in eight lanes."""
    rings = [[0, 16 << i] for i in range(4) if 16 << i < head_size // 4]
    of_warps = rings[: warps.bit_length() - 1]
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [4, 0], [8, 0], *rings[len(of_warps) :], [0, 1]],
        lane_bases=[[16, 0], [32, 0], [0, 2], [0, 4], [0, 8]],
        warp_bases=of_warps,
        block_bases=[],
        shape=[64, head_size // 4],
    )


@gluon.jit
def value_channel(column, D: gl.constexpr):
    """Channel of columns that load_values brings of a trellis: of each field the even channels, then the odd ones."""
    field, i = column // (D // 4), column % (D // 4)
    return field * (D // 4) + i % (D // 8) * 2 + i // (D // 8)


@gluon.jit
def load_values(
    v0, v1, table, D: gl.constexpr, BITS: gl.constexpr, TRELLIS: gl.constexpr, ASM: gl.constexpr, L: gl.constexpr
):
    """Values of a tile as signed bytes [64 positions, D], channels in order; 2 bits: what value_asm says.

    Args: table: first_table; of a trellis lane_before
    """
    if TRELLIS:
        w = v0.permute([1, 0]).load(_ring_layout(D, gl.num_warps()))
        w0, w1 = gl.split(w.reshape([64, D // 8, 2]))
        a0, a1, b0, b1, c0, c1, d0, d1 = _trellis(w0, w1, table, ASM)
        low = _cat_columns(_cat_columns(a0, a1), _cat_columns(b0, b1))
        high = _cat_columns(_cat_columns(c0, c1), _cat_columns(d0, d1))
        return gl.convert_layout(_cat_columns(low, high), L, assert_trivial=True)
    elif BITS == 8:
        return v0.permute([1, 0]).load(L).to(gl.int8, bitcast=True)
    elif BITS == 4:
        w = v0.permute([1, 0]).load(L)
        x0, x1 = _four_bits(w, table, ASM)
        return gl.convert_layout(_cat_columns(x0, x1), L, assert_trivial=True)
    elif BITS == 2:
        w = v0.permute([1, 0]).load(L)
        x0, x1, x2, x3 = _two_bits(w, ASM)
        return gl.convert_layout(_cat_columns(_cat_columns(x0, x1), _cat_columns(x2, x3)), L, assert_trivial=True)
    else:
        w0 = v0.slice(0, D // 8).permute([1, 0]).load(L)
        w1 = v0.slice(D // 8, D // 8).permute([1, 0]).load(L)
        h = v1.permute([1, 0]).load(L)
        x0, x1, x2, x3 = _three_bits(w0, h, table, ASM, 0)
        y0, y1, y2, y3 = _three_bits(w1, h, table, ASM, 1)
        low = _cat_columns(_cat_columns(x0, y0), _cat_columns(x1, y1))
        high = _cat_columns(_cat_columns(x2, y2), _cat_columns(x3, y3))
        return gl.convert_layout(_cat_columns(low, high), L, assert_trivial=True)


@gluon.jit
def lane_before():
    """The lane that holds the column before the first of this lane's two, in its ring of eight lanes."""
    return gl.inline_asm_elementwise(_LANE_BEFORE, "=r,r", [0], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def top_field_sums(acc, D: gl.constexpr, TRELLIS: gl.constexpr):
    """Sums [N, D] over 2-bit values as load_values gives them -> over their fields alone.

    The last quarter is over whole bytes; of a trellis the last two quarters, whose lower half is the first two's.
    """
    x = acc.reshape([acc.shape[0], 2, 2, D // 4]).permute([0, 3, 1, 2])
    even, odd = gl.split(x)
    f0, f2 = gl.split(even)
    f1, f3 = gl.split(odd)
    if TRELLIS:
        x = gl.join(gl.join(f0, f2 - f0), gl.join(f1, f3 - f1))
    else:
        x = gl.join(gl.join(f0, f2), gl.join(f1, f3 - f0 - f1 - f2))
    return gl.convert_layout(x.permute([0, 2, 3, 1]).reshape(acc.shape), acc.type.layout, assert_trivial=True)
