"""What PTX instructions compute, on numpy arrays [warps, 32] of a register's bits: unsigned integers, bool for predicates.

Constants are arrays [1, 1]. arithmetic() looks an instruction up in the tables FLOAT, SIGNED and INTEGER, or, where its
modifiers or operands are of its own kind, in BUILDERS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BITS = {kind + str(bits): bits for kind in "busf" for bits in (8, 16, 32, 64)}
BITS |= {"bf16": 16, "f16x2": 32, "bf16x2": 32, "pred": 1}
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
LANES = np.arange(32)


class UnsupportedInstruction(NotImplementedError):
    """The emulator does not know an instruction, or a modifier of it."""


def operand_bits(op: list[str], i: int) -> int:
    """Bits of the i-th source operand, which a constant cannot tell."""
    name, bits = op[0], BITS.get(op[-1], 32)
    if (name in ("shl", "shr") and i == 1) or (name == "bfe" and i > 0):
        return 32
    if name == "selp" and i == 2:
        return 1
    if name == "mad" and i == 2 and "wide" in op:
        return 2 * bits
    return bits


def full(x: np.ndarray, warps: int) -> np.ndarray:
    return x if x.shape == (warps, 32) else np.broadcast_to(x, (warps, 32))


def signed(x: np.ndarray) -> np.ndarray:
    return x.view(f"i{x.itemsize}")


def unsigned(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


def _extended(x: np.ndarray, is_signed: bool, bits: int) -> np.ndarray:
    return unsigned(signed(x).astype(f"i{bits // 8}")) if is_signed else x.astype(f"u{bits // 8}")


# Floating point. Sums and products of fp32 are rounded once; a sum of three exponents far apart may be rounded twice (fma).


def _flushed(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "fma": lambda a, b, c: a * b + c,
    "div": np.divide,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "ex2": lambda a: _flushed(np.exp2(_flushed(a))),
    "lg2": lambda a: np.log2(_flushed(a)),
}
# rounded as fp32 by numpy itself; the others are computed in double precision
_SINGLE = {"add", "sub", "mul", "neg", "abs", "min", "max"}
_MODIFIERS = {"ex2": {"approx", "ftz"}, "lg2": {"approx", "ftz"}, "div": {"full", "rn"}, "sqrt": {"approx", "rn"}}
_MODIFIERS |= {"rcp": {"rn"}, "add": {"rn", "rm"}, "min": {"NaN"}, "max": {"NaN"}}


def _add_down(a, b):
    """a + b rounded towards minus infinity."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    nearest = total.astype(np.float32)
    above = (nearest > total) | ((nearest == total) & (lost < 0))
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _saturated(x):
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1))


def _float(op: list[str]) -> Callable:
    name, modifiers = op[0], set(op[1:-1])
    if not modifiers <= _MODIFIERS.get(name, {"rn"}) | {"sat"}:
        raise UnsupportedInstruction(".".join(op))
    function = FLOAT[name]
    if "NaN" in modifiers:
        function = {"min": np.minimum, "max": np.maximum}[name]
    if "rm" in modifiers:
        function = _add_down
    finish = _saturated if "sat" in modifiers else lambda x: x

    def single(*operands):
        x = [a.view(np.float32) for a in operands]
        if name not in _SINGLE:
            x = [a.astype(np.float64) for a in x]
        return finish(function(*x).astype(np.float32)).astype(np.float32).view(np.uint32)

    def pair(*operands):
        halves = []
        for shift in (np.uint32(0), np.uint32(16)):
            x = [(a >> shift).astype(np.uint16).view(np.float16).astype(np.float64) for a in operands]
            rounded = finish(function(*x).astype(np.float16)).astype(np.float16)
            halves.append(rounded.view(np.uint16).astype(np.uint32) << shift)
        return halves[0] | halves[1]

    return single if op[-1] == "f32" else pair


def _to_half(x):
    return x.view(np.float32).astype(np.float16).view(np.uint16)


def _to_half_toward_zero(x):
    value = x.view(np.float32)
    half = value.astype(np.float16)
    return half.view(np.uint16) - (np.abs(half.astype(np.float32)) > np.abs(value)).astype(np.uint16)


