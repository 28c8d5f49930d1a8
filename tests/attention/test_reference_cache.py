"""The Transformers cache against the reference's attention, and through a real model."""

import pytest
import torch

pytest.importorskip("transformers")

from helpers import key_frame
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.qjl import ResidualSketch
from vllm_powerquant.attention.reference_cache import ReferenceCache, ReferenceLayer
from vllm_powerquant.attention.rotation import hadamard_transform
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError


def chunks(lengths: list[int], batch: int = 1, heads: int = 2, head_size: int = 64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(batch, heads, n, head_size, generator=g) for _ in "kv") for n in lengths]


def attended(query, keys, values) -> torch.Tensor:
    """Causal attention of the last queries, float64: [heads, n, head_size]."""
    n, total = query.shape[1], keys.shape[1]
    mask = torch.arange(total)[None] <= torch.arange(total - n, total)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(query.double(), keys.double(), values.double(), attn_mask=mask)


@pytest.mark.parametrize("residual_tokens, sink_tokens", [(128, 4), (0, 0), (0, 4), (1, 0), (16, 20)])
@pytest.mark.parametrize("framed", [False, True])
def test_chunks_are_attended_as_the_reference_attends(framed, residual_tokens, sink_tokens):
    """Chunk after chunk, the same window, sinks and packed tokens as reference.attend's."""
    cache_format, lengths = CacheFormat(64), [70, 1, 1, 90, 3]
    frame = key_frame(2, 64) if framed else None
    layer = ReferenceLayer(cache_format, residual_tokens, sink_tokens, frame)
    pages = torch.zeros(3, 2, 128, cache_format.layout.slot_bytes, dtype=torch.uint8)
    exact = torch.zeros(13, 2, 16, 128)
    table, exact_table, length = torch.tensor([2, 1]), torch.arange(1, 13), 0
    for key, value in chunks(lengths):
        n = key.shape[2]
        query = torch.randn(2, n, 64, generator=torch.Generator().manual_seed(length))
        keys, values = layer.update(key, value)
        rows_k, rows_v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        want = reference.attend(
            cache_format, query.transpose(0, 1), rows_k, rows_v, pages, table, length, 0.125, frame, exact, exact_table,
            residual_tokens, sink_tokens,
        )  # fmt: skip
        got = attended(query, keys[0], values[0]).transpose(0, 1)
        assert (got - want).norm() / want.norm() < 1e-6
        position = torch.arange(length, length + n)
        reference.store(cache_format, pages, rows_k, rows_v, table[position // 128] * 128 + position % 128, frame)
        exact[exact_table[position // 16], :, position % 16] = torch.cat((rows_k, rows_v), -1)
        length += n


def test_a_protected_layer_keeps_every_token():
    layer, given = ReferenceLayer(None), chunks([300, 7])
    for key, value in given:
        keys, values = layer.update(key, value)
    assert torch.equal(keys, torch.cat([k for k, _ in given], 2)) and torch.equal(
        values, torch.cat([v for _, v in given], 2)
    )


def test_every_seed_is_another_rotation_of_the_same_error():
    key, value = chunks([512])[0]
    errors, packed = [], []
    for seed in range(3):
        layer = ReferenceCache(1, 64, residual_tokens=0, sink_tokens=0, seed=seed).layers[0]
        layer.update(key, value)
        keys, _ = layer.update(key[:, :, :1], value[:, :, :1])
        errors.append(float((keys[:, :, :512] - key).square().mean() / key.square().mean()))
        packed.append(layer.packed[:, :512])
    assert all(error == pytest.approx(0.0095, rel=0.1) for error in errors)
    assert not torch.equal(packed[0], packed[1]) and not torch.equal(packed[1], packed[2])


def test_held_bytes_count_slots_and_exact_rows():
    cache = ReferenceCache(4, 64, protected_layers=1)
    for layer in cache.layers:
        layer.update(*chunks([1000])[0])
    slot, row = 2 * CacheFormat(64).layout.slot_bytes, 2 * 2 * 64 * 4
    assert cache.held_bytes() == 2 * 1000 * row + 2 * (1000 * slot + 132 * row)


@pytest.mark.parametrize("bits", [1, 2])
def test_sketch_estimates_inner_products_without_bias(bits):
    """Over many matrices: the mean is <q, r>, the variance (pi/2 |q|^2 |r|^2 - <q, r>^2) / projections."""
    g = torch.Generator().manual_seed(0)
    residual = torch.randn(64, generator=g)
    # one query along the residual, where a sketch without the factor pi/2 is furthest off, and some across it
    queries = torch.cat((residual[None], torch.randn(3, 64, generator=g)))
    estimates = []
    for seed in range(2000):
        sketch = ResidualSketch(64, bits, seed)
        estimates.append(queries @ sketch.decode(sketch.encode(residual[None]))[0])
    estimates, exact = torch.stack(estimates), queries @ residual
    energy = queries.square().sum(-1) * residual.square().sum()
    variance = (torch.pi / 2 * energy - exact.square()) / (64 * bits)
    # four standard errors
    assert ((estimates.mean(0) - exact).abs() < 4 * (variance / 2000).sqrt()).all()
    torch.testing.assert_close(estimates.var(0), variance, rtol=0.15, atol=0)


@pytest.mark.parametrize("framed", [False, True])
def test_sketched_keys_are_packed_keys_and_the_estimate_of_their_residual(framed):
    frame, (key, value) = key_frame(2, 64) if framed else None, chunks([40])[0]
    plain = ReferenceLayer(CacheFormat(64, 3, 2), 0, 0, frame)
    sketched = ReferenceLayer(CacheFormat(64, 3, 2), 0, 0, frame, sketch=ResidualSketch(64))
    for layer in (plain, sketched):
        layer.update(key, value)
        layer.update(*chunks([1], seed=1)[0])
    inverse = frame[:, 2, None] if framed else torch.ones(2, 1, 64)
    # the residual is what is left in the frame, where keys are packed
    sketch = sketched.sketch
    estimate = sketch.decode(sketch.encode((key - plain.keys[:, :, :40]) / inverse)) * inverse
    torch.testing.assert_close(sketched.keys[:, :, :40], plain.keys[:, :, :40] + estimate, rtol=1e-3, atol=1e-3)
    assert torch.equal(sketched.values, plain.values)
    assert torch.equal(sketched.packed[..., : plain.packed.shape[-1]], plain.packed)


def test_held_bytes_count_sketches():
    caches = [ReferenceCache(2, 64, key_bits=3, qjl_bits=bits) for bits in (0, 1, 2)]
    for cache in caches:
        for layer in cache.layers:
            layer.update(*chunks([1000])[0])
    without, one, two = (cache.held_bytes() for cache in caches)
    tokens = 2 * 2 * 1000  # layers, heads, tokens
    assert one - without == tokens * (64 // 8 + 2) and two - one == tokens * 64 // 8
    assert caches[1].layers[0].packed.shape[-1] == CacheFormat(64, 3).layout.slot_bytes + 10


@pytest.mark.parametrize("bits", [-1, 9, 1.0, True, "1"])
def test_sketch_bits_outside_are_refused(bits):
    with pytest.raises(PowerQuantConfigError, match="qjl_bits must be 0 .* to 8, got"):
        ReferenceCache(1, 64, qjl_bits=bits)


def test_crop_forgets_the_last_tokens():
    layer, (key, value) = ReferenceLayer(CacheFormat(64), 16, 0), chunks([200])[0]
    layer.update(key, value)
    layer.crop(-50)
    keys, _ = layer.update(key[:, :, :1], value[:, :, :1])
    assert keys.shape[2] == 151
    assert torch.equal(keys[:, :, 135:150], key[:, :, 135:150])
    error = (keys[:, :, :135] - key[:, :, :135]).norm() / key[:, :, :135].norm()
    assert error == pytest.approx(hadamard_error(key[:, :, :135]), rel=1e-4)


def test_sequences_are_chosen_and_repeated_with_their_packed_slots():
    layer, (key, value) = ReferenceLayer(CacheFormat(64), 16, 4), chunks([100], batch=3)[0]
    layer.update(key, value)
    layer.reorder_cache(torch.tensor([2, 0, 2]))
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    keys, values = layer.update(key[:1, :, :1].repeat(4, 1, 1, 1), value[:1, :, :1].repeat(4, 1, 1, 1))
    for row, source in enumerate((2, 2, 0, 0)):
        alone = ReferenceLayer(CacheFormat(64), 16, 4)
        alone.update(key[source : source + 1], value[source : source + 1])
        want_keys, want_values = alone.update(key[:1, :, :1], value[:1, :, :1])
        assert torch.equal(keys[row], want_keys[0]) and torch.equal(values[row], want_values[0])


def test_what_would_leave_the_slots_behind_is_refused():
    layer = ReferenceLayer(CacheFormat(64))
    layer.update(*chunks([3])[0])
    with pytest.raises(PowerQuantUnsupportedError, match="not by assignment"):
        layer.keys = layer.keys[:, :, :1]
    with pytest.raises(PowerQuantUnsupportedError, match="without offloading"):
        layer.offload()


def hadamard_error(x: torch.Tensor) -> float:
    """Relative error of 4-bit codes of x, by the reference."""
    book, cache_format = CacheFormat(64).key_codebook, CacheFormat(64)
    codes = reference.dequantize(*reference.quantize(x, book, cache_format.scale_factor(book)), book)
    h = hadamard_transform(x) / 8
    return float((codes - h).norm() / h.norm())


def test_layers_of_other_bits():
    cache = ReferenceCache(4, 64, value_codec="trellis", layer_bits={0: (8, 3), -1: (3, 2)})
    formats = [layer.format for layer in cache.layers]
    trellis = CacheFormat(64, 4, 2, "trellis")
    assert formats == [CacheFormat(64, 8, 3), trellis, trellis, CacheFormat(64, 3, 2, "trellis")]
    with pytest.raises(PowerQuantConfigError, match="layer_bits must name layers from -4 to 3, got 4"):
        ReferenceCache(4, 64, layer_bits={4: (4, 4)})
    for twice in ({0: (4, 4), -4: (4, 3)}, {3: (4, 4)}):
        with pytest.raises(PowerQuantConfigError, match="which is protected or named twice"):
            ReferenceCache(4, 64, protected_layers=len(twice) % 2, layer_bits=twice)
    with pytest.raises(PowerQuantConfigError, match="key_bits must be 2, 3, 4 or 8, got 5"):
        ReferenceCache(4, 64, layer_bits={0: (5, 2)})
