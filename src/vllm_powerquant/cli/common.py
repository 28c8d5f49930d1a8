"""What verbs share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ..errors import PowerQuantConfigError


def say(line: str) -> None:
    """A line on stderr; on a terminal in the place of a progress line."""
    over = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{over}powerquant: {line}", file=sys.stderr, flush=True)


def stdin_is_terminal() -> bool:
    """Raises: PowerQuantConfigError if there is no stdin"""
    if sys.stdin is None:
        raise PowerQuantConfigError("stdin is closed; give it something to read, e.g. < /dev/null")
    return sys.stdin.isatty()


def progress_lines() -> Callable[[str], None]:
    """A function that prints lines over each other on a terminal, else one every 10 s; an empty one wipes the last."""
    terminal = sys.stderr.isatty()
    printed = float("-inf")

    def show(line: str) -> None:
        nonlocal printed
        if terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif line and time.monotonic() >= printed + 10:
            printed = time.monotonic()
            say(line)

    return show


def coloured(text: str, code: str, stream: TextIO) -> str:
    """ANSI colour on a terminal, unless NO_COLOR is set (no-color.org) or the terminal has none; code as in "1;32"."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Meanwhile a terminal's stderr shows the text; the line is empty again afterwards."""
    terminal = sys.stderr.isatty()
    if terminal:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
