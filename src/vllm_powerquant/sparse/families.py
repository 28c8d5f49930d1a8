"""The model families of PowerInfer's file format: what config.json must say, and which tensors a file holds.

Left of each line of a tensor list is GGUF's name, right of it Hugging Face's. A sparse file differs from a plain one in
`ffn_down_t` (the down projection transposed: a row is one neuron) and in the predictor `fc1`, `fc2` of each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError

if TYPE_CHECKING:
    import torch

# Hugging Face's class -> family; Mistral's feed-forward is llama's, Bamboo also applies ReLU to the up projection.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "BambooForCausalLM": "bamboo",
    "FalconForCausalLM": "falcon",
    "OPTForCausalLM": "opt",
    "OPTModel": "opt",  # its output matrix is the embedding
}
ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu"}

# torch.nn.LayerNorm's default: OPT's config.json names none
OPT_NORM_EPS = 1e-5
# rows at the start of OPT's table of positions that no position uses
OPT_POSITION_OFFSET = 2


@dataclass(frozen=True)
class Model:
    """What a checkpoint's config.json says, in one form for all families."""

    family: str
    activation: str  # relu, silu or gelu (the exact one, by erf)
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int  # tokens; a sliding window limits it
    norm_eps: float
    rope_theta: float | None  # None: no rotary embedding
    tied: bool  # the output matrix is the token embedding
    two_norms: bool = False  # falcon: attention and feed-forward have a norm each

    def metadata(self) -> dict[str, int | float | str]:
        """GGUF's entries `<family>.*`, and `powerinfer.activation`, which files made elsewhere lack."""
        prefix = self.family
        norm = "layer_norm_rms_epsilon" if prefix in ("llama", "bamboo") else "layer_norm_epsilon"
        entries = {
            f"{prefix}.context_length": self.context_length,
            f"{prefix}.embedding_length": self.hidden_size,
            f"{prefix}.block_count": self.num_layers,
            f"{prefix}.feed_forward_length": self.intermediate_size,
            f"{prefix}.attention.head_count": self.num_heads,
            f"{prefix}.attention.head_count_kv": self.num_kv_heads,
            f"{prefix}.attention.{norm}": self.norm_eps,
            f"{prefix}.vocab_size": self.vocab_size,
            "powerinfer.activation": self.activation,
        }
        if self.rope_theta is not None:
            entries[f"{prefix}.rope.dimension_count"] = self.head_size
            entries[f"{prefix}.rope.freq_base"] = self.rope_theta
        if self.head_size * self.num_heads != self.hidden_size:
            entries[f"{prefix}.attention.key_length"] = self.head_size
            entries[f"{prefix}.attention.value_length"] = self.head_size
        return entries


@dataclass(frozen=True)
class Weight:
    """One tensor of the file and where it comes from."""

    name: str  # GGUF's
    source: str  # the checkpoint's
    shape: tuple[int, ...]  # in the checkpoint
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None  # rows only, except for transpose

    @property
    def file_shape(self) -> tuple[int, ...]:
        """In the file, slowest dimension first."""
        return self.shape[::-1] if self.reorder is transpose else self.shape


def planned_name(name: str) -> str:
    """What `weights` calls a checkpoint's tensor: OPTModel saves decoder.* where OPTForCausalLM has model.decoder.*"""
    return f"model.{name}" if name.startswith("decoder.") else name


def transpose(weight: torch.Tensor) -> torch.Tensor:
    return weight.T.contiguous()


