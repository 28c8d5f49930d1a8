"""The codebooks that ship with the package, one per (head_size, bits, kind), from the file `build` writes.

All coordinates are in units where a vector's norm is sqrt(head_size), so that each coordinate has variance 1.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

DATA_FILE = Path(__file__).parent / "data" / "codebooks.json"
BUILD_COMMAND = "powerquant codebook build"

KINDS = ("lloyd_max", "uniform")
BITS = (2, 3, 4, 8)

# The trellis of attention/trellis.py has the same codebook for every head size. Step: least error over random unit vectors
# of 64 to 256 coordinates, where it is flat; 16 significant bits. Error: between that of 64 coordinates, 0.0913, and of 256,
# 0.0938 (bench_quality.py --distortion).
TRELLIS_LEVELS = (-8, -5, -3, -2, 1, 2, 4, 7)
TRELLIS_STEP, TRELLIS_MSE = 15401 / 65536, 0.0930


@dataclass(frozen=True)
class Codebook:
    """Centroids (levels + 1/2) * step of one coordinate; idx i stands for centroid i.

    Centroids and boundaries are exact in float32: step has 16 significant bits. They are symmetric about 0.
    """

    head_size: int
    bits: int
    kind: str  # "lloyd_max", "uniform" or "trellis", where idx and the idx before it stand for a centroid
    levels: tuple[int, ...]  # [2**bits], of a trellis [2 * 2**bits]; ascending, each fits int8
    step: float  # a float32 value
    mse: float  # relative, of a coordinate of a random unit vector

    @property
    def centroids(self) -> np.ndarray:
        """[2**bits] float32, ascending."""
        return ((np.array(self.levels) + 0.5) * self.step).astype(np.float32)

    @property
    def boundaries(self) -> np.ndarray:
        """[2**bits - 1] float32, the midpoints between neighbouring centroids."""
        levels = np.array(self.levels)
        return ((levels[1:] + levels[:-1] + 1) * 0.5 * self.step).astype(np.float32)


def load_codebook(head_size: int, bits: int, kind: str = "lloyd_max", file: Path = DATA_FILE) -> Codebook:
    """The codebook of a file, by default the shipped one; at 8 bits every kind is the uniform one.

    Args:
        bits: 2, 3, 4 or 8.
        kind: "lloyd_max" (8-bit integer levels of least MSE), "uniform" (2**(bits-1) even levels a side) or, of 2 bits,
            "trellis", which is no file's.
    Raises:
        PowerQuantConfigError: bits or kind does not exist, or it is not a file that `codebook build` wrote.
        PowerQuantUnsupportedError: no codebook was built for this head size.
    """
    if (bits, kind) == (2, "trellis"):
        return Codebook(head_size, 2, kind, TRELLIS_LEVELS, TRELLIS_STEP, TRELLIS_MSE)
    if kind == "trellis":
        raise PowerQuantConfigError(f"kind 'trellis' is for 2 bits, got {bits!r}")
    if kind not in KINDS:
        raise PowerQuantConfigError(f"kind must be {' or '.join(map(repr, KINDS))}, got {kind!r}")
    if bits not in BITS:
        raise PowerQuantConfigError(f"bits must be 2, 3, 4 or 8, got {bits!r}")
    tables = _read_tables(file)
    if head_size not in tables:
        known = ", ".join(map(str, tables))
        raise PowerQuantUnsupportedError(
            f"no codebook for head_size {head_size}, only for {known}; build it with: {BUILD_COMMAND} --add {head_size}"
        )
    # at 8 bits an even grid errs by 8e-5 of the energy, twice the optimum and still negligible
    kind = "uniform" if bits == 8 else kind
    entry = tables[head_size][kind][str(bits)]
    return Codebook(head_size, bits, kind, tuple(entry["levels"]), entry["step"], entry["mse"])


def supported_head_sizes() -> tuple[int, ...]:
    """Head sizes load_codebook knows, ascending."""
    return tuple(_read_tables())


@functools.cache
def _read_tables(file: Path = DATA_FILE) -> dict[int, Any]:
    try:
        tables = json.loads(file.read_text(encoding="ascii"))["head_sizes"]
        return {int(head_size): kinds for head_size, kinds in tables.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it has no codebooks"
        raise PowerQuantConfigError(f"cannot read codebooks from {file}: {why}; write one with: {BUILD_COMMAND}") from error
