"""What `relufy` trains, and the file it is kept in: small changes that make a gated-SiLU checkpoint a ReLU one.

Each matrix W of each layer becomes W + B A with A [rank, columns] and B [rows, rank] (E. J. Hu et al., "LoRA", 2021,
arXiv:2106.09685), each norm's weight w becomes w (1 + d). A file keeps A and B as int8 with one fp32 scale a row, d in fp16.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ..errors import PowerQuantConfigError
from ..files import whole_file
from .checkpoint import Checkpoint
from .families import Model
from .llama import MATRICES, NORMS, PARTS, Weights

FORMAT = "vllm-powerquant relu deltas 1"
ATTENTION = ("q", "k", "v", "o")


@dataclass
class Deltas:
    """Changes of all layers.

    tensors, fp32: of a matrix `gate.a` [num_layers, rank, columns] and `gate.b` [num_layers, rows, rank] (a matrix may be
    left out); `attn_norm`, `ffn_norm` [num_layers, hidden_size] and `norm` [hidden_size]
    """

    tensors: dict[str, torch.Tensor]

    @classmethod
    def initial(cls, weights: Weights, rank: int, attention_rank: int, generator: torch.Generator) -> Self:
        """That change nothing: B is zero, A normal with variance 1 / columns. A rank of 0 leaves a matrix alone."""
        device = weights.embedding.device
        tensors = {}
        for name in MATRICES:
            layers, rows, columns = weights.stacked[name].shape
            n = min(attention_rank if name in ATTENTION else rank, rows, columns)
            if n:
                a = torch.randn(layers, n, columns, generator=generator) * columns**-0.5
                tensors[f"{name}.a"] = a.to(device)
                tensors[f"{name}.b"] = torch.zeros(layers, rows, n, device=device)
        for name in NORMS:
            tensors[name] = torch.zeros_like(weights.stacked[name])
        tensors["norm"] = torch.zeros_like(weights.norm)
        return cls(tensors)

    def applied(self, weights: Weights, dtype: torch.dtype) -> Weights:
        """The changed model, matrices in dtype; the embedding and the output matrix are the original's."""
        stacked = {name: self._changed(name, part, dtype) for name, part in weights.stacked.items()}
        embedding = weights.embedding.to(dtype)
        head = embedding if weights.head is weights.embedding else weights.head.to(dtype)
        return Weights(stacked, embedding, self._changed("norm", weights.norm, dtype), head)

    def _changed(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype, layer: int | slice = slice(None)
    ) -> torch.Tensor:
        """A part of all layers, or of one."""
        if name in (*NORMS, "norm"):
            return weight * (1 + (self.tensors[name] if name == "norm" else self.tensors[name][layer]))
        if f"{name}.a" not in self.tensors:
            return weight.to(dtype)
        return (weight.float() + self.tensors[f"{name}.b"][layer] @ self.tensors[f"{name}.a"][layer]).to(dtype)

    def merged(self, source: str, weight: torch.Tensor) -> torch.Tensor:
        """One tensor of the checkpoint by its Hugging Face name, changed, in its own type."""
        if source == "model.norm.weight":
            return self._changed("norm", weight.float(), torch.float32).to(weight.dtype)
        for name, hf_name in PARTS.items():
            if source.startswith("model.layers.") and source.endswith(f".{hf_name}.weight"):
                layer = int(source.split(".")[2])
                return self._changed(name, weight.float(), torch.float32, layer).to(weight.dtype)
        return weight

    def rounded(self) -> Self:
        """As the file has them."""
        return type(self)({name: tensor.to(self.tensors[name].device) for name, tensor in _decode(_encode(self)).items()})

    def to(self, device: torch.device) -> Self:
        return type(self)({name: tensor.to(device) for name, tensor in self.tensors.items()})


def _encode(deltas: Deltas) -> dict[str, torch.Tensor]:
    """What the file holds."""
    stored = {}
    for name, tensor in deltas.tensors.items():
        tensor = tensor.detach().cpu().float()
        if not name.endswith((".a", ".b")):
            stored[name] = tensor.to(torch.float16)
            continue
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        stored[name] = (tensor / scale.clamp(min=1e-30)).round().to(torch.int8)
        stored[f"{name}.scale"] = scale
    return stored


def _decode(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in stored.items():
        if not name.endswith(".scale"):
            scale = stored.get(f"{name}.scale")
            tensors[name] = tensor.float() * scale if scale is not None else tensor.float()
    return tensors


def fingerprint(source: Checkpoint, model: Model) -> str:
    """16 hex digits of a checkpoint's shape and of a part of each of its tensors: rounding or training changes them."""
    from .families import weights

    digest = hashlib.sha256(repr((model.family, model.num_layers, model.hidden_size, model.rope_theta)).encode())
    for weight in weights(model, sparse=False, with_output=False):
        part = source.part(weight, 4)
        digest.update(f"{weight.source} {tuple(weight.shape)} {part.dtype}".encode())
        digest.update(part.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_deltas(path: Path, deltas: Deltas, original: str, recipe: dict[str, Any]) -> None:
    """Args: original: the fingerprint of what they change. Raises: PowerQuantConfigError if it can't be written"""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"original": original, "recipe": recipe}
    try:
        with whole_file(path) as unfinished:
            save_file(_encode(deltas), unfinished, {"format": FORMAT, "about": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise PowerQuantConfigError(f"cannot write {path}: {error}") from None


@dataclass(frozen=True)
class DeltasFile:
    deltas: Deltas
    original: str  # fingerprint of the checkpoint that they were trained for
    recipe: dict[str, Any]


def load_deltas(path: Path) -> DeltasFile:
    """Raises: PowerQuantConfigError if the file is missing or none that save_deltas wrote"""
    from safetensors import SafetensorError, safe_open

    remedy = "give a deltas.safetensors that `powerquant relufy` wrote"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise PowerQuantConfigError(f"{path} can't be read: {error}; {remedy}") from None
    if metadata.get("format") != FORMAT:
        raise PowerQuantConfigError(f"{path} has no deltas (format {metadata.get('format')!r}, not {FORMAT!r}); {remedy}")
    try:
        about = json.loads(metadata["about"])
        return DeltasFile(Deltas(_decode(stored)), str(about["original"]), dict(about["recipe"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PowerQuantConfigError(f"{path} does not say what it was made of ({error!r}); {remedy}") from None


def check_fit(file: DeltasFile, path: Path, original: str, weights: Weights) -> None:
    """Raises: PowerQuantConfigError if the deltas were trained for another checkpoint, or have other shapes"""
    if file.original != original:
        raise PowerQuantConfigError(
            f"{path} was made for another model (fingerprint {file.original}, this one's is {original}); apply deltas to "
            "the checkpoint they were trained on, or train some for this one with --sampled or --text"
        )
    for name, tensor in file.deltas.tensors.items():
        part, _, side = name.partition(".")
        whole = weights.norm if part == "norm" else weights.stacked.get(part)
        expected = None
        if whole is not None:
            layers, *size = whole.shape if part != "norm" else (0, *whole.shape)
            rank = tensor.shape[-1 if side == "b" else 1] if side else 0
            expected = {"": tuple(whole.shape), "a": (layers, rank, size[-1]), "b": (layers, size[0], rank)}.get(side)
        if tuple(tensor.shape) != expected or not tensor.isfinite().all():
            raise PowerQuantConfigError(f"{path} is damaged: {name} of shape {tuple(tensor.shape)} does not fit the model")
