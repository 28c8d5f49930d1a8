"""The road from a SiLU checkpoint to a sparse model, measured: perplexity, active neurons, speed and size at each step.

    powerquant relufy -o student && powerquant train-predictor student -o predictors
    python benchmarks/eval_sparse_road.py --student student --point sparse=predictors --point faster=predictors@0.3 --out CSV

Rows are the original and the dense student (plain GGUF), and the student with predictors at each point: a name, a folder of
predictors, and a threshold if it is not the folder's own. Sparse files hold an output matrix of their own, which q4_0 keeps
in more bits than the embedding that plain files of such models share; so the first point's file is also run with every
neuron computed ("all neurons"). All run in this project's engine, token by token as it decodes, on windows of the built-in
texts' second half, which nothing is trained on. A window is a round: every model reads it in turn, ratios are taken round by
round. Perplexities by transformers, in float32, check the engine's.

Needs powerinfer-bench (build/powerinfer, or --engine). SmolLM2-135M with two points (5 models, 6 windows of 1024 tokens):
about 7 minutes in f16 and 2 in q4_0 on two cores, computed from 85 and 360 tokens/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "src")]

from bench_sparse import cpu_name  # noqa: E402
from csv_rows import append_rows, check_csv, git_commit  # noqa: E402

from vllm_powerquant.quality import SPLITS, cut, read_texts  # noqa: E402
from vllm_powerquant.sparse.convert import DTYPES, convert  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OWN_NAMES = ("original", "student", "all neurons")


@dataclass(frozen=True)
class Point:
    """An operating point: predictors and what a predicted value must reach."""

    name: str
    predictor: Path
    threshold: float | None  # None: the predictors' own

    @classmethod
    def parse(cls, text: str) -> Point:
        name, equals, rest = text.partition("=")
        folder, at, threshold = rest.partition("@")
        try:
            point = cls(name, Path(folder), float(threshold) if at else None)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{threshold!r} is no threshold") from None
        if not (name and equals and point.predictor.is_dir()):
            raise argparse.ArgumentTypeError(f"a point is NAME=FOLDER or NAME=FOLDER@THRESHOLD, got {text!r}")
        return point


@dataclass(frozen=True)
class Row:
    """Over the rounds: median, least and greatest; a perplexity's median is that of all rounds' tokens together."""

    model: str  # one of OWN_NAMES or a point's name
    type: str
    what: str
    median: float
    low: float
    high: float
    rounds: int
    window: int  # tokens of a round
    threshold: float | None
    threads: int
    load: float  # of the machine, running processes, when a round began; median
    cpu: str
    commit: str
    date: str


def held_out(folder: Path, windows: int, length: int) -> list[list[int]]:
    """`windows` runs of each built-in text's second half, with the tokenizer's BOS if it adds one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    prefix = tokenizer("")["input_ids"][:1]
    rows = []
    for name, text in read_texts().items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows += [[*prefix, *run] for run in cut(ids, SPLITS["report"], length - len(prefix), windows, name)]
    return rows


def by_transformers(folder: Path, windows: list[list[int]]) -> tuple[list[float], list[float]]:
    """(mean negative log-likelihood, share of gates above zero) of each window, in float32."""
    import torch

    from vllm_powerquant.sparse.text import load_causal_lm

    model = load_causal_lm(folder, device="cpu").model
    positive: list[float] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, given, out: positive.append((out > 0).float().mean().item())
        )
    nll, active = [], []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor(window)
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            nll.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
            active.append(statistics.mean(positive))
            positive.clear()
    return nll, active


