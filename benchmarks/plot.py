"""Draws the CSVs of the benchmarks; measures nothing.

    python benchmarks/plot.py benchmarks/results/nvidia-h200/*.csv benchmarks/results/quality/*.csv [--format png]

Writes decode_time, decode_bandwidth and serving_tokens (those that have rows) to benchmarks/results/<machine>/, and for each
model and prompt length of bench_quality.py's rows a quality_<model>_<tokens> to benchmarks/results/quality/.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from harness import Row, read_rows  # noqa: E402
from matplotlib import pyplot  # noqa: E402

RESULTS = Path(__file__).parent / "results"
OURS = "K4/V2"
# provider -> (label, colour, marker); what is not here is not drawn
STYLES = {
    "powerquant": (f"POWERQUANT {OURS}", "#c1272d", "o"),
    "fa3": ("FlashAttention 3, bf16", "#1f4e79", "s"),
    "flash_attn": ("FLASH_ATTN, bf16", "#1f4e79", "s"),
    "fa3_fp8": ("FlashAttention 3, fp8", "#5b9bd5", "^"),
    "flash_attn_fp8": ("FLASH_ATTN, fp8", "#5b9bd5", "^"),
    "turboquant": ("vLLM TURBOQUANT 4bit_nc", "#7f7f7f", "D"),
    "int4_per_token_head": ("vLLM int4_per_token_head", "#b8860b", "v"),
}
BITS = r"(K\d/V\d)"
# quality: configurations -> (label, colour, marker, face: whether the marker is filled); what fits none is not drawn
QUALITY_STYLES = {
    BITS: ("POWERQUANT", "#c1272d", "o", True),
    f"{BITS}, calibrated keys": ("POWERQUANT, calibrated keys", "#c1272d", "*", True),
    f"{BITS} trellis": ("POWERQUANT trellis", "#6b0f1a", "o", False),
    f"{BITS} trellis, calibrated keys": ("POWERQUANT trellis, calibrated keys", "#6b0f1a", "*", False),
    f"tqai {BITS}, window 128": ("tqai", "#1f4e79", "s", False),
    f"tqai {BITS}, window 128, 4 sinks": ("tqai, 4 sinks", "#1f4e79", "s", True),
    f"fused-turboquant {BITS}, no window": ("fused-turboquant", "#7f7f7f", "D", False),
    f"fused-turboquant {BITS}, window 128": ("fused-turboquant, window lent", "#7f7f7f", "D", True),
    f"turbo-attn {BITS}, no window": ("turbo-attn", "#b8860b", "v", False),
    f"turbo-attn {BITS}, window 128": ("turbo-attn, window lent", "#b8860b", "v", True),
    f"tiny-turboquant {BITS}, window 128": ("tiny-turboquant", "#2e7d32", "^", False),
    f"tiny-turboquant {BITS} in groups of 32, window 128": ("tiny-turboquant K4/V2, groups of 32", "#2e7d32", "^", True),
    f"quanto {BITS}, window 128": ("Transformers K4/V4, quanto", "#6a3d9a", "P", False),
    f"quanto {BITS} in groups of 32, window 128": ("Transformers K4/V4, quanto, groups of 32", "#6a3d9a", "P", True),
    f"hqq {BITS} in groups of 32, window 128": ("Transformers K4/V4, HQQ, groups of 32", "#6a3d9a", "X", True),
}
LABELLED = ("POWERQUANT", "POWERQUANT, calibrated keys")  # the trellis's points lie just below
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}
SWEEP = re.compile(r"(\d+)x(\d+) 32/8 d128")
SERVED = re.compile(r"context (\d+), batch (\d+)(, memory full)?, no torch\.compile")
Series = dict[str, list[tuple[int, Row]]]  # provider -> (x, row)


def drawn(row: Row) -> bool:
    return row.provider in STYLES and (row.provider != "powerquant" or row.format == OURS)


def sweep(rows: list[Row], batch: int) -> Series:
    """Context and row of each provider's decode times at a batch."""
    series = defaultdict(list)
    for row in rows:
        match = SWEEP.fullmatch(row.case)
        if row.bench == "decode" and drawn(row) and match and int(match[1]) == batch:
            series[row.provider].append((int(match[2]), row))
    return {name: sorted(series[name], key=lambda point: point[0]) for name in STYLES if len(series[name]) > 1}


