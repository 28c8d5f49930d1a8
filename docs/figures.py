"""Draws the figures of docs/codec.md and prints its table; measures nothing.

    python docs/figures.py [--folder docs/figures]

Rows: benchmarks/results/codec/*.csv (benchmarks/measure_codec.py), benchmarks/results/quality/smollm2-levers.csv
(benchmarks/bench_quality.py --levers). Levels, errors of tables and offsets are the package's own.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from vllm_powerquant.attention.layout import SUB_PAGE_TOKENS, PageLayout  # noqa: E402
from vllm_powerquant.codebooks.lloyd_max import UnitCoordinate  # noqa: E402
from vllm_powerquant.codebooks.tables import load_codebook  # noqa: E402

FOLDER = Path(__file__).parent / "figures"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HEAD_SIZE = 64  # of the rows' model
KEY, VALUE, GREY, DARK = "#c1272d", "#1f4e79", "#b8b8b8", "#333333"
# configurations of smollm2-levers.csv by what they change, the number of tokens first
WINDOWS = {
    0: "all but the window",
    16: "window 16",
    32: "window 32",
    64: "window 64",
    128: "all",
    256: "window 256",
    512: "window 512",
}
SINKS = {0: "all but the sinks", 1: "sinks 1", 2: "sinks 2", 4: "all", 8: "sinks 8", 16: "sinks 16"}


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def coordinates() -> Figure:
    """Keys' coordinates before and after the rotation, the exact density of a random direction, the levels."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8.5, 3.2), sharey=True, layout="constrained")
    rows = [row for row in read("codec/coordinates.csv") if row["vectors"] == "keys"]
    x = np.linspace(-6, 6, 201)
    for axis, rotated, title in zip(axes, ("no", "yes"), ("as the model makes them", "after the rotation"), strict=True):
        of = [row for row in rows if row["rotated"] == rotated]
        low, density = [float(row["low"]) for row in of], [float(row["density"]) for row in of]
        axis.stairs(density, [*low, float(of[-1]["high"])], fill=True, color=GREY, label="keys of SmolLM2")
        axis.plot(x, UnitCoordinate(HEAD_SIZE).density(x), color=DARK, lw=1, label="random direction, exact")
        axis.set(title=title, yscale="log", ylim=(1e-5, 5), xlim=(-7, 7), xlabel="coordinate, root mean square of a key = 1")
    for bits, kind, height, colour, label in (
        (4, "lloyd_max", 1.1, KEY, "levels of 4-bit keys"),
        (2, "uniform", 2.4, VALUE, "levels of 2-bit values"),
    ):
        centroids = load_codebook(HEAD_SIZE, bits, kind).centroids
        axes[1].plot(centroids, [height] * len(centroids), "|", ms=9, color=colour, label=label)
    axes[0].set_ylabel("density")
    axes[1].legend(fontsize=7, loc="lower center", framealpha=1)
    return figure


def errors() -> Figure:
    """Error by bits, in units of the least that a codec of a Gaussian source can have."""
    figure, axis = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    rows, widths = read("codec/errors.csv"), (2, 3, 4, 8)
    axis.axhline(1, color=DARK, lw=1, ls="--", label="no codec can do better: 4^-bits")
    axis.axhline(3**0.5 * np.pi / 2, color=GREY, lw=1, ls=":", label="Lloyd-Max at many bits")
    table = [load_codebook(HEAD_SIZE, bits).mse * 4**bits for bits in widths]
    axis.hlines(table, np.arange(4) - 0.2, np.arange(4) + 0.2, color=GREY, label="the table's own error")
    for name, colour, marker, shift in (("random", DARK, "o", -0.12), ("keys", KEY, "s", 0), ("values", VALUE, "D", 0.12)):
        label = "random vectors" if name == "random" else f"{name} of SmolLM2"
        of = [row for row in rows if row["vectors"] == name]
        # values have a table of their own at 2 bits alone
        plain = [row for row in of if row["kind"] == "key" and not (name == "values" and row["bits"] == "2")]
        plain += [row for row in of if name == "values" and row["levels"] == "uniform" and row["bits"] == "2"]
        trellis = [row for row in of if name == "values" and row["levels"] == "trellis"]
        for some, face, text in ((plain, colour, label), (trellis, "none", f"{label}, trellis")):
            at = [widths.index(int(row["bits"])) + shift for row in some]
            y = [float(row["error"]) * 4 ** int(row["bits"]) for row in some]
            if some:
                axis.plot(at, y, marker, ms=4, color=colour, mfc=face, label=text)
    axis.set(xticks=range(4), xticklabels=widths, xlabel="bits of a coordinate", ylim=(0, 5.5))
    axis.set_ylabel("squared error over energy, times 4^bits")
    axis.legend(fontsize=7, loc="upper left")
    return figure


