"""What a predictor sees and what it must predict, taken from a model that reads text.

A predictor's input p is what the format says: the residual before the feed-forward's norm; for falcon, whose attention and
feed-forward run side by side, the layer's input. A neuron is active for a token if its value h, which the down projection
multiplies, is not exactly zero. Only p is stored: h follows from it by the layer's own norm and projections.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from .checkpoint import read_json
from .families import Model
from .text import LoadedModel

if TYPE_CHECKING:
    import numpy as np
    import torch

# left free on the disk beside what is written
SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class FeedForward:
    """The modules of one layer's feed-forward. Weights of projections are [rows of output, rows of input]."""

    norm: torch.nn.Module  # of p
    up: torch.nn.Module  # hidden_size -> intermediate_size
    down: torch.nn.Module  # intermediate_size -> hidden_size
    gate: torch.nn.Module | None  # as up; None for falcon and opt

    @property
    def deciding(self) -> torch.nn.Module:
        """The projection whose sign decides first: the gate where there is one."""
        return self.up if self.gate is None else self.gate

    def values(self, p: torch.Tensor) -> torch.Tensor:
        """h [tokens, intermediate_size] of p [tokens, hidden_size], in the model's type."""
        x = self.norm(p.to(self.up.weight.dtype))
        # Bamboo's up projection applies its ReLU itself (text.load_causal_lm)
        return self.up(x).relu() if self.gate is None else self.gate(x).relu() * self.up(x)


def require_relu(shape: Model, name: str, step: str) -> None:
    """Raises: PowerQuantUnsupportedError for a model whose activation is not ReLU"""
    if shape.activation != "relu":
        raise PowerQuantUnsupportedError(
            f"cannot {step} {name}: it is a {shape.activation.upper()} model, whose neurons are never exactly zero, so none "
            "may be skipped; make a ReLU model of it first with `powerquant relufy`"
        )


def feed_forwards(loaded: LoadedModel) -> list[FeedForward]:
    """By layer."""
    model, shape = loaded.model, loaded.source.shape
    match shape.family:
        case "llama" | "bamboo":
            layers = model.model.layers
            return [FeedForward(x.post_attention_layernorm, x.mlp.up_proj, x.mlp.down_proj, x.mlp.gate_proj) for x in layers]
        case "falcon":
            return [
                FeedForward(
                    x.ln_mlp if shape.two_norms else x.input_layernorm, x.mlp.dense_h_to_4h, x.mlp.dense_4h_to_h, None
                )
                for x in model.transformer.h
            ]
        case _:
            return [FeedForward(x.final_layer_norm, x.fc1, x.fc2, None) for x in model.model.decoder.layers]


@contextmanager
def watched(modules: Iterable[torch.nn.Module], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Meanwhile see(i, x) is called with the input x [tokens, size] of module i whenever it runs."""

    def hook(i: int) -> Callable:
        return lambda module, args: see(i, args[0].flatten(0, -2))

    handles = [module.register_forward_pre_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_windows(loaded: LoadedModel, windows: torch.Tensor, what: str, progress: bool, batch: int = 4) -> Iterator[int]:
    """Run the model over windows [count, length], a few at a time.

    Yields: how many windows have been read, after each batch
    """
    import torch
    from tqdm import tqdm

    limit = loaded.source.shape.context_length
    if windows.shape[1] > limit:
        raise PowerQuantConfigError(
            f"windows of {windows.shape[1]} tokens are longer than the model's context of {limit}; shorten them"
        )
    if int(windows.max()) >= loaded.source.shape.vocab_size:
        raise PowerQuantConfigError(
            f"the tokenizer gave token {int(windows.max())}, the model's vocabulary has {loaded.source.shape.vocab_size}"
        )
    bar = tqdm(total=windows.numel(), desc=what, unit="token", unit_scale=True, disable=not progress, **bar_options())
    with torch.inference_mode(), bar:
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            loaded.model(part.to(loaded.device), use_cache=False, logits_to_keep=1)
            bar.update(part.numel())
            yield start + len(part)


def bar_options() -> dict:
    """tqdm's: on a terminal often, else a line now and then."""
    return {"file": sys.stderr, "mininterval": 0.1 if sys.stderr.isatty() else 10}


class Inputs:
    """A folder with p of every layer and token: layer_{i}.npy, float16 [tokens, hidden_size], mapped into memory.

    It counts as whole once its inputs.json is there, which says what it was made of.
    """

    def __init__(self, folder: Path, shape: Model, tokens: int) -> None:
        self.folder, self.shape, self.tokens = folder, shape, tokens

    @property
    def file_bytes(self) -> int:
        return self.shape.num_layers * self.tokens * self.shape.hidden_size * 2

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.npy"

    def made_of(self, origin: str) -> bool:
        """Whether the folder is whole and was captured from `origin` (any text that tells one capture from another)."""
        marker = self.folder / "inputs.json"
        return marker.is_file() and read_json(marker).get("origin") == origin

    def layer(self, layer: int) -> np.ndarray:
        """float16 [tokens, hidden_size], read-only, not in memory until it is used."""
        import numpy as np

        return np.load(self._path(layer), mmap_mode="r")

    def capture(self, loaded: LoadedModel, windows: torch.Tensor, origin: str, progress: bool = True) -> None:
        """Write the folder anew; rows are the tokens of windows [count, length] in their order.

        Raises: PowerQuantError if the disk is too small; PowerQuantUnsupportedError if a value does not fit float16
        """
        import numpy as np

        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise PowerQuantError(f"cannot write {self.folder}: {error.strerror}") from error
        if self.file_bytes + SPARE_BYTES > free:
            raise PowerQuantError(
                f"{windows.numel()} tokens need {self.file_bytes / 1e9:.2f} GB in {self.folder} for {self.shape.num_layers} "
                f"layers, {free / 1e9:.2f} GB are free there; use fewer tokens or another disk"
            )
        size = (self.tokens, self.shape.hidden_size)
        files = []
        for layer in range(self.shape.num_layers):
            files.append(np.lib.format.open_memmap(self._path(layer), "w+", np.float16, size))
            try:
                # a mapping that runs out of disk kills the process, so its space is taken first
                with self._path(layer).open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self._path(layer).stat().st_size)
            except OSError as error:
                raise PowerQuantError(f"cannot write {self._path(layer)}: {error.strerror}") from error
        at = 0

        def see(layer: int, p: torch.Tensor) -> None:
            rows = p.half()
            if not rows.isfinite().all():
                raise PowerQuantUnsupportedError(
                    f"the residual of layer {layer} reaches {float(p.abs().max()):g}, which float16 cannot hold"
                )
            files[layer][at : at + len(rows)] = rows.cpu().numpy()

        with watched([x.norm for x in feed_forwards(loaded)], see):
            for done in read_windows(loaded, windows, "reading the texts", progress):
                at = done * windows.shape[1]
        for file in files:
            file.flush()
        (self.folder / "inputs.json").write_text(json.dumps({"origin": origin, "tokens": self.tokens}))


def fingerprint(loaded: LoadedModel, windows: torch.Tensor) -> str:
    """Changes when the weights or the text do: a digest of the windows and of evenly spaced entries of every parameter."""
    digest = hashlib.sha256(windows.numpy().tobytes())
    digest.update(loaded.source.shape.family.encode())
    for name, parameter in loaded.model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 997)].float().cpu()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]
