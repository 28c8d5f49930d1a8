"""Functions that several Gluon kernels share: single instructions, where Triton's own functions guard what cannot occur.

Code size is time in decode_hopper.py: every maximum that overflows leaves the loop for instructions that have to be fetched.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_SPLIT = gl.constexpr(
    "{ .reg .b32 s, t, u; prmt.b32 s, $2, $3, 0x5140; prmt.b32 t, $4, $5, 0x5140; prmt.b32 $0, s, t, 0x7632; "
    "prmt.b32 u, s, t, 0x5410; xor.b32 $1, u, 0x80808080; }"
)


@gluon.jit
def ex2(x):
    """2^x, 0 where that is denormal."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def lg2(x):
    """log2(x) of zero and normal numbers."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def split_bytes(x):
    """Words whose low 16 bits are n + 128 -> int8 (high, low) with n = 256 high + low."""
    return gl.inline_asm_elementwise(_SPLIT, "=r,=r,r,r,r,r", [x], dtype=(gl.int8, gl.int8), is_pure=True, pack=4)
