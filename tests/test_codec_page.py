"""docs/codec.md: its code runs and prints what stands there, its table and figures are those of the rows."""

import importlib.util
import re
import shlex

import pytest

from pages import DOCS, blocks, check_python
from vllm_powerquant.cli import main

PAGE = (DOCS / "codec.md").read_text(encoding="utf-8")
BLOCKS = blocks("docs/codec.md")


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("codec_figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python_prints_what_the_page_says():
    assert check_python("docs/codec.md") >= 4


def test_commands_print_what_the_page_says(capsys):
    shown = [text for kind, text in BLOCKS if kind == "console"]
    assert shown
    for text in shown:
        command, _, want = text.partition("\n")
        program, *words = shlex.split(command.removeprefix("$ "))
        assert program == "powerquant" and main(words) == 0
        assert capsys.readouterr().out == want


def test_table_is_that_of_the_rows(figures):
    assert figures.error_table() in PAGE


def test_figures_are_drawn_and_shown(figures, tmp_path):
    paths = figures.draw(tmp_path)
    shown = re.findall(r"!\[[^]]+\]\((figures/\w+\.svg)\)", PAGE)
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in paths)
    for path in paths:
        assert path.stat().st_size > 5_000 and (DOCS / "figures" / path.name).is_file()
        # the texts of a figure show that it was drawn from today's rows and levels
        texts = [re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text()) for file in (path, DOCS / "figures" / path.name)]
        assert texts[0] and texts[0] == texts[1]


def test_links_lead_somewhere():
    for target in re.findall(r"benchmarks/results/[\w/.-]+\.csv", PAGE):
        assert (DOCS.parent / target).is_file(), target
    for target in re.findall(r"`((?:attention|codebooks)/[\w.]*)`", PAGE):
        assert (DOCS.parent / "src" / "vllm_powerquant" / target).exists(), target
