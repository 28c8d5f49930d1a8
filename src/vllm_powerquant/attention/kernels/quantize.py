"""reference.quantize inside Triton kernels, on the columns of hadamard.py, and the bytes of layout.py that codes become."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from ...codebooks.tables import Codebook
from ..cache_format import CacheFormat
from ..trellis import LIMIT, UNIT, ring_length
from .hadamard import join_columns, outer_masks, signs_mask, split_columns, tree_sum

# smallest and largest positive fp16
_SCALE_MIN, _SCALE_MAX = tl.constexpr(2.0**-24), tl.constexpr(65504.0)
_LIMIT, _UNIT = tl.constexpr(LIMIT), tl.constexpr(float(UNIT))
_ROUND = tl.constexpr(1.5 * 2.0**23)  # added and taken off again: rounds to an integer


@dataclass(frozen=True)
class VectorFormat:
    """How keys, or values, become codes. A code is idx - 2**bits / 2: 0 is the first positive level."""

    bits: int
    planes: tuple[tuple[int, int], ...]  # byte offset in the sub-page, bits of each idx
    scales: int  # byte offset in the sub-page
    step: float
    scale_factor: float
    # level + 1/2 of the codes from 0; code ~n has the same magnitude as code n
    magnitudes: tuple[float, ...]
    # a power of two: every t outside +-limit has the first or the last code
    limit: float
    # (c1, c3, c5) or fewer terms: with x = (floor(2 t) + 1/2) / (4 limit) the code is floor(c1 x + c3 x**3 + c5 x**5);
    # empty where levels are even: it is floor(t)
    polynomial: tuple[float, ...]
    ring: int  # channels of a ring of trellis.py, whose codes none of the three above finds; 0: the scalar codec

    @staticmethod
    def of(codebook: Codebook, scale_factor: float, planes: tuple[int, ...], scales: int) -> VectorFormat:
        half = len(codebook.levels) // 2
        magnitudes = tuple(level + 0.5 for level in codebook.levels[half:])
        limit, polynomial = float(half), ()
        ring = ring_length(codebook.head_size) if codebook.kind == "trellis" else 0
        if not ring and magnitudes != tuple(i + 0.5 for i in range(half)):
            limit, polynomial = _code_polynomial(magnitudes)
        plane_bits = (2, 1) if codebook.bits == 3 else (codebook.bits,)
        return VectorFormat(
            bits=codebook.bits,
            planes=tuple(zip(planes, plane_bits, strict=True)),
            scales=scales,
            step=float(codebook.step),
            scale_factor=float(scale_factor),
            magnitudes=magnitudes,
            limit=limit,
            polynomial=polynomial,
            ring=ring,
        )


@dataclass(frozen=True)
class StoreFormat:
    """What a store kernel must know of a CacheFormat, as one constexpr argument."""

    head_size: int
    sub_page_bytes: int
    signs: int
    outer: tuple[int, ...]
    keys: VectorFormat
    values: VectorFormat

    @staticmethod
    @functools.cache
    def of(cache_format: CacheFormat) -> StoreFormat:
        layout, keys, values = cache_format.layout, cache_format.key_codebook, cache_format.value_codebook
        factor = cache_format.scale_factor
        return StoreFormat(
            head_size=cache_format.head_size,
            sub_page_bytes=layout.sub_page_bytes,
            signs=signs_mask(cache_format.head_size),
            outer=outer_masks(cache_format.head_size),
            keys=VectorFormat.of(keys, factor(keys), layout.key_plane_offsets, layout.key_scale_offset),
            values=VectorFormat.of(values, factor(values), layout.value_plane_offsets, layout.value_scale_offset),
        )


@functools.cache
def _code_polynomial(magnitudes: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """VectorFormat's limit and polynomial of uneven levels, which replaces a comparison with each boundary.

    Boundaries are multiples of 1/2 and x is the middle of a half step, so it may miss them by a quarter of a step: least
    squares come close enough. Of the fp16 neighbours of their result those are taken that give every code, with room for
    the rounding of fp32, and in fp16 arithmetic too.
    """
    boundaries = (np.array(magnitudes[1:]) + magnitudes[:-1]) / 2
    limit = 2.0 ** np.floor(np.log2(boundaries[-1]) + 1)
    # the half step from limit too: store_nvidia.py clamps to it
    t = np.arange(-2 * limit, 2 * limit + 1) / 2
    codes = (t[:, None] >= np.concatenate([-boundaries, [0.0], boundaries])).sum(1) - len(magnitudes)
    x = (t + 0.25) / (2 * limit)
    terms = range(1, len(magnitudes), 2)[:3]
    at = boundaries / (2 * limit)
    weights = np.diff(at, prepend=0.0)
    best = np.linalg.lstsq((at[:, None] ** terms) / weights[:, None], np.arange(1, len(magnitudes)) / weights, rcond=None)[0]
    near = [np.float16(c).view(np.int16) + np.arange(-3, 4, dtype=np.int16) for c in best]
    for polynomial in itertools.product(*(bits.view(np.float16) for bits in near)):
        exact = sum(float(c) * x**n for c, n in zip(polynomial, terms, strict=True)) - codes
        if ((exact > 1e-4) & (exact < 1 - 1e-4)).all() and (_codes_in_fp16(polynomial, x) == codes).all():
            return float(limit), tuple(map(float, polynomial))
    raise ValueError(f"no polynomial finds the codes of magnitudes {magnitudes}")


def _codes_in_fp16(polynomial: tuple[np.float16, ...], x: np.ndarray) -> np.ndarray:
    """Codes by fp16 multiply-adds, every result rounded, as store_nvidia.py computes them."""

    def rounded(y):
        return y.astype(np.float16).astype(np.float64)

    square, factor = rounded(x * x), np.float64(polynomial[-1])
    for c in polynomial[-2::-1]:
        factor = rounded(factor * square + np.float64(c))
    return np.rint(rounded(factor * x - 0.5))


@triton.jit
def energy_and_inverse(h, lane, COUNT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr):
    """|h|^2 and 1 / (rms * step) (0 without energy) of columns h: two [TOKENS, LANES] fp32, the same in every lane."""
    squares = ()
    for c in tl.static_range(COUNT):
        squares = squares + (h[c] * h[c],)
    energy = tree_sum(squares, lane, COUNT, LANES, GROUP)
    if LANES * COUNT & (LANES * COUNT - 1) == 0:
        mean = energy * (1.0 / (LANES * COUNT))
    else:
        mean = tl.div_rn(energy, LANES * COUNT * 1.0)
    return energy, tl.where(energy > 0, tl.div_rn(1.0, tl.sqrt_rn(mean) * STEP), 0.0)


@triton.jit
def scale_bits(energy, dot, FACTOR: tl.constexpr):
    """The stored scale as the bits of an fp16: energy / dot * FACTOR in its positive range, NaN if energy is not finite."""
    scale = tl.where(energy > 0, tl.div_rn(energy, dot) * FACTOR, 0.0)
    scale = tl.minimum(tl.maximum(scale, _SCALE_MIN), _SCALE_MAX)
    bits = scale.to(tl.float16).to(tl.int16, bitcast=True)
    return tl.where(energy < float("inf"), bits, 0x7E00)


@triton.jit
def _floor(x):
    """tl.floor, which takes a negative denormal for zero on NVIDIA GPUs, of what fits an int32."""
    toward_zero = x.to(tl.int32).to(tl.float32)
    return toward_zero - tl.where(toward_zero > x, 1.0, 0.0)


@triton.jit
def find_codes(t, VECTORS: tl.constexpr):
    """t fp32 -> code int32, and the magnitude of its level + 1/2; NaN has the first code."""
    t = tl.where(t > -VECTORS.limit, t, -VECTORS.limit)
    t = tl.where(t < VECTORS.limit, t, VECTORS.limit - 0.5)
    if len(VECTORS.polynomial) == 0:
        code = _floor(t)
        magnitude = tl.abs(code + 0.5)
    else:
        x = (_floor(t + t) + 0.5) * (0.25 / VECTORS.limit)
        factor = VECTORS.polynomial[len(VECTORS.polynomial) - 1]
        for i in tl.static_range(1, len(VECTORS.polynomial)):
            factor = factor * (x * x) + VECTORS.polynomial[len(VECTORS.polynomial) - 1 - i]
        code = tl.floor(factor * x)
        above = tl.abs(code + 0.5)
        magnitude = tl.where(above > 1, VECTORS.magnitudes[1], VECTORS.magnitudes[0])
        for i in tl.static_range(2, len(VECTORS.magnitudes)):
            magnitude = tl.where(above > i, VECTORS.magnitudes[i], magnitude)
    return code.to(tl.int32), magnitude


@triton.jit
def _encode_rings(h, inverse, RING: tl.constexpr):
    """trellis.encode of columns h [TOKENS, LANES], RING of which are a ring: a word of symbols for each, [TOKENS, LANES].

    Sums are multiples of 4 with the symbol before in the last two bits, and below 2^24: fp32 holds them exactly, and the
    first of equal sums is the least. They have a dimension of their own for the symbol that the ring ends with. A loop over
    channels and not its body many times over, which compiles for minutes.
    """
    TOKENS: tl.constexpr = inverse.shape[0]
    LANES: tl.constexpr = inverse.shape[1]
    RINGS: tl.constexpr = len(h) // RING
    SLOTS: tl.constexpr = 1 << (RINGS - 1).bit_length()  # tensors have powers of two as sizes
    columns = ()
    for ring in tl.static_range(SLOTS):
        for i in tl.static_range(16):
            if ring < RINGS and i < RING:
                columns = columns + (_units(h[ring * RING + i] * inverse),)
            else:
                columns = columns + (tl.zeros([TOKENS, LANES], tl.float32),)
    x = tl.reshape(join_columns(columns, 0, 16 * SLOTS), [TOKENS * LANES * SLOTS, 16])
    channel = tl.arange(0, 16)[None, :]
    start = tl.arange(0, 4)[None, :]
    none = tl.zeros([TOKENS * LANES * SLOTS, 4], tl.float32)
    m0 = tl.where(start == 0, none, 2.0**23)
    m1 = tl.where(start == 1, none, 2.0**23)
    m2 = tl.where(start == 2, none, 2.0**23)
    m3 = tl.where(start == 3, none, 2.0**23)
    # the symbols before, 8 bits a channel, of channels 0 to 7 and of the others
    first = none.to(tl.int64)
    others = first
    for i in range(RING):
        t = tl.sum(tl.where(channel == i, x, 0.0), 1)[:, None]
        n0, tag0 = _step(t, m0, m1, m2, m3, 0)
        n1, tag1 = _step(t, m0, m1, m2, m3, 1)
        n2, tag2 = _step(t, m0, m1, m2, m3, 2)
        n3, tag3 = _step(t, m0, m1, m2, m3, 3)
        m0, m1, m2, m3 = n0, n1, n2, n3
        chosen = (tag0 | tag1 << 2 | tag2 << 4 | tag3 << 6).to(tl.int64)
        first = tl.where(i < 8, first | chosen << (8 * (i & 7)), first)
        others = tl.where(i < 8, others, others | chosen << (8 * (i & 7)))
    ends = tl.where(start == 0, m0, tl.where(start == 1, m1 + 1, tl.where(start == 2, m2 + 2, m3 + 3)))
    now = tl.min(ends, 1).to(tl.int32) & 3
    first = tl.sum(tl.where(start == now[:, None], first, 0), 1)
    others = tl.sum(tl.where(start == now[:, None], others, 0), 1)
    symbols = now * 0
    for back in range(RING):
        i = RING - 1 - back
        symbols = symbols << 2 | now
        chosen = tl.where(i < 8, first, others) >> (8 * (i & 7) + 2 * now)
        now = chosen.to(tl.int32) & 3
    return split_columns(tl.reshape(symbols, [TOKENS, LANES, SLOTS]), SLOTS)


@triton.jit
def _units(t):
    """Coordinates rounded to the units of trellis.py."""
    t = tl.where(t > -_LIMIT, t, -_LIMIT)
    t = tl.where(t < _LIMIT, t, _LIMIT)
    return (t * _UNIT + _ROUND) - _ROUND


@triton.jit
def _step(x, m0, m1, m2, m3, SYMBOL: tl.constexpr):
    """Least sums [.., 4] of a symbol after one more channel, and the symbols before."""
    best = m0 + _error(x, level(SYMBOL, 0))
    best = tl.minimum(best, m1 + (_error(x, level(SYMBOL, 1)) + 1.0))
    best = tl.minimum(best, m2 + (_error(x, level(SYMBOL, 2)) + 2.0))
    best = tl.minimum(best, m3 + (_error(x, level(SYMBOL, 3)) + 3.0))
    tag = best.to(tl.int32) & 3
    return best - tag.to(tl.float32), tag


@triton.jit
def _error(x, N: tl.constexpr):
    """Four times the square error, less x^2, of level N - 7.5."""
    return 4.0 * (_UNIT * (N - 7.5)) * (_UNIT * (N - 7.5)) - x * (8.0 * (_UNIT * (N - 7.5)))


@triton.constexpr_function
def level(symbol: int, before: int) -> int:
    """n + 8 of trellis.py."""
    k = symbol ^ (before >> 1)
    return k + 4 * (k ^ (3 * (before & 1)))


@triton.jit
def quantize(h, lane, COUNT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VECTORS: tl.constexpr):
    """reference.quantize of columns h.

    Returns: codes: COUNT columns of int32; the bits of the fp16 scale, [TOKENS, LANES] int16
    """
    energy, inverse = energy_and_inverse(h, lane, COUNT, LANES, GROUP, VECTORS.step)
    codes = ()
    terms = ()
    RING: tl.constexpr = VECTORS.ring
    if RING:
        words = _encode_rings(h, inverse, RING)
        for c in tl.static_range(COUNT):
            symbol = (words[c // RING] >> (2 * (c % RING))) & 3
            before = (words[c // RING] >> (2 * ((c + RING - 1) % RING))) & 3
            k = symbol ^ (before >> 1)
            codes = codes + (symbol - 2,)
            terms = terms + (h[c] * ((k + 4 * (k ^ (3 * (before & 1)))).to(tl.float32) - 7.5),)
    for c in tl.static_range(0 if RING else COUNT):
        code, magnitude = find_codes(h[c] * inverse, VECTORS)
        codes = codes + (code,)
        # h and its level + 1/2 have the same sign, or their product does not count
        terms = terms + (tl.abs(h[c]) * magnitude,)
    return codes, scale_bits(energy, tree_sum(terms, lane, COUNT, LANES, GROUP), VECTORS.scale_factor)


@triton.jit
def pack_plane(codes, SHIFT: tl.constexpr, BITS: tl.constexpr, VECTORS: tl.constexpr, IS_VALUE: tl.constexpr):
    """A plane's bytes as int32 columns: BITS bits of each idx from bit SHIFT."""
    BYTES: tl.constexpr = len(codes) * BITS // 8
    out = ()
    for k in tl.static_range(BYTES):
        if BITS == 8:
            byte = codes[k] & 255
        else:
            # field 3 of a 2-bit value has its high bit flipped
            byte = codes[k] * 0 + (0x80 if IS_VALUE and VECTORS.bits == 2 and VECTORS.ring == 0 else 0)
            for field in tl.static_range(8 // BITS):
                idx = codes[k + field * BYTES] + (1 << (VECTORS.bits - 1))
                byte = byte ^ ((idx >> SHIFT) & ((1 << BITS) - 1)) << (field * BITS)
        out = out + (byte,)
    return out


@triton.jit
def pack_key_words(codes):
    """4-bit keys as sign and magnitude (layout.py): one int32 for each four columns of the lower half."""
    HALF: tl.constexpr = len(codes) // 2
    out = ()
    for k in tl.static_range(0, HALF, 4):
        word = codes[k] * 0
        for i in tl.static_range(4):
            # all ones where negative: a negative code's complement is its magnitude
            low_sign, high_sign = codes[k + i] >> 31, codes[HALF + k + i] >> 31
            word = word | (codes[k + i] ^ low_sign) << (4 * i) | (codes[HALF + k + i] ^ high_sign) << (16 + 4 * i)
            word = word | (low_sign & 1) << (8 * i + 7) | (high_sign & 1) << (8 * i + 3)
        out = out + (word,)
    return out


@triton.jit
def pack_words(column_bytes):
    """Four bytes to an int32 each, little endian."""
    words = ()
    for k in tl.static_range(0, len(column_bytes), 4):
        low, high = column_bytes[k] | column_bytes[k + 1] << 8, column_bytes[k + 2] | column_bytes[k + 3] << 8
        words = words + (low | high << 16,)
    return words


@triton.jit
def find_slots(cache_ptr, slot, stride_block, BLOCK_SIZE: tl.constexpr, SUB_PAGE_BYTES: tl.constexpr):
    """Slots [TOKENS, 1] int64 of one head -> pointers to their sub-pages; tokens and their positions in them, int32."""
    in_block = slot % BLOCK_SIZE
    sub_page = cache_ptr + slot // BLOCK_SIZE * stride_block + in_block // 64 * SUB_PAGE_BYTES
    token = (in_block % 64).to(tl.int32)
    return sub_page, token, 16 * (token >> 1 & 3) + 2 * (token >> 3) + (token & 1)
