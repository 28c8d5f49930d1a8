"""Hugging Face checkpoint, with or without predictors, to PowerInfer's file format.

A sparse file (magic PWRI) is a GGUF whose feed-forwards are stored by neuron and come with a predictor of which neurons
are active; without predictors the same weights become a plain GGUF. Types: f16 and q4_0 are what every reader of the
format knows; f32 is for comparisons with this project's engine, others misread it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from .families import Model, Weight, read_config, weights
from .vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

SPARSE_MAGIC = b"PWRI"
DTYPES = ("f16", "q4_0", "f32")
# general.file_type by dtype
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2}
OUTPUT_DTYPES = (*DTYPES, "q8_0", "q6_k")
# found in old checkpoints; computed, not learned
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Converted:
    """What was written."""

    output: str
    format: str  # PWRI or GGUF
    family: str
    activation: str
    dtype: str
    output_dtype: str | None  # of output.weight; None where the token embedding serves
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    predictor_ranks: list[int]  # by layer; empty in a plain GGUF
    threshold: float | None  # a neuron is computed if its predicted value is at least this
    tensors: int
    file_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str = "f16",
    predictor: str | Path | None = None,
    threshold: float | None = None,
    dense: bool = False,
    predictor_dtype: str | None = None,
    output_dtype: str | None = None,
    family: str | None = None,
    progress: bool = True,
) -> Converted:
    """Write `output`, one tensor in memory at a time; it appears under its name only when it is whole.

    Args:
        checkpoint: folder with config.json, safetensors and a tokenizer; LlamaForCausalLM, MistralForCausalLM,
            BambooForCausalLM, FalconForCausalLM or OPTForCausalLM
        predictor: folder of model_{layer}.safetensors or model_{layer}.pt with fc1.weight [rank, hidden_size] and
            fc2.weight [intermediate_size, rank]; None, or dense=True, writes a plain GGUF
        threshold: what a predicted value must reach; default: sparse_threshold of the predictor folder's config.json,
            else 0. PowerInfer reads it from the file
        dtype: of matrices; vectors are f32, and so small a table as OPT's positions is never below f16
        predictor_dtype: default: dtype
        output_dtype: of the output matrix (output.weight), also q8_0 or q6_k; default: dtype, but for q4_0 q6_k where
            hidden_size is a multiple of 256, else q8_0
        family: "bamboo" for Bamboo's weights under another class's name

    Raises:
        PowerQuantConfigError, PowerQuantUnsupportedError: the checkpoint or the predictor does not fit the format;
            nothing is written
        PowerQuantError: a package is missing, or the file can't be written
    """
    start = time.monotonic()
    _check_dtypes(dtype, predictor_dtype, output_dtype)
    output = Path(output).absolute()
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise PowerQuantConfigError(f"cannot write {output}: give a file in an existing folder that you may write to")
    _require_packages()
    import gguf

    folder = Path(checkpoint)
    source = _Checkpoint(folder)
    model = read_config(source.config, family)
    sparse = predictor is not None and not dense
    if sparse and model.activation != "relu":
        raise PowerQuantUnsupportedError(
            f"no sparse file of a {model.activation.upper()} model: its neurons are never exactly zero, so none may be "
            "skipped; make it a ReLU model first (fine-tune with ReLU), or leave out the predictor for a plain GGUF"
        )
    predictors = _Predictors(Path(predictor), model) if sparse else None
    planned = weights(model, sparse, with_output=sparse)
    source.check(planned)
    kind = gguf.GGMLQuantizationType
    if output_dtype is None:
        output_dtype = dtype if dtype != "q4_0" else "q6_k" if model.hidden_size % 256 == 0 else "q8_0"

    tensors: list[_Tensor] = []
    for weight in planned:
        if len(weight.shape) == 1:
            name = "f32"
        elif weight.name == "output.weight":
            name = output_dtype
        elif weight.name == "position_embd.weight" and dtype == "q4_0":
            name = "f16"
        else:
            name = dtype
        tensors.append(
            _Tensor(weight.name, weight.file_shape, kind[name.upper()], lambda weight=weight: source.load(weight))
        )
    if predictors is not None:
        name = kind[(predictor_dtype or dtype).upper()]
        for layer, rank in enumerate(predictors.ranks):
            shapes = {"fc1": (rank, model.hidden_size), "fc2": (model.intermediate_size, rank)}
            for part, shape in shapes.items():
                load = lambda layer=layer, part=part: predictors.load(layer)[part]  # noqa: E731
                tensors.append(_Tensor(f"blk.{layer}.{part}.weight", shape, name, load))
        threshold = _checked_threshold(predictors.threshold if threshold is None else threshold)
    for tensor in tensors:
        tensor.check()
    if sparse and model.intermediate_size % 32:
        raise PowerQuantUnsupportedError(
            f"no sparse file with an intermediate size that is no multiple of 32, got {model.intermediate_size}"
        )
    vocabulary = read_vocabulary(folder, source.config)
    vocabulary.pad(model.vocab_size)

    entries = {"general.name": folder.resolve().name, "general.file_type": FILE_TYPES[dtype], **model.metadata()}
    if sparse:
        entries["powerinfer.sparse_threshold"] = threshold
    _write(output, model, entries, vocabulary, tensors, SPARSE_MAGIC if sparse else None, progress)
    return Converted(
        output=str(output),
        format="PWRI" if sparse else "GGUF",
        family=model.family,
        activation=model.activation,
        dtype=dtype,
        output_dtype=output_dtype if any(tensor.name == "output.weight" for tensor in tensors) else None,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        predictor_ranks=predictors.ranks if predictors is not None else [],
        threshold=threshold if sparse else None,
        tensors=len(tensors),
        file_bytes=output.stat().st_size,
        seconds=round(time.monotonic() - start, 2),
    )


def _check_dtypes(dtype: str, predictor_dtype: str | None, output_dtype: str | None) -> None:
    for name, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("predictor_dtype", predictor_dtype, (None, *DTYPES)),
        ("output_dtype", output_dtype, (None, *OUTPUT_DTYPES)),
    ):
        if value not in allowed:
            raise PowerQuantConfigError(f"{name} must be one of {', '.join(filter(None, allowed))}, got {value!r}")


def _checked_threshold(value: float) -> float:
    """An infinite one is fine: every neuron is computed, or none."""
    if type(value) not in (int, float) or value != value:
        raise PowerQuantConfigError(f"threshold must be a number, got {value!r}")
    return float(value)


def _require_packages() -> None:
    try:
        import gguf  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise PowerQuantError(f"{error.name} is not installed; run: pip install 'vllm-powerquant[sparse]'") from error


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; its weights are read when it is written."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first
    kind: GGMLQuantizationType
    load: Callable[[], torch.Tensor]

    def check(self) -> None:
        from gguf import GGML_QUANT_SIZES

        block, _ = GGML_QUANT_SIZES[self.kind]
        if self.shape[-1] % block:
            raise PowerQuantUnsupportedError(
                f"no {self.kind.name.lower()} for {self.name} with rows of {self.shape[-1]}, it packs {block} values at a "
                "time; use type f16 (or predictor type f16, if it is a predictor's)"
            )

    @property
    def file_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        elements = 1
        for size in self.shape:
            elements *= size
        return elements // block * block_bytes


def _write(
    output: Path,
    model: Model,
    entries: dict[str, int | float | str],
    vocabulary: Vocabulary,
    tensors: list[_Tensor],
    magic: bytes | None,
    progress: bool,
) -> None:
    """The whole file under another name beside `output`, then renamed."""
    import gguf
    import numpy as np

    from .blocks import encode

    partial = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
        os.close(descriptor)
        partial = Path(name)
        writer = gguf.GGUFWriter(partial, model.family)
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in entries.items():
            add[type(value)](key, value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.write(writer)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.file_bytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in _progress(tensors, progress):
            writer.write_tensor_data(encode(tensor.load(), tensor.kind, tensor.name))
        writer.close()
        if magic is not None:
            with partial.open("r+b") as file:
                file.write(magic)
        # mkstemp makes it readable by its owner alone
        partial.chmod(0o644)
        os.replace(partial, output)
    except OSError as error:
        raise PowerQuantError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _progress(tensors: list[_Tensor], shown: bool) -> Iterator[_Tensor]:
    from tqdm import tqdm

    interval_s = 0.1 if sys.stderr.isatty() else 10
    return iter(
        tqdm(tensors, "converting the model", unit="tensor", file=sys.stderr, mininterval=interval_s, disable=not shown)
    )


class _Checkpoint:
    """A folder of safetensors, whole or in shards, read one tensor at a time.

    Raises: PowerQuantConfigError if it is no such folder or a file is damaged
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        if not (folder / "config.json").is_file():
            raise PowerQuantConfigError(f"{folder} is no checkpoint folder: it has no config.json")
        self.config = _read_json_object(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = _read_json_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise PowerQuantConfigError(f"{index} must name a file for each tensor in weight_map")
            names = sorted(set(shards.values()))
        else:
            names = [path.name for path in sorted(folder.glob("*.safetensors"))]
        if not names:
            raise PowerQuantConfigError(
                f"{folder} has no *.safetensors; weights in pytorch_model.bin must be saved as safetensors first"
            )
        self._files: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise PowerQuantConfigError(f"{folder / name} can't be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def check(self, planned: list[Weight]) -> None:
        """Every tensor is there with its shape, and none is left over."""
        missing = [weight.source for weight in planned if weight.source not in self._files]
        if missing:
            raise PowerQuantConfigError(f"{self.folder} lacks {len(missing)} tensors, the first is {missing[0]}")
        for weight in planned:
            part = self._files[weight.source].get_slice(weight.source)
            shape = tuple(part.get_shape())
            if shape != weight.shape:
                raise PowerQuantConfigError(
                    f"{weight.source} must have shape {weight.shape} by config.json, got {shape} in {self.folder}"
                )
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise PowerQuantUnsupportedError(f"no checkpoint with weights in {part.get_dtype()} ({weight.source})")
        used = {weight.source for weight in planned} | {"lm_head.weight"}
        extra = [name for name in self._files if name not in used and not name.endswith(IGNORED_SUFFIXES)]
        if extra:
            raise PowerQuantUnsupportedError(
                f"no checkpoint with tensors that the format has no place for: {len(extra)}, the first is {extra[0]}"
            )

    def load(self, weight: Weight) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            tensor = self._files[weight.source].get_tensor(weight.source)
        except SafetensorError as error:
            raise PowerQuantConfigError(f"{self.folder}: {weight.source} can't be read: {error}") from error
        return weight.reorder(tensor) if weight.reorder else tensor


class _Predictors:
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
        self.threshold = _read_json_object(config).get("sparse_threshold", 0.0) if config.is_file() else 0.0

    def _path(self, layer: int) -> Path:
        for suffix in (".safetensors", ".pt"):
            path = self.folder / f"model_{layer}{suffix}"
            if path.is_file():
                return path
        raise PowerQuantConfigError(
            f"{self.folder} lacks model_{layer}.safetensors (or .pt), the model has {self.model.num_layers} layers"
        )

    def _check(self, layer: int) -> int:
        parts, path = self.load(layer), self.paths[layer]
        fc1, fc2 = parts["fc1"], parts["fc2"]
        if fc1.dim() != 2 or fc1.shape[0] == 0 or fc1.shape[1] != self.model.hidden_size:
            raise PowerQuantConfigError(
                f"fc1.weight of {path} must be [rank, {self.model.hidden_size}], got {list(fc1.shape)}"
            )
        want = (self.model.intermediate_size, fc1.shape[0])
        if tuple(fc2.shape) != want:
            raise PowerQuantConfigError(f"fc2.weight of {path} must be {list(want)}, got {list(fc2.shape)}")
        return fc1.shape[0]

    def load(self, layer: int) -> dict[str, torch.Tensor]:
        """fc1 [rank, hidden_size] and fc2 [intermediate_size, rank] of a layer."""
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


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PowerQuantConfigError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise PowerQuantConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
