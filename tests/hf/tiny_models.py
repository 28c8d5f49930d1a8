"""Tiny models with random weights, of the architectures that the cache is tested with."""

from __future__ import annotations

import functools

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}
_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON),
    # three layers see 32 tokens, the fourth all
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_COMMON, sliding_window=32, layer_types=["sliding_attention"] * 3 + ["full_attention"], query_pre_attn_scalar=64
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=4, n_head=2, n_positions=2048, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "phi3": lambda: transformers.Phi3Config(**_COMMON),
    # convolutions and attention in turns
    "lfm2": lambda: transformers.Lfm2Config(
        **_COMMON, layer_types=["conv", "full_attention", "conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_CONFIGS)


@functools.cache
def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """fp32 on the CPU, attn_implementation "sdpa". The one object of its kind: leave it as it was."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(_CONFIGS[architecture](), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # as they come, weights are so small that every token is as likely: attention would not show
            if weight.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                weight.mul_(4.0)
    return model


def tokens(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random prompts [length] without padding tokens."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=g) for n in lengths]


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask [batch, longest]."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts])
    return ids, mask.long()
