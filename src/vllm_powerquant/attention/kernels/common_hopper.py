"""Functions that several Gluon kernels share: single instructions, where Triton's own functions guard what cannot occur.

Code size is time in decode_hopper.py: every maximum that overflows leaves the loop for instructions that have to be fetched.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_SPLIT = "{{ .reg .b32 s, t, u; prmt.b32 s, $2, $3, {0}; prmt.b32 t, $4, $5, {0}; prmt.b32 $0, s, t, 0x7632; " + (
    "prmt.b32 u, s, t, 0x5410; xor.b32 $1, u, 0x80808080; }}"
)
_SPLIT_BYTES_0_1 = gl.constexpr(_SPLIT.format("0x5140"))
_SPLIT_BYTES_1_2 = gl.constexpr(_SPLIT.format("0x6251"))
# the last bit of %lanemask_lt is never set
_IN_REGISTER = gl.constexpr("{ .reg .b32 t; mov.u32 t, %lanemask_lt; shr.u32 t, t, 31; add.s32 $0, $1, t; }")


@gluon.jit
def in_register(X: gl.constexpr):
    """X in a register of each lane. A constant would be loaded anew wherever it is used."""
    return gl.inline_asm_elementwise(_IN_REGISTER, "=r,r", [X], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def ex2(x):
    """2^x, 0 where that is denormal."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def lg2(x):
    """log2(x) of zero and normal numbers."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def split_bytes(x, FIRST: gl.constexpr):
    """Words with n + 128 in 16 bits, from byte FIRST (0 or 1) on -> int8 (high, low) with n = 256 high + low."""
    if FIRST == 0:
        PTX: gl.constexpr = _SPLIT_BYTES_0_1
    else:
        PTX: gl.constexpr = _SPLIT_BYTES_1_2
    return gl.inline_asm_elementwise(PTX, "=r,=r,r,r,r,r", [x], dtype=(gl.int8, gl.int8), is_pure=True, pack=4)
