"""The random rotation that makes every coordinate of a key or value look alike.

A vector x is multiplied by fixed random signs and by a Hadamard matrix of its own width. Every supported head size is
m * 2**k with m in {1, 12, 20, 28}, orders for which Paley's constructions give a true Hadamard matrix (entries +-1), so
nothing is padded and all coordinates mix with equal weight. Source: R. E. A. C. Paley, "On Orthogonal Matrices",
J. Math. Phys. 12 (1933); randomized Hadamard transforms in front of a scalar quantizer as in TurboQuant, arXiv:2504.19874.

The order of every floating-point operation is fixed (butterflies, then sums from left to right), so a kernel that keeps
it produces the same bits whatever the batch a token arrives in.
"""

from __future__ import annotations

import functools
import math

import torch

from ..errors import PowerQuantUnsupportedError

SUPPORTED_HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
# head size -> order m of the outer Hadamard matrix; the inner one has order head_size / m, a power of two
_OUTER_ORDER = {64: 1, 80: 20, 96: 12, 112: 28, 128: 1, 192: 12, 256: 1}


def check_head_size(head_size: int) -> None:
    """Raises PowerQuantUnsupportedError unless head_size is one the cache supports."""
    if head_size not in SUPPORTED_HEAD_SIZES:
        allowed = ", ".join(map(str, SUPPORTED_HEAD_SIZES))
        raise PowerQuantUnsupportedError(
            f"head_size must be one of {allowed}, got {head_size}; serve this model with vLLM's default backend"
        )


def outer_order(head_size: int) -> int:
    """Order m of the outer factor of the Hadamard matrix H_m (x) H_(head_size/m)."""
    check_head_size(head_size)
    return _OUTER_ORDER[head_size]


@functools.cache
def outer_matrix(order: int) -> torch.Tensor:
    """Hadamard matrix [order, order] int8 with entries +-1, for order 1, 12, 20 or 28 (Paley I and II)."""
    # explicit device, here and below: vLLM builds layers under another default device and dtype
    with torch.device("cpu"):
        if order == 1:
            return torch.ones(1, 1, dtype=torch.int8)
        if order == 28:  # Paley II over GF(13)
            conference = torch.zeros(14, 14, dtype=torch.int64)
            conference[0, 1:] = conference[1:, 0] = 1
            conference[1:, 1:] = _jacobsthal(13)
            one, cross = torch.tensor([[1, -1], [-1, -1]]), torch.tensor([[1, 1], [1, -1]])
            h = torch.kron(torch.eye(14, dtype=torch.int64), one) + torch.kron(conference, cross)
        else:  # Paley I over GF(order - 1), a prime that is 3 mod 4
            skew = torch.zeros(order, order, dtype=torch.int64)
            skew[0, 1:] = 1
            skew[1:, 0] = -1
            skew[1:, 1:] = _jacobsthal(order - 1)
            h = torch.eye(order, dtype=torch.int64) + skew
        return h.to(torch.int8)


def _jacobsthal(q: int) -> torch.Tensor:
    """Q[i, j] = quadratic character of i - j modulo the prime q."""
    residues = {x * x % q for x in range(1, q)}
    return torch.tensor([[0 if i == j else (1 if (i - j) % q in residues else -1) for j in range(q)] for i in range(q)])


@functools.cache
def random_signs(head_size: int) -> torch.Tensor:
    """Fixed signs [head_size] float32 (+-1): the top bits of SplitMix64, so no library's generator is part of the format."""
    check_head_size(head_size)
    mask, state, signs = (1 << 64) - 1, 0x5EED_0F_B175 + head_size, []
    for _ in range(head_size):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(1.0 if (z ^ (z >> 31)) >> 63 else -1.0)
    return torch.tensor(signs, dtype=torch.float32, device="cpu")


def _hadamard(x: torch.Tensor, transpose: bool) -> torch.Tensor:
    """H x or H^T x along the last dimension, unnormalized, in the fixed order of operations."""
    head_size = x.shape[-1]
    order = outer_order(head_size)
    inner = head_size // order
    shape, x = x.shape, x.reshape(-1, head_size)
    stride = 1
    while stride < inner:
        pairs = x.reshape(-1, head_size // (2 * stride), 2, stride)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((a + b, a - b), dim=2).reshape(-1, head_size)
        stride *= 2
    if order > 1:
        matrix = outer_matrix(order).T if transpose else outer_matrix(order)
        blocks = x.reshape(-1, order, inner)
        signs = matrix.to(x)
        total = signs[:, 0, None] * blocks[:, 0, None]
        for j in range(1, order):
            total = total + signs[:, j, None] * blocks[:, j, None]
        x = total.reshape(-1, head_size)
    return x.reshape(shape)


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """sqrt(head_size) times the rotated vector, without rounding by a normalization.

    Args:    x [..., head_size] fp32
    Returns: [..., head_size] fp32
    Raises:  PowerQuantUnsupportedError if head_size is not supported
    """
    return _hadamard(x * random_signs(x.shape[-1]).to(x), transpose=False)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal rotation R x of [..., head_size] float vectors."""
    return hadamard_transform(x) * (1.0 / math.sqrt(x.shape[-1]))


def unrotate(y: torch.Tensor) -> torch.Tensor:
    """R^T y, the inverse of rotate."""
    head_size = y.shape[-1]
    return _hadamard(y, transpose=True) * random_signs(head_size).to(y) * (1.0 / math.sqrt(head_size))


@functools.cache
def rotation_matrix(head_size: int) -> torch.Tensor:
    """R as a matrix [head_size, head_size] fp32: x @ R.T = rotate(x) up to rounding; faster for many vectors."""
    with torch.device("cpu"):
        return rotate(torch.eye(head_size, dtype=torch.float64)).T.contiguous().float()
