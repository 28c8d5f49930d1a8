"""The verb compare."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from ..errors import PowerQuantConfigError
from .common import coloured, progress_lines
from .engine_options import EXIT_CODES, add_cache, add_model, cache_options, quiet
from .generate import read_prompt

if TYPE_CHECKING:
    from ..compare import Comparison

_EXAMPLES = """examples:
  powerquant compare
  powerquant compare --prompt-tokens 2048 --max-tokens 128 --key-bits 3
  powerquant compare --chat "Explain rainbows." --residual-tokens 0
  powerquant compare --json - < long-prompt.txt | jq .kl
"""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "compare",
        help="answer one prompt with an uncompressed and a compressed cache, side by side",
        description="Greedy answers of Transformers, where they part, the KL divergence along the uncompressed answer, "
        "memory and speed. Tokens in the exact window (--residual-tokens, --sink-tokens) are not compressed: give a long "
        "prompt.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("prompt", nargs="?", metavar="PROMPT", help="text; -: all of stdin (default: a built-in text)")
    verb.add_argument("--chat", action="store_true", help="the prompt is what a user says, rendered by the model's template")
    verb.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of the built-in text (default: 512)")
    verb.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of the answers (default: 64)")
    verb.add_argument("--json", action="store_true", help="print the comparison as JSON, and no progress")
    add_model(verb, "checkpoint folder or name")
    verb.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto", help="of the weights")
    verb.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add_cache(verb)
    verb.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    if args.max_tokens < 1:
        raise PowerQuantConfigError(f"--max-tokens must be 1 or more, got {args.max_tokens}")
    quiet()
    from ..compare import compare

    show = (lambda what: None) if args.json else progress_lines()
    done = compare(
        args.model,
        prompt,
        max_tokens=args.max_tokens,
        prompt_tokens=args.prompt_tokens,
        chat=args.chat,
        dtype=args.dtype,
        device=args.device,
        progress=lambda what: show(f"{what} ..."),
        **cache_options(args),
    )
    if args.json:
        print(json.dumps(done.to_dict()))
        return 0
    show("")
    _print(done)
    return 0


def _print(done: Comparison) -> None:
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 160))
    column = (width - 3) // 2
    exact, compressed = done.exact, done.compressed
    print(f"{exact.model}: {exact.prompt_tokens} tokens of prompt, {exact.completion_tokens} of answer, greedy\n")
    title = f"{'uncompressed':<{column}} | compressed"
    print(coloured(title, "1", sys.stdout))
    print("-" * column + "-+-" + "-" * column)
    left, right = (_wrapped(result.text, column) for result in (exact, compressed))
    for a, b in itertools.zip_longest(left, right, fillvalue=""):
        line = f"{a:<{column}} | {b}"
        print(line if a == b else coloured(line, "33", sys.stdout))
    print()
    print(_where(done))
    print(
        f"KL of the compressed cache along the uncompressed answer: {done.kl:.4f} nats a token (most {done.kl_max:.3f}), "
        f"the same most likely token at {done.top1:.0%} of them"
    )
    print()
    print(f"{'':16}{'uncompressed':>16}{'compressed':>16}")
    from ..engine.result import beside

    ratio = compressed.compression_ratio
    rows = (
        ("KV cache", _mb(exact.kv_bytes), _mb(compressed.kv_bytes), beside(ratio) if ratio else ""),
        ("first token", _seconds(exact.seconds_to_first_token), _seconds(compressed.seconds_to_first_token), ""),
        ("decoding", _rate(exact), _rate(compressed), f"{done.speed:.2f} times" if done.speed else ""),
        ("GPU memory", _mb(exact.gpu_memory_peak), _mb(compressed.gpu_memory_peak), "at the peak"),
    )
    for name, a, b, note in rows:
        if a or b:
            print(f"{name:16}{a:>16}{b:>16}   {note}".rstrip())
    print(
        f"\ntokens in the compressed cache: {compressed.tokens_compressed} packed, {compressed.tokens_exact} exact; "
        f"attention {compressed.attention}"
    )
    if compressed.tokens_compressed == 0:
        print("nothing was compressed: all tokens are in the exact window. Give a longer prompt, or --residual-tokens 0")


def _where(done: Comparison) -> str:
    place = done.first_difference
    if place is None:
        return "the answers are the same, token by token"
    said = [json.dumps(text, ensure_ascii=False) if text else "its end" for text in (place.exact, place.compressed)]
    return f"first difference: token {place.token + 1} of the answer, {said[0]} beside {said[1]}"


def _wrapped(text: str, width: int) -> list[str]:
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, width, replace_whitespace=False, drop_whitespace=True) or [""]
    return lines


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} MB"


def _seconds(value: float) -> str:
    return f"{value:.3f} s"


def _rate(result) -> str:
    return f"{result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else ""
