"""patch, unpatch and check_model."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf.tiny_models import ARCHITECTURES, left_padded, tiny_model, tokens
from vllm_powerquant import PowerQuantCache, check_model, patch, unpatch
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def model(request):
    model = tiny_model(request.param)
    yield model
    if hasattr(model, "_powerquant_patch"):
        unpatch(model)


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, return_dict_in_generate=True, **kwargs)


def test_a_patched_model_generates_packed(model):
    ids = tokens(60)[0][None]
    want = greedy(model, ids)
    assert patch(model, residual_tokens=1024, sink_tokens=8) is model
    got = greedy(model, ids)
    assert isinstance(got.past_key_values, PowerQuantCache)
    assert got.past_key_values.memory_report().path == "fused"
    assert got.past_key_values.layers[-1].window.sink_tokens == 8
    assert torch.equal(got.sequences, want.sequences)
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, PowerQuantCache)
        assert model(ids, use_cache=False).past_key_values is None
    unpatch(model)
    again = greedy(model, ids)
    assert isinstance(again.past_key_values, DynamicCache) and torch.equal(again.sequences, want.sequences)
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks.keys() - _seen(model)


def _seen(model) -> set[int]:
    """Hooks that tell caches of padding: they stay."""
    from vllm_powerquant.hf.cache import _tell_padding

    return {key for key, hook in model._forward_pre_hooks.items() if hook is _tell_padding}


def test_padding_is_seen(model):
    prompts = tokens(60, 31)
    ids, mask = left_padded(prompts)
    patch(model)
    together = greedy(model, ids, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        alone = greedy(model, prompt[None])
        assert torch.equal(together.sequences[row, -10:], alone.sequences[0, -10:])


def test_a_cache_that_is_given_is_used(model):
    patch(model)
    cache = DynamicCache(config=model.config)
    assert greedy(model, tokens(20)[0][None], past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 29


def test_refusals(model):
    with pytest.raises(PowerQuantConfigError, match="this model is not patched"):
        unpatch(model)
    with pytest.raises(PowerQuantConfigError, match="key_bits must be"):
        patch(model, key_bits=7)
    assert not hasattr(model, "_powerquant_patch") and model.config._attn_implementation == "sdpa"
    patch(model)
    with pytest.raises(PowerQuantConfigError, match="this model is patched"):
        patch(model)
    with pytest.raises(PowerQuantUnsupportedError, match="cache_implementation='static'"):
        greedy(model, tokens(20)[0][None], cache_implementation="static")


def test_a_cache_given_by_position_is_used():
    model = copy.deepcopy(tiny_model("llama"))
    patch(model)
    cache, ids = PowerQuantCache(model), tokens(20)[0][None]
    with torch.no_grad():
        model(ids, None, None, cache)
        assert cache.get_seq_length() == 20
        assert isinstance(model(ids, None, None, None).past_key_values, PowerQuantCache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_patched_assistant_takes_tokens_back(architecture):
    """Also of sliding windows and convolutions, which must be told beforehand."""
    model, assistant = (copy.deepcopy(tiny_model(architecture, seed=seed)) for seed in (0, 1))
    ids = tokens(60)[0][None]
    want = greedy(model, ids)
    patch(model, residual_tokens=1024)
    patch(assistant, residual_tokens=1024)
    for helper in (assistant, assistant, model):
        assert torch.equal(greedy(model, ids, assistant_model=helper).sequences, want.sequences)


def test_check_model_says_why():
    support = check_model(tiny_model("gemma3"))
    assert [layer.packed for layer in support.layers] == [False, False, False, True] and support.ok and support.fused
    assert "layer 0: sliding window, kept exact, 32 tokens at most" in str(support)
    assert "1 of 4 layers packed" in str(support) and support.to_dict()["ok"]
    support = check_model(tiny_model("lfm2"))
    assert [layer.kind for layer in support.layers][:2] == ["LinearAttentionLayer", "full attention"]


def test_a_soft_cap_is_not_fused():
    config = transformers.Gemma2Config(
        vocab_size=96, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    support = check_model(model)
    assert support.ok and not support.fused and "fused attention: no, attention has a logit soft cap" in str(support)
    ids = tokens(40)[0][None]
    want = greedy(model, ids)
    patch(model, residual_tokens=1024)
    got = greedy(model, ids)
    assert got.past_key_values.memory_report().path == "dequantized" and torch.equal(got.sequences, want.sequences)
    unpatch(model)
    model.set_attn_implementation("powerquant")
    with torch.no_grad(), pytest.raises(PowerQuantUnsupportedError, match="no a logit soft cap|logit soft cap"):
        model(ids, past_key_values=PowerQuantCache(model), use_cache=True)


def test_vision_towers_are_skipped():
    text = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision)
    ).eval()
    support = check_model(model)
    assert support.ok and len(support.layers) == 2 and any("vision_tower" in name for name in support.skipped)
    ids = tokens(40)[0][None]
    want = greedy(model, ids)
    model.set_attn_implementation({"vision_config": "eager"})
    before = [x._attn_implementation for x in (model.config, model.config.text_config, model.config.vision_config)]
    patch(model, residual_tokens=1024)
    got = greedy(model, ids)
    assert got.past_key_values.memory_report().path == "fused" and torch.equal(got.sequences, want.sequences)
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, PowerQuantCache)
    unpatch(model)
    assert [x._attn_implementation for x in (model.config, model.config.text_config, model.config.vision_config)] == before


def test_a_model_without_a_packable_layer_is_refused():
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    support = check_model(model)
    assert not support.ok and not support.fused and "head size 32 has no rotation" in str(support)
    with pytest.raises(PowerQuantUnsupportedError, match="no layer of GPT2LMHeadModel can be packed: head size 32"):
        patch(model)