def read_config(config: dict[str, Any], family: str | None = None) -> Model:
    """The model that a config.json describes.

    Args:   family overrides what the class name says: Bamboo's weights under Mistral's class are "bamboo"
    Raises: PowerQuantUnsupportedError for a class, activation or option that the format can't express;
        PowerQuantConfigError for a missing or contradictory entry
    """
    names = config.get("architectures") or []
    known = FAMILIES.get(names[0]) if names else None
    if known is None:
        raise PowerQuantUnsupportedError(
            f"no checkpoint of class {names[0] if names else None!r}; config.json must name one of {', '.join(FAMILIES)}"
        )
    if family not in (None, known) and {family, known} != {"llama", "bamboo"}:
        raise PowerQuantConfigError(f"family must be {known!r} for {names[0]}, got {family!r}")
    reader = {"llama": _llama, "bamboo": _llama, "falcon": _falcon, "opt": _opt}[known]
    try:
        model = reader(config, family or known)
    except KeyError as error:
        raise PowerQuantConfigError(f"config.json lacks {error}") from error
    except (TypeError, AttributeError) as error:
        raise PowerQuantConfigError(f"config.json has an entry of the wrong kind: {error}") from error
    if model.rope_theta is not None and model.head_size % 2:
        raise PowerQuantConfigError(f"no rotary embedding of heads of odd size, got {model.head_size}")
    if model.head_size * model.num_heads != model.hidden_size and model.family in ("falcon", "opt"):
        raise PowerQuantConfigError(
            f"hidden_size must be a multiple of num_attention_heads, got {model.hidden_size} and {model.num_heads}"
        )
    if model.num_heads % model.num_kv_heads:
        raise PowerQuantConfigError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {model.num_heads} and {model.num_kv_heads}"
        )
    return model


