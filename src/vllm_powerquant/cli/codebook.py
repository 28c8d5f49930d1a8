"""The verbs codebook show, compare and build."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from ..errors import PowerQuantConfigError
from .common import progress_lines

BITS = (2, 3, 4, 8)
SOLVED_BITS = (2, 3, 4)
# those that need no model's queries and keys: codebooks.solvers.MSE_SOLVERS, whose module needs scipy
SOLVERS = ("lloyd_max", "fuzzy_c_means", "cma_es")


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "codebook",
        help="show, compare and build the tables that say what codes stand for",
        description="A rotated key or value has coordinates of a known distribution; a codebook is the set of numbers that "
        "stand for them. Errors are mean squares relative to the vector's: 0.01 is one per cent of its energy.",
    )
    parts = verb.add_subparsers(dest="part", required=True)

    part = parts.add_parser(
        "show",
        help="levels, boundaries and error of one codebook",
        description="Centroids and boundaries are of a vector whose coordinates have mean square 1.",
        epilog="example: powerquant codebook show --head-size 64 --bits 2 --kind uniform",
    )
    _add_head_size(part)
    part.add_argument("--bits", type=int, choices=BITS, default=4, help="of a coordinate (default: 4)")
    part.add_argument(
        "--kind",
        choices=("lloyd_max", "uniform", "trellis"),
        default="lloyd_max",
        help="lloyd_max: keys, and values but of 2 bits; uniform: 2-bit values; trellis: the other codec of 2-bit values "
        "(default: lloyd_max)",
    )
    part.add_argument("--file", type=Path, help="one that `codebook build` wrote (default: the shipped one)")
    _add_json(part)
    part.set_defaults(run=_show)

    part = parts.add_parser(
        "compare",
        help="exact error and time of every solver, beside the shipped tables",
        description="Needs scipy; cma_es also the package cma, without which it is left out. The solver attention_aware "
        "needs a model's queries and keys: benchmarks/compare_codebooks.py.",
        epilog="example: powerquant codebook compare --head-size 64 --bits 2 4 --solver lloyd_max cma_es",
    )
    _add_head_size(part)
    part.add_argument(
        "--bits", type=int, choices=SOLVED_BITS, nargs="+", default=SOLVED_BITS, help="of a coordinate (default: 2 3 4)"
    )
    part.add_argument("--solver", choices=SOLVERS, nargs="+", help="which (default: all that can run here)")
    _add_json(part)
    part.set_defaults(run=_compare)

    part = parts.add_parser(
        "build",
        help="solve the shipped tables anew, and those of more head sizes",
        description="Needs scipy; takes about five seconds. The file is the same on every machine. Before a cache can use a "
        "new head size, it also needs a rotation (attention/rotation.py).",
        epilog="example: powerquant codebook build --add 160 -o codebooks.json, "
        "then powerquant codebook show --head-size 160 --file codebooks.json",
    )
    part.add_argument("--add", type=int, nargs="+", default=[], metavar="HEAD_SIZE", help="beside the shipped ones")
    part.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write (default: the package's own)")
    _add_json(part)
    part.set_defaults(run=_build)


def _add_head_size(part: argparse.ArgumentParser) -> None:
    part.add_argument("--head-size", type=int, default=128, metavar="N", help="coordinates of a vector (default: 128)")


def _add_json(part: argparse.ArgumentParser) -> None:
    part.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")


def _show(args: argparse.Namespace) -> int:
    from ..codebooks.tables import DATA_FILE, load_codebook

    book = load_codebook(args.head_size, args.bits, args.kind, args.file or DATA_FILE)
    trellis = book.kind == "trellis"
    facts = {
        "head_size": book.head_size,
        "bits": book.bits,
        "kind": book.kind,
        "mse": book.mse,
        "bound": 4.0**-book.bits,
        "step": book.step,
        "levels": list(book.levels),
        "centroids": [float(x) for x in book.centroids],
        # a trellis chooses by all coordinates of a ring
        "boundaries": None if trellis else [float(x) for x in book.boundaries],
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    print(f"{book.kind} of {book.bits} bits for head size {book.head_size}: centroid = (level + 1/2) * {book.step:.9g}")
    share = book.mse / facts["bound"]
    print(f"relative MSE {book.mse:.7g}, {share:.3f} times the least that any codec of Gaussian vectors can have")
    if trellis:
        print("a code and the one before it choose the level; the MSE is a measurement")
        print("level   centroid")
        for level, centroid in zip(book.levels, facts["centroids"], strict=True):
            print(f"{level:5}  {centroid:9.6f}")
        return 0
    print("code  level   centroid  from")
    starts = ["     -inf", *(f"{x:9.6f}" for x in facts["boundaries"])]
    for code, (level, centroid, start) in enumerate(zip(book.levels, facts["centroids"], starts, strict=True)):
        print(f"{code:4}  {level:5}  {centroid:9.6f}  {start}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    solvers = _solvers("compare")
    names = args.solver or [name for name in SOLVERS if solvers.can_solve(name)]
    show = None if args.json else progress_lines()
    rows = solvers.compare(args.head_size, args.bits, names, show)
    left_out = {name: "needs the package cma" for name in SOLVERS if args.solver is None and name not in names}
    if args.json:
        print(json.dumps({"rows": [vars(row) for row in rows], "left_out": left_out}))
        return 0
    show("")
    print(f"head size {args.head_size}\nbits  codebook           relative MSE  over the optimum  seconds")
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:7.3f}"
        over = "0" if abs(row.over_optimum) < 1e-9 else f"{row.over_optimum:+.2e}"
        print(f"{row.bits:4}  {row.codebook:17}  {row.mse:12.7g}  {over:>16}  {seconds}".rstrip())
    for name, why in left_out.items():
        print(f"left out: {name}, which {why}")
    return 0


def _build(args: argparse.Namespace) -> int:
    _solvers("build")
    from ..codebooks.build import build
    from ..codebooks.tables import DATA_FILE

    output = args.output or DATA_FILE
    start = time.monotonic()
    show = None if args.json else progress_lines()
    head_sizes = build(output, args.add, show)
    seconds = time.monotonic() - start
    if args.json:
        print(json.dumps({"file": str(output), "head_sizes": list(head_sizes), "seconds": round(seconds, 3)}))
        return 0
    show("")
    print(f"{output}: codebooks for head sizes {', '.join(map(str, head_sizes))} in {seconds:.1f} s")
    return 0


def _solvers(part: str):
    """The module codebooks.solvers. Raises PowerQuantConfigError without scipy."""
    try:
        from ..codebooks import solvers
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "scipy":
            raise
        raise PowerQuantConfigError(f"codebook {part} needs scipy, which is not installed; pip install scipy") from error
    return solvers
