"""What verbs share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def say(line: str) -> None:
    """A line on stderr; on a terminal in the place of a progress line."""
    over = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{over}powerquant: {line}", file=sys.stderr, flush=True)


def progress_lines() -> Callable[[str], None]:
    """A function that prints lines over each other on a terminal, else one every 10 s."""
    terminal = sys.stderr.isatty()
    printed = float("-inf")

    def show(line: str) -> None:
        nonlocal printed
        if terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= printed + 10:
            printed = time.monotonic()
            say(line)

    return show