def page() -> Figure:
    """A sub-page of 64 tokens byte by byte, 64 to a row, with the bytes of one token."""
    layout, token = PageLayout(128), 21
    parts = (
        ("codes of keys", 0, layout.value_plane_offsets[0], "#f1c9ca"),
        ("codes of values", layout.value_plane_offsets[0], layout.key_scale_offset, "#c6d5e6"),
        ("scales of keys", layout.key_scale_offset, layout.value_scale_offset, "#dd8f92"),
        ("scales of values", layout.value_scale_offset, layout.sub_page_bytes, "#8fb0d3"),
    )
    row = SUB_PAGE_TOKENS
    figure, axis = pyplot.subplots(figsize=(5.8, 5), layout="constrained")
    for name, start, end, colour in parts:
        axis.add_patch(Rectangle((0, start / row), row, (end - start) / row, fc=colour, ec="white", lw=0.8))
        axis.text(row + 1, (start + end) / 2 / row, f"{name}: {start} to {end - 1}", va="center", fontsize=6)
    offsets = np.sort(layout.slot_offsets[token].numpy())
    runs = np.split(offsets, np.flatnonzero(np.diff(offsets) != 1) + 1)
    for run in runs:
        axis.add_patch(Rectangle((run[0] % row, run[0] // row), len(run), 1, fc=DARK, ec="none"))
    axis.set(xlim=(0, row + 26), ylim=(layout.sub_page_bytes / row, 0), xticks=[0, 16, 32, 48, 64], ylabel="row of 64 bytes")
    axis.set_title(f"a sub-page, head size 128, K4/V2; dark: token {token}'s {layout.slot_bytes} bytes", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def exact_tokens() -> Figure:
    """KL by the number of tokens kept exact: the newest (window) and the first (sinks)."""
    kl = defaultdict(list)
    for row in read("quality/smollm2-levers.csv"):
        kl[row["configuration"]].append(float(row["kl"]))
    figure, axes = pyplot.subplots(1, 2, figsize=(8.5, 2.8), sharey=True, layout="constrained")
    for axis, cases, title in zip(
        axes, (WINDOWS, SINKS), ("window: newest tokens, 4 sinks", "sinks: first tokens, window 128"), strict=True
    ):
        at = range(len(cases))
        means = [np.mean(kl[name]) for name in cases.values()]
        axis.bar(at, means, color=[KEY if name == "all" else GREY for name in cases.values()], width=0.7)
        for i, mean in zip(at, means, strict=True):
            axis.text(i, mean, f"{mean:.4f}", ha="center", va="bottom", fontsize=7)
        axis.set(xticks=list(at), xticklabels=list(map(str, cases)), title=title, xlabel="tokens kept exact")
    axes[0].set_ylabel("KL from bf16, nats")
    axes[0].set_ylim(0, 0.028)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "coordinates": coordinates,
    "errors": errors,
    "page": page,
    "exact_tokens": exact_tokens,
}


def error_table() -> str:
    """Errors as a markdown table, a row for each codec."""
    lines = ["| Codec | levels | table | random vectors | keys | values |", "|---|---|---:|---:|---:|---:|"]
    of = defaultdict(dict)
    for row in read("codec/errors.csv"):
        of[row["kind"], row["bits"], row["value_codec"], row["levels"], row["table_mse"]][row["vectors"]] = row["error"]
    for (kind, bits, value_codec, levels, table), error in of.items():
        call = f"Codec({HEAD_SIZE}, {bits}" + (f', "{kind}"' if kind == "value" else "")
        call += f', "{value_codec}")' if value_codec != "scalar" else ")"
        numbers = [f"{float(x):.3g}" for x in (table, error["random"], error["keys"], error["values"])]
        lines.append(f"| `{call}` | {levels} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw(folder: Path) -> list[Path]:
    """Writes every figure as SVG, the same bytes from the same rows."""
    matplotlib.rcParams.update({"svg.hashsalt": "powerquant", "svg.fonttype": "none", "axes.titlesize": 9, "font.size": 8})
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in FIGURES.items():
        figure = make()
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    for path in draw(parser.parse_args().folder):
        print(path)
    print(error_table())


if __name__ == "__main__":
    main()
