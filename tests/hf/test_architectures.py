"""check_model says the truth of other architectures; patch() answers as DynamicCache does, or refuses with one line."""

import pytest
import torch
import transformers

from hf.tiny_models import VOCABULARY, left_padded, tokens
from vllm_powerquant import PowerQuantCache, check_model, patch
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LLAMA_LIKE = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_TURNS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA_4 = {**_TURNS, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "global_head_dim": 128}
_LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16}
_HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}

# (name of a config, its options, P: packed or -: not, layer by layer, why attention is not fused or "")
_SHARED = "-P--" if hasattr(transformers.cache_utils, "DummyLayer") else "-P"
_NOT_REPLACED = "the model's code does not let its attention be replaced"
MODELS = {
    "gemma2": ("Gemma2Config", {**_LLAMA_LIKE, "sliding_window": 16}, "-P-P", "attention has a logit soft cap"),
    # two share keys and values: they have no layer of their own in a cache, or, since transformers 5.24, one that holds none
    "gemma3n": (
        "Gemma3nTextConfig",
        {**_LLAMA_LIKE, **_TURNS, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
         "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2,
         "activation_sparsity_pattern": [0.0] * 4},
        _SHARED, "layers share keys and values",
    ),
    # layers of full attention have another head size
    "gemma4": ("Gemma4TextConfig", {**_LLAMA_LIKE, **_GEMMA_4, "num_kv_shared_layers": 0}, "-P-P", ""),
    "gemma4-shared": (
        "Gemma4TextConfig", {**_LLAMA_LIKE, **_GEMMA_4, "num_kv_shared_layers": 2}, _SHARED, "layers share keys and values"
    ),
    "qwen2": ("Qwen2Config", {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
              "PP--", ""),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 64, "max_position_embeddings": 512, "word_embed_proj_dim": 128}, "PPPP", ""),
    "falcon": ("FalconConfig", {**_COMMON, "alibi": True}, "PPPP", _NOT_REPLACED),
    "gpt-neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 64, "max_position_embeddings": 512}, "PPPP", ""),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": None}, "PPPP", ""),
    "starcoder2": ("Starcoder2Config", {**_LLAMA_LIKE, "sliding_window": None}, "PPPP", ""),
    "phi": ("PhiConfig", _LLAMA_LIKE, "PPPP", ""),
    "gpt-j": (
        "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 4, "n_head": 2, "rotary_dim": 32, "eos_token_id": None},
        # newer Transformers have rewritten it
        "PPPP", "" if transformers.GPTJModel._supports_attention_backend else _NOT_REPLACED,
    ),
    "cohere": ("CohereConfig", _LLAMA_LIKE, "PPPP", ""),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, **_EXPERTS}, "PPPP", ""),
    "gpt-oss": ("GptOssConfig", {**_LLAMA_LIKE, **_EXPERTS, **_TURNS}, "-P-P", "attention has learned sink logits"),
    "llama4": ("Llama4TextConfig", {**_LLAMA_LIKE, **_EXPERTS, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
               "---P", ""),
    "cohere2": ("Cohere2Config", {**_LLAMA_LIKE, "sliding_window": 16}, "---P", ""),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE, "PPPP", ""),
    "doge": ("DogeConfig", _LLAMA_LIKE, "PPPP", "attention makes a mask of its own"),
    "diffllama": (
        "DiffLlamaConfig", {**_LLAMA_LIKE, "num_attention_heads": 4, "num_key_value_heads": 2}, "PPPP",
        "attention is the difference of two over the same keys",
    ),
    "jamba": ("JambaConfig", {**_LLAMA_LIKE, **_HYBRID}, "-P-P", _NOT_REPLACED),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {**_LLAMA_LIKE, **_MAMBA, "mamba_expand": 2, "num_local_experts": 0, "shared_intermediate_size": 64,
         "layer_types": ["mamba", "attention"] * 2},
        "-P-P", "",
    ),
}  # fmt: skip
REFUSED = {
    "mistral-sliding": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 16}, "kept exact, 16 tokens at most"),
    "deepseek-v2": ("DeepseekV2Config", {**_LLAMA_LIKE, **_LATENT}, "multi-head latent attention"),
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "kept as Transformers"),
    "rwkv": ("RwkvConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "has no attention"),
    "minimax": ("MiniMaxConfig", {**_LLAMA_LIKE, **_EXPERTS}, "takes no cache but its MiniMaxCache"),
}


def make(config: str, options: dict):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()


def generated(model, ids, mask):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, output_logits=True, **options)


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures(name):
    config, options, packed, reason = MODELS[name]
    model = make(config, options)
    support = check_model(model)
    assert "".join("P" if layer.packed else "-" for layer in support.layers) == packed
    assert (support.fused, support.reason) == (not reason, reason)
    ids, mask = left_padded(tokens(40, 23))
    want = generated(model, ids, mask)
    patch(model, residual_tokens=4096)
    got = generated(model, ids, mask)
    assert got.past_key_values.memory_report().path == ("dequantized" if reason else "fused")
    assert torch.equal(got.sequences, want.sequences)
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_are_refused(name):
    config, options, says = REFUSED[name]
    model = make(config, options)
    support = check_model(model)
    assert not support.ok and not support.fused
    with pytest.raises(PowerQuantUnsupportedError, match=f"no layer of {type(model).__name__} can be packed: .*{says}"):
        patch(model)


def test_attention_that_comes_twice_is_noticed():
    """DiffLlama's does; stored twice, a chunk would be read twice by the next, without a word."""
    config, options, _, _ = MODELS["diffllama"]
    model = make(config, options)
    model.set_attn_implementation("powerquant")
    with torch.no_grad(), pytest.raises(PowerQuantUnsupportedError, match="ran twice over one chunk"):
        model(tokens(20)[0][None], past_key_values=PowerQuantCache(model))


def test_a_config_is_no_model():
    with pytest.raises(PowerQuantConfigError, match="needs a Transformers model that is loaded, got Qwen2Config"):
        check_model(transformers.Qwen2Config())
