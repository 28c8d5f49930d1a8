"""The verb generate."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ..errors import PowerQuantConfigError
from .common import stdin_is_terminal, waiting
from .engine_options import EXIT_CODES, add_engine, add_sampling, open_engine, sampling

if TYPE_CHECKING:
    from ..engine import GenerationResult, TextStream

_EXAMPLES = """examples:
  powerquant generate "The capital of France is" --greedy --max-tokens 20
  powerquant generate --chat --stream "Explain rainbows to a child."
  powerquant generate --metrics < long-prompt.txt
  powerquant generate --json --model model.gguf "Once upon a time" | jq .tokens_per_second
"""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "generate",
        help="continue a prompt, with a compressed KV cache",
        description="Prints the answer on stdout, and nothing else there.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue (default, or -: all of stdin)")
    verb.add_argument("--chat", action="store_true", help="the prompt is what a user says, rendered by the model's template")
    verb.add_argument(
        "--stream", action="store_true", help="print the answer as it comes; with --json a line for each piece"
    )
    verb.add_argument("--json", action="store_true", help="print the answer and its figures as JSON")
    verb.add_argument("--metrics", action="store_true", help="report the figures on stderr")
    add_engine(verb)
    add_sampling(verb, max_tokens=256)
    verb.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    options = sampling(args)
    from ..engine.sampling import Sampling

    # refused before a model is loaded
    Sampling.of(options)
    prompt = read_prompt(args.prompt)
    with open_engine(args) as engine:
        if args.chat:
            stream = engine.chat_stream([{"role": "user", "content": prompt}], **options)
        else:
            stream = engine.generate_stream(prompt, **options)
        result = _streamed(stream, args.json) if args.stream else _whole(stream)
        if args.json:
            print(json.dumps(result.to_dict()), flush=True)
        elif not args.stream:
            print(result.text, flush=True)
        if args.metrics:
            result.print_report(sys.stderr)
    return 0


def _streamed(stream: TextStream, as_json: bool) -> GenerationResult:
    for piece in stream:
        print(json.dumps({"piece": piece}) if as_json else piece, end="\n" if as_json else "", flush=True)
    if not as_json:
        print(flush=True)
    return stream.result


def _whole(stream: TextStream) -> GenerationResult:
    with waiting("generating ..."):
        return stream.finish()


def read_prompt(given: str | None) -> str:
    """The argument, or stdin without its last line's end. Raises: PowerQuantConfigError if there is neither"""
    if given is not None and given != "-":
        return given
    if stdin_is_terminal() and given is None:
        raise PowerQuantConfigError('give a prompt: powerquant generate "Once upon a time", or on stdin')
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PowerQuantConfigError(f"stdin is not UTF-8 text (byte {error.start}); convert it first") from None
    return text.removesuffix("\n").removesuffix("\r")
