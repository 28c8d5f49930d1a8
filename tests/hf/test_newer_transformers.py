"""The tests of this folder with the Transformers that one gets without vLLM, which asks for an older one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NEWER = Path(sys.prefix) / "newer-transformers"  # where quickstart.py installs it
TESTS = ("test_patch.py", "test_dynamic_cache_behaviours.py", "test_cache.py", "test_architectures.py")


@pytest.mark.skipif(not NEWER.is_dir(), reason=f"there is no {NEWER}: quickstart.py installs it")
def test_the_same_holds():
    here = Path(__file__).parent
    path = os.pathsep.join([str(NEWER), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / name) for name in TESTS)]
    asked = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.strip() >= "5.24"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
