"""Code written for turboquant 0.2.0 and tqai 0.6, as their READMEs show it, with the import changed."""

import copy

import pytest
import torch

from hf.tiny_models import tiny_model, tokens
from vllm_powerquant.compat import tqai
from vllm_powerquant.compat.turboquant import TurboQuantCache
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model("llama"))


def test_turboquant_cache_in_a_forward_and_in_generate(model):
    ids = tokens(200)[0][None]
    for cache in (
        TurboQuantCache(bits=4),
        TurboQuantCache(key_bits=4, value_bits=8, protected_layers=1, config=model.config),
    ):
        with torch.no_grad():
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert outputs.past_key_values is cache and cache.get_seq_length() == 200
        out = model.generate(torch.cat((ids, ids[:, :4]), 1), past_key_values=cache, max_new_tokens=5, min_new_tokens=5)
        assert out.shape[1] == 209 and cache.get_seq_length() == 208
        usage = cache.memory_usage_bytes()
        # that package's own counter hid what it kept decoded: here all of it counts
        assert usage["total_bytes"] >= usage["compressed_bytes"] + usage["residual_bytes"] > 0


def test_turboquant_cache_by_hand():
    cache = TurboQuantCache(bits=3)
    g = torch.Generator().manual_seed(0)
    for n in (512, 1):
        for layer in range(3):
            key, value = (torch.randn(1, 4, n, 128, generator=g) for _ in "kv")
            keys, values = cache.update(key, value, layer_idx=layer)
    assert keys.shape == (1, 4, 513, 128) and torch.equal(keys[:, :, -1:], key) and cache.get_seq_length() == 513
    assert 0.02 < (cache.layers[0].keys - cache.layers[0].keys.round()).square().mean() < 0.2


@pytest.mark.parametrize(
    "options, says",
    [
        ({"bits": 5}, "key_bits must be 2, 3, 4 or 8, got 5"),
        ({"bits": 4, "key_bits": 4}, "not both"),
        ({"protected_layers": 2}, "give PowerQuantCache the model"),
    ],
)
def test_turboquant_options_that_are_refused(options, says):
    with pytest.raises(PowerQuantConfigError, match=says):
        TurboQuantCache(**options)


def test_tqai_patch(model):
    ids = tokens(200)[0][None]
    want = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cache = tqai.patch(model, bits_k=8, bits_v=8, sink_tokens=4, cache_strategy="residual", residual_window=256)
    got = model.generate(ids, past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(got, want) and cache.memory_report().path == "fused"
    tqai.unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    tqai.unpatch(model)  # harmless, as in that package
    assert tqai.patch(model, kv_compression=False) is None


@pytest.mark.parametrize(
    "options, kind, says",
    [
        ({"bits_k": 6}, PowerQuantConfigError, "key_bits must be 2, 3, 4 or 8, got 6"),
        ({"use_qjl": True}, PowerQuantUnsupportedError, "use_qjl"),
        ({"pipeline": {"scorer": "palm"}}, PowerQuantUnsupportedError, "pipeline"),
        ({"backend": "mlx"}, PowerQuantUnsupportedError, "backend must be torch"),
        ({"cache_strategy": "fast"}, PowerQuantConfigError, "cache_strategy must be auto"),
        ({"bitsk": 4}, PowerQuantConfigError, "no argument bitsk"),
    ],
)
def test_tqai_options_that_are_refused(model, options, kind, says):
    with pytest.raises(kind, match=says):
        tqai.patch(model, **options)
    assert not hasattr(model, "_powerquant_patch")
