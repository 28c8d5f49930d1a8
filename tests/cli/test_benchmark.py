"""`powerquant benchmark` on the embedded model."""

import json

import pytest

from vllm_powerquant.cli import main

pytest.importorskip("transformers")

SMALL = ["--quick", "--tokens", "200", "--positions", "8"]


@pytest.mark.slow
def test_five_configurations(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "quality.svg"
    assert main(["benchmark", *SMALL, "--json", "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    rows = {row["configuration"]: row for row in report["rows"]}
    assert list(rows) == ["K8/V8", "K4/V4", "K4/V2", "K4/V2 trellis", "K3/V2 trellis"]
    assert (report["texts"], report["needles"]) == (3, 5)
    # wider codes lose less and hold more
    assert rows["K8/V8"]["kl"] < rows["K4/V2"]["kl"] and 0 < rows["K8/V8"]["kl"] < 0.02
    held = [rows[name]["bytes_per_token"] for name in ("K8/V8", "K4/V4", "K4/V2", "K3/V2 trellis")]
    assert held == sorted(held, reverse=True) and rows["K8/V8"]["ratio"] < rows["K4/V2"]["ratio"]
    # 199 tokens in whole sub-pages of 64, 30 layers of 3 heads, 64 coordinates of 16 bits in both or of 4 and 2
    assert held[0] - held[2] == pytest.approx(256 * 30 * 3 * 64 * (16 - 6) / 8 / 199)
    assert all(row["kl_least"] <= row["kl"] <= row["kl_most"] for row in rows.values())
    exact = report["uncompressed"]
    # 30 layers, keys and values of 3 heads of 64, 2 bytes each
    assert exact["bytes_per_token"] == 30 * 2 * 3 * 64 * 2 and exact["needles_found"] == 5
    assert abs(rows["K8/V8"]["perplexity"] / exact["perplexity"] - 1) < 0.05
    drawn = plot.read_text()
    assert drawn.lstrip().startswith("<?xml") and "<svg" in drawn and f"drew {plot}" in err


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--plot", "x.pdf"], "a plot must be a file ending in .svg or .png, got x.pdf"),
        (["--plot", "/nowhere/x.svg"], "cannot write /nowhere/x.svg: give a file in an existing folder"),
        (["--tokens", "1"], "2 prompt tokens, 1 position and 1 segment are the least, got 1, 128 and 2"),
        (["--tokens", "9000"], "more than the model's context of 8192; ask for fewer"),
        (["--model", "/nothing"], "there is no file or folder /nothing"),
    ],
)
def test_refusals_come_before_the_work(capsys, flags, text):
    assert main(["benchmark", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == 1


def test_table(capsys):
    from vllm_powerquant.benchmark import QUICK, Report, Row
    from vllm_powerquant.cli.benchmark import _text

    row = Row("K4/V2", 0.0071, 0.0061, 0.0083, 0.938, 19.04, 4, 0.2, 11543.2, 1.996)
    exact = Row("uncompressed", 0, 0, 0, 1, 19.11, 5, 0.1, 23040, 1)
    lines = _text(Report("model", QUICK, 3, 5, exact, [row])).splitlines()
    assert lines[-1].split() == ["K4/V2", "0.0071", "(0.0061", "to", "0.0083)", "93.8%", "19.04", "4/5", "11,543", "2.00x"]
    assert len(lines[-1]) == len(lines[-2])