def _to_bfloat(x):
    rounded = (x + (np.uint32(0x7FFF) + (x >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x.view(np.float32)), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _from_half(x):
    return x.view(np.float16).astype(np.float32).view(np.uint32)


def _from_bfloat(x):
    return x.astype(np.uint32) << np.uint32(16)


def _floor(x):
    return np.floor(x.view(np.float32)).view(np.uint32)


def _to_integer(low: float, high: float) -> Callable:
    def convert(x):
        value = np.trunc(np.clip(x.view(np.float32).astype(np.float64), low, high))
        return np.where(np.isnan(value), 0, value).astype(np.int64).astype(np.uint32)

    return convert


_CONVERSIONS = {
    "rn.f16.f32": _to_half,
    "rz.f16.f32": _to_half_toward_zero,
    "rn.bf16.f32": _to_bfloat,
    "f32.f16": _from_half,
    "f32.bf16": _from_bfloat,
    "rmi.f32.f32": _floor,
    "rmi.ftz.f32.f32": _floor,
    "rzi.s32.f32": _to_integer(-(2.0**31), 2.0**31 - 1),
    "rzi.u32.f32": _to_integer(0, 2.0**32 - 1),
    "rn.f32.s32": lambda x: signed(x).astype(np.float32).view(np.uint32),
    "rn.f32.u32": lambda x: x.astype(np.float32).view(np.uint32),
}


def _convert(op: list[str]) -> Callable:
    name, to, source = ".".join(op[1:]), op[-2], op[-1]
    if to in ("f16x2", "bf16x2"):
        half = _CONVERSIONS[name.replace("x2", "")]
        return lambda high, low: half(low).astype(np.uint32) | half(high).astype(np.uint32) << np.uint32(16)
    if name in _CONVERSIONS:
        return _CONVERSIONS[name]
    if "f" in to + source or len(op) > 3:
        raise UnsupportedInstruction(".".join(op))

    def integer(x):
        x = x.astype(UNSIGNED[BITS[source]])  # registers have 16 bits at least
        x = _extended(x, source[0] == "s", 64).astype(UNSIGNED[BITS[to]])
        return _extended(x, to[0] == "s", 16) if x.itemsize == 1 else x

    return integer


# Integers.


def _shift_left(a, b):
    return a << np.minimum(b, 64).astype(a.dtype)  # by its width or more: 0, as in PTX


def _shift_right(a, b):
    return a >> np.minimum(b, 64).astype(a.dtype)


def _extract(a, position, length):
    bits = 8 * a.itemsize
    return _shift_right(_shift_left(a, bits - position - length), bits - length)


def _permute(a, b, selectors):
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    table = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(a.shape, np.uint32)
    for i in range(4):
        selector = selectors >> np.uint32(4 * i) & np.uint32(15)
        byte = (table >> (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        # the selector's top bit asks for the byte's sign, replicated
        out |= np.where(selector & np.uint32(8), signed(byte) >> 7, signed(byte)).astype(np.uint8).astype(
            np.uint32
        ) << np.uint32(8 * i)
    return out


def _funnel_shift(op: list[str]) -> Callable:
    def shift(low, high, by):
        by = (np.minimum(by, 32) if op[2] == "clamp" else by & np.uint32(31)).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return (both >> by if op[1] == "r" else both << by >> np.uint64(32)).astype(np.uint32)

    return shift


def _logic(a, b, c, table):
    out = np.uint32(0)
    for i in range(8):
        if int(table[0, 0]) >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _quotient(a, b):
    """Rounded towards zero; a division by zero gives all ones."""
    a, b = np.broadcast_arrays(a, b)
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(wide_a) // np.maximum(np.abs(wide_b), 1) * np.sign(wide_a) * np.sign(wide_b)
    return np.where(b == 0, -1, quotient).astype(a.dtype)


INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "min": np.minimum,
    "max": np.maximum,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _extract,
    "prmt": _permute,
    "lop3": _logic,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}
# the same functions, of signed operands
SIGNED = {"min", "max", "shr", "div", "rem"}


def _extract_signed(a, position, length):
    bits = 8 * a.itemsize
    return unsigned(_shift_right(signed(_shift_left(a, bits - position - length)), bits - length))


def _integer(op: list[str]) -> Callable:
    name, kind = op[0], op[-1]
    if name == "bfe" and kind[0] == "s":
        return _extract_signed
    if name in ("div", "rem") and BITS[kind] != 32:
        raise UnsupportedInstruction(".".join(op))
    function = INTEGER[name]
    if kind[0] == "s" and name in SIGNED:
        if name == "shr":
            return lambda a, b: unsigned(function(signed(a), b))
        return lambda a, b: unsigned(function(signed(a), signed(b)))
    return function


def _product(op: list[str]) -> Callable:
    is_signed, bits = op[-1][0] == "s", BITS[op[-1]]

    def multiply(a, b):
        if "wide" in op:
            return _extended(a, is_signed, 2 * bits) * _extended(b, is_signed, 2 * bits)
        if "hi" not in op:
            return a * b
        if bits == 64:
            x, y = ((signed(v) if is_signed else v).astype(object) for v in (a, b))
            return ((x * y >> 64) % 2**64).astype(np.uint64)
        product = _extended(a, is_signed, 64) * _extended(b, is_signed, 64)
        return (product >> np.uint64(bits)).astype(UNSIGNED[bits])

    return multiply if op[0] == "mul" else lambda a, b, c: multiply(a, b) + c


_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _compare(op: list[str]) -> Callable:
    relation, kind = op[1], op[-1]
    if kind == "f32":

        def floats(a, b):
            a, b = a.view(np.float32), b.view(np.float32)
            unordered = np.isnan(a) | np.isnan(b)
            if relation in ("num", "nan"):
                return unordered if relation == "nan" else ~unordered
            result = _COMPARE[relation[:2]](a, b)
            return result | unordered if relation[2:] == "u" else result & ~unordered

        return floats
    if kind[0] == "f" or len(op) != 3:
        raise UnsupportedInstruction(".".join(op))
    function = _COMPARE[relation]
    return (lambda a, b: function(signed(a), signed(b))) if kind[0] == "s" else function


# Registers of other lanes.


def _shuffle(op: list[str]) -> Callable:
    how = op[2]

    def shuffle(x, by, clamp, members):
        if (members != 0xFFFFFFFF).any() or (clamp != (0 if how == "up" else 31)).any():
            raise UnsupportedInstruction("a shuffle of a part of a warp")
        x, by = np.broadcast_arrays(full(x, len(x)), by)
        by = by.astype(np.int64)
        source = {"bfly": LANES ^ by, "idx": by & 31, "up": LANES - by, "down": LANES + by}[how]
        source = np.where((source < 0) | (source > 31), LANES, source)
        return np.take_along_axis(x, source, 1)

    return shuffle


def _reduce(op: list[str]) -> Callable:
    function = {"max": np.max, "min": np.min, "add": np.sum}[op[2]]

    def reduce(x, members):
        values = signed(x) if op[-1] == "s32" else x
        result = function(full(values, len(x)), axis=1, keepdims=True).astype(values.dtype)
        return unsigned(np.repeat(result, 32, 1))

    return reduce


# Tensor cores: each lane holds parts of the matrices (PTX ISA, "Matrix Fragments for mma"). Integers are exact; fp16 and
# bf16 products are summed in double precision and rounded once to fp32.


def _left_matrix(registers, kind):
    """Four registers to [warps, 16, 16 or 32]."""
    each = 4 // np.dtype(kind).itemsize
    x = np.stack(registers, 2).view(kind).reshape(-1, 8, 4, 2, 2, each)
    return x.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8 * each)


def _right_matrix(registers, kind):
    """Two registers to [warps, 16 or 32, 8]."""
    each = 4 // np.dtype(kind).itemsize
    x = np.stack(registers, 2).view(kind).reshape(-1, 8, 4, 2, each)
    return x.transpose(0, 3, 2, 4, 1).reshape(-1, 8 * each, 8)


def _sums(registers):
    return np.stack(registers, 2).reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def _sum_registers(x):
    x = x.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 32, 4)
    return tuple(np.ascontiguousarray(x[:, :, i]).view(np.uint32) for i in range(4))


def _multiply_matrices(op: list[str]) -> Callable:
    shape, kinds = op[3], op[-4:]
    integers = shape == "m16n8k32" and kinds == ["s32", "s8", "s8", "s32"]
    floats = shape == "m16n8k16" and kinds in (["f32", "f16", "f16", "f32"], ["f32", "bf16", "bf16", "f32"])
    if not (integers or floats):
        raise UnsupportedInstruction(".".join(op))

    def integer(a, b, c):
        # a sum of 32 products of bytes is exact in fp32
        products = np.matmul(_left_matrix(a, np.int8).astype(np.float32), _right_matrix(b, np.int8).astype(np.float32))
        return np.clip(signed(c).astype(np.int64) + products.astype(np.int64), -(2**31), 2**31 - 1).astype(np.int32)

    def double(x):
        x = np.ascontiguousarray(x)
        return (_from_bfloat(x).view(np.float32) if kinds[1] == "bf16" else x.view(np.float16)).astype(np.float64)

    def floating(a, b, c):
        products = np.matmul(double(_left_matrix(a, np.uint16)), double(_right_matrix(b, np.uint16)))
        return (products + c.view(np.float32)).astype(np.float32)

    def multiply(*registers):
        registers = [full(x, max(map(len, registers))) for x in registers]
        a, b, c = registers[:4], registers[4:6], _sums(registers[6:])
        return _sum_registers(integer(a, b, c) if integers else floating(a, b, c))

    return multiply


def _pack(op: list[str]) -> Callable:
    kind = UNSIGNED[BITS[op[-1]]]

    def pack(*parts):
        bits = BITS[op[-1]] // len(parts)
        out = kind(0)
        for i, part in enumerate(parts):
            out = out | part.astype(kind) << kind(i * bits)
        return out

    return pack


def unpack(op: list[str], parts: int) -> Callable:
    """mov from one register to several."""
    bits = BITS[op[-1]] // parts
    kind = UNSIGNED[BITS[op[-1]]]
    return lambda x: tuple((x >> kind(i * bits)).astype(UNSIGNED[bits]) for i in range(parts))


BUILDERS = {
    "mov": lambda op: _pack(op) if op[-1] != "pred" else lambda x: x,
    "selp": lambda op: lambda a, b, chosen: np.where(chosen, a, b),
    "setp": _compare,
    "cvt": _convert,
    "mul": _product,
    "mad": _product,
    "shfl": _shuffle,
    "redux": _reduce,
    "shf": _funnel_shift,
    "mma": _multiply_matrices,
}


def arithmetic(op: list[str]) -> Callable:
    """The function from an instruction's source operands to its result (several: a tuple)."""
    name, kind = op[0], op[-1]
    if kind in ("f32", "f16x2") and name in FLOAT:
        return _float(op)
    if name in BUILDERS:
        return BUILDERS[name](op)
    if name in INTEGER and kind[0] in "busp":
        return _integer(op)
    raise UnsupportedInstruction(".".join(op))