def run(args: argparse.Namespace, path: Path, window: Path, *options: str) -> dict:
    command = [str(args.engine), "--model", str(path), "--threads", str(args.threads), "--tokens", str(window)]
    done = subprocess.run([*command, "--together", "1", *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    report = json.loads(done.stdout)
    # one thread counts CPU time, as bench_sparse.py does
    clock = "per_cpu_second" if args.threads == 1 else "per_second"
    return {"nll": report["nll"], "tokens/s": report["run"][clock], "computed share": report.get("active_share")}


def measure(args: argparse.Namespace, dtype: str, folder: Path, windows: list[Path]) -> list[Row]:
    """One type: all models on all windows, in turn."""
    # file, threshold, options of powerinfer-bench
    models: dict[str, tuple] = {}
    for name, checkpoint in (("original", args.original), ("student", args.student)):
        models[name] = folder / f"{name}-{dtype}.gguf", None, ()
        convert(checkpoint, models[name][0], dtype=dtype, progress=False)
    for point in args.point:
        path = folder / f"{point.name}-{dtype}.gguf"
        kind = args.predictor_type or dtype
        made = convert(
            args.student,
            path,
            dtype=dtype,
            predictor=point.predictor,
            threshold=point.threshold,
            predictor_dtype=kind,
            progress=False,
        )
        models.setdefault("all neurons", (path, None, ("--dense",)))
        models[point.name] = path, made.threshold, ()
    values: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    loads = []
    for window in windows:
        loads.append(os.getloadavg()[0])
        found = {name: run(args, path, window, *options) for name, (path, _, options) in models.items()}
        for name, result in found.items():
            result["tokens/s over the dense student's"] = result["tokens/s"] / found["student"]["tokens/s"]
            for what, value in result.items():
                if value is not None:
                    values[name].setdefault(what, []).append(value)
    rows = []
    for name, (path, threshold, _) in models.items():
        nll = values[name].pop("nll")
        perplexities = list(map(math.exp, nll))
        told = {"perplexity": (math.exp(statistics.mean(nll)), min(perplexities), max(perplexities))}
        told |= {what: (statistics.median(v), min(v), max(v)) for what, v in values[name].items()}
        megabytes = path.stat().st_size / 1e6
        told["file, MB"] = (megabytes, megabytes, megabytes)
        rows += [row(args, name, dtype, what, numbers, len(windows), threshold, loads) for what, numbers in told.items()]
    return rows


def row(
    args: argparse.Namespace,
    model: str,
    dtype: str,
    what: str,
    numbers: tuple[float, float, float],
    rounds: int,
    threshold: float | None,
    loads: list[float],
) -> Row:
    commit = args.commit or git_commit()
    load = statistics.median(loads) if loads else os.getloadavg()[0]
    where = (args.threads, load, cpu_name(), commit, time.strftime("%Y-%m-%d"))
    return Row(model, dtype, what, *numbers, rounds, args.length, threshold, *where)


def check_rows(args: argparse.Namespace, windows: list[list[int]]) -> list[Row]:
    """What transformers says of both checkpoints."""
    rows = []
    for name, folder in (("original", args.original), ("student", args.student)):
        nll, active = by_transformers(folder, windows)
        perplexities = list(map(math.exp, nll))
        told = {
            "perplexity by transformers": (math.exp(statistics.mean(nll)), min(perplexities), max(perplexities)),
            "gates above zero": (statistics.mean(active), min(active), max(active)),
        }
        rows += [row(args, name, "f32", what, numbers, len(windows), None, []) for what, numbers in told.items()]
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, a line for each model and type."""
    columns = list(dict.fromkeys(row.what for row in rows))
    lines = ["| model | type | threshold | " + " | ".join(columns) + " |", "|---|---|---|" + "---:|" * len(columns)]
    for model, dtype in dict.fromkeys((row.model, row.type) for row in rows):
        mine = {row.what: row for row in rows if (row.model, row.type) == (model, dtype)}
        threshold = next(iter(mine.values())).threshold
        cells = [f"{mine[what].median:.4g}" if what in mine else "" for what in columns]
        lines.append(f"| {model} | {dtype} | {'' if threshold is None else f'{threshold:g}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, help="checkpoint folder (default: the embedded SmolLM2)")
    parser.add_argument("--student", type=Path, required=True, help="the ReLU checkpoint that relufy made of it")
    parser.add_argument(
        "--point", type=Point.parse, action="append", default=[], help="NAME=FOLDER[@THRESHOLD]; may be repeated"
    )
    parser.add_argument("--types", nargs="+", choices=DTYPES, default=["f16", "q4_0"])
    parser.add_argument("--predictor-type", choices=DTYPES, help="of the predictors (default: the matrices')")
    parser.add_argument("--windows", type=int, default=2, help="of each of the three texts")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", type=Path, default=ROOT / "build" / "powerinfer" / "powerinfer-bench")
    parser.add_argument("--out", type=Path, help="CSV that rows are appended to (default: none)")
    parser.add_argument("--commit", default=os.environ.get("BENCH_COMMIT"), help="for the rows (default: what git says)")
    args = parser.parse_args()
    if len({*OWN_NAMES, *(point.name for point in args.point)}) < len(OWN_NAMES) + len(args.point):
        parser.error(f"points need names of their own, other than {', '.join(OWN_NAMES)}")
    check_csv(args.out, Row)
    if not args.engine.is_file():
        parser.error(
            f"no powerinfer-bench at {args.engine}: build it (third_party/PowerInfer/README.md) or name it by --engine"
        )
    if args.original is None:
        from vllm_powerquant.model import prepare_model

        args.original = prepare_model()
    windows = held_out(args.original, args.windows, args.length)
    everything = check_rows(args, windows)
    append_rows(args.out, everything)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for index, window in enumerate(windows):
            paths.append(Path(folder) / f"window{index}.txt")
            paths[-1].write_text(" ".join(map(str, window)))
        for dtype in args.types:
            rows = measure(args, dtype, Path(folder), paths)
            append_rows(args.out, rows)
            everything += rows
    print(table(everything))


if __name__ == "__main__":
    main()
