"""The trellis codec: symbols of least error, levels by their definition, scales and errors of vectors."""

import itertools

import pytest
import torch

from vllm_powerquant.attention import reference, trellis
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES, rotate
from vllm_powerquant.errors import PowerQuantConfigError


def test_symbols_have_the_least_error():
    """Rings of four channels, which have 256 sequences: every one tried, on rounded coordinates."""
    t = 4 * torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    rounded = torch.round(t.clamp(-16, 16) * trellis.UNIT) / trellis.UNIT
    every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
    levels = trellis.levels(every.repeat(1, 4))[:, :4] + 0.5
    errors = (rounded.unflatten(-1, (4, 1, 4)) - levels).square().sum(-1)
    got = (rounded - trellis.levels(trellis.encode(t)) - 0.5).square().unflatten(-1, (4, 4)).sum(-1)
    assert torch.equal(got, errors.min(-1).values)


def test_levels_are_as_documented():
    for before, symbol in itertools.product(range(4), range(4)):
        k = symbol ^ (before >> 1)
        want = 5 * (k - 1.5) if before % 2 == 0 else -3 * (k - 1.5)
        assert trellis.level_of(torch.tensor(symbol), torch.tensor(before)) + 0.5 == want
    used = {int(trellis.level_of(torch.tensor(s), torch.tensor(p))) for s, p in itertools.product(range(4), range(4))}
    assert tuple(sorted(used)) == CacheFormat(64, 4, 2, "trellis").value_codebook.levels


def test_rings_do_not_see_each_other():
    t = 4 * torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    other = t.clone()
    other[0, 16:32] *= -1
    assert torch.equal(trellis.encode(t)[0, :16], trellis.encode(other)[0, :16])
    assert torch.equal(trellis.encode(t)[0, 32:], trellis.encode(other)[0, 32:])
    assert trellis.encode(t)[0, 16:32].tolist() != trellis.encode(other)[0, 16:32].tolist()


def test_a_ring_turned_has_its_symbols_turned():
    t = 4 * torch.randn(50, 16, generator=torch.Generator().manual_seed(2)).repeat(1, 4)
    assert torch.equal(trellis.encode(t.roll(16, -1)), trellis.encode(t))
    turned = t.unflatten(-1, (4, 16)).roll(5, -1).flatten(1)
    a, b = (trellis.levels(trellis.encode(x)) + 0.5 for x in (t, turned))
    error = lambda x, n: (torch.round(x * trellis.UNIT) / trellis.UNIT - n).square().sum(-1)  # noqa: E731
    torch.testing.assert_close(error(t, a), error(turned, b))


def test_not_finite_and_far_coordinates_have_symbols():
    t = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).repeat(16)
    limits = torch.tensor([-16.0, 16.0, -16.0, 16.0]).repeat(16)
    assert torch.equal(trellis.encode(t), trellis.encode(limits))


@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
def test_distortion(head_size):
    """A fifth less than four even levels', whose distortion is 0.1188, and never far from the table's figure."""
    fmt = CacheFormat(head_size, 4, 2, "trellis")
    book, x = fmt.value_codebook, torch.randn(2000, head_size, generator=torch.Generator().manual_seed(3))
    idx, scale = reference.quantize(x, book, fmt.scale_factor(book))
    h = rotate(x.double())
    got = reference.dequantize(idx, scale, book)
    error = float((h - got).square().sum() / h.square().sum())
    assert error / (1 + error) == pytest.approx(book.mse, rel=0.03)
    ratio = (h * got).sum(-1) / h.square().sum(-1)
    assert (ratio - 1).abs().max() < 2**-10.5


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_only_two_bit_values(bits):
    with pytest.raises(PowerQuantConfigError, match=f"value_codec trellis is for value_bits 2, got value_bits {bits}"):
        CacheFormat(64, 4, bits, "trellis")
    with pytest.raises(PowerQuantConfigError, match="value_codec must be scalar or trellis, got 'tcq'"):
        CacheFormat(64, 4, 2, "tcq")
