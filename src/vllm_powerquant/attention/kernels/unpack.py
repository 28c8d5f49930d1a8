"""Packed bytes to integer levels: the one jit helper of every portable Triton kernel that reads packed pages.

A tile has a row for each of the token positions asked for and a column for each channel, in order, padded to a power of
two. Padding columns hold finite rubbish: the other operand (query, rotation matrix) is zero there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ..cache_format import CacheFormat
from ..layout import SUB_PAGE_TOKENS
from ..trellis import ring_length


@dataclass(frozen=True)
class PackedFormat:
    """What kernels must know of a CacheFormat, as one constexpr argument.

    key_magnitudes, value_magnitudes: levels of the upper half of the codebook, ascending, as the bytes of two words (the
    lower half mirrors it: ~n for n); None: the even levels idx - 2**(bits - 1).
    """

    head_size: int
    padded_size: int  # columns of a tile
    sub_page_bytes: int
    key_bits: int
    value_bits: int
    key_planes: tuple[int, int]  # byte offsets in the sub-page, as all below
    value_planes: tuple[int, int]
    key_scales: int
    value_scales: int
    key_magnitudes: tuple[int, int] | None
    value_magnitudes: tuple[int, int] | None
    key_step: float
    value_step: float
    value_ring: int  # channels of a ring of trellis.py; 0: the scalar codec

    @staticmethod
    @functools.cache
    def of(cache_format: CacheFormat) -> PackedFormat:
        layout, keys, values = cache_format.layout, cache_format.key_codebook, cache_format.value_codebook
        return PackedFormat(
            head_size=cache_format.head_size,
            padded_size=triton.next_power_of_2(cache_format.head_size),
            sub_page_bytes=layout.sub_page_bytes,
            key_bits=cache_format.key_bits,
            value_bits=cache_format.value_bits,
            key_planes=_two(layout.key_plane_offsets),
            value_planes=_two(layout.value_plane_offsets),
            key_scales=layout.key_scale_offset,
            value_scales=layout.value_scale_offset,
            key_magnitudes=_words(keys.levels),
            value_magnitudes=_words(values.levels),
            key_step=float(keys.step),
            value_step=float(values.step),
            value_ring=ring_length(cache_format.head_size) if cache_format.is_trellis else 0,
        )


def _two(offsets: tuple[int, ...]) -> tuple[int, int]:
    return offsets[0], offsets[-1]


def _words(levels: tuple[int, ...]) -> tuple[int, int] | None:
    """Every byte is below 128, so that a word is a positive int32."""
    half = len(levels) // 2
    if levels == tuple(range(-half, half)):
        return None
    upper = levels[half:]
    words = [sum(n << 8 * i for i, n in enumerate(upper[start : start + 4])) for start in (0, 4)]
    return words[0], words[1]


SUB_PAGE: tl.constexpr = tl.constexpr(SUB_PAGE_TOKENS)


@triton.jit
def token_at(position):
    """Token of a sub-page whose value bytes and scales are at these positions: the inverse of layout.token_positions."""
    return ((position >> 1) & 7) * 8 + ((position >> 4) & 3) * 2 + (position & 1)


@triton.jit
def position_of(token):
    """Position of a sub-page's tokens in its value planes and scales: layout.token_positions."""
    return 16 * ((token >> 1) & 3) + 2 * (token >> 3) + (token & 1)


