"""The four families' forward pass in plain PyTorch, from a file of either kind or from weights in memory.

Weights carry GGUF's names without `blk.N.`, and the orientation of Hugging Face: [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

EPS = 1e-5


def forward_layer(
    shape: Any,
    weights: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    *,
    before_ffn: Callable[[torch.Tensor], None] | None = None,
    interleaved: bool = False,
    sparse_threshold: float | None = None,
    q8: bool = False,
    active: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """One layer over a sequence from position 0.

    Args:    shape with family, num_heads, num_kv_heads, activation
             weights fp32; before_ffn sees what a predictor reads and may change them
             hidden [tokens, hidden_size] fp32, the residual
             interleaved: rotary pairs lie side by side (llama and bamboo files), else half a head apart
             sparse_threshold: skip the neurons that fc1, fc2 predict to be below it; None computes all
             q8: inputs of matrices in blocks of Q8_0, as engines multiply with Q4_0
             active collects the neurons computed (or, where all are, those not zero): [tokens, intermediate_size] bool
    Returns: the residual after it
    """
    family = shape.family
    normed = _norm(shape, hidden, weights, "attn_norm")
    attention = _attention(shape, normed, weights, interleaved, q8)
    predictor_input = hidden if family == "falcon" else hidden + attention
    if before_ffn is not None:
        before_ffn(predictor_input)
    normed = _norm(shape, predictor_input, weights, "ffn_norm")
    act = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[shape.activation]
    up = _linear(normed, weights, "ffn_up", q8)
    if family in ("llama", "bamboo"):
        gate = _linear(normed, weights, "ffn_gate", q8)
        product = act(gate) * (act(up) if family == "bamboo" else up)
    else:
        gate, product = up, act(up)
    computed = gate > 0
    if sparse_threshold is not None:
        predicted = _linear(torch.relu(_linear(predictor_input, weights, "fc1", q8)), weights, "fc2", q8)
        computed = predicted >= sparse_threshold
        product = torch.where(computed, product, 0)
    if active is not None:
        active.append(computed)
    down = _linear(product, weights, "ffn_down", q8)
    return hidden + attention + down


def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, q8: bool) -> torch.Tensor:
    x = _through_q8_0(x) if q8 else x
    return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _through_q8_0(x: torch.Tensor) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    return (torch.where(scale > 0, (blocks / scale).round(), 0) * scale).flatten(-2)


def _norm(shape: Any, x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    weight = weights[f"{name}.weight"]
    if shape.family in ("llama", "bamboo"):
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return torch.nn.functional.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], EPS)


def _attention(shape: Any, x: torch.Tensor, weights: dict[str, torch.Tensor], interleaved: bool, q8: bool) -> torch.Tensor:
    tokens = len(x)
    q = _linear(x, weights, "attn_q", q8).view(tokens, shape.num_heads, -1)
    k = _linear(x, weights, "attn_k", q8).view(tokens, shape.num_kv_heads, -1)
    v = _linear(x, weights, "attn_v", q8).view(tokens, shape.num_kv_heads, -1)
    if shape.family != "opt":
        q, k = _rotate(q, interleaved), _rotate(k, interleaved)
    group = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    )
    return _linear(out.transpose(0, 1).reshape(tokens, -1), weights, "attn_output", q8)


def _rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding with base 10000: [tokens, heads, head_size]."""
    tokens, _, size = x.shape
    frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(tokens)[:, None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def _open(path: Path) -> Any:
    """gguf's reader of a file of either kind: it knows no PWRI, so it is shown a private mapping with the magic replaced."""
    import gguf

    def memmap(path: Path, mode: str) -> np.memmap:
        content = original(path, mode=mode)
        content[:4] = np.frombuffer(b"GGUF", np.uint8)
        return content

    original = np.memmap
    with mock.patch.object(np, "memmap", memmap):
        return gguf.GGUFReader(path, "c")


class File:
    """A GGUF or PWRI file: entries, tensors dequantized to fp32, and the logits they give."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.magic = file.read(4)
        self.sparse = self.magic == b"PWRI"
        reader = _open(path)
        self.entries = {key: field.contents() for key, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        self.data = {tensor.name: tensor.data for tensor in reader.tensors}
        self.sizes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
        self.family = self.entries["general.architecture"]
        self.activation = self.entries["powerinfer.activation"]
        self.num_heads = self.entry("attention.head_count")
        self.num_kv_heads = self.entry("attention.head_count_kv")
        self.num_layers = self.entry("block_count")

    def entry(self, name: str) -> Any:
        return self.entries[f"{self.family}.{name}"]

    def tensor(self, name: str) -> torch.Tensor:
        import gguf

        values = gguf.dequantize(self.data[name], self.kinds[name]).reshape(self.sizes[name])
        return torch.from_numpy(values.copy()).float()

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Weights for forward_layer."""
        prefix = f"blk.{layer}."
        weights = {name.removeprefix(prefix): self.tensor(name) for name in self.data if name.startswith(prefix)}
        if "ffn_down_t.weight" in weights:
            weights["ffn_down.weight"] = weights.pop("ffn_down_t.weight").T
        if "ffn_down_t.bias" in weights:
            weights["ffn_down.bias"] = weights.pop("ffn_down_t.bias")
        if self.family == "falcon":
            size = self.entry("embedding_length") // self.num_heads
            rows = [self.num_heads * size, self.num_kv_heads * size, self.num_kv_heads * size]
            for part, weight in zip("qkv", weights.pop("attn_qkv.weight").split(rows), strict=True):
                weights[f"attn_{part}.weight"] = weight
            for kind in ("weight", "bias"):
                weights[f"ffn_norm.{kind}"] = weights[f"attn_norm.{kind}"]
                if f"attn_norm_2.{kind}" in weights:
                    weights[f"attn_norm.{kind}"] = weights[f"attn_norm_2.{kind}"]
        return weights

    @torch.no_grad()
    def logits(self, ids: list[int], sparse: bool | None = None, q8: bool = False) -> tuple[torch.Tensor, float]:
        """([tokens, vocab_size] fp32, share of neurons computed); sparse False computes a sparse file's every neuron."""
        sparse = self.sparse if sparse is None else sparse
        hidden = self.tensor("token_embd.weight")[ids]
        if self.family == "opt":
            hidden = hidden + self.tensor("position_embd.weight")[2 : 2 + len(ids)]
        active: list[torch.Tensor] = []
        for layer in range(self.num_layers):
            hidden = forward_layer(
                self,
                self.layer(layer),
                hidden,
                interleaved=self.family in ("llama", "bamboo"),
                sparse_threshold=self.entries["powerinfer.sparse_threshold"] if sparse else None,
                q8=q8,
                active=active,
            )
        top = {name: self.tensor(name) for name in self.data if name.startswith("output_norm")}
        output = "output.weight" if "output.weight" in self.data else "token_embd.weight"
        logits = _norm(self, hidden, top, "output_norm") @ self.tensor(output).T
        return logits, torch.stack(active).float().mean().item()
