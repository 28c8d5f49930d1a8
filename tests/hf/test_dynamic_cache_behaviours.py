"""What `generate` relies on in DynamicCache, one test each: the same tokens and logits from a PowerQuantCache.

Two settings: with a window longer than the text everything is exact, so nothing but DynamicCache's own answer is right; with
8 bits and a short window packed tokens are read, whose error is far smaller than what a token in a wrong place makes.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf.tiny_models import left_padded, tiny_model, tokens
from vllm_powerquant import PowerQuantCache

EXACT = {"residual_tokens": 4096}
PACKED = {"key_bits": 8, "value_bits": 8, "residual_tokens": 24}
# logits are of size 1 to 10; of 8-bit keys and values they differ by 0.02 or so, of a token too many by 0.3 and more
LIMIT = {"exact": 2e-4, "packed": 0.15}


@pytest.fixture(params=["exact", "packed"])
def setting(request):
    return request.param


@pytest.fixture
def new(model, path, setting):
    return lambda: PowerQuantCache(model, **(EXACT if setting == "exact" else PACKED))


def generated(model, ids, cache, n=12, **kwargs):
    with torch.no_grad():
        kwargs = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, **kwargs}
        return model.generate(ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **kwargs)


def same_logits(got, want, setting):
    got, want = (torch.stack(x.logits) if hasattr(x, "logits") and isinstance(x.logits, tuple) else x for x in (got, want))
    assert (got - want).abs().max() < LIMIT[setting], float((got - want).abs().max())


def logits(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def test_forward_fills_the_cache(model, new, setting):
    (prompt,) = tokens(90)
    cache, want = new(), DynamicCache(config=model.config)
    for chunk in prompt[None].split([50, 1, 1, 38], 1):
        same_logits(logits(model, chunk, cache), logits(model, chunk, want), setting)
    assert cache.get_seq_length() == want.get_seq_length() == 90


def test_greedy(model, new, setting):
    ids = tokens(70)[0][None]
    got, want = generated(model, ids, new()), generated(model, ids, DynamicCache(config=model.config))
    if setting == "exact":
        assert torch.equal(got.sequences, want.sequences)
        same_logits(got, want, setting)


def test_sampling_with_a_seed(model, new, setting):
    ids = tokens(70)[0][None]
    out = []
    for cache in (new(), DynamicCache(config=model.config)):
        torch.manual_seed(5)
        out.append(generated(model, ids, cache, do_sample=True, temperature=0.8))
    if setting == "exact":
        assert torch.equal(out[0].sequences, out[1].sequences)


def test_beam_search_reorders_rows(model, new, setting):
    ids = torch.stack(tokens(60, 60))
    got, want = (generated(model, ids, c, num_beams=3, n=8) for c in (new(), DynamicCache(config=model.config)))
    if setting == "exact":
        assert torch.equal(got.sequences, want.sequences)
    assert got.sequences.shape == want.sequences.shape


def test_several_answers_to_one_prompt(model, new):
    ids = tokens(60)[0][None]
    torch.manual_seed(1)
    cache = new()
    out = generated(model, ids, cache, do_sample=True, num_return_sequences=3)
    assert out.sequences.shape == (3, 72) and cache.batch_size == 3


def test_assisted_decoding_takes_tokens_back(model, new, setting):
    architecture = model.config.model_type.replace("_text", "")
    assistant = tiny_model(architecture, seed=1)
    ids = tokens(60)[0][None]
    cache, want = new(), DynamicCache(config=model.config)
    got = generated(model, ids, cache, assistant_model=assistant)
    want = generated(model, ids, want, assistant_model=assistant)
    if setting == "exact":
        assert torch.equal(got.sequences, want.sequences)


def test_prompt_lookup_decoding(model, new, setting):
    ids = torch.cat(tokens(20, 20) * 2)[None]
    got, want = (generated(model, ids, c, prompt_lookup_num_tokens=4) for c in (new(), DynamicCache(config=model.config)))
    if setting == "exact":
        assert torch.equal(got.sequences, want.sequences)


def test_left_padded_rows_answer_as_alone(model, new, setting):
    prompts = tokens(70, 41, 3)
    ids, mask = left_padded(prompts)
    together = generated(model, ids, new(), attention_mask=mask)
    for row, prompt in enumerate(prompts):
        alone = generated(model, prompt[None], new())
        assert torch.equal(together.sequences[row, -12:], alone.sequences[0, -12:])
        got = torch.stack([x[row] for x in together.logits])
        # the same tokens in the same places: not even packed ones differ, but for the order of sums
        assert (got - torch.stack(alone.logits)[:, 0]).abs().max() < (2e-4 if setting == "exact" else 5e-3)


def test_left_padded_rows_token_by_token(model, new, setting):
    prompts = tokens(40, 29)
    ids, mask = left_padded(prompts)
    cache, positions = new(), (mask.cumsum(1) - 1).clamp(min=0)
    for i in range(40):
        options = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
        got = logits(model, ids[:, i : i + 1], cache, **options)
    alone = new()
    for i in range(29):
        want = logits(model, prompts[1][None, i : i + 1], alone)
    if model.config.model_type != "lfm2":  # its convolutions see padding when they are fed token by token
        assert (got[1] - want[0]).abs().max() < (2e-4 if setting == "exact" else 5e-3)


def test_chunked_prefill(model, new, setting):
    ids = tokens(90)[0][None]
    got, want = (generated(model, ids, c, prefill_chunk_size=32) for c in (new(), DynamicCache(config=model.config)))
    if setting == "exact":
        assert torch.equal(got.sequences, want.sequences)
        same_logits(got, want, setting)


def test_a_second_turn_goes_on_with_the_cache(model, new, setting):
    first, second = tokens(50, 20)
    caches = new(), DynamicCache(config=model.config)
    for cache in caches:
        answer = generated(model, first[None], cache).sequences[0]
        # one history for both, whatever was answered
        history = torch.cat((first, answer[50:] if setting == "exact" else tokens(12, seed=9)[0], second))
    if setting == "exact":
        got, want = (generated(model, history[None], cache) for cache in caches)
        assert torch.equal(got.sequences, want.sequences)
        same_logits(got, want, setting)
    else:
        assert generated(model, history[None], caches[0]).sequences.shape[1] == len(history) + 12


def test_crop_forgets_the_last_tokens(model, new, setting):
    prompt, other = tokens(90, 30)
    if not DynamicCache(config=model.config).is_croppable:
        pytest.skip("Transformers' own cache cannot crop this model's state")
    cache, want = new(), DynamicCache(config=model.config)
    for c in (cache, want):
        c.activate_past_recording()
        logits(model, prompt[None], c)
        c.crop(-25)
    assert cache.get_seq_length() == want.get_seq_length() == 65
    same_logits(logits(model, other[None], cache), logits(model, other[None], want), setting)


def test_crop_to_a_length(model, new):
    cache = new()
    if not cache.is_croppable or any(cache.is_sliding):
        pytest.skip("a length is for full attention alone")
    logits(model, tokens(40)[0][None], cache)
    cache.crop(50)
    assert cache.get_seq_length() == 40
    cache.crop(10)
    assert cache.get_seq_length() == 10


def test_rows_are_repeated_and_chosen(model, new, setting):
    prompt, tails = tokens(60), torch.stack(tokens(5, 5, 5, seed=3))
    cache, want = new(), DynamicCache(config=model.config)
    if any(want.is_linear):
        pytest.skip("Transformers' own state of convolutions has no rows to choose")
    for c in (cache, want):
        logits(model, prompt[0][None], c)
        c.batch_repeat_interleave(3)
    same_logits(logits(model, tails, cache), logits(model, tails, want), setting)
    for c in (cache, want):
        c.batch_select_indices(torch.tensor([2, 0]))
    same_logits(logits(model, tails[:2], cache), logits(model, tails[:2], want), setting)
    for c in (cache, want):
        c.reorder_cache(torch.tensor([1, 1]))
    same_logits(logits(model, tails[:2], cache), logits(model, tails[:2], want), setting)


def test_a_copy_is_another_cache(model, new, setting):
    """As prompts are reused: one prefix, several continuations."""
    prompt, tails = tokens(60)[0], tokens(8, 8, seed=4)
    prefix, want = new(), DynamicCache(config=model.config)
    for c in (prefix, want):
        logits(model, prompt[None], c)
    for tail in tails:
        same_logits(
            logits(model, tail[None], copy.deepcopy(prefix)), logits(model, tail[None], copy.deepcopy(want)), setting
        )
    assert prefix.get_seq_length() == 60


def test_reset_empties_it(model, new, setting):
    first, second = tokens(60, 40)
    cache = new()
    logits(model, first[None], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    same_logits(logits(model, second[None], cache), logits(model, second[None], new()), "exact")


def test_early_initialization(model, new, setting):
    cache, heads = new(), getattr(model.config, "num_key_value_heads", 2)
    cache.early_initialization(1, heads, 64, torch.float32, torch.device("cpu"))
    ids = tokens(40)[0][None]
    same_logits(logits(model, ids, cache), logits(model, ids, DynamicCache(config=model.config)), setting)


def test_mask_sizes_and_lengths(model, new):
    cache, want = new(), DynamicCache(config=model.config)
    assert cache.get_seq_length() == 0 and len(cache) == len(want)
    assert cache.is_sliding == want.is_sliding and not cache.is_compileable
    logits(model, tokens(50)[0][None], cache)
    logits(model, tokens(50)[0][None], want)
    for i in range(len(want)):
        if not want.is_linear[i]:
            assert cache.get_mask_sizes(3, i) == want.get_mask_sizes(3, i)
            assert cache.get_max_length(i) == want.get_max_length(i)


def test_keys_and_values_can_be_read(model, new, setting):
    cache, want = new(), DynamicCache(config=model.config)
    for c in (cache, want):
        logits(model, tokens(60)[0][None], c)
        logits(model, tokens(1)[0][None], c)
    for got, exact in zip(cache.layers, want.layers, strict=True):
        if getattr(exact, "keys", None) is not None:
            for name in ("keys", "values"):
                x, y = getattr(got, name), getattr(exact, name)
                assert x.shape == y.shape and (x - y).norm() < (1e-4 if setting == "exact" else 2e-2) * y.norm()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["powerquant", "sdpa"])
def test_a_compiled_model(attention):
    """Cache and attention are cut out of the graph; the rest is compiled."""
    model = copy.deepcopy(tiny_model("llama"))
    model.set_attn_implementation(attention)
    prompt = tokens(40)[0][None]
    compiled = torch.compile(model, dynamic=True)
    cache, want = PowerQuantCache(model, **EXACT), DynamicCache(config=model.config)
    for chunk in (prompt, prompt[:, :1], prompt[:, 1:2]):
        same_logits(logits(compiled, chunk, cache), logits(model, chunk, want), "exact")
