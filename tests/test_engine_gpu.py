"""Engine and the command line on a GPU, with the embedded model: what they hold of its memory, and the same answers."""

import json
import subprocess
import sys

import pytest
import torch

from vllm_powerquant import Codec, Engine
from vllm_powerquant.compat.turboquant import TurboQuantMSE
from vllm_powerquant.sparse.protocols import Prompt

pytestmark = pytest.mark.gpu

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPT = "The capital of France is"
LONG = "Once there was a ship that sailed along the coast, and its captain told of every harbour. " * 40


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained(backend="transformers") as engine:
        yield engine


def weights(engine: Engine) -> int:
    return sum(x.nbytes for x in engine._backend.model.parameters())


def test_it_is_on_the_gpu_and_tells_of_its_memory(engine):
    result = engine.generate_with_metrics(LONG, max_tokens=20, temperature=0)
    assert engine._backend.device.type == "cuda" and result.attention == "fused"
    assert weights(engine) <= result.gpu_memory_before <= result.gpu_memory_peak
    # what is held afterwards: the answer's cache, and what a GPU's kernels keep for all
    assert weights(engine) <= result.gpu_memory_after <= result.gpu_memory_peak
    assert result.kv_bytes < result.gpu_memory_peak - weights(engine)
    assert any(name == "GPU memory" for name, _ in result.rows())
    again = [engine.generate_with_metrics(LONG, max_tokens=20, temperature=0) for _ in range(4)]
    # nothing is left behind by an answer
    assert len({x.gpu_memory_before for x in again[1:]}) == 1 and len({x.text for x in again}) == 1


def test_answers(engine):
    assert engine.generate(PROMPT, **GREEDY).startswith(" Paris")
    stream = engine.generate_stream(PROMPT, **GREEDY)
    assert "".join(stream) == stream.result.text == engine.generate(PROMPT, **GREEDY)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = engine._backend.encode(Prompt(messages=messages))
    assert engine.chat(messages, **GREEDY) == engine.generate(ids, **GREEDY) != ""
    texts = [engine.generate("Hello", seed=seed, temperature=1.0, max_tokens=8) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_closing_gives_the_memory_back():
    before = torch.cuda.memory_allocated()
    engine = Engine.from_pretrained(backend="transformers", compress=False)
    result = engine.generate_with_metrics(PROMPT, **GREEDY)
    held = weights(engine)
    assert result.attention == "exact" and torch.cuda.memory_allocated() - before >= held
    engine.close()
    # cuBLAS keeps a workspace
    assert torch.cuda.memory_allocated() - before < held / 4


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_few_bits(engine, bits):
    pytest.importorskip("bitsandbytes")
    with Engine.from_pretrained(backend="transformers", **{f"load_in_{bits}bit": True}) as few:
        assert weights(few) < (0.8 if bits == 8 else 0.7) * weights(engine)  # the embedding stays as it is
        result = few.generate_with_metrics(PROMPT, **GREEDY)
    assert "Paris" in result.text and result.attention == "fused"


def test_codec_on_the_gpu():
    codec, vectors = Codec(128, 4), torch.randn(5, 3, 128, generator=torch.Generator().manual_seed(0))
    packed, there = codec.encode(vectors), codec.encode(vectors.cuda())
    back, want = codec.decode(there), codec.decode(packed)
    # a coordinate between two centroids may fall to either side
    assert back.is_cuda and ((back.cpu() - want).abs() < 1e-3).float().mean() > 0.99
    assert (back.cpu() - vectors).norm() < 0.12 * vectors.norm()
    turbo = TurboQuantMSE(128, 4, "cuda")
    found = turbo.dequantize(*turbo.quantize(vectors.cuda()))
    assert found.is_cuda and (found.cpu() - vectors).norm() < 0.12 * vectors.norm()


def powerquant(*arguments: str, text: str | None = None) -> str:
    command = [sys.executable, "-m", "vllm_powerquant.cli", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_verbs():
    result = json.loads(
        powerquant("generate", PROMPT, "--json", "--greedy", "--max-tokens", "8", "--backend", "transformers")
    )
    assert result["gpu_memory_peak"] > 0 and result["text"].startswith(" Paris")
    compared = json.loads(powerquant("compare", "--json", "--max-tokens", "16"))
    assert 0 < compared["kl"] < 0.2
    assert "cuda" in powerquant("doctor").lower()
    assert "France" in powerquant("chat", "--backend", "transformers", text="Say: the capital of France.\n")
