"""docs/transformers.md: its code runs and prints what stands there, and the tests it names exist."""

import re

import pytest

pytest.importorskip("transformers")

from pages import DOCS, check_python  # noqa: E402


def test_python_prints_what_the_page_says():
    assert check_python("docs/transformers.md") >= 6


def test_what_it_names_is_there():
    page = (DOCS / "transformers.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)", page):
        assert (DOCS.parent / path).is_file(), path
    for target in re.findall(r"\]\(([\w./]+\.md)\)", page):
        assert (DOCS / target).is_file(), target
