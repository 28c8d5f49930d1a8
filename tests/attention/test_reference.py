"""Quality of the codec: error of each width against theory, unbiased scales, edge cases; attention against float."""

import pytest
import torch

from helpers import Batch, key_frame, relative_rms
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES, rotate


def codec_error(head_size, codebook, x, factor):
    idx, scale = reference.quantize(x, codebook, factor)
    return reference.dequantize(idx, scale, codebook) - rotate(x.double())


@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_distortion_matches_theory(head_size, bits):
    # With the unbiased scale a vector's relative error is tan^2 of its angle to the quantized one: about D / (1 - D) where
    # D is the distortion of a scale fitted to the vector, a little below the codebook's. At 8 bits rare outliers dominate.
    cache_format = CacheFormat(head_size, bits, bits)
    codebook = cache_format.key_codebook
    x = torch.randn(4000, head_size, generator=torch.Generator().manual_seed(bits))
    error = codec_error(head_size, codebook, x, cache_format.scale_factor(codebook))
    distortion = (error.square().sum() / x.double().square().sum()).item()
    limit = {2: 0.03, 3: 0.04, 4: 0.04, 8: 0.12}[bits]
    assert distortion == pytest.approx(codebook.mse / (1 - codebook.mse), rel=limit)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scale_is_unbiased(bits):
    cache_format = CacheFormat(128, 4, bits)
    codebook = cache_format.value_codebook
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    idx, scale = reference.quantize(x, codebook, cache_format.scale_factor(codebook))
    back = reference.dequantize(idx, scale, codebook)
    ratio = (rotate(x.double()) * back).sum(-1) / x.double().square().sum(-1)
    # rounding the scale to fp16 is all that is left
    assert (ratio - 1).abs().max() < 2**-10.5


def test_scale_does_not_depend_on_the_length():
    cache_format = CacheFormat(64, 4, 2)
    codebook, factor = cache_format.key_codebook, cache_format.scale_factor(cache_format.key_codebook)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    idx, scale = reference.quantize(x, codebook, factor)
    for power in (-12, 10):
        idx_scaled, scale_scaled = reference.quantize(x * 2.0**power, codebook, factor)
        assert torch.equal(idx_scaled, idx)
        assert scale_scaled == scale * 2.0**power


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_vector_is_small_and_scale_positive(bits):
    cache_format = CacheFormat(64, bits, bits)
    codebook = cache_format.value_codebook
    idx, scale = reference.quantize(torch.zeros(64), codebook, cache_format.scale_factor(codebook))
    assert scale > 0
    assert reference.dequantize(idx, scale, codebook).abs().max() < 1e-6


def test_huge_vector_saturates_and_not_finite_is_nan():
    cache_format = CacheFormat(64, 4, 2)
    codebook, factor = cache_format.key_codebook, cache_format.scale_factor(cache_format.key_codebook)
    assert reference.quantize(torch.full((64,), 1e7), codebook, factor)[1] == 65504
    for bad in (torch.nan, torch.inf):
        x = torch.ones(64)
        x[3] = bad
        assert reference.quantize(x, codebook, factor)[1].isnan()


def test_keys_are_packed_in_their_frame():
    cache_format, frame = CacheFormat(64, 4, 2), key_frame(2, 64)
    key, value = torch.randn(2, 6, 2, 64, generator=torch.Generator().manual_seed(0))
    framed = (key - frame[:, 0]) * frame[:, 1]
    assert torch.equal(reference.encode(cache_format, key, value, frame), reference.encode(cache_format, framed, value))
    assert torch.equal(framed * frame[:, 2], key - frame[:, 0])


@pytest.mark.parametrize("key_bits, value_bits, limit", [(8, 8, 0.02), (4, 4, 0.15), (4, 2, 0.45), (3, 2, 0.5)])
def test_attention_error_per_width(key_bits, value_bits, limit):
    # loose bounds on Gaussian data, one for each width: quality, not arithmetic
    batch = Batch(CacheFormat(64, key_bits, value_bits), [300], [1], 2, 2, torch.float32)
    reference.store(batch.format, batch.cache, batch.keys[0][:300], batch.values[0][:300], batch.slots(0)[:300])
    got = reference.attend(
        batch.format, batch.query, batch.keys[0][300:], batch.values[0][300:], batch.cache, batch.block_table[0], 300, 0.125
    )
    keys, values = (x[0].double().repeat_interleave(2, dim=1).transpose(0, 1) for x in (batch.keys, batch.values))
    want = torch.nn.functional.scaled_dot_product_attention(batch.query.double().transpose(0, 1), keys, values, scale=0.125)
    assert relative_rms(got, want.transpose(0, 1)) < limit
