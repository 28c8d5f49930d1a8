"""What `powerquant codebook build` writes: data/codebooks.json (needs scipy, about 5 seconds).

Beside each table of integers stands the Lloyd-Max optimum it approximates, for reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import PowerQuantConfigError
from ..files import whole_file
from .lloyd_max import integer_levels, solve_lloyd_max, uniform_levels
from .tables import BUILD_COMMAND, DATA_FILE

HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
LLOYD_MAX_BITS = (2, 3, 4)
UNIFORM_BITS = (2, 3, 4, 8)


def build(
    output: Path = DATA_FILE, add: Iterable[int] = (), progress: Callable[[str], None] | None = None
) -> tuple[int, ...]:
    """Writes the file, made with its folder if need be.

    Args:    add: head sizes beside the shipped ones; progress: called with a line at each head size
    Returns: head sizes that the file has, ascending
    Raises:  PowerQuantConfigError for a head size below 3 or a file that cannot be written
    """
    head_sizes = tuple(sorted({*HEAD_SIZES, *add}))
    if head_sizes[0] < 3:
        raise PowerQuantConfigError(f"a head size is 3 or more, got {head_sizes[0]}")
    text = build_tables(head_sizes, progress)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as file:
            file.write_text(text, encoding="ascii")
    except OSError as error:
        raise PowerQuantConfigError(f"cannot write {output} ({error.strerror}); give another file with -o") from error
    return head_sizes


def build_tables(head_sizes: Iterable[int], progress: Callable[[str], None] | None = None) -> str:
    """The file's text: JSON with one line per table."""
    blocks = []
    for head_size in sorted(set(head_sizes)):
        if progress:
            progress(f"head size {head_size}")
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
