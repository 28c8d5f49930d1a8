"""The verb serve."""

from __future__ import annotations

import argparse
import shlex

from .common import progress_lines, say


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "serve",
        help="serve a model by OpenAI's protocol",
        description="A file in GGUF or PowerInfer format (whatever its name) is served by the sparse engine, a Hugging Face "
        "checkpoint by vLLM with --attention-backend POWERQUANT. The process becomes that server: signals and exit status "
        "are its own.",
        usage="powerquant serve [-h] [--dry-run] MODEL [the server's flags ...]",
        allow_abbrev=False,
    )
    verb.add_argument("--dry-run", action="store_true", help="print the server's command instead (before MODEL)")
    verb.add_argument("model", metavar="MODEL", help="file, checkpoint folder or name on the Hugging Face hub")
    verb.add_argument("flags", nargs=argparse.REMAINDER, help="passed on to the server, e.g. --host 0.0.0.0 --port 8000")
    verb.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from ..serve import choose, command, replace_process

    choice = choose(args.model)
    words = command(choice, args.flags, say=progress_lines(), build=not args.dry_run)
    if args.dry_run:
        print(shlex.join(words))
        return 0
    say(f"{args.model} is {choice.reason}; starting: {shlex.join(words)}")
    replace_process(words)
    return 1
