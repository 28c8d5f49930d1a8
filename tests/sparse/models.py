"""Random-weight models with an exact predictor, as Hugging Face checkpoints; `vllm_powerquant.sparse.convert` makes the
files of them.

    folder = write_checkpoint(SHAPES["tiny"], tmp_path)
    convert(folder, tmp_path / "sparse.gguf", predictor=folder / "predictor")   # PWRI
    convert(folder, tmp_path / "dense.gguf")                                    # the same weights, GGUF

Why the predictor is exact. The projection that decides a neuron (gate; up for falcon and opt) reads only a slice S of the
residual, as wide as half the predictor's rank: its rows are C on S and zero elsewhere. The predictor is fc1 = [I_S; -I_S],
fc2 = [C, -C], so fc2 relu(fc1 h) = C h_S is the projection's own sum, without the norm, which there only scales by a
positive number:
  - RMSNorm has weight 1 on S. LayerNorm also subtracts the mean, so for falcon and opt the residual is [u; -u] throughout
    (token and position embeddings, attention's and the feed-forward's outputs), whose mean is zero.
  - opt's bias of the up projection is never positive: it may only switch off a neuron that was predicted.
S is aligned to 32, so C has the same Q4_0 blocks in both places, I and zeros are exact in Q4_0, and a negated block is an
exactly negated block: all this holds for the quantized numbers too. What is left is the rounding of activations, which
the two ways of computing a neuron's sign undergo at different places: a neuron may be missed if its value is within that
rounding of zero. With activations in f32 that adds less than 1e-6 to the logits' error. Where they are rounded to Q8_0,
as engines do for Q4_0, it adds up to 1e-2, no more than Q8_0 itself does; a `margin` of 0.1 (a threshold of -0.1; 1 % more
active neurons) makes sparse equal dense there too.
The down projection is one that Q4_0 stores without loss in both directions (`q4_0_exact`), so that in each type the PWRI
and the GGUF hold the same numbers.

About `active_share` of the neurons are active because S has coordinates that are constant in the residual (set by the
embeddings, never written again), which C counts against every neuron; how much is measured layer by layer on random tokens.
PowerInfer's own engine wants more than 1000 neurons, a multiple of 32; smaller models here are for this project's engine.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparse.reference import forward_layer

CONSTANT = 3.0  # value of the constant coordinates; others are about 1
CALIBRATION_TOKENS = 128
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; see SHAPES."""

    family: str = "llama"
    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 320
    rank: int = 64  # of the predictor; a multiple of 64
    context_length: int = 256
    active_share: float = 0.1
    tied: bool = False
    tokenizer: str = "bpe"  # bpe: trained on a few lines; spm: the same, SentencePiece; smollm2: the packaged model's
    two_norms: bool = False  # falcon's newer form: a norm each for attention and feed-forward
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.rank % 64 or self.rank > self.slice_limit * 2:
            raise ValueError(f"rank must be a multiple of 64, at most {self.slice_limit * 2}, got {self.rank}")
        if self.hidden_size % 64 or self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(f"sizes do not divide: {self}")

    @property
    def antisymmetric(self) -> bool:
        """The residual is [u; -u]: the families with LayerNorm."""
        return self.family in ("falcon", "opt")

    @property
    def slice_limit(self) -> int:
        return self.hidden_size // 2 if self.antisymmetric else self.hidden_size

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def constant(self) -> torch.Tensor:
        """Indices of the constant coordinates: the first of each 32 of the slice."""
        return torch.arange(0, self.rank // 2, 32)


SHAPES = {
    "tiny": Shape(),
    "tiny-bamboo": Shape("bamboo"),
    "tiny-falcon": Shape("falcon", hidden_size=128, num_kv_heads=1, rank=64),
    "tiny-falcon-new": Shape("falcon", hidden_size=128, num_kv_heads=2, rank=128, two_norms=True),
    "tiny-opt": Shape("opt", hidden_size=128, num_kv_heads=4, rank=128),
    # what PowerInfer's own engine takes
    "small": Shape(
        hidden_size=256, intermediate_size=1536, num_layers=3, num_heads=8, num_kv_heads=2, vocab_size=512, rank=256
    ),
    "m1": Shape(
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=12,
        num_heads=16,
        num_kv_heads=16,
        vocab_size=49152,
        rank=256,
        context_length=2048,
        tokenizer="smollm2",
    ),
    "m2": Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        vocab_size=49152,
        rank=512,
        context_length=2048,
        tokenizer="smollm2",
    ),
}


