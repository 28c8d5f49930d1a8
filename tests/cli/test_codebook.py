"""powerquant codebook: what it shows is what the package uses; what it builds the package reads."""

import json
import subprocess
import sys

import pytest

from vllm_powerquant.cli import codebook, main
from vllm_powerquant.codebooks import solvers, tables
from vllm_powerquant.codebooks.lloyd_max import solve_lloyd_max
from vllm_powerquant.codebooks.tables import load_codebook


def report(capsys, *words):
    assert main(["codebook", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize(
    "bits, kind", [(2, "lloyd_max"), (3, "lloyd_max"), (4, "lloyd_max"), (2, "uniform"), (8, "uniform"), (2, "trellis")]
)
def test_show(bits, kind, capsys):
    facts = report(capsys, "show", "--head-size", "64", "--bits", str(bits), "--kind", kind)
    book = load_codebook(64, bits, kind)
    assert (facts["head_size"], facts["bits"], facts["kind"], facts["mse"]) == (64, bits, kind, book.mse)
    assert facts["levels"] == list(book.levels) and facts["centroids"] == book.centroids.tolist()
    assert facts["boundaries"] == (None if kind == "trellis" else book.boundaries.tolist())
    assert main(["codebook", "show", "--head-size", "64", "--bits", str(bits), "--kind", kind]) == 0
    text = capsys.readouterr().out
    assert f"{kind} of {bits} bits for head size 64" in text and f"{book.mse:.7g}" in text
    for centroid in book.centroids:
        assert f"{centroid:9.6f}" in text


def test_compare(capsys):
    rows = report(capsys, "compare", "--head-size", "64", "--bits", "2", "3")["rows"]
    by_name = {(row["bits"], row["codebook"]): row for row in rows}
    for bits in (2, 3):
        optimum = solve_lloyd_max(64, bits)[2]
        for name in codebook.SOLVERS:
            row = by_name[bits, name]
            assert row["mse"] == pytest.approx(optimum, rel=1e-6) and row["seconds"] > 0
        shipped = by_name[bits, "shipped uniform"]
        assert shipped["mse"] == load_codebook(64, bits, "uniform").mse and shipped["seconds"] is None
        assert shipped["over_optimum"] == pytest.approx(shipped["mse"] / optimum - 1)
    assert by_name[2, "shipped trellis"]["over_optimum"] < -0.15


def test_compare_prints_a_row_for_each(capsys):
    assert main(["codebook", "compare", "--head-size", "72", "--bits", "4", "--solver", "lloyd_max"]) == 0
    out = capsys.readouterr().out.splitlines()
    # nothing is shipped for 72
    assert len(out) == 3 and out[0] == "head size 72" and out[2].split()[:2] == ["4", "lloyd_max"]


def test_compare_says_what_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(solvers, "can_solve", lambda name: name != "cma_es")
    facts = report(capsys, "compare", "--bits", "2")
    assert facts["left_out"] == {"cma_es": "needs the package cma"}
    assert not any(row["codebook"] == "cma_es" for row in facts["rows"])


def test_solvers_offered_are_those_without_samples():
    assert codebook.SOLVERS == solvers.MSE_SOLVERS
    assert codebook.BITS == tables.BITS and codebook.SOLVED_BITS == solvers.BITS


def test_build_makes_the_shipped_file_and_more(tmp_path, capsys):
    output = tmp_path / "new" / "codebooks.json"
    facts = report(capsys, "build", "-o", str(output))
    assert output.read_bytes() == tables.DATA_FILE.read_bytes()
    assert facts["file"] == str(output) and tuple(facts["head_sizes"]) == tables.supported_head_sizes()


def test_build_adds_head_sizes_that_show_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vllm_powerquant.codebooks.build.HEAD_SIZES", (64,))
    output = tmp_path / "codebooks.json"
    assert report(capsys, "build", "--add", "160", "-o", str(output))["head_sizes"] == [64, 160]
    facts = report(capsys, "show", "--head-size", "160", "--bits", "3", "--file", str(output))
    assert facts["mse"] == pytest.approx(solve_lloyd_max(160, 3)[2], rel=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["show", "--head-size", "72"], "build it with: powerquant codebook build --add 72"),
        (["show", "--file", "/no/such.json"], "cannot read codebooks from /no/such.json: No such file"),
        (["show", "--file", __file__], "it has no codebooks; write one with: powerquant codebook build"),
        (["show", "--kind", "trellis"], "kind 'trellis' is for 2 bits, got 4"),
        (["compare", "--head-size", "2"], "head_size must be an integer of 3 or more, got 2"),
        (["build", "--add", "2"], "a head size is 3 or more, got 2"),
    ],
    ids=lambda value: "-".join(value)[:20] if isinstance(value, list) else "",
)
def test_what_is_refused(words, message, capsys):
    assert main(["codebook", *words]) == 1
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1] and err[-1].startswith("powerquant: ")


def test_a_file_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vllm_powerquant.codebooks.build.HEAD_SIZES", (64,))
    blocked = tmp_path / "file"
    blocked.touch()
    assert main(["codebook", "build", "-o", str(blocked / "x.json")]) == 1
    assert "cannot write" in capsys.readouterr().err and blocked.read_bytes() == b""


def test_without_scipy_show_works_and_compare_says_what_to_install():
    code = (
        "import sys; sys.modules['scipy'] = None; from vllm_powerquant.cli import main; "
        "assert main(['codebook', 'show']) == 0; sys.exit(main(['codebook', 'compare']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "powerquant: codebook compare needs scipy, which is not installed; pip install scipy\n"
