"""Nothing is compiled after the warm-up, whatever the batch: Triton's own specialisation, counted for a Hopper target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "shape",
    ["128 32 8 256 1 1 0", "128 32 8 1024 1 1 0", "64 9 3 64 4 1 0", "128 32 8 8 4 0 0", "128 32 8 8 4 1 1"],
    ids=["256-requests", "1024-requests", "drafts", "all-packed", "calibrated"],
)
def test_warm_up_covers_every_batch(shape):
    script = Path(__file__).parent / "specialisations.py"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, script, *shape.split()], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    warm, after = map(int, result.stdout.split())
    assert warm == after > 0
