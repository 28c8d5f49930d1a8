"""Builds data/codebooks.json: `python -m vllm_powerquant.codebooks.build` (needs scipy, about 5 seconds).

Beside each table of integers stands the Lloyd-Max optimum it approximates, for reference.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_powerquant.codebooks.lloyd_max import integer_levels, solve_lloyd_max, uniform_levels
from vllm_powerquant.codebooks.tables import BUILD_COMMAND, DATA_FILE

HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
LLOYD_MAX_BITS = (2, 3, 4)
UNIFORM_BITS = (2, 3, 4, 8)


def build_tables(head_sizes: Iterable[int]) -> str:
    """The file's text: JSON with one line per table."""
    blocks = []
    for head_size in sorted(set(head_sizes)):
        kinds = {
            "optimum": {bits: _optimum(head_size, bits) for bits in LLOYD_MAX_BITS},
            "lloyd_max": {bits: _entry(*integer_levels(head_size, bits)) for bits in LLOYD_MAX_BITS},
            "uniform": {bits: _entry(*uniform_levels(head_size, bits)) for bits in UNIFORM_BITS},
        }
        lines = []
        for kind, tables in kinds.items():
            rows = ",\n".join(f'    "{bits}": {json.dumps(table)}' for bits, table in tables.items())
            lines.append(f'   "{kind}": {{\n{rows}\n   }}')
        blocks.append(f'  "{head_size}": {{\n' + ",\n".join(lines) + "\n  }")
    return f'{{\n "built_by": "{BUILD_COMMAND}",\n "head_sizes": {{\n' + ",\n".join(blocks) + "\n }\n}\n"


def _optimum(head_size: int, bits: int) -> dict:
    centroids, _, mse = solve_lloyd_max(head_size, bits)
    return {"mse": _round(mse, 7), "centroids": [_round(x, 9) for x in centroids]}


def _entry(levels: tuple[int, ...], step: float, mse: float) -> dict:
    return {"mse": _round(mse, 7), "step": step, "levels": list(levels)}


def _round(x: float, digits: int) -> float:
    # so that the last bits of another scipy or libm do not show in the file
    return float(f"{x:.{digits}g}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=BUILD_COMMAND, description="Build the codebook file of this package.")
    parser.add_argument(
        "--add",
        type=int,
        nargs="+",
        default=[],
        metavar="HEAD_SIZE",
        help="head sizes beside the shipped ones",
    )
    parser.add_argument("--output", type=Path, default=DATA_FILE, help="file to write (default: the package's own)")
    args = parser.parse_args(argv)
    if any(head_size < 2 for head_size in args.add):
        parser.error("--add: a head size is 2 or more")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(build_tables((*HEAD_SIZES, *args.add)), encoding="ascii")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
