"""The store of store.py for NVIDIA GPUs, in Gluon: the same bytes, from layouts that Triton cannot be asked for.

In large batches a thread holds a vector, or half of one, in its registers: rows come, and the words of keys go, through
shared memory, so that a warp's accesses lie side by side, and values are on their way while keys are stored. In small ones
more lanes share a vector. Rings of the trellis codec are encoded in four lanes each, whatever the batch. The usual widths,
4-bit keys and 2-bit values, are quantized and packed in inline PTX, by instructions that Triton has no words for (rounding
down, saturation, byte permutes, fp16 pairs).
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..cache_format import CacheFormat
from .hadamard import hadamard, join_columns, split_columns, tree_sum
from .quantize import (
    StoreFormat,
    VectorFormat,
    energy_and_inverse,
    find_slots,
    pack_key_words,
    pack_plane,
    pack_words,
    quantize,
    scale_bits,
)
from .rings_nvidia import ring_bytes, ring_ptx

# Vectors of one launch from which a thread takes a vector or half of one: below, latency counts and not instructions (H200,
# 2026-11-24).
LARGE_BATCH = 32768

# Bytes 0, 1 and 3 of the factors that _key_word_ptx looks up.
_OTHER_BYTES = 0x003F8000

_WIDEN_BF16 = gl.constexpr("shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xFFFF0000;")


def _f32(x: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


def _f16x2(x: float) -> str:
    return f"0x{int(np.float16(x).view(np.uint16)) * 0x10001:08X}"


def _bytes(values: list[int]) -> str:
    return f"0x{sum(value << 8 * i for i, value in enumerate(values)):08X}"


def _magnitude_bytes(keys: VectorFormat) -> list[int]:
    """Byte 2 of the fp32 factor 1 + (level + 1/2) / 128 for each magnitude."""
    return [0x80 | int(magnitude) for magnitude in keys.magnitudes]


@functools.cache
def _key_word_ptx(keys: VectorFormat) -> str:
    """4-bit keys: h of four channels A ($5 ..) and four Z of the upper half ($9 ..), inverse ($13) -> word, four sums.

    Per pair (A_i, Z_i): t = h * inverse, rounded down to half steps in fp16 (512 to 1024 are half a step apart, and both
    roundings go down), clamped by saturation (NaN to the first code) to x + 1/2, then the polynomial in fp16 pairs; its code
    + 1536.0 has the code in the low bits. Codes are gathered in nibbles (plus 8), then turned to sign and magnitude. Each
    magnitude selects a byte of f = 1 + (level + 1/2) / 128 from two tables, $14 and a constant; the others are in $15.
    h * f - h is rounded like h * (level + 1/2), 128 times as much. A sum is of A_i's and Z_i's, tree_sum's first step.
    """
    limit, (c1, c3, c5) = keys.limit, keys.polynomial
    eights = (0x88888888 - sum((0x6600 << 4 * i) * 0x10001 for i in range(4))) % 2**32
    lines = [
        ".reg .f32 t, z, s;",
        ".reg .b32 n, q, m, a, b, c, d, x, u, w, k1, k3, k5, half, middle, magic, per, low;",
        f"mov.b32 k1, {_f16x2(c1)};",
        f"mov.b32 k3, {_f16x2(c3)};",
        f"mov.b32 k5, {_f16x2(c5)};",
        f"mov.b32 half, {_f16x2(-0.5)};",
        f"mov.b32 middle, {_f16x2(0.125 / limit - 0.5)};",
        f"mov.b32 magic, {_f16x2(1536.0)};",
        f"mov.b32 per, {_f16x2(0.5 / limit)};",
        f"mov.b32 low, {_f16x2(0.5 - 384.0 / limit)};",
        f"mov.b32 n, 0x{eights:08X};",
    ]
    for i in range(4):
        for register, operand in (("t", 5 + i), ("z", 9 + i)):
            lines += [f"mul.rn.f32 {register}, ${operand}, $13;", f"add.rm.f32 {register}, {register}, {_f32(768.0)};"]
        lines += [
            "cvt.rz.f16x2.f32 x, z, t;",
            "fma.rn.sat.f16x2 x, x, per, low;",
            "add.rn.f16x2 x, x, middle;",
            "mul.rn.f16x2 u, x, x;",
            "fma.rn.f16x2 w, u, k5, k3;",
            "fma.rn.f16x2 w, w, u, k1;",
            "fma.rn.f16x2 w, w, x, half;",
            "add.rn.f16x2 w, w, magic;",
            f"shl.b32 w, w, {4 * i};",
            "add.u32 n, n, w;",
        ]
    lines += [
        # q: 8 where negative; there idx ^ 7 is the magnitude, elsewhere idx & 7
        "lop3.b32 q, n, 0x88888888, 0, 0x0C;",
        "shr.u32 a, q, 3;",
        "sub.u32 a, q, a;",
        "lop3.b32 m, n, a, 0x77777777, 0x28;",
        # signs of A_i from nibble i to bit 8 i + 7, of Z_i from nibble 4 + i to bit 8 i + 3
        "shl.b32 a, q, 4;",
        "shr.u32 b, q, 4;",
        "prmt.b32 c, q, a, 0x1504;",
        "prmt.b32 d, q, b, 0x7362;",
        "lop3.b32 c, c, d, 0x80808080, 0xE4;",
        "lop3.b32 $0, c, m, 0x88888888, 0xE4;",
        "shr.u32 x, m, 16;",
        f"mov.b32 c, {_bytes(_magnitude_bytes(keys)[4:])};",
        "prmt.b32 a, $14, c, m;",
        "prmt.b32 b, $14, c, x;",
    ]
    for i in range(4):
        for register, magnitude, operand in (("t", "a", 5 + i), ("z", "b", 9 + i)):
            lines += [
                f"prmt.b32 c, {magnitude}, $15, 0x6{i}54;",
                f"neg.f32 s, ${operand};",
                f"mov.b32 {register}, c;",
                f"fma.rn.f32 {register}, ${operand}, {register}, s;",
                f"abs.f32 {register}, {register};",
            ]
        lines += [f"add.rn.f32 ${1 + i}, t, z;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _value_byte_ptx() -> str:
    """2-bit values on even levels: h of four fields ($5 ..), inverse ($9) -> byte, h * (level + 1/2).

    y = (3 - idx) / 4: floor(t) by a magic number, clamped below by max (NaN to the first code) and above by saturation.
    """
    magic = 1.5 * 2.0**23
    lines = [".reg .f32 t, y0, y1, y2, y3;", ".reg .b32 n;"]
    for i in range(4):
        lines += [
            f"mul.rn.f32 t, ${5 + i}, $9;",
            f"max.f32 t, t, {_f32(-2.0)};",
            f"add.rm.f32 t, t, {_f32(magic)};",
            f"fma.rn.sat.f32 y{i}, t, {_f32(-0.25)}, {_f32(0.25 * (1 + magic))};",
            f"fma.rn.f32 t, y{i}, {_f32(-4.0)}, {_f32(1.5)};",
            f"mul.rn.f32 ${1 + i}, ${5 + i}, t;",
        ]
    lines += [f"fma.rn.f32 t, y0, {_f32(4.0)}, {_f32(2.0**23)};"]
    lines += [f"fma.rn.f32 t, y{i}, {_f32(4.0 ** (i + 1))}, t;" for i in range(1, 4)]
    # 3 - idx is the complement of idx; field 3 keeps its high bit flipped
    lines += ["mov.b32 n, t;", "xor.b32 $0, n, 0x7F;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def _place(column, lane, LANES: gl.constexpr, GROUP: gl.constexpr):
    """Byte of a plane that a column of bytes holds (hadamard.py): [1, LANES]."""
    return (column // GROUP * LANES + lane) * GROUP + column % GROUP


@gluon.jit
def _widen(x):
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(_WIDEN_BF16, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@gluon.jit
def _in_frame(x, frame, HEAD_SIZE: gl.constexpr):
    """(x - centre) * scale; frame points to the centre of each element."""
    return (x - gl.load(frame)) * gl.load(frame + HEAD_SIZE)


@gluon.jit
def _load_vectors(
    ptr, row, frame_ptr, to_ptr, copied, stride_token,
    HEAD_SIZE: gl.constexpr, LANES: gl.constexpr, GROUP: gl.constexpr, COLUMN: gl.constexpr,
):  # fmt: skip
    """Rows [TOKENS, 1] from ptr, copied to to_ptr (unless None), in the frame (unless None), as columns of fp32."""
    WIDTH: gl.constexpr = LANES * GROUP
    PIECE: gl.constexpr = gl.BlockedLayout([1, GROUP], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    offs = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, PIECE))[None, :]
    rows = ptr + gl.convert_layout(row, PIECE, assert_trivial=True) * stride_token + offs
    pieces = ()
    for start in gl.static_range(0, HEAD_SIZE, WIDTH):
        pieces = pieces + (gl.load(rows + start),)
    if to_ptr is not None:
        to_rows = gl.convert_layout(to_ptr, PIECE, assert_trivial=True) + offs
        mask = gl.convert_layout(copied, PIECE, assert_trivial=True)
        for p in gl.static_range(len(pieces)):
            gl.store(to_rows + p * WIDTH, pieces[p], mask=mask)
    columns = ()
    for p in gl.static_range(len(pieces)):
        x = _widen(pieces[p])
        if frame_ptr is not None:
            x = _in_frame(x, frame_ptr + (p * WIDTH + offs), HEAD_SIZE)
        piece = split_columns(x.reshape([x.shape[0], LANES, GROUP]), GROUP)
        for j in gl.static_range(GROUP):
            columns = columns + (gl.convert_layout(piece[j], COLUMN, assert_trivial=True),)
    return columns


@gluon.constexpr_function
def _tile_layout(head_size, dtype, warps):
    """Sixteen bytes a lane along the length of rows [TOKENS, head_size]."""
    run = 128 // dtype.primitive_bitwidth
    beside = min(32, head_size // run)
    return gl.BlockedLayout([1, run], [32 // beside, beside], [warps, 1], [1, 0])


@gluon.jit
def _copy_tile(ptr, stride_token, TOKENS: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Start to copy consecutive rows from ptr to shared memory [TOKENS, HEAD_SIZE]."""
    DTYPE: gl.constexpr = ptr.dtype.element_ty
    TILE: gl.constexpr = _tile_layout(HEAD_SIZE, DTYPE, gl.num_warps())
    row = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, TILE))[:, None]
    offs = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, TILE))[None, :]
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(128 // DTYPE.primitive_bitwidth, 1, 8, [1, 0])
    tile = gl.allocate_shared_memory(DTYPE, [TOKENS, HEAD_SIZE], SWIZZLED)
    # 32 bits: the launcher sees to it
    async_copy.async_copy_global_to_shared(tile, ptr + (row * stride_token.to(gl.int32) + offs))
    async_copy.commit_group()
    return tile


@gluon.jit
def _store_tile(tile, to_ptr, mask):
    """Rows of a tile that has arrived to to_ptr [TOKENS, 1]."""
    L: gl.constexpr = _tile_layout(tile.shape[1], tile.dtype, gl.num_warps())
    rows = gl.convert_layout(to_ptr, L) + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, L))[None, :]
    gl.store(rows, tile.load(L), mask=gl.convert_layout(mask, L))


