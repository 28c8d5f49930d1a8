"""Draws the CSVs of the benchmarks; measures nothing.

    python benchmarks/plot.py benchmarks/results/nvidia-h200/*.csv [--format png]

Writes decode_time, decode_bandwidth and serving_tokens (those that have rows) to benchmarks/results/<machine>/.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--folder", type=Path, help="where to write (default: results/<machine>/)")
    args = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "powerquant"  # the same rows draw the same bytes
    rows = read_rows(*args.csv)
    for gpu in sorted({row.gpu for row in rows}):
        folder = args.folder or RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower())
        for draw in (decode_time, decode_bandwidth, serving_tokens):
            figure = draw([row for row in rows if row.gpu == gpu])
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{draw.__name__}.{args.format}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if args.format == "svg" else None)
            print(path)


if __name__ == "__main__":
    main()
