"""A sketch of what a key's codes leave over: signs of random projections, for measuring whether it is worth its bits.

The residual r of a key is kept as its norm and sign(S r), with S of m rows of independent N(0, 1) entries. For every query q

    E[ <q, r^> ] = <q, r>      r^ = sqrt(pi/2) / m * |r| * S^T sign(S r)

over S, with variance (pi/2 |q|^2 |r|^2 - <q, r>^2) / m. The estimate is linear in q, so r^ can be added to the dequantized
key: attention then reads the same scores as a kernel that multiplies S q with the signs.
Source: QJL, arXiv:2406.03482; on the residual of a scalar codec, the inner-product variant of TurboQuant, arXiv:2504.19874.
"""

from __future__ import annotations

import math

import torch

from ..errors import PowerQuantConfigError

SEED = 0x514A4C
MAX_BITS = 8


class ResidualSketch:
    """Sign sketch of `bits * head_size` projections; the same ones for every token, head and layer.

    Raises: PowerQuantConfigError if bits is not 1 to 8, or head_size no multiple of 8.
    """

    def __init__(self, head_size: int, bits: int = 1, seed: int = SEED) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
            raise PowerQuantConfigError(f"qjl_bits must be 0 (no sketch) to {MAX_BITS}, got {bits!r}")
        if head_size < 8 or head_size % 8:
            raise PowerQuantConfigError(f"head_size must be a multiple of 8 for a sketch, got {head_size}")
        self.projections = bits * head_size
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(self.projections, head_size, generator=generator)

    @property
    def sketch_bytes(self) -> int:
        """Of one residual: the signs, and the norm in fp16."""
        return self.projections // 8 + 2

    def encode(self, residual: torch.Tensor) -> torch.Tensor:
        """[..., head_size] fp32 -> [..., sketch_bytes] uint8."""
        positive = residual @ self.matrix.T >= 0
        powers = 1 << torch.arange(8)
        signs = (positive.unflatten(-1, (-1, 8)) * powers).sum(-1).to(torch.uint8)
        norm = residual.norm(dim=-1, keepdim=True).to(torch.float16)
        return torch.cat((signs, norm.view(torch.uint8)), -1)

    def decode(self, sketch: torch.Tensor) -> torch.Tensor:
        """[..., sketch_bytes] uint8 -> the estimate r^, [..., head_size] fp32."""
        signs, norm = sketch.split((self.projections // 8, 2), -1)
        positive = (signs[..., None] >> torch.arange(8)) & 1
        norm = norm.contiguous().view(torch.float16).float()
        return (positive.flatten(-2).float() * 2 - 1) @ self.matrix * (norm * math.sqrt(math.pi / 2) / self.projections)
