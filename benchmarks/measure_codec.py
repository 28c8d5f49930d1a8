"""What docs/codec.md says of vectors: the codec's error by width, and how coordinates are distributed.

    python benchmarks/measure_codec.py        (a minute on one core; writes benchmarks/results/codec/*.csv anew)

Of random vectors, and of the keys and values of the embedded SmolLM2 on 1,024 tokens of the built-in text "docs".
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import harness
import quality_models
import torch
from csv_rows import append_rows

from vllm_powerquant import quality
from vllm_powerquant.attention.rotation import rotate
from vllm_powerquant.codec import Codec

RESULTS = Path(__file__).parent / "results" / "codec"
TOKENS, RANDOM_VECTORS = 1024, 200_000
CODECS = [Codec(64, bits) for bits in (2, 3, 4, 8)] + [Codec(64, 2, "value"), Codec(64, 2, "value", "trellis")]
# of the histograms, in units of a vector's root mean square; 8 is the most that one of 64 coordinates can be
EDGES = torch.linspace(-8, 8, 161)


@dataclass(frozen=True)
class ErrorRow:
    """The codec's error on one kind of vectors, relative to their energy."""

    vectors: str
    count: int
    kind: str
    value_codec: str
    bits: int
    levels: str  # kind of codebook
    table_mse: float
    error: float
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class CoordinateRow:
    """Density of coordinates between two edges, of vectors of mean square 1."""

    vectors: str
    rotated: str  # "yes" or "no"
    low: float
    high: float
    density: float
    torch: str
    commit: str
    date: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="to write into the rows (default: git's)")
    args = parser.parse_args()
    where = {key: harness.environment(args.commit)[key] for key in ("torch", "commit", "date")}
    errors, coordinates = [], []
    for name, x in vectors().items():
        energy = x.double().square().sum()
        for codec in CODECS:
            error = (codec.decode(codec.encode(x)).double() - x.double()).square().sum() / energy
            book = codec.codebook
            errors.append(
                ErrorRow(name, len(x), codec.kind, codec.value_codec, codec.bits, book.kind, book.mse, error.item(), **where)
            )
        unit = x / x.square().mean(-1, keepdim=True).sqrt()
        for rotated, of in (("no", unit), ("yes", rotate(unit))):
            counts = torch.histogram(of.flatten(), EDGES).hist
            density = counts / of.numel() / EDGES.diff()
            ends = zip(EDGES[:-1].tolist(), EDGES[1:].tolist(), density.tolist(), strict=True)
            coordinates += [CoordinateRow(name, rotated, *row, **where) for row in ends]
    for name, rows in (("errors", errors), ("coordinates", coordinates)):
        path = RESULTS / f"{name}.csv"
        path.unlink(missing_ok=True)
        append_rows(path, rows)
        print(f"{path}: {len(rows)} rows")


def vectors() -> dict[str, torch.Tensor]:
    """[n, 64] fp32 of each kind."""
    loaded = quality_models.load("smollm2")
    run = quality.cut(loaded.ids(quality.read_texts()["docs"]), quality.SPLITS["tune"], TOKENS, 1)[0]
    exact = quality.make_segment(loaded.model, "captured", [*run, run[-1]], len(run)).exact
    keys, values = (torch.cat([layer[i].float().flatten(0, 2) for layer in exact]) for i in (0, 1))
    gaussian = torch.randn(RANDOM_VECTORS, 64, generator=torch.Generator().manual_seed(0))
    return {"random": gaussian, "keys": keys, "values": values}


if __name__ == "__main__":
    main()
