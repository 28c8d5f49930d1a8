"""The llama family's forward in plain PyTorch, for training and sampling: `relufy` needs what Transformers' modules hide.

Matrices of all layers are stacked, so that low-rank changes of all of them are one batched product; the activation is the
caller's, so that it sees the gate; and a step of decoding takes static tensors only, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .checkpoint import Checkpoint
from .families import Model, Weight, weights

# Hugging Face's names of a layer's tensors, in the order of Layer
PARTS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = ("attn_norm", "ffn_norm")
MATRICES = tuple(name for name in PARTS if name not in NORMS)


class Layer(NamedTuple):
    """One layer's weights, [rows, columns] as Hugging Face has them."""

    attn_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    ffn_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """A model's tensors on one device."""

    stacked: dict[str, torch.Tensor]  # by part: [num_layers, rows, columns], norms [num_layers, hidden_size] fp32
    embedding: torch.Tensor  # [vocab_size, hidden_size]
    norm: torch.Tensor  # [hidden_size] fp32
    head: torch.Tensor  # [vocab_size, hidden_size], the embedding itself where they are tied

    def layers(self) -> list[Layer]:
        return [Layer(*parts) for parts in zip(*(self.stacked[name].unbind() for name in PARTS), strict=True)]

    def to(self, dtype: torch.dtype) -> Weights:
        """Matrices in another type; norms stay fp32."""
        return replace(
            self,
            stacked={name: part if name in NORMS else part.to(dtype) for name, part in self.stacked.items()},
            embedding=self.embedding.to(dtype),
            head=self.head.to(dtype),
        )


def load_weights(source: Checkpoint, model: Model, device: torch.device) -> Weights:
    """A checkpoint's tensors in its own types, norms in fp32.

    Raises: PowerQuantConfigError, PowerQuantUnsupportedError as Checkpoint.check
    """
    planned = weights(model, sparse=False, with_output=False)
    source.check(planned)
    named = {weight.source: weight for weight in planned}

    def load(name: str) -> torch.Tensor:
        # rotary rows in Hugging Face's order, not in the file format's
        weight: Weight = replace(named[f"{name}.weight"], reorder=None)
        return source.load(weight).to(device)

    stacked = {}
    for part, name in PARTS.items():
        layers = [load(f"model.layers.{layer}.{name}") for layer in range(model.num_layers)]
        stacked[part] = torch.stack([layer.float() for layer in layers] if part in NORMS else layers)
    embedding = load("model.embed_tokens")
    head = embedding if model.tied else load("lm_head")
    return Weights(stacked, embedding, load("model.norm").float(), head)


class Rotary(NamedTuple):
    """Angles of RoPE by position, [tokens, head_size / 2] fp32 each."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, model: Model, tokens: int, device: torch.device) -> Rotary:
        exponents = torch.arange(0, model.head_size, 2, device=device, dtype=torch.float32) / model.head_size
        angles = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), model.rope_theta**-exponents)
        return cls(angles.cos(), angles.sin())


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """x [..., tokens, head_size] in pairs (i, i + head_size / 2); computed in fp32, returned in x's type."""
    first, second = x.float().chunk(2, -1)
    cos, sin = rotary
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm of x [..., hidden_size] fp32 in fp32, returned in dtype."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps).to(dtype)


