"""A model that costs nothing to have: Qwen3-8B's shape as a folder with a config alone, for vLLM's load_format="dummy"."""

from __future__ import annotations

import json
from pathlib import Path

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
# to try the scripts on a machine that is too small for the real shape
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
TINY |= {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2}


def write_config(folder: str, num_layers: int = 36, tiny: bool = False) -> dict:
    """Write config.json to the folder and return what it says."""
    config = {**QWEN3_8B, **(TINY if tiny else {}), "num_hidden_layers": num_layers}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return config