def _llama(config: dict[str, Any], family: str) -> Model:
    _refuse(config, "attention_bias", "mlp_bias", "quantization_config")
    heads, hidden_size = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    context = _size(config, "max_position_embeddings")
    return Model(
        family=family,
        activation=_activation(config.get("hidden_act", "relu" if family == "bamboo" else "silu"), "hidden_act"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", heads),
        head_size=_size(config, "head_dim", hidden_size // heads),
        vocab_size=_size(config, "vocab_size"),
        # attention to everything is the same as a sliding window until the window is full
        context_length=min(context, _size(config, "sliding_window", context)),
        norm_eps=_number("rms_norm_eps", config["rms_norm_eps"]),
        rope_theta=_rope_theta(config),
        tied=config.get("tie_word_embeddings", False),
    )


def _falcon(config: dict[str, Any], family: str) -> Model:
    _refuse(config, "bias", "alibi", "quantization_config")
    if not config.get("parallel_attn", True):
        raise PowerQuantUnsupportedError("no falcon with parallel_attn = False: its feed-forward reads another residual")
    new = config.get("new_decoder_architecture", False)
    heads, hidden_size = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    kv_heads = _size(config, "num_kv_heads", heads)
    return Model(
        family=family,
        activation=_activation(config.get("activation", "gelu"), "activation"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "ffn_hidden_size", 4 * hidden_size),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads if new or not config.get("multi_query", True) else 1,
        head_size=hidden_size // heads,
        vocab_size=_size(config, "vocab_size"),
        context_length=_size(config, "max_position_embeddings", 2048),
        norm_eps=_number("layer_norm_epsilon", config.get("layer_norm_epsilon", 1e-5)),
        rope_theta=_rope_theta(config),
        tied=config.get("tie_word_embeddings", True),
        two_norms=new and config.get("num_ln_in_parallel_attn") in (None, 2),
    )


def _opt(config: dict[str, Any], family: str) -> Model:
    _refuse(config, "_remove_final_layer_norm", "quantization_config")
    for name in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"):
        if not config.get(name, True):
            raise PowerQuantUnsupportedError(f"no opt with {name} = False; the format has no place for it")
    heads, hidden_size = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    if config.get("word_embed_proj_dim", hidden_size) != hidden_size:
        raise PowerQuantUnsupportedError(
            f"no opt with word_embed_proj_dim = {config['word_embed_proj_dim']}, other than hidden_size = {hidden_size}"
        )
    return Model(
        family=family,
        activation=_activation(config.get("activation_function", "relu"), "activation_function"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "ffn_dim"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden_size // heads,
        vocab_size=_size(config, "vocab_size"),
        context_length=_size(config, "max_position_embeddings"),
        norm_eps=OPT_NORM_EPS,
        rope_theta=None,
        tied=True,
    )


def _size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """An entry that counts something; `default` where it is missing or null."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        return default
    if type(value) is not int or not 0 < value < 1 << 31:
        raise PowerQuantConfigError(f"{name} in config.json must be a positive integer, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise PowerQuantConfigError(f"{name} in config.json must be a number, got {value!r}")
    return float(value)


def _activation(name: str, entry: str) -> str:
    if name not in ACTIVATIONS:
        raise PowerQuantUnsupportedError(f"no model with {entry} = {name!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _refuse(config: dict[str, Any], *names: str) -> None:
    for name in names:
        if config.get(name):
            raise PowerQuantUnsupportedError(f"no checkpoint with {name} = {config[name]!r}; the format has no place for it")


def _rope_theta(config: dict[str, Any]) -> float:
    """Of the plain rotary embedding: scaled ones are refused. Both spellings, before and since transformers 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise PowerQuantUnsupportedError(f"no rotary embedding of type {kind!r}, only the unscaled 'default'")
    return _number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def weights(model: Model, sparse: bool, with_output: bool) -> list[Weight]:
    """The tensors of a file in its order, without the predictors.

    Args:   with_output writes the output matrix even where it is the token embedding (never for opt, whose files
            have none)
    """
    build = {"llama": _llama_weights, "bamboo": _llama_weights, "falcon": _falcon_weights, "opt": _opt_weights}
    return build[model.family](model, sparse, with_output)


def _down(model: Model, layer: int, source: str, sparse: bool) -> Weight:
    shape = (model.hidden_size, model.intermediate_size)
    name = "ffn_down_t" if sparse else "ffn_down"
    return Weight(f"blk.{layer}.{name}.weight", source, shape, transpose if sparse else None)


def _llama_weights(model: Model, sparse: bool, with_output: bool) -> list[Weight]:
    n, ffn = model.hidden_size, model.intermediate_size
    q_rows, kv_rows = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    vocabulary = (model.vocab_size, n)
    embedding = "model.embed_tokens.weight"
    found = [Weight("token_embd.weight", embedding, vocabulary)]
    for layer in range(model.num_layers):
        blk, hf = f"blk.{layer}", f"model.layers.{layer}"
        found += [
            Weight(f"{blk}.attn_norm.weight", f"{hf}.input_layernorm.weight", (n,)),
            Weight(f"{blk}.attn_q.weight", f"{hf}.self_attn.q_proj.weight", (q_rows, n), _pairs(model.num_heads)),
            Weight(f"{blk}.attn_k.weight", f"{hf}.self_attn.k_proj.weight", (kv_rows, n), _pairs(model.num_kv_heads)),
            Weight(f"{blk}.attn_v.weight", f"{hf}.self_attn.v_proj.weight", (kv_rows, n)),
            Weight(f"{blk}.attn_output.weight", f"{hf}.self_attn.o_proj.weight", (n, q_rows)),
            Weight(f"{blk}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", (n,)),
            Weight(f"{blk}.ffn_gate.weight", f"{hf}.mlp.gate_proj.weight", (ffn, n)),
            Weight(f"{blk}.ffn_up.weight", f"{hf}.mlp.up_proj.weight", (ffn, n)),
            _down(model, layer, f"{hf}.mlp.down_proj.weight", sparse),
        ]
    found.append(Weight("output_norm.weight", "model.norm.weight", (n,)))
    if with_output or not model.tied:
        found.append(Weight("output.weight", embedding if model.tied else "lm_head.weight", vocabulary))
    return found


def _falcon_weights(model: Model, sparse: bool, with_output: bool) -> list[Weight]:
    n, ffn = model.hidden_size, model.intermediate_size
    qkv_rows = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    vocabulary = (model.vocab_size, n)
    embedding = "transformer.word_embeddings.weight"
    found = [Weight("token_embd.weight", embedding, vocabulary)]
    for layer in range(model.num_layers):
        blk, hf = f"blk.{layer}", f"transformer.h.{layer}"
        norms = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if model.two_norms else {"attn_norm": "input_layernorm"}
        for name, source in norms.items():
            found += [Weight(f"{blk}.{name}.{part}", f"{hf}.{source}.{part}", (n,)) for part in ("weight", "bias")]
        found += [
            Weight(
                f"{blk}.attn_qkv.weight", f"{hf}.self_attention.query_key_value.weight", (qkv_rows, n), _split_qkv(model)
            ),
            Weight(f"{blk}.attn_output.weight", f"{hf}.self_attention.dense.weight", (n, model.num_heads * model.head_size)),
            Weight(f"{blk}.ffn_up.weight", f"{hf}.mlp.dense_h_to_4h.weight", (ffn, n)),
            _down(model, layer, f"{hf}.mlp.dense_4h_to_h.weight", sparse),
        ]
    found += [Weight(f"output_norm.{part}", f"transformer.ln_f.{part}", (n,)) for part in ("weight", "bias")]
    if with_output or not model.tied:
        found.append(Weight("output.weight", embedding if model.tied else "lm_head.weight", vocabulary))
    return found


def _opt_weights(model: Model, sparse: bool, with_output: bool) -> list[Weight]:
    n, ffn = model.hidden_size, model.intermediate_size
    found = [
        Weight("token_embd.weight", "model.decoder.embed_tokens.weight", (model.vocab_size, n)),
        # every row, the unused ones too: the row of position p is p + OPT_POSITION_OFFSET
        Weight(
            "position_embd.weight",
            "model.decoder.embed_positions.weight",
            (model.context_length + OPT_POSITION_OFFSET, n),
        ),
    ]
    for layer in range(model.num_layers):
        blk, hf = f"blk.{layer}", f"model.decoder.layers.{layer}"
        parts = {
            "attn_norm": ("self_attn_layer_norm", None),
            "attn_q": ("self_attn.q_proj", (n, n)),
            "attn_k": ("self_attn.k_proj", (n, n)),
            "attn_v": ("self_attn.v_proj", (n, n)),
            "attn_output": ("self_attn.out_proj", (n, n)),
            "ffn_norm": ("final_layer_norm", None),
            "ffn_up": ("fc1", (ffn, n)),
        }
        for name, (source, shape) in parts.items():
            found.append(Weight(f"{blk}.{name}.weight", f"{hf}.{source}.weight", shape or (n,)))
            found.append(Weight(f"{blk}.{name}.bias", f"{hf}.{source}.bias", shape[:1] if shape else (n,)))
        down = _down(model, layer, f"{hf}.fc2.weight", sparse)
        found += [down, Weight(down.name.removesuffix("weight") + "bias", f"{hf}.fc2.bias", (n,))]
    found += [Weight(f"output_norm.{part}", f"model.decoder.final_layer_norm.{part}", (n,)) for part in ("weight", "bias")]
    return found


def _pairs(num_heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of a q or k projection from halves to pairs side by side, which is how the format's llama rotates.

    Within a head, row i becomes row 2i and row i + head_size / 2 row 2i + 1.
    """

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
        return halves.transpose(1, 2).reshape(rows, columns)

    return reorder


def _split_qkv(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of falcon's fused projection from [q.. k v] per key-value head to all q, then all k, then all v."""

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        group = model.num_heads // model.num_kv_heads
        heads = weight.reshape(model.num_kv_heads, group + 2, model.head_size, columns)
        parts = heads[:, :group], heads[:, group], heads[:, group + 1]
        import torch

        return torch.cat([part.reshape(-1, columns) for part in parts])

    return reorder