def caption(rows: list[Row]) -> str:
    return f"{rows[0].gpu}, {max(row.date for row in rows)}"


def tokens(n: float) -> str:
    return f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"


def decode_figure(rows: list[Row], title: str, label: str, value, limit=None, logarithmic: bool = True):
    """value(row) against context, a panel for each batch; None where there is no sweep. limit(row): a line across."""
    panels = {batch: series for batch in (32, 1) if (series := sweep(rows, batch))}
    if not panels:
        return None
    size, share = (5.5 * len(panels), 4.2), not logarithmic
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, sharey=share, layout="constrained")
    for axis, (batch, series) in zip(axes[0], panels.items(), strict=True):
        for name, points in series.items():
            text, colour, marker = STYLES[name]
            axis.plot(
                [x for x, _ in points], [value(row) for _, row in points], color=colour, marker=marker, ms=4, label=text
            )
        contexts = sorted({x for points in series.values() for x, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [tokens(x) for x in contexts])
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        if limit:
            row = next(iter(series.values()))[0][1]
            axis.axhline(limit(row), color="black", lw=0.8, ls="--", label="read-only kernel")
        axis.set_title(f"{batch} request{'s' if batch > 1 else ''}", fontsize=10)
        axis.set_xlabel("context, tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(fontsize=8)
    every = [row for series in panels.values() for points in series.values() for _, row in points]
    figure.suptitle(f"{title}\n{caption(every)}", fontsize=11)
    return figure


def decode_time(rows: list[Row]):
    title = "Decode attention, one layer's whole call, 32/8 heads of 128: time"
    return decode_figure(rows, title, "ms", lambda row: row.q50)


def decode_bandwidth(rows: list[Row]):
    title = "Decode attention, 32/8 heads of 128: bytes of its own cache read a second"
    return decode_figure(
        rows,
        title,
        "TB/s",
        lambda row: row.bytes / row.q50 / 1e9,
        limit=lambda row: row.read_gbps / 1e3,
        logarithmic=False,
    )


def serving_tokens(rows: list[Row]):
    """Tokens/s of decode-only steps against batch, at the longest context served without torch.compile; the last point is
    the full memory."""
    found = [(match, row) for row in rows if drawn(row) and (match := SERVED.fullmatch(row.case)) and row.unit == "tokens/s"]
    found = [(match, row) for match, row in found if row.bench == "serving"]
    if not found:
        return None
    context = max(int(match[1]) for match, _ in found)
    series = defaultdict(list)
    for match, row in found:
        if int(match[1]) == context:
            series[row.provider].append((int(match[2]), row.q50, match[3]))
    figure, axis = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name in (name for name in STYLES if series[name]):
        text, colour, marker = STYLES[name]
        points = sorted(series[name])
        axis.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, marker=marker, ms=5, label=text)
        for x, y, full in points:
            if full:
                note = f"memory full:\n{x} requests, {y:,.0f}"
                axis.annotate(note, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, color=colour)
    batches = sorted({x for points in series.values() for x, *_ in points})
    axis.set_xscale("log", base=2)
    axis.set_xlim(batches[0] / 1.4, batches[-1] * 2.8)
    axis.set_xticks(batches, [f"{x}" for x in batches])
    axis.set_ylim(0, 1.2 * max(y for points in series.values() for _, y, _ in points))
    axis.set_xlabel("requests")
    axis.set_ylabel("tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    used = [row for match, row in found if int(match[1]) == context]
    title = f"Decode steps in vLLM without torch.compile, Qwen3-8B's shape, {tokens(context)} contexts"
    figure.suptitle(f"{title}\n{caption(used)}", fontsize=11)
    return figure


def has_column(path: Path, name: str) -> bool:
    with path.open(newline="") as file:
        return name in next(csv.reader(file), [])


def read_quality(paths: list[Path]) -> list[dict]:
    """Rows of bench_quality.py on the report part of the texts: of each configuration those of the run (date and commit)
    with the most texts and rotations, of as large ones the last."""
    runs = defaultdict(dict)
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                case, run = (row["model"], row["prompt_tokens"], row["configuration"]), (row["date"], row["commit"])
                if row["split"] == "report":
                    runs[case].setdefault(run, []).append(row)
    # of equally large and old ones max takes the first
    chosen = (max(reversed(of.items()), key=lambda item: (len(item[1]), item[0][0]))[1] for of in runs.values())
    return [row for rows in chosen for row in rows]


def quality_figure(rows: list[dict]):
    """KL to the uncompressed cache against bytes held, of a model's rows at one prompt length; None without rows to draw."""
    points = defaultdict(list)  # configuration -> (share of bf16's bytes, KL) of each row
    for row in rows:
        points[row["configuration"]].append((int(row["held_bytes"]) / int(row["exact_bytes"]), float(row["kl"])))
    figure, axis = pyplot.subplots(figsize=(8.5, 4.8), layout="constrained")
    for pattern, (label, colour, marker, filled) in QUALITY_STYLES.items():
        found = ((re.fullmatch(pattern, name), values) for name, values in points.items())
        means = sorted((*(sum(x) / len(x) for x in zip(*values, strict=True)), match[1]) for match, values in found if match)
        if not means:
            continue
        shares, divergences, _ = zip(*means, strict=True)
        face, size = colour if filled else "white", 9 if marker == "*" else 6
        axis.plot(
            [100 * x for x in shares], divergences, color=colour, marker=marker, ms=size, mfc=face, lw=0.8, label=label
        )
        for share, divergence, name in means if label in LABELLED else ():
            right = marker == "o"
            axis.annotate(
                name,
                (100 * share, divergence),
                xytext=(6 if right else -6, 3),
                textcoords="offset points",
                ha="left" if right else "right",
                fontsize=7,
                color=colour,
            )
    if not axis.lines:
        pyplot.close(figure)
        return None
    axis.set_xscale("log")
    axis.set_yscale("log")
    shares, divergences = (15, 20, 30, 40, 60, 100, 200), [m * 10**e for e in (-4, -3, -2, -1) for m in (1, 2, 5)]
    low, high = axis.get_ylim()
    axis.set_xticks(shares, [f"{x}" for x in shares])
    axis.set_yticks(*zip(*((x, f"{x:g}") for x in divergences if low < x < high), strict=True))
    axis.minorticks_off()
    axis.set_xlabel("bytes held, % of bf16's; a peer's joined points: K4/V2 above, K4/V4 below")
    axis.set_ylabel("KL to the uncompressed cache, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    first, texts = rows[0], len({row["text"] for row in rows})
    name, length = MODELS.get(first["model"], first["model"]), int(first["prompt_tokens"])
    figure.suptitle(
        f"{name}, prompts of {length:,} tokens, {first['positions']} more decoded, {texts} texts\n"
        f"torch {first['torch']}, transformers {first['transformers']}, {max(row['date'] for row in rows)}",
        fontsize=11,
    )
    return figure


def save(figure, folder: Path, name: str, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{kind}"
    figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--folder", type=Path, help="where to write (default: results/<machine>/, results/quality/)")
    args = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "powerquant"  # the same rows draw the same bytes
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines
    quality = [path for path in args.csv if has_column(path, "configuration")]
    groups = defaultdict(list)
    for row in read_quality(quality):
        groups[row["model"], int(row["prompt_tokens"])].append(row)
    for (model, length), of_group in sorted(groups.items()):
        figure = quality_figure(of_group)
        if figure is not None:
            save(figure, args.folder or RESULTS / "quality", f"quality_{model}_{length}", args.format)
    # what is left are timings, and tables that nothing is drawn of
    rows = read_rows(*(path for path in args.csv if has_column(path, "q50")))
    for gpu in sorted({row.gpu for row in rows}):
        folder = args.folder or RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower())
        for draw in (decode_time, decode_bandwidth, serving_tokens):
            figure = draw([row for row in rows if row.gpu == gpu])
            if figure is not None:
                save(figure, folder, draw.__name__, args.format)


if __name__ == "__main__":
    main()
