"""Hugging Face checkpoint, with or without predictors, to PowerInfer's file format.

A sparse file (magic PWRI) is a GGUF whose feed-forwards are stored by neuron and come with a predictor of which neurons
are active; without predictors the same weights become a plain GGUF. Types: f16 and q4_0 are what every reader of the
format knows; f32 is for comparisons with this project's engine, others misread it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from ..files import whole_file
from .checkpoint import Checkpoint, Predictors
from .families import Model, Weight, read_config, weights
from .header import file_format
from .vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

SPARSE_MAGIC = b"PWRI"
DTYPES = ("f16", "q4_0", "f32")
# general.file_type by dtype
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2}
OUTPUT_DTYPES = (*DTYPES, "q8_0", "q6_k")


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
    if output.is_file() and output.stat().st_size and file_format(output) is None:
        raise PowerQuantConfigError(f"{output} is there and is no model file; give another name, or remove it first")
    require_packages()
    folder = Path(checkpoint)
    source = Checkpoint(folder)
    model = read_config(source.config, family)
    if output_dtype is None:
        output_dtype = dtype if dtype != "q4_0" else "q6_k" if model.hidden_size % 256 == 0 else "q8_0"
    sparse = predictor is not None and not dense
    if threshold is not None and not sparse:
        raise PowerQuantConfigError(
            f"a threshold, got {threshold}, is for a sparse file: give the predictors that it belongs to, or leave it out "
            "for a plain GGUF, which computes every neuron"
        )
    if sparse and model.activation != "relu":
        raise PowerQuantUnsupportedError(
            f"no sparse file of a {model.activation.upper()} model: its neurons are never exactly zero, so none may be "
            "skipped; make it a ReLU model first (`powerquant relufy`), or leave out the predictor for a plain GGUF"
        )
    predictors = Predictors(Path(predictor), model) if sparse else None
    planned = weights(model, sparse, with_output=sparse)
    source.check(planned)
    tensors = _plan(source, planned, predictors, dtype, predictor_dtype or dtype, output_dtype)
    for tensor in tensors:
        tensor.check()
    if sparse and model.intermediate_size % 32:
        raise PowerQuantUnsupportedError(
            f"no sparse file with an intermediate size that is no multiple of 32, got {model.intermediate_size}"
        )
    vocabulary = read_vocabulary(folder, source.config)
    vocabulary.pad(model.vocab_size)

    entries = {"general.name": folder.resolve().name, "general.file_type": FILE_TYPES[dtype], **model.metadata()}
    if predictors is not None:
        threshold = _checked_threshold(predictors.threshold if threshold is None else threshold)
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


def _plan(
    source: Checkpoint,
    planned: list[Weight],
    predictors: Predictors | None,
    dtype: str,
    predictor_dtype: str,
    output_dtype: str,
) -> list[_Tensor]:
    """The tensors of the file in its order, each with its type."""
    from gguf import GGMLQuantizationType

    tensors = []
    for weight in planned:
        if len(weight.shape) == 1:
            kind = "f32"
        elif weight.name == "output.weight":
            kind = output_dtype
        elif weight.name == "position_embd.weight" and dtype == "q4_0":
            kind = "f16"
        else:
            kind = dtype
        kind = GGMLQuantizationType[kind.upper()]
        tensors.append(_Tensor(weight.name, weight.file_shape, kind, partial(source.load, weight)))
    if predictors is not None:
        kind = GGMLQuantizationType[predictor_dtype.upper()]
        for layer in range(len(predictors.ranks)):
            for part, shape in predictors.shapes(layer).items():
                tensors.append(_Tensor(f"blk.{layer}.{part}.weight", shape, kind, partial(predictors.load, layer, part)))
    return tensors


# (2 - 2^-23) * 2^127
_LARGEST_FLOAT32 = 3.4028234663852886e38


def _checked_threshold(value: float) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST_FLOAT32:
        raise PowerQuantConfigError(f"threshold must be a finite 32-bit number, got {value!r}")
    return float(value)


def require_packages() -> None:
    """Raises: PowerQuantError, with what to install, if a package that conversion needs is missing"""
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
    import gguf
    import numpy as np

    from .blocks import encode

    try:
        with whole_file(output) as unfinished:
            writer = gguf.GGUFWriter(unfinished, model.family)
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
                with unfinished.open("r+b") as file:
                    file.write(magic)
    except OSError as error:
        raise PowerQuantError(f"cannot write {output}: {error.strerror or error}") from error


def _progress(tensors: list[_Tensor], shown: bool) -> Iterator[_Tensor]:
    from tqdm import tqdm

    interval_s = 0.1 if sys.stderr.isatty() else 10
    return iter(
        tqdm(tensors, "converting the model", unit="tensor", file=sys.stderr, mininterval=interval_s, disable=not shown)
    )
