"""examples/sparse_model.py runs: a SiLU model becomes a sparse one, which the engine serves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sparse_model.py"


@pytest.mark.slow
def test_sparse_model(engine_build, tmp_path):
    environment = os.environ | {"POWERQUANT_ENGINE": str(engine_build / "powerinfer-server"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares, answer = done.stdout.split("\n", 1)
    active, predicted, recall = map(float, re.findall(r"([\d.]+)%", shares))
    # what is predicted holds nearly all of what is active, and leaves neurons out
    assert 15 < active < 30 and active < predicted < 80 and recall > 98
    # so little training loses facts, not sentences
    assert answer.startswith("The capital of France is")
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"PWRI"
