"""Engine on the sparse engine: a real one with a tiny model."""

import pytest

from vllm_powerquant import Engine
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def open_engine(engine_server, tiny_model):
    """Engines of the tiny model, closed in the end; its heads are too small for the packed cache."""
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POWERQUANT_ENGINE", str(engine_server))

        def get(**options) -> Engine:
            opened.append(Engine.from_pretrained(str(tiny_model), threads=1, **options))
            return opened[-1]

        yield get
        for engine in opened:
            engine.close()


@pytest.fixture(scope="module")
def engine(open_engine):
    return open_engine(compress=False, slots=4)


def test_file_gets_the_sparse_engine(engine):
    result = engine.generate_with_metrics("Hello", **GREEDY)
    assert (engine.backend, result.backend, result.model) == ("sparse", "sparse", "tiny.gguf")
    assert (result.completion_tokens, result.finish_reason, result.attention) == (12, "length", "exact")
    assert 0 < result.seconds_to_first_token < result.seconds and result.prompt_tokens > 0
    # what it does not tell
    assert result.kv_bytes is result.compression_ratio is result.gpu_memory_peak is None


def test_stream_batch_and_chat_agree(engine):
    prompts = ["Hello", "The quick brown fox", "naïve", "x", "1234", "def main"]
    alone = [engine.generate(prompt, **GREEDY) for prompt in prompts]
    assert engine.generate(prompts, **GREEDY) == alone
    stream = engine.generate_stream("Hello", **GREEDY)
    assert "".join(stream) == alone[0] == stream.result.text
    assert engine.chat(HELLO, **GREEDY) == "".join(engine.chat_stream(HELLO, **GREEDY))


def test_sampling_and_stop(engine):
    options = {"max_tokens": 10, "temperature": 1.0, "top_p": 1.0, "ignore_eos": True}
    first, again, other = (engine.generate("Hello", seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    whole = engine.generate("Hello", **GREEDY)
    result = engine.generate_with_metrics("Hello", stop=whole[3:5], **GREEDY)
    assert result.finish_reason == "stop" and whole.startswith(result.text) and len(result.text) <= 3


def test_one_refused_prompt_ends_the_batch(engine):
    with pytest.raises(PowerQuantConfigError, match="outside the vocabulary"):
        engine.generate(["Hello", [10**6]], temperature=0, max_tokens=8000, ignore_eos=True)
    assert engine.generate("Hello", **GREEDY)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"key_bits": 3}, PowerQuantUnsupportedError, "packs keys in 4 and values in 2 bits .*, got key_bits 3"),
        ({"residual_tokens": 0}, PowerQuantUnsupportedError, "got residual_tokens 0"),
        ({"protected_layers": [1]}, PowerQuantUnsupportedError, "as a list is for backend transformers"),
        ({"dtype": "float32"}, PowerQuantConfigError, "dtype is the file's"),
        ({"device": "cuda"}, PowerQuantConfigError, "device is for backend transformers"),
        ({"load_in_4bit": True}, PowerQuantConfigError, "load_in_4bit is for checkpoints"),
        ({"slotz": 3}, PowerQuantConfigError, r"unknown option of backend sparse: slotz \(did you mean slots\?\)"),
    ],
)
def test_options_that_it_lacks_are_refused(open_engine, options, error, text):
    with pytest.raises(error, match=text):
        open_engine(**options)


def test_packed_cache_on_the_embedded_model(engine_server, monkeypatch):
    monkeypatch.setenv("POWERQUANT_ENGINE", str(engine_server))
    with Engine.from_pretrained(backend="sparse", key_bits=4, value_bits=2, context=512, slots=1) as engine:
        result = engine.generate_with_metrics("The capital of France is", temperature=0, max_tokens=4)
        assert result.text.startswith(" Paris") and result.attention == "fused"
