"""`powerquant benchmark`: what five settings of the compressed cache cost a model in quality, and what they save.

Figures of quality.py on the built-in texts' half that nothing was tuned on: the prompt's keys and values are exact, true
tokens follow in chunks of 16. benchmarks/bench_quality.py measures more, with intervals over rotations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import quality
from .engine.choose import Settings, find_source
from .engine.transformers_backend import TransformersBackend
from .errors import PowerQuantConfigError, PowerQuantError
from .hf import PowerQuantCache

# the presets of config.py are K4/V4 (quality), K4/V2 (balanced) and K3/V2 trellis (max-context)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "K8/V8": {"key_bits": 8, "value_bits": 8},
    "K4/V4": {"key_bits": 4, "value_bits": 4},
    "K4/V2": {"key_bits": 4, "value_bits": 2},
    "K4/V2 trellis": {"key_bits": 4, "value_bits": 2, "value_codec": "trellis"},
    "K3/V2 trellis": {"key_bits": 3, "value_bits": 2, "value_codec": "trellis"},
}
CHUNK = 16
PLOT_FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    prompt_tokens: int = 1024
    positions: int = 128  # tokens decoded after each prompt
    segments: int = 2  # of each text


QUICK = Size(prompt_tokens=512, positions=32, segments=1)


@dataclass(frozen=True)
class Row:
    """One configuration; means over texts."""

    configuration: str
    kl: float  # to the uncompressed cache, nats a token
    kl_least: float  # of one text
    kl_most: float
    top1: float  # share of positions with the same most likely token
    perplexity: float
    needles_found: int  # of quality.NEEDLE_DEPTHS
    needle_nll: float  # nats a token of the answers
    bytes_per_token: float  # held at the prompt's length, exact tokens among them
    ratio: float  # uncompressed bytes over those held


@dataclass(frozen=True)
class Report:
    model: str
    size: Size
    texts: int
    needles: int
    uncompressed: Row
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def benchmark(
    model: str | None = None,
    size: Size | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    bar: Callable[..., Iterable] = lambda items, name: items,
) -> Report:
    """Args:   bar: wraps what is iterated over, with a name: for progress
    Raises: PowerQuantConfigError if there is no such model, or a size does not fit its context or the texts
    """
    size = size or Size()
    if size.prompt_tokens < 2 or size.positions < 1 or size.segments < 1:
        raise PowerQuantConfigError(
            f"2 prompt tokens, 1 position and 1 segment are the least, got {size.prompt_tokens}, {size.positions} and "
            f"{size.segments}"
        )
    backend = TransformersBackend(
        Settings.of(
            find_source(model, "transformers"),
            compress=False,
            load_in_4bit=False,
            load_in_8bit=False,
            dtype=dtype,
            device=device,
            options={},
        )
    )
    if backend.context is not None and size.prompt_tokens + size.positions > backend.context:
        raise PowerQuantConfigError(
            f"{size.prompt_tokens} prompt tokens and {size.positions} positions are more than the model's context of "
            f"{backend.context}; ask for fewer"
        )
    tokenizer = backend.tokenizer
    # texts are longer than any context: only cut pieces of them are given to the model
    tokenizer.model_max_length = 10**9
    prefix = tokenizer("")["input_ids"][:1]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    part, length = quality.SPLITS["report"], size.prompt_tokens + size.positions - len(prefix)
    ids = {name: encode(text) for name, text in quality.read_texts().items()}
    cuts = [
        (f"{name} {i}", run)
        for name, of_text in ids.items()
        for i, run in enumerate(quality.cut(of_text, part, length, size.segments, name))
    ]
    segments = [
        quality.make_segment(backend.model, name, [*prefix, *run], size.prompt_tokens, CHUNK)
        for name, run in bar(cuts, "uncompressed")
    ]
    filler = ids["prose"][round(len(ids["prose"]) * part[0]) :]
    needles = quality.make_needles(backend.model, encode, filler, size.prompt_tokens, prefix)
    exact = sum(keys.nbytes + values.nbytes for keys, values in segments[0].exact) / len(segments[0].prompt)
    rows = [_measure(backend, name, options, segments, needles, exact, bar) for name, options in CONFIGURATIONS.items()]
    found = [quality.find_needle(backend.model, needle, None) for needle in needles]
    uncompressed = Row(
        "uncompressed",
        kl=0.0,
        kl_least=0.0,
        kl_most=0.0,
        top1=1.0,
        perplexity=_uncompressed_perplexity(segments),
        needles_found=sum(hit for hit, _ in found),
        needle_nll=statistics.fmean(nll for _, nll in found),
        bytes_per_token=exact,
        ratio=1.0,
    )
    return Report(backend.settings.source.name, size, len(segments), len(needles), uncompressed, rows)


def _uncompressed_perplexity(segments: list[quality.Segment]) -> float:
    nll = [float(-s.logprobs.gather(1, s.continuation[1:, None]).mean()) for s in segments]
    return math.exp(statistics.fmean(nll))


def _measure(
    backend: TransformersBackend,
    name: str,
    options: dict[str, Any],
    segments: list[quality.Segment],
    needles: list[quality.Needle],
    exact: float,
    bar: Callable[..., Iterable],
) -> Row:
    def make() -> PowerQuantCache:
        return PowerQuantCache(backend.model, **options)

    metrics, found, work = [], [], [*segments, *needles]
    for item in bar(work, name):
        if isinstance(item, quality.Segment):
            metrics.append(quality.measure(backend.model, item, make, CHUNK))
        else:
            found.append(quality.find_needle(backend.model, item, make()))
    report = quality.filled(make(), segments[0].exact).memory_report()
    # decoded copies are how this measures, not what a cache has to hold
    held = (report.total_bytes - report.buffer_bytes) / len(segments[0].prompt)
    perplexity, _ = quality.perplexity(metrics)
    kl = [m.kl for m in metrics]
    return Row(
        name,
        kl=statistics.fmean(kl),
        kl_least=min(kl),
        kl_most=max(kl),
        top1=statistics.fmean(m.top1 for m in metrics),
        perplexity=perplexity,
        needles_found=sum(hit for hit, _ in found),
        needle_nll=statistics.fmean(nll for _, nll in found),
        bytes_per_token=held,
        ratio=exact / held,
    )


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises: PowerQuantConfigError, PowerQuantError if matplotlib is not installed"""
    if path.suffix.lower() not in PLOT_FORMATS:
        raise PowerQuantConfigError(f"a plot must be a file ending in {' or '.join(PLOT_FORMATS)}, got {path}")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise PowerQuantConfigError(f"cannot write {path}: give a file in an existing folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PowerQuantError("plots need matplotlib, which is not installed; run: pip install matplotlib") from None


def plot(report: Report, path: Path) -> None:
    """KL against bytes of a token, a point a configuration, the spread over texts as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    most = max(row.bytes_per_token for row in report.rows)
    for row in report.rows:
        # the same bytes as the scalar code: beside it
        trellis = "trellis" in row.configuration
        x = row.bytes_per_token - trellis * 0.006 * most
        spread = [[row.kl - row.kl_least], [row.kl_most - row.kl]]
        axes.errorbar(
            x, row.kl, yerr=spread, fmt="s" if trellis else "o", color="#6b0f1a" if trellis else "#c1272d", capsize=3
        )
        side = {"xytext": (-7, -3), "ha": "right"} if trellis else {"xytext": (7, -3), "ha": "left"}
        axes.annotate(row.configuration, (x, row.kl), textcoords="offset points", **side)
    axes.set_yscale("log")
    axes.set_xlim(0.7 * min(row.bytes_per_token for row in report.rows), 1.1 * most)
    axes.set_xlabel(f"bytes a token held at {report.size.prompt_tokens} tokens, exact ones among them")
    axes.set_ylabel("KL to the uncompressed cache, nats a token")
    uncompressed = f"uncompressed: {report.uncompressed.bytes_per_token:,.0f} bytes a token"
    axes.set_title(f"{report.model}, {report.texts} texts x {report.size.positions} tokens ({uncompressed})", fontsize=10)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except OSError as error:
        raise PowerQuantConfigError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        pyplot.close(figure)
