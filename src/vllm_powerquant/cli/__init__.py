"""The `powerquant` command: parses, calls, prints.

Each module listed in FAMILIES has add(verbs), which adds its verbs' parsers; what a verb runs is its parser's default
`run`, args -> exit code. Modules import what they run only when it runs, so that `powerquant --help` is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import PowerQuantError
from . import (
    benchmark,
    calibrate,
    chat,
    codebook,
    compare,
    completion,
    convert,
    doctor,
    generate,
    info,
    predictor,
    relufy,
    serve,
)

# in the order of the help
FAMILIES = (
    generate,
    chat,
    compare,
    benchmark,
    calibrate,
    codebook,
    convert,
    relufy,
    predictor,
    serve,
    info,
    doctor,
    completion,
)

# of every verb; the README's table has the same words
EXIT_CODES = {
    "0": "done; doctor: nothing failed",
    "1": "refused or failed, with one line of reason; doctor: a problem was found",
    "2": "wrong usage; doctor: it could not run",
    "130": "interrupted",
    "141": "nobody reads the output",
}

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    codes = "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="powerquant",
        description="KV-cache compression and sparse inference.",
        epilog=f"exit codes (serve: the server's own):\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for family in FAMILIES:
        family.add(verbs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns: one of EXIT_CODES"""
    args = build_parser().parse_args(argv)
    try:
        with _sigterm_interrupts():
            code = args.run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except PowerQuantError as error:
        print(f"powerquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read it has ended
        return 141
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _drop_output()
        print(f"powerquant: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """Else the interpreter tries to write the rest when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C is: what is half written is removed, instead of left under a passing name."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