def write_checkpoint(
    shape: Shape,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    margin: float = 0.0,
    predictor_suffix: str = ".pt",
) -> Path:
    """A checkpoint that transformers loads (bamboo has no class there), and predictors in its folder `predictor`.

    Args:    margin: the predictors' threshold is -margin; values are about 1.5 in size
    Returns: folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictors = folder / "predictor"
    predictors.mkdir(exist_ok=True)
    shards, shard, shard_bytes = [], {}, 0
    for layer, tensors, predictor in _generate(shape, seed, dtype):
        shard |= tensors
        shard_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if predictor is not None:
            path = predictors / f"model_{layer}{predictor_suffix}"
            torch.save(predictor, path) if predictor_suffix == ".pt" else save_file(predictor, path)
        if shard_bytes > SHARD_BYTES:
            shards.append((folder / f"model-{len(shards) + 1:05d}.safetensors", sorted(shard)))
            save_file(shard, shards[-1][0], metadata={"format": "pt"})
            shard, shard_bytes = {}, 0
    if shards:
        shards.append((folder / f"model-{len(shards) + 1:05d}.safetensors", sorted(shard)))
        save_file(shard, shards[-1][0], metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: path.name for path, names in shards for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(shard, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2))
    (predictors / "config.json").write_text(json.dumps({"sparse_threshold": 0.0 - margin}))
    _write_tokenizer(shape, folder)
    return folder


def _generate(
    shape: Shape, seed: int, dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]]:
    """(layer, Hugging Face tensors, predictor); layer -1 for those outside layers, first and last."""
    g = torch.Generator().manual_seed(seed)
    n, width = shape.hidden_size, shape.rank // 2

    def random(*size: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=g).mul_(std).to(dtype)

    def norm(fixed: bool = False) -> torch.Tensor:
        """[n] fp32; fixed: 1 on the slice."""
        weight = 1 + 0.2 * torch.randn(n, generator=g)
        if fixed:
            weight[:width] = 1
        return weight

    def norm_bias(fixed: bool = False) -> torch.Tensor:
        bias = 0.1 * torch.randn(n, generator=g)
        if fixed:
            bias[:width] = 0
        return bias

    def residual(weight: torch.Tensor, dim: int, constant: float = 0.0) -> torch.Tensor:
        """What is added to the residual along `dim`: with its constants set, and antisymmetric where it must be."""
        weight.index_fill_(dim, shape.constant, constant)
        if shape.antisymmetric:
            first, second = weight.split(n // 2, dim)
            second.copy_(-first)
        return weight

    embedding = residual(random(shape.vocab_size, n), 1, CONSTANT)
    top = {"token_embd.weight": embedding}
    ids = torch.randint(shape.vocab_size, (CALIBRATION_TOKENS,), generator=g)
    hidden = embedding[ids].float()
    if shape.family == "opt":
        top["position_embd.weight"] = residual(random(shape.context_length + 2, n, std=0.3), 1)
        hidden += top["position_embd.weight"][2 : 2 + len(ids)].float()
    yield -1, _hf_top(shape, top), None

    for layer in range(shape.num_layers):
        q_rows, kv_rows = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        std = n**-0.5
        # all layers together add about as much to the residual as the embedding is
        written = (2 * shape.num_layers) ** -0.5
        down_std = written * (shape.active_share * shape.intermediate_size) ** -0.5
        weights = {
            "attn_norm.weight": norm(fixed=shape.family == "falcon" and not shape.two_norms),
            "attn_q.weight": random(q_rows, n, std=1.5 * std),
            "attn_k.weight": random(kv_rows, n, std=1.5 * std),
            "attn_v.weight": random(kv_rows, n, std=std),
            "attn_output.weight": residual(random(n, q_rows, std=written * std), 0),
            "ffn_up.weight": random(shape.intermediate_size, n, std=std),
            "ffn_down.weight": residual(q4_0_exact(n, shape.intermediate_size, down_std, g).to(dtype), 0),
            "ffn_norm.weight": norm(fixed=True),
        }
        if shape.antisymmetric:
            fixed = shape.family == "falcon" and not shape.two_norms
            weights |= {"attn_norm.bias": norm_bias(fixed), "ffn_norm.bias": norm_bias(fixed=True)}
        if shape.family == "falcon" and not shape.two_norms:
            weights |= {"ffn_norm.weight": weights["attn_norm.weight"], "ffn_norm.bias": weights["attn_norm.bias"]}
        if shape.family == "opt":
            weights |= {f"{name}.bias": 0.1 * torch.randn(n, generator=g) for name in ("attn_q", "attn_k", "attn_v")}
            weights |= {
                f"{name}.bias": residual(0.1 * torch.randn(n, generator=g), 0) for name in ("attn_output", "ffn_down")
            }
            weights["ffn_up.bias"] = -0.1 * torch.rand(shape.intermediate_size, generator=g)
        deciding = "ffn_up.weight" if shape.antisymmetric else "ffn_gate.weight"
        decider = torch.zeros(shape.intermediate_size, n, dtype=dtype)
        decider[:, :width] = random(shape.intermediate_size, width, std=1.5 * width**-0.5)
        decider[:, shape.constant] = 0
        weights[deciding] = decider
        floats = {name: part.float() for name, part in weights.items()}

        def calibrate(predictor_input: torch.Tensor, decider=decider, deciding=deciding, floats=floats) -> None:
            """Set the constants' weights so that active_share of the neurons is positive."""
            centred = predictor_input - predictor_input.mean(-1, keepdim=True) * shape.antisymmetric
            values = centred[:, :width] @ decider[:, :width].float().T
            if "ffn_up.bias" in floats:
                values += floats["ffn_up.bias"] * centred.square().mean(-1, keepdim=True).sqrt()
            sample = values.flatten()
            sample = sample[:: max(1, len(sample) // 100_000)]
            offset = torch.quantile(sample, 1 - shape.active_share).item()
            decider[:, shape.constant] = -offset / (CONSTANT * len(shape.constant))
            floats[deciding] = decider.float()

        hidden = forward_layer(shape, floats, hidden, before_ffn=calibrate)
        identity = torch.eye(n, dtype=dtype)[:width]
        coefficients = decider[:, :width]
        predictor = {
            "fc1.weight": torch.cat([identity, -identity]),
            "fc2.weight": torch.cat([coefficients, -coefficients], 1),
        }
        yield layer, _hf_layer(shape, layer, weights), predictor

    tied = shape.tied or shape.family == "opt"
    # logits of about 1 from an embedding whose entries are about 1
    scale = n**-0.5 if tied else 1.0
    top = {"output_norm.weight": norm() * scale}
    if shape.antisymmetric:
        top["output_norm.bias"] = norm_bias() * scale
    if not tied:
        top["output.weight"] = random(shape.vocab_size, n, std=n**-0.5)
    yield -1, _hf_top(shape, top), None


def q4_0_exact(rows: int, columns: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """A matrix that Q4_0 stores without loss, and its transpose too, so that ffn_down and ffn_down_t are one matrix.

    Multiples of a power of two, at most 7 of them, but for two diagonals of each 32 x 32 tile, which hold 8: a block's
    largest entry, whichever way it runs (one remains where residual() sets a constant coordinate to zero). The sign of
    the 8s is that of the tile, since a block can hold 8 or -8, not both.
    """
    step = 2.0 ** round(math.log2(std / 4.6))
    values = torch.randint(-7, 8, (rows, columns), generator=generator, dtype=torch.int8)
    tiles = torch.randint(2, (-(-rows // 32), -(-columns // 32)), generator=generator, dtype=torch.int8) * 16 - 8
    diagonal = (torch.arange(rows)[:, None] + torch.arange(columns)) % 32 < 2
    signs = tiles.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
    return torch.where(diagonal, signs, values).to(torch.float16) * step


_HF_TOP = {
    "llama": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    },
    "falcon": {
        "token_embd": "transformer.word_embeddings",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    "opt": {
        "token_embd": "model.decoder.embed_tokens",
        "position_embd": "model.decoder.embed_positions",
        "output_norm": "model.decoder.final_layer_norm",
    },
}
_HF_LAYER = {
    "llama": {
        "attn_norm": "model.layers.{}.input_layernorm",
        "attn_q": "model.layers.{}.self_attn.q_proj",
        "attn_k": "model.layers.{}.self_attn.k_proj",
        "attn_v": "model.layers.{}.self_attn.v_proj",
        "attn_output": "model.layers.{}.self_attn.o_proj",
        "ffn_norm": "model.layers.{}.post_attention_layernorm",
        "ffn_gate": "model.layers.{}.mlp.gate_proj",
        "ffn_up": "model.layers.{}.mlp.up_proj",
        "ffn_down": "model.layers.{}.mlp.down_proj",
    },
    "falcon": {
        "attn_norm": "transformer.h.{}.ln_attn",
        "ffn_norm": "transformer.h.{}.ln_mlp",
        "attn_output": "transformer.h.{}.self_attention.dense",
        "ffn_up": "transformer.h.{}.mlp.dense_h_to_4h",
        "ffn_down": "transformer.h.{}.mlp.dense_4h_to_h",
    },
    "opt": {
        "attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
        "attn_q": "model.decoder.layers.{}.self_attn.q_proj",
        "attn_k": "model.decoder.layers.{}.self_attn.k_proj",
        "attn_v": "model.decoder.layers.{}.self_attn.v_proj",
        "attn_output": "model.decoder.layers.{}.self_attn.out_proj",
        "ffn_norm": "model.decoder.layers.{}.final_layer_norm",
        "ffn_up": "model.decoder.layers.{}.fc1",
        "ffn_down": "model.decoder.layers.{}.fc2",
    },
}
_HF_LAYER["bamboo"], _HF_TOP["bamboo"] = _HF_LAYER["llama"], _HF_TOP["llama"]


def _hf_top(shape: Shape, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = _HF_TOP[shape.family]
    parts = {name: name.rsplit(".", 1) for name in tensors}
    return {f"{names[parts[name][0]]}.{parts[name][1]}": tensor for name, tensor in tensors.items()}


def _hf_layer(shape: Shape, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    names, found = dict(_HF_LAYER[shape.family]), {}
    if shape.family == "falcon":
        if not shape.two_norms:
            names["attn_norm"] = "transformer.h.{}.input_layernorm"
            del tensors["ffn_norm.weight"], tensors["ffn_norm.bias"]
        kv, d = shape.num_kv_heads, shape.head_size
        parts = [tensors.pop(f"attn_{part}.weight").reshape(kv, -1, d, shape.hidden_size) for part in "qkv"]
        fused = torch.cat(parts, 1).reshape(-1, shape.hidden_size)
        found[f"transformer.h.{layer}.self_attention.query_key_value.weight"] = fused
    for name, tensor in tensors.items():
        part, kind = name.rsplit(".", 1)
        found[f"{names[part].format(layer)}.{kind}"] = tensor.contiguous()
    return found


def _config(shape: Shape) -> dict:
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if shape.tokenizer == "bpe":
        special = {"bos_token_id": 0, "eos_token_id": 0}
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.context_length,
        "tie_word_embeddings": shape.tied or shape.family == "opt",
        "torch_dtype": "float16",
        **special,
    }
    match shape.family:
        case "llama" | "bamboo":
            return common | {
                "architectures": ["BambooForCausalLM" if shape.family == "bamboo" else "LlamaForCausalLM"],
                "model_type": shape.family,
                "intermediate_size": shape.intermediate_size,
                "num_key_value_heads": shape.num_kv_heads,
                "hidden_act": shape.activation,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
            }
        case "falcon":
            return common | {
                "architectures": ["FalconForCausalLM"],
                "model_type": "falcon",
                "ffn_hidden_size": shape.intermediate_size,
                "activation": shape.activation,
                "num_kv_heads": shape.num_kv_heads,
                "multi_query": shape.num_kv_heads == 1,
                "new_decoder_architecture": shape.two_norms,
                "parallel_attn": True,
                "bias": False,
                "alibi": False,
                "layer_norm_epsilon": 1e-5,
                "rope_theta": 10000.0,
            }
        case "opt":
            return common | {
                "architectures": ["OPTForCausalLM"],
                "model_type": "opt",
                "ffn_dim": shape.intermediate_size,
                "word_embed_proj_dim": shape.hidden_size,
                "activation_function": shape.activation,
                "do_layer_norm_before": True,
                "pad_token_id": 1,
            }
    raise ValueError(f"family must be llama, bamboo, falcon or opt, got {shape.family!r}")


TEXT = [
    "The quick brown fox jumps over the lazy dog near the river, and 1234 birds fly away.",
    "She said: \"It's 7 o'clock, don't be late!\" Then they walked home through the rain.",
    "def main(argv):\n    return sum(int(x) for x in argv[1:])\n",
    "Größe, naïve café, Ελληνικά, русский, 日本語, 한국어, emoji \U0001f600 and\ttabs.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    match shape.tokenizer:
        case "smollm2":
            from vllm_powerquant.model import prepare_model

            source = prepare_model()
            for path in [source / "tokenizer.json", source / "tokenizer_config.json", source / "chat_template.jinja"]:
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
            return
        case "bpe":
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=shape.vocab_size,
                special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            tokenizer.train_from_iterator(TEXT, trainer)
            tokenizer.save(str(folder / "tokenizer.json"))
            options |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        case "spm":
            import sentencepiece

            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXT * 5),
                model_prefix=str(folder / "tokenizer"),
                model_type="bpe",
                vocab_size=shape.vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                character_coverage=0.98,
                hard_vocab_limit=False,
                split_digits=True,
                minloglevel=2,
            )
            (folder / "tokenizer.vocab").unlink()
            options |= {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
        case other:
            raise ValueError(f"tokenizer must be bpe, spm or smollm2, got {other!r}")
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=2))
