"""Reading the folders that a conversion starts from: a checkpoint's weights, and predictors, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError
from .families import Model, Weight, planned_name

if TYPE_CHECKING:
    import torch

# found in old checkpoints; computed, not learned
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class Checkpoint:
    """A folder of safetensors, whole or in shards, read one tensor at a time.

    Raises: PowerQuantConfigError if it is no such folder or a file is damaged
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        if not (folder / "config.json").is_file():
            raise PowerQuantConfigError(f"{folder} is no checkpoint folder: it has no config.json")
        self.config = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise PowerQuantConfigError(f"{index} must name a file for each tensor in weight_map")
            names = sorted(set(shards.values()))
        else:
            names = [path.name for path in sorted(folder.glob("*.safetensors"))]
        if not names:
            raise PowerQuantConfigError(
                f"{folder} has no *.safetensors; weights in pytorch_model.bin must be saved as safetensors first"
            )
        # by planned_name: the open file, and the name in it
        self._files: dict[str, tuple[Any, str]] = {}
        self.shards: dict[str, list[str]] = {}  # tensors by file, under the file's own names
        for name in names:
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise PowerQuantConfigError(f"{folder / name} can't be read: {error}") from error
            self.shards[name] = list(file.keys())
            for own_name in self.shards[name]:
                known = self._files.setdefault(planned_name(own_name), (file, own_name))[1]
                if known != own_name:
                    raise PowerQuantConfigError(
                        f"{folder} has {known} and {own_name}, which are the same tensor: remove one"
                    )

    def check(self, planned: list[Weight]) -> None:
        """Every tensor is there with its shape, and none is left over."""
        missing = [weight.source for weight in planned if weight.source not in self._files]
        if missing:
            raise PowerQuantConfigError(f"{self.folder} lacks {len(missing)} tensors, the first is {missing[0]}")
        for weight in planned:
            file, name = self._files[weight.source]
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            if shape != weight.shape:
                raise PowerQuantConfigError(
                    f"{name} must have shape {weight.shape} by config.json, got {shape} in {self.folder}"
                )
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise PowerQuantUnsupportedError(f"no checkpoint with weights in {part.get_dtype()} ({name})")
        used = {weight.source for weight in planned} | {"lm_head.weight"}
        extra = [
            name for known, (_, name) in self._files.items() if known not in used and not name.endswith(IGNORED_SUFFIXES)
        ]
        if extra:
            raise PowerQuantUnsupportedError(
                f"no checkpoint with tensors that the format has no place for: {len(extra)}, the first is {extra[0]}"
            )

    def load(self, weight: Weight) -> torch.Tensor:
        from safetensors import SafetensorError

        file, name = self._files[weight.source]
        try:
            tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise PowerQuantConfigError(f"{self.folder}: {name} can't be read: {error}") from error
        return weight.reorder(tensor) if weight.reorder else tensor

    def load_shard(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a file, as they are."""
        found = {}
        for own_name in self.shards[name]:
            file, _ = self._files[planned_name(own_name)]
            found[own_name] = file.get_tensor(own_name)
        return found

    def part(self, weight: Weight, rows: int) -> torch.Tensor:
        """The first rows of a tensor as the checkpoint has it, without reading the rest."""
        file, name = self._files[weight.source]
        return file.get_slice(name)[:rows]


class Predictors:
    """A folder with the predictor of each layer, read when it is asked for.

    Raises: PowerQuantConfigError if a layer's is missing, damaged, or has another shape
    """

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder, self.model = folder, model
        if not folder.is_dir():
            raise PowerQuantConfigError(f"predictor must be a folder of model_0.pt, model_1.pt, ..., got {folder}")
        self.paths = [self._path(layer) for layer in range(model.num_layers)]
        self.ranks = [self._check(layer) for layer in range(model.num_layers)]
        config = folder / "config.json"
        self.threshold = read_json(config).get("sparse_threshold", 0.0) if config.is_file() else 0.0

    def _path(self, layer: int) -> Path:
        for suffix in (".safetensors", ".pt"):
            path = self.folder / f"model_{layer}{suffix}"
            if path.is_file():
                return path
        raise PowerQuantConfigError(
            f"{self.folder} lacks model_{layer}.safetensors (or .pt), the model has {self.model.num_layers} layers"
        )

    def _check(self, layer: int) -> int:
        parts, path = self._read(layer), self.paths[layer]
        fc1, fc2 = parts["fc1"], parts["fc2"]
        if fc1.dim() != 2 or fc1.shape[0] == 0 or fc1.shape[1] != self.model.hidden_size:
            raise PowerQuantConfigError(
                f"fc1.weight of {path} must be [rank, {self.model.hidden_size}], got {list(fc1.shape)}"
            )
        want = (self.model.intermediate_size, fc1.shape[0])
        if tuple(fc2.shape) != want:
            raise PowerQuantConfigError(f"fc2.weight of {path} must be {list(want)}, got {list(fc2.shape)}")
        return fc1.shape[0]

    def shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        rank = self.ranks[layer]
        return {"fc1": (rank, self.model.hidden_size), "fc2": (self.model.intermediate_size, rank)}

    def load(self, layer: int, part: str) -> torch.Tensor:
        """fc1 or fc2 of a layer, in the shape that shapes() says."""
        return self._read(layer)[part]

    def _read(self, layer: int) -> dict[str, torch.Tensor]:
        import pickle

        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.paths[layer]
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PowerQuantConfigError(f"{path} can't be read: {reason}") from error
        try:
            parts = {part: state[f"{part}.weight"] for part in ("fc1", "fc2")}
        except (KeyError, TypeError, IndexError) as error:
            raise PowerQuantConfigError(f"{path} must hold fc1.weight and fc2.weight") from error
        extra = sorted(set(state) - {"fc1.weight", "fc2.weight"})
        if extra:
            raise PowerQuantUnsupportedError(f"no predictor with more than fc1.weight and fc2.weight, {path} has {extra[0]}")
        if not all(isinstance(part, torch.Tensor) and part.is_floating_point() for part in parts.values()):
            raise PowerQuantConfigError(f"{path}: fc1.weight and fc2.weight must be tensors of floating-point numbers")
        return parts


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PowerQuantConfigError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise PowerQuantConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
