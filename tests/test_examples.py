"""Every script of examples/ runs as its first lines say, on the embedded model, and prints what it is about."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRINTS = {
    "codec.py": ["4 bits: 66 bytes a vector instead of 512"],
    "engine.py": ["Paris", "KV cache"],
    "one_prompt_several_answers.py": ["attention reads the packed pages", "Alice: red", "Bob: blue", "Carol: green"],
    "patch_a_model.py": ["LlamaForCausalLM: 30 of 30 layers packed", "Paris", "attention reads the packed pages"],
    "serve_and_chat.py": ["Paris", "Rome", "POWERQUANT: keys 4 bits, values 2 bits"],
}

# the one that needs the sparse engine runs in tests/sparse, where that is built
SPARSE = "sparse_model.py"
VLLM = "serve_and_chat.py"


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTS, SPARSE}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.vllm if name == VLLM else ()) for name in sorted(PRINTS)]
)
def test_example(name):
    if name == VLLM:
        pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = " ".join(done.stdout.split())
    for text in PRINTS[name]:
        assert text in printed, done.stdout
