"""The Hadamard transform in the registers of Gluon programs, for queries and outputs, whose last bit is nobody's format."""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..rotation import random_signs


@gluon.jit
def butterflies(x, BITS: gl.constexpr):
    """BITS steps of the transform of [ROWS, D]: each takes the lowest bit of the channel and puts it on top.

    After log2(D) steps the channels are in order again. A step moves nothing where that bit is one of registers.
    """
    for _ in gl.static_range(BITS):
        a, b = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
        x = gl.join(a + b, a - b).permute([0, 2, 1]).reshape([x.shape[0], x.shape[1]])
    return x


@functools.cache
def scaled_signs(head_size: int, device: torch.device) -> torch.Tensor:
    """The rotation's signs [head_size] fp32, divided by sqrt(head_size): the transform times these is orthogonal."""
    return (random_signs(head_size) * head_size**-0.5).to(device)