def heads_of(x: torch.Tensor, weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """[batch, heads, tokens, head_size] of x [batch, tokens, hidden_size]."""
    return F.linear(x, weight).unflatten(-1, (-1, head_size)).transpose(1, 2)


# of gate, up [..., intermediate_size] and operands of its own: what goes into the down projection, and what to tell of it
Activation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def block(
    x: torch.Tensor, layer: Layer, rotary: Rotary, model: Model, activation: Activation, operands: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer over whole sequences.

    Args:    x [batch, tokens, hidden_size] fp32, the residual
    Returns: the residual after the layer, and the second of what activation returned
    """
    dtype = layer.q.dtype
    h = normed(x, layer.attn_norm, model.norm_eps, dtype)
    q, k = (rotate(heads_of(h, weight, model.head_size), rotary) for weight in (layer.q, layer.k))
    v = heads_of(h, layer.v, model.head_size)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=model.num_kv_heads != model.num_heads)
    x = x + F.linear(a.transpose(1, 2).flatten(2), layer.o)
    h = normed(x, layer.ffn_norm, model.norm_eps, dtype)
    h, told = activation(F.linear(h, layer.gate), F.linear(h, layer.up), *operands)
    return x + F.linear(h, layer.down), told


def hidden_states(
    weights: Weights,
    ids: torch.Tensor,
    model: Model,
    rotary: Rotary,
    activation: Activation,
    operands: tuple[torch.Tensor, ...] = (),
    run: Callable = block,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output matrix is given.

    Args:    ids [batch, tokens] int; run: block, or a compiled one
    Returns: [batch, tokens, hidden_size] in the matrices' type; what activation told of each layer, stacked
    """
    x = F.embedding(ids, weights.embedding).float()
    told = []
    for layer in weights.layers():
        x, said = run(x, layer, rotary, model, activation, operands)
        told.append(said)
    return normed(x, weights.norm, model.norm_eps, weights.head.dtype), torch.stack(told)


def silu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's activation; tells the share of positive gates."""
    return F.silu(gate) * up, (gate > 0).float().mean()


def relu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's activation; tells the share of active neurons."""
    return F.relu(gate) * up, (gate > 0).float().mean()


class Decoder:
    """Token by token with a static cache: all rows are at the same position, which is a tensor.

    Keys and values take 4 * num_layers * num_kv_heads * head_size bytes per token and row in bf16.
    """

    def __init__(self, weights: Weights, model: Model, rows: int, length: int) -> None:
        self.weights, self.model, self.length = weights, model, length
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self.rotary = Rotary.of(model, length, device)
        self.positions = torch.arange(length, device=device)
        shape = (model.num_layers, rows, model.num_kv_heads, length, model.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def logits(self, tokens: torch.Tensor, position: torch.Tensor, reach: int) -> torch.Tensor:
        """Of what follows tokens.

        Args:    tokens [rows] int; position [1] int, less than reach; reach: how much of the cache is read
        Returns: [rows, vocab_size]
        """
        model, dtype = self.model, self.weights.embedding.dtype
        rotary = Rotary(*(angles.index_select(0, position) for angles in self.rotary))
        # 0 or -inf: boolean masks cost a conversion in each layer
        mask = torch.zeros(reach, dtype=dtype, device=tokens.device)
        mask = mask.masked_fill_(self.positions[:reach] > position, float("-inf")).expand(1, 1, 1, reach)
        x = F.embedding(tokens[:, None], self.weights.embedding).float()
        for index, layer in enumerate(self.weights.layers()):
            h = normed(x, layer.attn_norm, model.norm_eps, dtype)
            q, k = (rotate(heads_of(h, weight, model.head_size), rotary) for weight in (layer.q, layer.k))
            self.keys[index].index_copy_(2, position, k)
            self.values[index].index_copy_(2, position, heads_of(h, layer.v, model.head_size))
            # the queries of a key-value head are its rows: one attention without copies of keys
            q = q.reshape(len(tokens), model.num_kv_heads, -1, model.head_size)
            a = F.scaled_dot_product_attention(
                q, self.keys[index, :, :, :reach], self.values[index, :, :, :reach], attn_mask=mask
            )
            x = x + F.linear(a.reshape(len(tokens), 1, -1), layer.o)
            h = normed(x, layer.ffn_norm, model.norm_eps, dtype)
            x = x + F.linear(F.silu(F.linear(h, layer.gate)) * F.linear(h, layer.up), layer.down)
        return F.linear(normed(x[:, 0], self.weights.norm, model.norm_eps, dtype), self.weights.head)
