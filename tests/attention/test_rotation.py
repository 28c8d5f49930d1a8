"""Rotation: orthonormal at every width, flat, fixed, and the same bits in any batch."""

import pytest
import torch

from vllm_powerquant.attention.rotation import (
    SUPPORTED_HEAD_SIZES,
    check_head_size,
    hadamard_transform,
    outer_matrix,
    random_signs,
    rotate,
    rotation_matrix,
    unrotate,
)
from vllm_powerquant.errors import PowerQuantUnsupportedError

sizes = pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)


@sizes
def test_rotate_is_orthonormal(head_size):
    matrix = rotate(torch.eye(head_size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_size, dtype=torch.float64), atol=1e-12)


@sizes
def test_rotate_is_flat(head_size):
    # a true Hadamard matrix: every coordinate reaches every other with the same weight
    matrix = rotate(torch.eye(head_size, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, head_size**-0.5))


@sizes
def test_unrotate_inverts_rotate(head_size):
    x = torch.randn(5, 3, head_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(unrotate(rotate(x)), x, atol=1e-12)


@sizes
def test_hadamard_transform_does_not_depend_on_the_batch(head_size):
    x = torch.randn(97, head_size, generator=torch.Generator().manual_seed(1))
    together = hadamard_transform(x)
    alone = torch.stack([hadamard_transform(row) for row in x])
    assert torch.equal(together, alone)


@sizes
def test_rotation_matrix_rotates(head_size):
    x = torch.randn(5, head_size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(x @ rotation_matrix(head_size).T, rotate(x), atol=1e-5)


@pytest.mark.parametrize("order", [1, 12, 20, 28])
def test_outer_matrix_is_hadamard(order):
    h = outer_matrix(order).long()
    assert set(h.flatten().tolist()) <= {-1, 1}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64))


def test_signs_are_part_of_the_format():
    assert random_signs(64).dtype == torch.float32
    bits = "".join("1" if sign > 0 else "0" for sign in random_signs(64).tolist())
    assert f"{int(bits, 2):016x}" == "4e82984c9f3703fa"


def test_signs_and_matrix_ignore_the_default_dtype():
    # vLLM builds layers with bf16 as torch's default dtype
    random_signs.cache_clear()
    outer_matrix.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert random_signs(80).dtype == torch.float32
        assert outer_matrix(20).dtype == torch.int8
    finally:
        torch.set_default_dtype(default)


def test_unsupported_head_size_is_named():
    with pytest.raises(PowerQuantUnsupportedError, match="head_size must be one of 64, .* 256, got 72"):
        check_head_size(72)
