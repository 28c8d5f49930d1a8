"""patch() on tiny models of many architectures: the tokens and logits of DynamicCache, or one clear refusal.

The window is longer than the text, so nothing but DynamicCache's own answer is right.
"""

import pytest
import torch
import transformers

from hf.tiny_models import tokens
from vllm_powerquant import check_model, patch
from vllm_powerquant.errors import PowerQuantUnsupportedError

SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1}
HEADS = {**GROUPED, "head_dim": 64}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

# name -> (configuration, its options, how attention reads it or what is said instead)
ARCHITECTURES = {
    "mistral": ("MistralConfig", {**HEADS, "sliding_window": None}, "fused"),
    "mistral-sliding": ("MistralConfig", {**HEADS, "sliding_window": 32}, "kept exact, 32 tokens at most"),
    "mixtral": ("MixtralConfig", {**HEADS, **EXPERTS, "sliding_window": None}, "fused"),
    "qwen2": ("Qwen2Config", HEADS, "fused"),
    "cohere": ("CohereConfig", GROUPED, "fused"),
    "olmo2": ("Olmo2Config", GROUPED, "fused"),
    "starcoder2": ("Starcoder2Config", {**GROUPED, "sliding_window": None}, "fused"),
    "gpt-neox": ("GPTNeoXConfig", SIZES, "fused"),
    "phi": ("PhiConfig", GROUPED, "fused"),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 128, "dropout": 0.0}, "fused"),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **GROUPED, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 96,
            "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16,
        },
        "fused",
    ),
    "gemma2": ("Gemma2Config", HEADS, "dequantized"),
    "gpt-oss": (
        "GptOssConfig",
        {**HEADS, **EXPERTS, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 32},
        "dequantized",
    ),
    "falcon": (
        "FalconConfig",
        {
            "vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1,
            "eos_token_id": None, "alibi": False,
        },
        "dequantized",
    ),
    "gpt-j": (
        "GPTJConfig",
        {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 2, "rotary_dim": 32, "eos_token_id": None},
        "dequantized",
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            **SIZES, "num_key_value_heads": 2, "first_k_dense_replace": 2, "kv_lora_rank": 32, "q_lora_rank": None,
            "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "n_group": 1, "topk_group": 1,
        },
        "multi-head latent attention",
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEADS, "intermediate_size_mlp": 96, "num_local_experts": 1, "num_experts_per_tok": 1,
            "attention_chunk_size": 32, "interleave_moe_layer_step": 3,
        },
        "kept exact, 32 tokens at most",
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None},
        "no layer of MambaForCausalLM can be packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_patched_model_answers_as_before_or_is_refused(name):
    kind, options, expected = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
    support = check_model(model)
    if expected not in ("fused", "dequantized"):
        assert not support.ok
        with pytest.raises(PowerQuantUnsupportedError, match=expected):
            patch(model)
        return
    assert support.ok and support.fused == (expected == "fused")
    ids = torch.stack(tokens(60, 60))
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(ids, output_logits=True, **greedy)
    patch(model, residual_tokens=4096)
    got = model.generate(ids, output_logits=True, **greedy)
    assert torch.equal(got.sequences, want.sequences)
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() < 1e-4
    assert got.past_key_values.memory_report().path == expected