@triton.jit
def load_key_levels(sub_page, position, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of a sub-page's keys.

    Args:    sub_page pointer to its first byte (uint8); position [T] int32. tl.arange(0, 64) is cheapest: row r is then
             token_at(r); position_of(tl.arange(0, 64)) gives rows in token order.
    Returns: [T, padded_size] of DTYPE. Integer: the level n; float: n + 1/2 (exact in fp16 and bf16). Times
             load_key_scales it is the key in rotated space.
    """
    channel = tl.arange(0, FORMAT.padded_size)[None, :]
    token = token_at(position)[:, None]
    if FORMAT.key_bits == 4:
        HALF: tl.constexpr = FORMAT.head_size // 2
        high = (channel >= HALF).to(tl.int32)
        i = channel % HALF % 4
        words = (sub_page + FORMAT.key_planes[0]).to(tl.pointer_type(tl.int32))
        word = tl.load(words + token * (HALF // 4) + channel % HALF // 4)
        negative = (word >> (8 * i + 7 - 4 * high)) & 1
        return _level((word >> (16 * high + 4 * i)) & 7, negative, True, FORMAT, DTYPE)
    else:
        return _load_levels(sub_page, token, channel, True, FORMAT, DTYPE)


@triton.jit
def load_value_levels(sub_page, position, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of a sub-page's values: [T, padded_size], arguments as for load_key_levels."""
    channel = tl.arange(0, FORMAT.padded_size)[None, :]
    if FORMAT.value_ring == 0:
        return _load_levels(sub_page, position[:, None], channel, False, FORMAT, DTYPE)
    RING: tl.constexpr = FORMAT.value_ring
    before = channel // RING * RING + (channel % RING + RING - 1) % RING
    idx = _load_field(sub_page + FORMAT.value_planes[0], position[:, None], channel, False, FORMAT.head_size, 2)
    before = _load_field(sub_page + FORMAT.value_planes[0], position[:, None], before, False, FORMAT.head_size, 2)
    k = idx ^ (before >> 1)
    return _even_level(k + 4 * (k ^ (3 * (before & 1))), 8, DTYPE)


@triton.jit
def load_key_scales(sub_page, position, FORMAT: tl.constexpr):
    """Stored scale times the codebook's step: [T] fp32. Levels + 1/2 times this are the keys in rotated space."""
    scales = (sub_page + FORMAT.key_scales).to(tl.pointer_type(tl.float16))
    return tl.load(scales + position).to(tl.float32) * FORMAT.key_step


@triton.jit
def load_value_scales(sub_page, position, FORMAT: tl.constexpr):
    """As load_key_scales, of the values."""
    scales = (sub_page + FORMAT.value_scales).to(tl.pointer_type(tl.float16))
    return tl.load(scales + position).to(tl.float32) * FORMAT.value_step


@triton.jit
def _load_levels(sub_page, row, channel, KEYS: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Every plane form but 4-bit keys: row [T, 1] is the token of a key, the position of a value."""
    BITS: tl.constexpr = FORMAT.key_bits if KEYS else FORMAT.value_bits
    PLANES: tl.constexpr = FORMAT.key_planes if KEYS else FORMAT.value_planes
    MAGNITUDES: tl.constexpr = FORMAT.key_magnitudes if KEYS else FORMAT.value_magnitudes
    D: tl.constexpr = FORMAT.head_size
    if BITS == 8:
        idx = _load_bytes(sub_page + PLANES[0], row, channel, KEYS, D) ^ 128
    else:
        idx = _load_field(sub_page + PLANES[0], row, channel, KEYS, D, 4 if BITS == 4 else 2)
        if BITS == 3:
            idx |= _load_field(sub_page + PLANES[1], row, channel, KEYS, D, 1) << 2
        elif BITS == 2 and not KEYS:
            # field 3 is stored with its high bit flipped
            idx ^= 2 * (channel >= D // 4 * 3).to(tl.int32)
    HALF: tl.constexpr = 1 << (BITS - 1)
    if MAGNITUDES is None:
        return _even_level(idx, HALF, DTYPE)
    else:
        negative = 1 - (idx >> (BITS - 1))
        return _level((idx ^ -negative) & (HALF - 1), negative, KEYS, FORMAT, DTYPE)


@triton.jit
def _even_level(i, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """i from 0 to the level i - HALF."""
    if DTYPE == tl.float16:
        # without conversions: 0x6000 | 2 * i is 512 + i in fp16
        return (2 * i | 0x6000).to(tl.int16).to(tl.float16, bitcast=True) - (511.5 + HALF)
    else:
        return _as(i - HALF, DTYPE)


@triton.jit
def _load_field(plane, row, channel, KEYS: tl.constexpr, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Unsigned fields of one plane: [T, padded_size] int32."""
    WIDTH: tl.constexpr = HEAD_SIZE * BITS // 8
    byte = _load_bytes(plane, row, channel, KEYS, WIDTH)
    return (byte >> (channel // WIDTH * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _load_bytes(plane, row, channel, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    if KEYS:
        return tl.load(plane + row * WIDTH + channel % WIDTH).to(tl.int32)
    else:
        return tl.load(plane + channel % WIDTH * SUB_PAGE + row).to(tl.int32)


@triton.jit
def _level(i, negative, KEYS: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Index i of a magnitude and a sign (0 or 1) to a level; the table lies in one or two words."""
    BITS: tl.constexpr = FORMAT.key_bits if KEYS else FORMAT.value_bits
    MAGNITUDES: tl.constexpr = FORMAT.key_magnitudes if KEYS else FORMAT.value_magnitudes
    word = tl.full(i.shape, MAGNITUDES[0], tl.int32)
    if BITS == 4:
        word = tl.where(i < 4, word, MAGNITUDES[1])
        i &= 3
    magnitude = (word >> (8 * i)) & 127
    if DTYPE == tl.float16:
        # without conversions: 0x6400 | m is 1024 + m in fp16
        half = (magnitude | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1023.5
        signed = half.to(tl.int16, bitcast=True) | (negative << 15).to(tl.int16)
        return signed.to(tl.float16, bitcast=True)
    else:
        return _as(magnitude ^ -negative, DTYPE)


@triton.jit
def _as(level, DTYPE: tl.constexpr):
    if DTYPE.is_floating():
        return (level.to(tl.float32) + 0.5).to(DTYPE)
    else:
        return level.to(DTYPE)