@gluon.jit
def _load_tile(tile, frame_ptr, HEAD_SIZE: gl.constexpr, LANES: gl.constexpr, GROUP: gl.constexpr, COLUMN: gl.constexpr):
    """_load_vectors from what _copy_tile returns, without a copy."""
    TOKENS: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = LANES * GROUP
    PIECES: gl.constexpr = gl.BlockedLayout([1, GROUP], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    x = _widen(tile.load(PIECES))
    if frame_ptr is not None:
        x = _in_frame(x, frame_ptr + gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, PIECES))[None, :], HEAD_SIZE)
    x = x.reshape([TOKENS, HEAD_SIZE // WIDTH, LANES, GROUP]).permute(0, 2, 1, 3)
    parts = split_columns(x.reshape([TOKENS, LANES, HEAD_SIZE // LANES]), HEAD_SIZE // LANES)
    columns = ()
    for c in gl.static_range(len(parts)):
        columns = columns + (gl.convert_layout(parts[c], COLUMN, assert_trivial=True),)
    return columns


@gluon.jit
def _store_words(ptr, words, mask, LANES: gl.constexpr, GROUP: gl.constexpr):
    """A key's words of four bytes from ptr [TOKENS, 1]: as many at once as a lane has side by side."""
    RUN: gl.constexpr = len(words) if LANES == 1 else GROUP // 4
    VECTOR: gl.constexpr = 4 if RUN % 4 == 0 else (2 if RUN % 2 == 0 else 1)
    WORDS: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    ptr = gl.convert_layout(ptr, WORDS, assert_trivial=True)
    mask = gl.convert_layout(mask, WORDS, assert_trivial=True)
    i = gl.arange(0, LANES * VECTOR, layout=gl.SliceLayout(0, WORDS))[None, :]
    offs = i // VECTOR * GROUP + i % VECTOR * 4
    for w in gl.static_range(0, len(words), VECTOR):
        if VECTOR == 4:
            run = gl.join(gl.join(words[w], words[w + 2]), gl.join(words[w + 1], words[w + 3]))
        elif VECTOR == 2:
            run = gl.join(words[w], words[w + 1])
        else:
            run = words[w]
        run = gl.convert_layout(run.reshape([ptr.shape[0], LANES * VECTOR]), WORDS, assert_trivial=True)
        to = ptr + (4 * w // GROUP * LANES * GROUP + 4 * w % GROUP) + offs
        gl.store(to.to(gl.pointer_type(gl.int32)), run, mask=mask)


@gluon.jit
def _store_word_tile(ptr, words, mask, LANES: gl.constexpr, GROUP: gl.constexpr):
    """_store_words through shared memory, to lanes that store side by side."""
    TOKENS: gl.constexpr = ptr.shape[0]
    COUNT: gl.constexpr = len(words)
    WORDS: gl.constexpr = COUNT * LANES
    RUN: gl.constexpr = GROUP // 4
    VECTOR: gl.constexpr = min(4, WORDS)
    TILE: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // WORDS, WORDS // VECTOR], [gl.num_warps(), 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, max(1, 32 // WORDS), min(8, WORDS // VECTOR), [1, 0])
    tile = join_columns(words, 0, COUNT).reshape([TOKENS, LANES, COUNT // RUN, RUN])
    tile = tile.permute(0, 2, 1, 3).reshape([TOKENS, WORDS])
    shared = gl.allocate_shared_memory(gl.int32, [TOKENS, WORDS], SWIZZLED, tile)
    rows = gl.convert_layout(ptr, TILE).to(gl.pointer_type(gl.int32))
    offs = gl.arange(0, WORDS, layout=gl.SliceLayout(0, TILE))[None, :]
    gl.store(rows + offs, shared.load(TILE), mask=gl.convert_layout(mask, TILE))


@gluon.jit
def _key_words(
    h, inverse, magnitudes, other_bytes, lane, LANES: gl.constexpr, GROUP: gl.constexpr, PTX: gl.constexpr
):  # fmt: skip
    """4-bit keys: words of four bytes, and <h, level + 1/2>."""
    HALF: gl.constexpr = len(h) // 2
    magnitudes = gl.full(inverse.shape, magnitudes, gl.int32, inverse.type.layout)
    other_bytes = gl.full(inverse.shape, other_bytes, gl.int32, inverse.type.layout)
    words = ()
    terms = ()
    for k in gl.static_range(0, HALF, 4):
        word, s0, s1, s2, s3 = gl.inline_asm_elementwise(
            PTX,
            "=r,=f,=f,=f,=f,f,f,f,f,f,f,f,f,f,r,r",
            [
                h[k], h[k + 1], h[k + 2], h[k + 3], h[HALF + k], h[HALF + k + 1], h[HALF + k + 2], h[HALF + k + 3],
                inverse, magnitudes, other_bytes,
            ],
            dtype=(gl.int32, gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )  # fmt: skip
        words = words + (word,)
        # the first step of tree_sum is done
        terms = terms + (s0, s1, s2, s3)
    return words, tree_sum(terms, lane, HALF, LANES, GROUP) * 128.0


@gluon.jit
def _value_bytes(h, inverse, lane, LANES: gl.constexpr, GROUP: gl.constexpr, PTX: gl.constexpr):
    """2-bit values: bytes, and <h, level + 1/2>."""
    QUARTER: gl.constexpr = len(h) // 4
    column_bytes = ()
    terms = ()
    for k in gl.static_range(QUARTER):
        byte, a, b, c, d = gl.inline_asm_elementwise(
            PTX,
            "=r,=f,=f,=f,=f,f,f,f,f,f",
            [h[k], h[QUARTER + k], h[2 * QUARTER + k], h[3 * QUARTER + k], inverse],
            dtype=(gl.int32, gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )
        column_bytes = column_bytes + (byte,)
        # the first two steps of tree_sum
        terms = terms + ((a + c) + (b + d),)
    return column_bytes, tree_sum(terms, lane, QUARTER, LANES, GROUP)


@gluon.jit
def _store_vectors(
    ptr, tile, row, frame_ptr, to_ptr, copied, cache_ptr, slot, packed, magnitudes, other_bytes,
    stride_token, stride_block,
    IS_KEY: gl.constexpr, FORMAT: gl.constexpr, VECTORS: gl.constexpr, PTX: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, LANES: gl.constexpr, GROUP: gl.constexpr, COLUMN: gl.constexpr,
):  # fmt: skip
    """Keys or values of a program's tokens; per-token tensors are [TOKENS, 1] in layout COLUMN.

    Args: tile: they are there already, and copied (unless None)
    """
    HEAD_SIZE: gl.constexpr = FORMAT.head_size
    SIGNS: gl.constexpr = FORMAT.signs
    OUTER: gl.constexpr = FORMAT.outer
    COUNT: gl.constexpr = HEAD_SIZE // LANES
    if tile is not None:
        x = _load_tile(tile, frame_ptr, HEAD_SIZE, LANES, GROUP, COLUMN)
    else:
        x = _load_vectors(ptr, row, frame_ptr, to_ptr, copied, stride_token, HEAD_SIZE, LANES, GROUP, COLUMN)
    if cache_ptr is not None:
        lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, COLUMN))[None, :]
        h = hadamard(x, lane, COUNT, LANES, GROUP, SIGNS, OUTER)
        if PTX is not None:
            energy, inverse = energy_and_inverse(h, lane, COUNT, LANES, GROUP, VECTORS.step)
            if IS_KEY:
                out, dot = _key_words(h, inverse, magnitudes, other_bytes, lane, LANES, GROUP, PTX)
            elif VECTORS.ring:
                out, dot = ring_bytes(h, inverse, lane, LANES, GROUP, PTX)
            else:
                out, dot = _value_bytes(h, inverse, lane, LANES, GROUP, PTX)
            scale = scale_bits(energy, dot, VECTORS.scale_factor)
        else:
            out, scale = quantize(h, lane, COUNT, LANES, GROUP, VECTORS)
        sub_page, token, position = find_slots(cache_ptr, slot, stride_block, BLOCK_SIZE, FORMAT.sub_page_bytes)
        scale_ptr = (sub_page + VECTORS.scales + 2 * position).to(gl.pointer_type(gl.int16))
        gl.store(scale_ptr + lane, scale, mask=packed & (lane == 0))
        if IS_KEY and VECTORS.bits == 4:
            if PTX is None:
                out = pack_key_words(out)
            to = sub_page + VECTORS.planes[0][0] + token * (HEAD_SIZE // 2)
            if tile is not None:
                _store_word_tile(to, out, packed, LANES, GROUP)
            else:
                _store_words(to, out, packed, LANES, GROUP)
        else:
            for plane in gl.static_range(len(VECTORS.planes)):
                to = sub_page + VECTORS.planes[plane][0]
                if PTX is None:
                    column_bytes = pack_plane(out, 2 * plane, VECTORS.planes[plane][1], VECTORS, not IS_KEY)
                else:
                    column_bytes = out
                if IS_KEY:
                    to = to + token * (len(column_bytes) * LANES)
                else:
                    to = to + position
                if IS_KEY and len(column_bytes) % 4 == 0:
                    _store_words(to, pack_words(column_bytes), packed, LANES, GROUP)
                else:
                    for k in gl.static_range(len(column_bytes)):
                        offs = _place(k, lane, LANES, GROUP) * (1 if IS_KEY else 64)
                        gl.store(to + offs, column_bytes[k].to(gl.uint8), mask=packed)


@gluon.jit(
    do_not_specialize=["num_tokens", "magnitudes", "other_bytes"],
    do_not_specialize_on_alignment=["slots_ptr", "exact_slots_ptr"],
)
def _store_kernel(
    key_ptr, value_ptr,  # [num_tokens, num_kv_heads, head_size]
    frame_ptr,           # [num_kv_heads, 3, head_size] fp32: centre, scale, 1 / scale; or None
    slots_ptr,           # [num_tokens] int64
    cache_ptr,           # [num_blocks, num_kv_heads, BLOCK_SIZE, slot_bytes] uint8, or None
    exact_slots_ptr,     # [num_tokens] int64
    exact_ptr,           # [num_exact_blocks, num_kv_heads, EXACT_BLOCK_SIZE, 2 * head_size], or None
    num_tokens,
    magnitudes, other_bytes,  # two operands of KEY_PTX: constants would be loaded anew wherever they are used
    stride_key_token: gl.int64, stride_key_head: gl.int64, stride_value_token: gl.int64, stride_value_head: gl.int64,
    stride_block: gl.int64, stride_head: gl.int64,
    stride_exact_block: gl.int64, stride_exact_head: gl.int64, stride_exact_token: gl.int64,
    BLOCK_SIZE: gl.constexpr, EXACT_BLOCK_SIZE: gl.constexpr, FORMAT: gl.constexpr,
    KEY_PTX: gl.constexpr, VALUE_PTX: gl.constexpr, TOKENS: gl.constexpr, LANES: gl.constexpr, GROUP: gl.constexpr,
    TILED: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = FORMAT.keys
    VALUES: gl.constexpr = FORMAT.values
    COLUMN: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    head = gl.program_id(0).to(gl.int64)
    first = gl.program_id(1) * TOKENS
    key_ptr += head * stride_key_head
    value_ptr += head * stride_value_head
    key_tile, value_tile = None, None
    if TILED:
        # the last program starts early instead of ending late: what it shares with the one before is stored twice
        first = gl.minimum(first, num_tokens - TOKENS)
        # under way while the program asks for its slots, and the values while it stores the keys
        key_tile = _copy_tile(key_ptr + first.to(gl.int64) * stride_key_token, stride_key_token, TOKENS, FORMAT.head_size)
        value_tile = _copy_tile(
            value_ptr + first.to(gl.int64) * stride_value_token, stride_value_token, TOKENS, FORMAT.head_size
        )
    row = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, COLUMN))[:, None]
    real = row < num_tokens
    # reads need no mask
    row = gl.minimum(row, num_tokens - 1).to(gl.int64)
    slot, packed = row, real
    if cache_ptr is not None:
        slot = gl.load(slots_ptr + row)
        packed = real & (slot >= 0)
        cache_ptr += head * stride_head
    to_ptr, value_to_ptr, copied = None, None, real
    if exact_ptr is not None:
        exact_slot = gl.load(exact_slots_ptr + row)
        copied = real & (exact_slot >= EXACT_BLOCK_SIZE)
        to_ptr = exact_ptr + exact_slot // EXACT_BLOCK_SIZE * stride_exact_block + head * stride_exact_head
        to_ptr = to_ptr + exact_slot % EXACT_BLOCK_SIZE * stride_exact_token
        value_to_ptr = to_ptr + FORMAT.head_size
    if TILED:
        if exact_ptr is not None:
            # few tokens have an exact block
            if gl.max(gl.max(copied.to(gl.int32), 1), 0) != 0:
                async_copy.wait_group(0)
                _store_tile(key_tile, to_ptr, copied)
                _store_tile(value_tile, value_to_ptr, copied)
        async_copy.wait_group(1)
    if TILED or gl.program_id(2) == 0:
        _store_vectors(
            key_ptr,
            key_tile,
            row,
            None if frame_ptr is None else frame_ptr + head * (3 * FORMAT.head_size),
            to_ptr, copied, cache_ptr, slot, packed, magnitudes, other_bytes, stride_key_token, stride_block,
            True, FORMAT, KEYS, KEY_PTX, BLOCK_SIZE, LANES, GROUP, COLUMN,
        )  # fmt: skip
    if TILED:
        async_copy.wait_group(0)
    if TILED or gl.program_id(2) == 1:
        _store_vectors(
            value_ptr,
            value_tile,
            row,
            None,
            value_to_ptr, copied, cache_ptr, slot, packed, magnitudes, other_bytes, stride_value_token, stride_block,
            False, FORMAT, VALUES, VALUE_PTX, BLOCK_SIZE, LANES, GROUP, COLUMN,
        )  # fmt: skip


@functools.cache
def _ptx(cache_format: CacheFormat) -> tuple[str | None, str | None, int]:
    """Inline PTX of keys and of values (None: other widths), and the first table of keys' magnitudes."""
    keys = StoreFormat.of(cache_format).keys
    value_ptx = _value_byte_ptx() if cache_format.value_bits == 2 else None
    if cache_format.is_trellis:
        value_ptx = ring_ptx()
    if cache_format.key_bits != 4:
        return None, value_ptx, 0
    return _key_word_ptx(keys), value_ptx, int.from_bytes(bytes(_magnitude_bytes(keys)[:4]), "little", signed=True)


@dataclass(frozen=True)
class LaunchShape:
    """Tokens of a program, lanes that a vector is spread over, columns side by side in a lane, whether rows come by tiles,
    warps, registers that a thread may take."""

    tokens: int
    lanes: int
    group: int
    tiled: bool
    warps: int
    registers: int | None


@functools.cache
def launch_shape(cache_format: CacheFormat, large: bool) -> LaunchShape:
    head_size = cache_format.head_size
    if head_size & (head_size - 1):
        return LaunchShape(32, 1, 8, False, 1, None)
    if not large:
        # the columns of a byte lie in one lane: eight of each in planes of one bit, which 3 bits have
        fields = 8 if 3 in (cache_format.key_bits, cache_format.value_bits) else 4
        lanes = head_size // (4 * fields)
        # the rings of a warp's vectors keep four warps busy
        return LaunchShape(32 // lanes, lanes, 4, False, 4 if cache_format.is_trellis else 1, None)
    # fewer registers spill; with 168 12 warps fit a multiprocessor, with 96 20 (H200, 2026-11-24)
    usual = (cache_format.key_bits, cache_format.value_bits) == (4, 2)
    lanes, warps, registers = {64: (1, 1, 96), 128: (2, 4, 96), 256: (2, 1, 168)}[head_size]
    if cache_format.is_trellis:
        # h stays in registers while rings are encoded; fewer would spill (Triton 3.6)
        registers = {64: 128, 128: 128, 256: 255}[head_size]
    return LaunchShape(warps * 32 // lanes, lanes, 8, True, warps, registers if usual else None)


def store_nvidia(
    cache_format: CacheFormat,
    cache: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor | None,
    key_frame: torch.Tensor | None,
    exact_cache: torch.Tensor | None,
    exact_slots: torch.Tensor | None,
    num_tokens: int,
) -> None:
    """store.store after its checks."""
    num_kv_heads = key.shape[1]
    shape = launch_shape(cache_format, num_tokens * num_kv_heads >= LARGE_BATCH)
    # A tile is full, its offsets fit 32 bits, and its rows are copied 16 bytes at a time. Of a number Triton knows only
    # whether 16 divides it, so the strides, which count elements, must be multiples of that.
    odd = any(x.data_ptr() % 16 or x.stride(0) % 16 or x.stride(1) % 16 for x in (key, value))
    wide = shape.tokens * max(key.stride(0), value.stride(0)) >= 2**31
    if shape.tiled and (num_tokens < shape.tokens or wide or odd):
        shape = launch_shape(cache_format, False)
    key_ptx, value_ptx, magnitudes = _ptx(cache_format)
    _store_kernel[(num_kv_heads, triton.cdiv(num_tokens, shape.tokens), 1 if shape.tiled else 2)](
        key,
        value,
        key_frame,
        slots,
        cache,
        exact_slots,
        exact_cache,
        num_tokens,
        magnitudes,
        _OTHER_BYTES,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *(cache.stride()[:2] if cache is not None else (0, 0)),
        *(exact_cache.stride()[:3] if exact_cache is not None else (0, 0, 0)),
        BLOCK_SIZE=cache.shape[2] if cache is not None else 0,
        EXACT_BLOCK_SIZE=exact_cache.shape[2] if exact_cache is not None else 0,
        FORMAT=StoreFormat.of(cache_format),
        KEY_PTX=key_ptx,
        VALUE_PTX=value_ptx,
        TOKENS=shape.tokens,
        LANES=shape.lanes,
        GROUP=shape.group,
        TILED=shape.tiled,
        num_warps=shape.warps,
        maxnreg=shape.registers,
        enable_fp_fusion=False,
    )
