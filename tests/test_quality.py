"""The quality library: what its numbers mean, and that a real model's answers move as they should."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from vllm_powerquant import quality
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.reference_cache import ReferenceCache
from vllm_powerquant.codebooks.tables import load_codebook
from vllm_powerquant.errors import PowerQuantConfigError

PROSE = quality.read_texts()["prose"]


def test_splits_share_no_token():
    ids = list(range(1000))
    parts = [set(sum(quality.cut(ids, part, 100, 3), [])) for part in quality.SPLITS.values()]
    assert all(not a & b for i, a in enumerate(parts) for b in parts[:i])
    assert [run[0] for run in quality.cut(ids, quality.SPLITS["report"], 100, 3)] == [500, 700, 900]


def test_a_split_too_short_is_refused():
    with pytest.raises(PowerQuantConfigError, match="a.txt has 250 tokens for this, 300 are wanted"):
        quality.cut(list(range(1000)), quality.SPLITS["tune"], 300, 1, "a.txt")
    with pytest.raises(PowerQuantConfigError, match="1 or more, of 1 token or more, got 0 of 3"):
        quality.cut(list(range(1000)), (0, 1), 3, 0)


def test_metrics_of_two_known_distributions():
    exact, got = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    metrics = quality.compare(exact, got, torch.tensor([1]))
    assert metrics.kl == pytest.approx(0.25 * math.log(2))
    assert metrics.top1 == 0 and metrics.tv == pytest.approx(0.25)
    assert metrics.nll == pytest.approx(math.log(2)) and metrics.nll_exact == pytest.approx(math.log(4))
    assert quality.compare(exact, exact, torch.tensor([0])).kl == 0


@pytest.mark.parametrize("text_spread, seed_spread", [(1.0, 0.1), (0.1, 1.0), (0.0, 0.0)])
def test_the_interval_holds_the_mean_19_times_in_20(text_spread, seed_spread):
    """Texts and seeds each with their own scatter, 8 by 4; a simple interval of the 32 cells would hold it half as often."""
    g = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(400):
        texts, seeds = torch.randn(8, 1, generator=g) * text_spread, torch.randn(1, 4, generator=g) * seed_spread
        e = quality.estimate((texts + seeds + 0.2 * torch.randn(8, 4, generator=g)).tolist())
        held += abs(e.mean) <= e.half_width
    assert held >= 0.93 * 400


def test_one_text_has_no_interval():
    assert math.isnan(quality.estimate([[1.0, 2.0]]).half_width)


def test_distortion_of_gaussian_vectors_is_the_tables():
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(2))
    for bits in (2, 3, 4):
        book = load_codebook(128, bits)
        got = quality.distortion(x, book, CacheFormat(128).scale_factor(book))
        # the unbiased scale pays for its gain of 1 with error: mse / (1 - mse)
        assert got.gain == pytest.approx(1, abs=1e-3)
        assert got.error == pytest.approx(book.mse / (1 - book.mse), rel=0.03)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    from vllm_powerquant.model import prepare_model

    return AutoModelForCausalLM.from_pretrained(prepare_model(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def segment(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = tokenizer(PROSE)["input_ids"]
    return quality.make_segment(model, "prose", quality.cut(ids, quality.SPLITS["tune"], 417, 1)[0], 384)


def cache_of(model, **options):
    config = model.config
    return lambda: ReferenceCache(config.num_hidden_layers, config.head_dim, **options)


@pytest.mark.slow
def test_a_needle_is_found_and_foreign_values_hide_it(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    filler = tokenizer(PROSE)["input_ids"][12000:]
    needles = quality.make_needles(model, lambda text: tokenizer(text)["input_ids"], filler, 512)
    for needle in needles[::2]:
        hit, nll = quality.find_needle(model, needle, None)
        ours, our_nll = quality.find_needle(model, needle, cache_of(model)())
        assert hit and ours and abs(nll - our_nll) < 0.3
        order = torch.randperm(len(needle.segment.prompt), generator=torch.Generator().manual_seed(0))
        foreign = [(keys, values[:, :, order]) for keys, values in needle.segment.exact]
        elsewhere = replace(needle, segment=replace(needle.segment, exact=foreign))
        lost, lost_nll = quality.find_needle(model, elsewhere, cache_of(model)())
        assert not lost and lost_nll > 1
    with pytest.raises(PowerQuantConfigError, match="needs"):
        quality.make_needles(model, lambda text: tokenizer(text)["input_ids"], filler[:100], 512)


@pytest.mark.slow
def test_more_bits_and_more_exact_tokens_move_a_model_less(model, segment):
    exact = quality.measure(model, segment, cache_of(model, protected_layers=99))
    assert exact.kl < 1e-6 and exact.top1 == 1 and exact.nll == pytest.approx(exact.nll_exact)
    bare = {"residual_tokens": 0, "sink_tokens": 0}
    eight, four, two = (
        quality.measure(model, segment, cache_of(model, key_bits=k, value_bits=v, **bare))
        for k, v in ((8, 8), (4, 4), (4, 2))
    )
    windowed = quality.measure(model, segment, cache_of(model))
    assert eight.kl < 0.01 < four.kl < two.kl
    assert windowed.kl < two.kl / 3
    assert segment.positions == 33
