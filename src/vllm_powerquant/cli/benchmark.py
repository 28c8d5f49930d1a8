"""The verb benchmark."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .common import say, waiting
from .engine_options import EXIT_CODES, add_model, quiet

if TYPE_CHECKING:
    from ..benchmark import Report

_EXAMPLES = """examples:
  powerquant benchmark --quick
  powerquant benchmark --plot quality.svg --json > quality.json
  powerquant benchmark --model Qwen/Qwen3-0.6B --tokens 2048
"""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "benchmark",
        help="what five settings of the compressed cache cost a model in quality, and save in memory",
        description="KL divergence to the uncompressed cache, share of equal most likely tokens and perplexity on built-in "
        "texts; five facts hidden in a text and asked for; bytes held. Progress goes to stderr.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(verb, "checkpoint folder or name")
    verb.add_argument("--quick", action="store_true", help="fewer and shorter texts: a first look, in about a minute")
    verb.add_argument("--tokens", type=int, metavar="N", help="of a prompt (default: 1024, --quick: 512)")
    verb.add_argument("--positions", type=int, metavar="N", help="tokens decoded after it (default: 128, --quick: 32)")
    verb.add_argument("--json", action="store_true", help="print the figures as JSON")
    verb.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against bytes, .svg or .png")
    verb.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto", help="of the weights")
    verb.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    verb.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> int:
    quiet()
    with waiting("loading ..."):
        from ..benchmark import QUICK, Size, benchmark, check_plot, plot
    if args.plot is not None:
        check_plot(args.plot)
    size = QUICK if args.quick else Size()
    size = replace(size, prompt_tokens=args.tokens) if args.tokens is not None else size
    size = replace(size, positions=args.positions) if args.positions is not None else size
    report = benchmark(args.model, size, dtype=args.dtype, device=args.device, bar=_bar)
    print(json.dumps(report.to_dict()) if args.json else _text(report))
    if args.plot is not None:
        plot(report, args.plot)
        say(f"drew {args.plot}")
    return 0


def _bar(items: list, name: str) -> Iterable:
    from tqdm import tqdm

    return tqdm(items, name, unit="text", leave=False, disable=None)


def _text(report: Report) -> str:
    size = report.size
    lines = [
        f"{report.model}: {report.texts} texts, prompts of {size.prompt_tokens} tokens, {size.positions} tokens decoded "
        f"after each; {report.needles} facts hidden in {size.prompt_tokens} tokens",
        "",
        f"{'':16}{'KL, nats (least to most)':>29}{'top-1':>8}{'perplexity':>12}{'facts':>7}{'bytes/token':>13}{'':>8}",
    ]
    for row in (report.uncompressed, *report.rows):
        kl = f"{row.kl:.4f} ({row.kl_least:.4f} to {row.kl_most:.4f})" if row is not report.uncompressed else ""
        found = f"{row.needles_found}/{report.needles}"
        lines.append(
            f"{row.configuration:16}{kl:>29}{row.top1:>8.1%}{row.perplexity:>12.2f}{found:>7}{row.bytes_per_token:>13,.0f}"
            f"{row.ratio:>7.2f}x"
        )
    return "\n".join(lines)
