"""Pages whose code is run."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """(kind, text) of a page's fenced blocks; page: from the repository's root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def check_python(page: str) -> int:
    """Run a page's Python, one block after the other in one namespace: each prints what the text block behind it says.

    Returns: how many blocks ran
    """
    names, printed, count = {}, "", 0
    for kind, text in blocks(page):
        if kind == "python":
            assert printed == "", "a block's output is not on the page"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, page, "exec"), names)
            printed, count = out.getvalue(), count + 1
        elif kind == "text":
            assert printed == text
            printed = ""
    assert printed == ""
    return count
