"""Which neurons a GPU of limited memory should hold: `powerquant split` plans it from a profile.

Hot neurons are chosen greedily: each layer's are sorted by how often they were active, cut into groups, and the groups of
all layers taken by activations per byte until the budget is full. With whole groups of one size nothing does better, because
activations counted on the same tokens simply add up.

The plan is a gpuidx file, as PowerInfer reads it: magic PWRI, architecture generic.gpu_index, and for layer i, at positions
2i and 2i + 1, blk.i.gpu_idx int32 [intermediate_size] (1: on the GPU) and blk.i.gpu_bucket int32 [k] (the neurons on the GPU
in rising order). The format takes any k. Groups are of 256 neurons, what PowerInfer's own solver has always given its
kernels, or of the largest power of two below that divides the layer.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from ..files import whole_file
from .convert import SPARSE_MAGIC, require_packages
from .header import PLAN, Header, Tensor, read_header, read_tensors
from .profile import read_counts

if TYPE_CHECKING:
    import numpy as np

GROUP = 256
_INT32 = 26  # GGML's number
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Split:
    """A gpuidx file's content."""

    capacity: int  # bytes it was made for
    hot: list[np.ndarray]  # by layer: int32 [k], rising
    intermediate_sizes: list[int]  # by layer


@dataclass(frozen=True)
class Planned:
    """What was written. Lists are by layer."""

    output: str
    budget: int  # bytes
    used: int  # bytes
    total: int  # bytes that all neurons take
    group: int  # neurons
    neuron_bytes: list[int]
    hot: list[int]  # neurons
    hot_share: float  # of all neurons
    covered: float  # share of all activations that hot neurons make up

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_bytes(text: str) -> int:
    """ "1500000", "2GiB", "1.5 GB". Raises: PowerQuantConfigError"""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise PowerQuantConfigError(f"a budget is a number of bytes, or one with KiB, MiB, GiB, KB, MB or GB, got {text!r}")
    value = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if value >= 1 << 63:
        raise PowerQuantConfigError(f"a budget must be below 2^63 bytes, got {text!r}")
    return value


def split(model: str | Path, profile: str | Path, budget: int, output: str | Path) -> Planned:
    """Plan for a sparse file and write it to `output`.

    Args:
        model: the sparse file (PWRI); its tensors' types say what a neuron takes: its rows of gate, up and down
        profile: folder that `powerquant profile` wrote
        budget: bytes for neurons, of one group or more; what else lies on the GPU (attention, predictors, cache) is no part
            of it

    Raises: PowerQuantUnsupportedError for a file that is not sparse; PowerQuantConfigError for a damaged file, a profile of
        another shape, a bad budget or output; PowerQuantError if it can't be written
    """
    require_packages()
    import numpy as np

    model, output = Path(model), Path(output).absolute()
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise PowerQuantConfigError(f"cannot write {output}: give a file in an existing folder that you may write to")
    if output.is_file() and output.stat().st_size and not _is_plan(output):
        raise PowerQuantConfigError(f"{output} is there and is no gpuidx file; give another name, or remove it first")
    size, neuron_bytes = _neurons(model)
    counts = read_counts(profile, len(neuron_bytes), size).numpy()
    group = GROUP
    while size % group:
        group //= 2
    if budget < (smallest := group * min(neuron_bytes)):
        raise PowerQuantConfigError(
            f"budget must hold a group of {group} neurons, which takes {smallest} bytes in {model}, got {budget}; give "
            f"{smallest} or more"
        )
    order = [np.argsort(-row, kind="stable") for row in counts]
    groups = [
        (-int(counts[i][order[i][j : j + group]].sum()) / neuron_bytes[i], i, j)
        for i in range(len(counts))
        for j in range(0, size, group)
    ]
    taken, used = [0] * len(counts), 0
    for _, i, j in sorted(groups):
        cost = group * neuron_bytes[i]
        # groups of a layer cost the same, so once one does not fit none behind it does
        if taken[i] == j and used + cost <= budget:
            taken[i], used = j + group, used + cost
    hot = [np.sort(order[i][:k]).astype(np.int32) for i, k in enumerate(taken)]
    write_split(output, Split(budget, hot, [size] * len(hot)))
    everything = int(counts.sum())
    covered = sum(int(row[ids].sum()) for row, ids in zip(counts, hot, strict=True))
    return Planned(
        output=str(output),
        budget=budget,
        used=used,
        total=size * sum(neuron_bytes),
        group=group,
        neuron_bytes=neuron_bytes,
        hot=taken,
        hot_share=round(sum(taken) / (size * len(counts)), 5),
        covered=round(covered / everything, 5) if everything else 0.0,
    )


def _is_plan(path: Path) -> bool:
    try:
        return read_header(path).architecture == PLAN
    except PowerQuantConfigError:
        return False


