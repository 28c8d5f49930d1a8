"""`powerquant compare` on the embedded model."""

import json

import pytest

from vllm_powerquant.cli import main

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def comparison():
    from vllm_powerquant.compare import compare

    return compare(prompt_tokens=200, max_tokens=12, key_bits=2, residual_tokens=16)


def test_figures(comparison):
    exact, compressed = comparison.exact, comparison.compressed
    assert (exact.attention, compressed.attention) == ("exact", "fused")
    assert exact.prompt_tokens == compressed.prompt_tokens == 200
    assert exact.uncompressed_kv_bytes == exact.kv_bytes > 2 * compressed.kv_bytes
    assert compressed.tokens_compressed > 170
    # two bits a key: more than the fraction of a thousandth that rounding in bf16 leaves
    assert 0.01 < comparison.kl <= comparison.kl_max
    assert 0 <= comparison.top1 <= 1
    place = comparison.first_difference
    assert place is not None and exact.text.startswith(place.text) and compressed.text.startswith(place.text)
    assert place.exact != place.compressed
    assert comparison.speed == pytest.approx(compressed.tokens_per_second / exact.tokens_per_second)


def test_kl_is_that_of_the_distributions_along_the_exact_answer(comparison):
    """By a plain forward pass with the whole text for the exact side, and step by step for the other."""
    import torch

    from vllm_powerquant import Engine, quality

    text = quality.read_texts()["prose"]
    text = text[round(len(text) / 2) :]
    with Engine.from_pretrained(backend="transformers", compress=False) as engine:
        backend = engine._backend
        ids = backend.tokenizer(text[:4000])["input_ids"][:200]
        answer = backend.tokenizer(comparison.exact.text, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + answer[:11]])
        with torch.inference_mode():
            exact = backend.model(whole).logits[0, -12:].float().log_softmax(-1)
        from vllm_powerquant import PowerQuantCache

        cache, rows = PowerQuantCache(backend.model, key_bits=2, residual_tokens=16), []
        with torch.inference_mode():
            rows.append(backend.model(whole[:, :200], past_key_values=cache, use_cache=True).logits[0, -1])
            for i in range(200, 211):
                rows.append(backend.model(whole[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1])
    got = torch.stack(rows).float().log_softmax(-1)
    kl = float((exact.exp() * (exact - got)).sum(-1).mean())
    # another path of attention (decoded copies), in bf16
    assert comparison.kl == pytest.approx(kl, rel=0.15)


def test_report_and_its_hint_where_nothing_is_compressed(capsys):
    assert main(["compare", "The capital of France is", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    left, _, right = next(line for line in out.splitlines() if "Paris" in line).partition(" | ")
    assert left.strip() == right.strip()
    assert "the answers are the same, token by token" in out
    assert "0 packed, 9 exact" in out and "nothing was compressed" in out
    assert "\x1b" not in out + err and "loading the model" in err


def test_json(capsys):
    flags = ["--prompt-tokens", "160", "--max-tokens", "4", "--residual-tokens", "0", "--sink-tokens", "0", "--json"]
    assert main(["compare", *flags]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "" and set(found) == {"exact", "compressed", "kl", "kl_max", "top1", "speed", "first_difference"}
    assert found["compressed"]["tokens_exact"] == 0 and found["kl"] > 0


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--max-tokens", "0"], "--max-tokens must be 1 or more, got 0"),
        (["--prompt-tokens", "99999999"], "the built-in prompt has 1 to"),
        (["--chat"], "--chat needs a prompt"),
        (["--key-bits", "7"], "key_bits must be 2, 3, 4 or 8, got 7"),
        (["--model", "/nothing"], "there is no file or folder /nothing"),
    ],
)
def test_refusals(capsys, flags, text):
    assert main(["compare", "--json", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == 1
