"""Bytes: sizes, no byte shared by two tokens, exact round trips, and a committed sample."""

import itertools

import pytest
import torch

from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.layout import SUB_PAGE_TOKENS, PageLayout, token_positions
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

BITS = (2, 3, 4, 8)
ALL = [pytest.param(d, k, v, id=f"d{d}-k{k}v{v}") for d, k, v in itertools.product(SUPPORTED_HEAD_SIZES, BITS, BITS)]


def test_default_slot_is_100_bytes():
    assert PageLayout(128).slot_bytes == 100
    assert PageLayout(128).sub_page_bytes == 6400
    assert PageLayout(64).slot_bytes == 52


@pytest.mark.parametrize("head_size, key_bits, value_bits", ALL)
def test_slots_tile_the_sub_page(head_size, key_bits, value_bits):
    layout = PageLayout(head_size, key_bits, value_bits)
    offsets = layout.slot_offsets.flatten()
    assert torch.equal(offsets.sort().values, torch.arange(layout.sub_page_bytes))
    assert layout.slot_bytes == head_size * (key_bits + value_bits) // 8 + 4


@pytest.mark.parametrize("head_size, key_bits, value_bits", ALL)
def test_unpack_inverts_pack(head_size, key_bits, value_bits):
    layout = PageLayout(head_size, key_bits, value_bits)
    g = torch.Generator().manual_seed(0)
    key = torch.randint(0, 1 << key_bits, (9, 2, head_size), generator=g, dtype=torch.uint8)
    value = torch.randint(0, 1 << value_bits, (9, 2, head_size), generator=g, dtype=torch.uint8)
    scales = torch.rand(2, 9, 2, generator=g).half()
    slots = layout.pack_slots(key, scales[0], value, scales[1])
    assert slots.shape == (9, 2, layout.slot_bytes)
    for got, want in zip(layout.unpack_slots(slots), (key, scales[0], value, scales[1]), strict=True):
        assert torch.equal(got, want)


def test_positions_are_a_permutation():
    assert torch.equal(token_positions().sort().values, torch.arange(SUB_PAGE_TOKENS))


def test_key_words_hold_signs_and_magnitudes():
    # the form the tensor-core kernel reads: nibbles of magnitudes, A's low and Z's high, signs in the spare bits
    idx = torch.zeros(64, dtype=torch.uint8)
    idx[:] = 8  # sign 0, magnitude 0
    idx[1] = 8 + 5  # A_1: magnitude 5
    idx[2] = 7 - 3  # A_2: negative, magnitude 3
    idx[32] = 7 - 6  # Z_0: negative, magnitude 6
    layout = PageLayout(64, 4, 2)
    scale = torch.ones((), dtype=torch.float16)
    word = layout.pack_slots(idx, scale, torch.zeros(64, dtype=torch.uint8), scale)[:4]
    value = sum(int(byte) << 8 * i for i, byte in enumerate(word))
    assert value == 5 << 4 | 3 << 8 | 1 << 23 | 6 << 16 | 1 << 3


def test_two_bit_values_flip_the_top_field():
    layout, scale = PageLayout(64, 4, 2), torch.ones((), dtype=torch.float16)
    zeros = torch.zeros(64, dtype=torch.uint8)
    values = layout.pack_slots(zeros, scale, zeros, scale)[32:48]
    assert set(values.tolist()) == {0b10_00_00_00}


def test_sample_page():
    """A page of known input, as committed bytes: a change of the format must be made here too."""
    cache_format = CacheFormat(64, 4, 2)
    cache = torch.zeros(1, 1, 64, cache_format.layout.slot_bytes, dtype=torch.uint8)
    ramp = torch.arange(64, dtype=torch.float32)
    key = torch.stack((ramp % 7 - 3, (ramp * 5) % 11 - 5))[:, None]
    value = torch.stack((ramp % 5 - 2, (ramp * 3) % 13 - 6))[:, None]
    reference.store(cache_format, cache, key, value, torch.tensor([0, 41]))
    written = cache.flatten()[cache_format.layout.slot_offsets[[0, 41]]]
    assert (
        written[0].numpy().tobytes().hex()
        == "919d830b87a62c9007013eb0983a9f45943a0d0dd0190b59c2001b28b84510022a6ee82e0aee9dd314463f2a31d9eae6df3fdb3e"
    )
    assert (
        written[1].numpy().tobytes().hex()
        == "4ac0c9447ab9012a13c1e991ca3092233d5c010c009b351159d12133985a2790172b5b173927290a60fbca7614d5d7aa73427044"
    )


def test_bad_sizes_are_refused():
    with pytest.raises(PowerQuantConfigError, match="block_size must be a multiple of 64, got 96"):
        PageLayout(64).page_bytes(96)
    with pytest.raises(PowerQuantConfigError, match="key_bits must be 2, 3, 4 or 8, got 5"):
        PageLayout(64, 5, 2)
    with pytest.raises(PowerQuantUnsupportedError, match="head_size"):
        PageLayout(60)