def _neurons(path: Path) -> tuple[int, list[int]]:
    """Neurons of a layer, and what one takes in bytes, by layer."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header, tensors = read_tensors(path)
    if header.format != "PWRI" or header.architecture == PLAN:
        raise PowerQuantUnsupportedError(
            f"{path} is no sparse model (PWRI), so its neurons can't be split; make one with "
            "`powerquant convert MODEL --predictor DIR -o FILE`"
        )
    by_name = {tensor.name: tensor for tensor in tensors}
    layers = header.entries.get(f"{header.architecture}.block_count")
    size = header.entries.get(f"{header.architecture}.feed_forward_length")
    if not isinstance(layers, int) or not isinstance(size, int) or not 0 < layers <= len(tensors) or size < 1:
        raise PowerQuantConfigError(f"{path} is damaged: {layers!r} layers of {size!r} neurons")
    found = []
    for layer in range(layers):
        names = [f"blk.{layer}.{part}.weight" for part in ("ffn_up", "ffn_gate", "ffn_down_t")]
        parts = [by_name[name] for name in names if name in by_name]
        if names[0] not in by_name or names[2] not in by_name or any(part.shape[:1] != (size,) for part in parts):
            raise PowerQuantConfigError(f"{path} is damaged: layer {layer} lacks {names[0]} or {names[2]} of {size} rows")
        total = 0
        for part in parts:
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(part.kind)]
            except (ValueError, KeyError):
                raise PowerQuantConfigError(f"{path} is damaged: {part.name} is of unknown type {part.kind}") from None
            total += part.shape[-1] // block * block_bytes
        found.append(total)
    return size, found


def write_split(path: Path, plan: Split) -> None:
    """Raises: PowerQuantError if it can't be written"""
    import gguf
    import numpy as np

    try:
        with whole_file(path) as unfinished:
            writer = gguf.GGUFWriter(unfinished, PLAN)
            writer.add_block_count(len(plan.hot))
            writer.add_uint64("split.vram_capacity", plan.capacity)
            # by position, so in the layers' numeric order
            for layer, (ids, size) in enumerate(zip(plan.hot, plan.intermediate_sizes, strict=True)):
                on_gpu = np.zeros(size, np.int32)
                on_gpu[ids] = 1
                writer.add_tensor(f"blk.{layer}.gpu_idx", on_gpu)
                writer.add_tensor(f"blk.{layer}.gpu_bucket", np.asarray(ids, np.int32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with unfinished.open("r+b") as file:
                file.write(SPARSE_MAGIC)
    except OSError as error:
        raise PowerQuantError(f"cannot write {path}: {error.strerror or error}") from error


def read_split(path: str | Path) -> Split:
    """Raises: PowerQuantConfigError for a file that can't be read, is no gpuidx file or contradicts itself"""
    import numpy as np

    path = Path(path)
    header, tensors = read_tensors(path)
    count = header.entries.get(f"{PLAN}.block_count")
    capacity = header.entries.get("split.vram_capacity")
    if header.format != "PWRI" or header.architecture != PLAN:
        raise PowerQuantConfigError(f"{path} is no gpuidx file: it is {header.format}, {header.architecture!r}")
    if not isinstance(count, int) or not isinstance(capacity, int) or len(tensors) != 2 * count:
        raise PowerQuantConfigError(
            f"{path} is damaged: {count!r} layers for {len(tensors)} tensors, a capacity of {capacity!r}"
        )
    hot, sizes = [], []
    for layer in range(count):
        on_gpu, bucket = (_read_int32(path, header, tensor) for tensor in tensors[2 * layer : 2 * layer + 2])
        ids = np.flatnonzero(on_gpu).astype(np.int32)
        # of none or all neurons the bucket says nothing more, and readers ignore it
        if not np.isin(on_gpu, (0, 1)).all() or 0 < len(bucket) < len(on_gpu) and not np.array_equal(bucket, ids):
            raise PowerQuantConfigError(f"{path} is damaged: layer {layer}'s gpu_idx and gpu_bucket differ")
        hot.append(ids)
        sizes.append(len(on_gpu))
    return Split(capacity, hot, sizes)


def _read_int32(path: Path, header: Header, tensor: Tensor) -> np.ndarray:
    import numpy as np

    if tensor.kind != _INT32 or len(tensor.shape) != 1:
        raise PowerQuantConfigError(f"{path} is damaged: {tensor.name} is no list of int32")
    values = np.fromfile(path, "<i4", tensor.shape[0], offset=tensor.start) if tensor.shape[0] else np.empty(0, "<i4")
    if len(values) != tensor.shape[0]:
        raise PowerQuantConfigError(f"{path} is damaged: it ends in {tensor.name}")
    return values
