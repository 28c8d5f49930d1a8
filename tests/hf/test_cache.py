"""PowerQuantCache: what it holds, what it reports, how it is read, and what it refuses."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from transformers import DynamicCache, GPT2Config, T5Config

from hf.tiny_models import left_padded, tiny_model, tokens
from vllm_powerquant import PowerQuantCache
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.reference_cache import ReferenceCache
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError
from vllm_powerquant.hf.graphs import DecodeGraphs
from vllm_powerquant.hf.sequences import Rows, Window


@pytest.fixture
def llama():
    model = tiny_model("llama")
    yield model
    model.set_attn_implementation("sdpa")


@pytest.fixture(params=["fused", "dequantized"])
def either(request, llama):
    llama.set_attn_implementation("powerquant" if request.param == "fused" else "sdpa")
    return llama


def logits(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def tensors(root) -> dict[int, int]:
    """Bytes of every tensor storage that is reachable from an object, by address; not into modules, configs and
    functions."""
    found, seen, todo = {}, set(), [root]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type | torch.nn.Module) or type(x).__name__.endswith("Config") or callable(x):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif not isinstance(x, CacheFormat | str | int | float | torch.dtype | torch.device):
            todo += gc.get_referents(x)
    found.pop(0, None)
    return found


@pytest.mark.parametrize("residual_tokens, sink_tokens", [(128, 4), (0, 0), (1, 4), (16, 9), (17, 0), (500, 4)])
@pytest.mark.parametrize("bits", [(4, 2), (3, 4)])
def test_it_reads_as_the_reference_cache(either, residual_tokens, sink_tokens, bits):
    """The same codes, window and sinks, chunk after chunk: logits agree to what kernels' sums differ by."""
    options = {"key_bits": bits[0], "value_bits": bits[1], "residual_tokens": residual_tokens, "sink_tokens": sink_tokens}
    cache, want = PowerQuantCache(either, **options), ReferenceCache(4, 64, **options)
    implementation = either.config._attn_implementation
    for chunk in tokens(300)[0][None].split([150, 1, 1, 9, 70, 1, 68], 1):
        got = logits(either, chunk, cache)
        either.set_attn_implementation("sdpa")
        exact = logits(either, chunk, want)
        either.set_attn_implementation(implementation)
        assert (got - exact).norm() < 5e-3 * exact.norm()


def test_after_a_crop_no_token_is_read_that_is_gone(either):
    """Rows of the ring that a longer text wrote are not taken for the shorter one's."""
    first, second = tokens(200, 60)
    options = {"key_bits": 8, "value_bits": 8, "residual_tokens": 32}
    cache, want = PowerQuantCache(either, **options), DynamicCache(config=either.config)
    for c in (cache, want):
        logits(either, first[None], c)
    for keep, n in ((170, 1), (100, 20), (101, 9), (3, 30)):
        for c in (cache, want):
            c.crop(keep - c.get_seq_length())
        got, exact = (logits(either, second[None, :n], c) for c in (cache, want))
        assert (got - exact).abs().max() < 0.15


@pytest.mark.parametrize("protect", [0, 1, [0, -1]])
def test_the_report_is_the_bytes_of_the_tensors(either, protect):
    cache = PowerQuantCache(either, protected_layers=protect)
    for n in (100, 1, 30):
        logits(either, torch.stack(tokens(n, n)), cache)
    report = cache.memory_report()
    held = tensors(cache)
    assert sum(held.values()) == report.total_bytes
    assert report.tokens == 262
    assert report.path == ("fused" if either.config._attn_implementation == "powerquant" else "dequantized")
    assert (report.buffer_bytes == 0) == (report.path == "fused")
    want = DynamicCache(config=either.config)
    logits(either, torch.stack(tokens(131, 131)), want)
    assert report.uncompressed_bytes == sum(tensors(want).values())
    assert "262 tokens" in str(report) and report.to_dict()["ratio"] == report.ratio


def test_the_report_of_other_layers():
    for name in ("gemma3", "lfm2"):
        model = tiny_model(name)
        cache = PowerQuantCache(model)
        assert cache.memory_report().packed_bytes == 0 and str(cache.memory_report()) == "KV cache: empty"
        logits(model, tokens(100)[0][None], cache)
        kinds = [layer.kind for layer in cache.memory_report().layers]
        assert kinds == (["sliding"] * 3 + ["packed"] if name == "gemma3" else ["other", "packed"] * 2)
        assert all(layer.exact_bytes for layer in cache.memory_report().layers)


def test_8k_tokens_take_what_the_format_takes(llama):
    """K4/V2 at 8,192 tokens: at most 1.02 of the slots, window and sinks; at least 4.3 times less than DynamicCache."""
    llama.set_attn_implementation("powerquant")
    cache = PowerQuantCache(llama)
    g = torch.Generator().manual_seed(0)
    step = [torch.randn(1, 2, 8191, 64, generator=g).bfloat16() for _ in "kv"]
    for layer in cache.layers:
        for key, value in (step, [x[:, :, :1] for x in step]):
            key, value = layer.update(key, value)
            layer.attend(torch.zeros(1, 4, key.shape[2], 64, dtype=torch.bfloat16), key, value, 0.125, None)
    report, layers, heads = cache.memory_report(), 4, 2
    slots = 8192 * layers * heads * CacheFormat(64).layout.slot_bytes
    exact = (128 + 4) * layers * heads * 2 * 64 * 2
    assert report.tokens == 8192 and slots + exact <= report.total_bytes <= 1.02 * slots + exact
    assert report.ratio >= 4.3


def test_the_history_is_not_copied_at_every_step(llama):
    llama.set_attn_implementation("powerquant")
    cache = PowerQuantCache(llama)
    logits(llama, tokens(700)[0][None], cache)
    moved = 0
    for _ in range(128):
        before = cache.layers[0].packed.data_ptr()
        logits(llama, tokens(1)[0][None], cache)
        moved += cache.layers[0].packed.data_ptr() != before
    assert moved <= 3


def test_tokens_packed_and_exact(either):
    cache = PowerQuantCache(either, residual_tokens=32, sink_tokens=4)
    logits(either, tokens(100)[0][None], cache)
    report = cache.memory_report()
    assert report.tokens_exact == 4 * (31 + 4) and report.tokens_packed == 4 * (100 - 35)


def test_a_deep_copy_follows_the_model(llama):
    cache = copy.deepcopy(PowerQuantCache(llama))
    llama.set_attn_implementation("powerquant")
    logits(llama, tokens(50)[0][None], cache)
    assert cache.memory_report().path == "fused"


def test_attention_may_change_on_the_way(llama):
    """Buffers are made of what is packed, and dropped when packed pages are read."""
    chunks = tokens(150)[0][None].split([90, 1, 30, 1, 28], 1)
    options = {"key_bits": 8, "value_bits": 8, "residual_tokens": 32}
    cache, want = PowerQuantCache(llama, **options), DynamicCache(config=llama.config)
    for i, chunk in enumerate(chunks):
        llama.set_attn_implementation("sdpa" if i % 2 else "powerquant")
        assert (logits(llama, chunk, cache) - logits(llama, chunk, want)).abs().max() < 0.15
        assert cache.memory_report().path == ("dequantized" if i % 2 else "fused")


def test_padding_is_not_stored(either):
    prompts = tokens(120, 30)
    ids, mask = left_padded(prompts)
    cache = PowerQuantCache(either)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits(either, ids, cache, attention_mask=mask, position_ids=positions)
    assert cache.layers[0].rows.lens == (120, 30) and cache.get_seq_length() == 120
    # a second turn, padded again: holes between the tokens
    more, more_mask = left_padded(tokens(5, 20, seed=2))
    mask = torch.cat((mask, more_mask), 1)
    positions = (mask.cumsum(1) - 1)[:, 120:].clamp(min=0)
    got = logits(either, more, cache, attention_mask=mask, position_ids=positions)
    assert cache.layers[0].rows.lens == (125, 50)
    alone = PowerQuantCache(either)
    logits(either, prompts[1][None], alone)
    want = logits(either, more[1][None], alone)
    assert (got[1] - want[0]).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = copy.deepcopy(tiny_model("llama")).to(dtype)
    for name in ("sdpa", "powerquant"):
        model.set_attn_implementation(name)
        cache, want = PowerQuantCache(model, key_bits=8, value_bits=8), DynamicCache(config=model.config)
        for chunk in tokens(220)[0][None].split([200, 20], 1):
            got, exact = (logits(model, chunk, c).float() for c in (cache, want))
        assert got.dtype == torch.float32 and (got - exact).norm() < 0.05 * exact.norm()


def test_layers_may_have_other_bits_and_stay_exact(llama):
    cache = PowerQuantCache(llama, protected_layers=[-1], layer_bits={0: (8, 8), 1: (4, 2)}, value_codec="trellis")
    assert [getattr(layer, "format", None) and layer.format.key_bits for layer in cache.layers] == [8, 4, 4, None]
    assert cache.layers[1].format.is_trellis and not cache.layers[0].format.is_trellis
    assert cache.memory_report().layers[3].kind == "exact"


@pytest.mark.parametrize(
    "options, says",
    [
        ({"key_bits": 5}, "key_bits must be 2, 3, 4 or 8, got 5"),
        ({"value_codec": "x"}, "value_codec must be scalar or trellis, got 'x'"),
        ({"residual_tokens": -1}, "residual_tokens must be 0 to 4096, got -1"),
        ({"sink_tokens": 17}, "sink_tokens must be 0 to 16, got 17"),
        ({"value_codec": "trellis", "value_bits": 4}, "value_codec trellis is for value_bits 2, got value_bits 4"),
        ({"protected_layers": 3}, "protected_layers must be at most half of 4 layers, got 3"),
        ({"protected_layers": [4]}, "protected_layers must name layers from -4 to 3, got 4"),
        ({"layer_bits": {3: (4, 2)}, "protected_layers": [-1]}, "layers [3] have layer_bits and are protected"),
        ({"layer_bits": {7: (4, 2)}}, "layer_bits must name layers from -4 to 3, got 7"),
        ({"layer_bits": {0: (5, 2)}}, "key_bits must be 2, 3, 4 or 8, got 5"),
        ({"calibration": "nowhere"}, "nowhere"),
        ({"protected_layers": 1.5}, "protected_layers must be a number of layers or a list of them, got 1.5"),
        ({"layer_bits": {0: 4}}, "layer_bits must be {layer: (key_bits, value_bits)}, got {0: 4}"),
        ({"layer_bits": [(4, 2)]}, "layer_bits must be {layer: (key_bits, value_bits)}, got [(4, 2)]"),
        ({"layer_bits": {3: (4, 2), -1: (8, 8)}}, "layer_bits must name a layer once, of 4 layers, got [3, -1]"),
    ],
)
def test_options_that_are_refused(llama, options, says):
    with pytest.raises(PowerQuantConfigError, match=re.escape(says)):
        PowerQuantCache(llama, **options)


def test_models_that_are_refused():
    with pytest.raises(PowerQuantConfigError, match="a Transformers model or its config, got int"):
        PowerQuantCache(3)
    with pytest.raises(PowerQuantUnsupportedError, match="T5Config is an encoder-decoder"):
        PowerQuantCache(T5Config())
    with pytest.raises(PowerQuantUnsupportedError, match="head_size must be one of .*, got 32"):
        PowerQuantCache(GPT2Config(n_embd=128, n_head=4))


def test_masks_that_are_refused(llama):
    llama.set_attn_implementation("powerquant")
    ids, mask = left_padded(tokens(40, 20))
    cache = PowerQuantCache(llama)
    logits(llama, ids, cache, attention_mask=mask)
    with pytest.raises(PowerQuantUnsupportedError, match="hides or shows positions"):
        logits(llama, ids[:, :1], cache, attention_mask=torch.ones(2, 41))
    with pytest.raises(PowerQuantUnsupportedError, match=r"got a mask of \[1, 1, 9, 9\]"):
        logits(llama, tokens(9)[0][None], PowerQuantCache(llama), attention_mask=torch.ones(1, 1, 9, 9).bool())


def test_another_batch_is_refused(either):
    cache = PowerQuantCache(either)
    logits(either, torch.stack(tokens(9, 9)), cache)
    with pytest.raises(PowerQuantUnsupportedError, match="holds a batch of 2, got keys of 3"):
        logits(either, torch.stack(tokens(1, 1, 1)), cache)


def test_attention_that_never_comes_is_noticed(llama):
    """A layer whose attention does not go through the registered function would be wrong without a word."""
    llama.set_attn_implementation("powerquant")
    cache = PowerQuantCache(llama)
    key, value = (torch.randn(1, 2, 5, 64) for _ in "kv")
    cache.update(key, value, 0)
    with pytest.raises(PowerQuantUnsupportedError, match="did not run through it"):
        cache.update(key, value, 1)


def test_a_gradient_that_is_not_there_is_not_taken_for_zero(either):
    """DynamicCache has gradients, also of an eval model: keys and values of a chunk are of the same forward."""
    cache = PowerQuantCache(either)
    for n in (20, 1, 7):
        loss = either(tokens(n)[0][None], past_key_values=cache).logits.sum()
    with pytest.raises(PowerQuantUnsupportedError, match="a packed cache has no gradients"):
        loss.backward()
    either.zero_grad()
    assert not logits(either, tokens(3)[0][None], cache).requires_grad


def test_rows_may_be_chosen_under_inference_mode(either):
    """As beam search does; what it leaves is written to later, with and without inference_mode."""
    ids = tokens(30)[0][None]
    want = PowerQuantCache(either)
    logits(either, torch.cat((ids, ids[:, :2]), 1), want)
    want = logits(either, ids[:, :1], want)
    cache = PowerQuantCache(either)
    with torch.inference_mode():
        either(ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([0]))
        either(ids[:, :1], past_key_values=cache)
        cache.batch_select_indices([0])
    logits(either, ids[:, 1:2], cache)
    assert (logits(either, ids[:, :1], cache) - want).abs().max() < 5e-3


def test_a_mask_is_of_one_call(either):
    """Of a model's parts, which are called without, and of calls by position."""
    ids, mask = left_padded(tokens(40, 20))
    cache = PowerQuantCache(either)
    logits(either, ids, cache, attention_mask=mask)
    assert cache.common.padding_mask is None
    with torch.no_grad():
        either(ids[:, :1], torch.cat((mask, torch.ones(2, 1)), 1), None, cache)
        assert cache.layers[0].rows.lens == (41, 21)
        either.model(ids[:, :1], past_key_values=cache)
    assert cache.layers[0].rows.lens == (42, 22)


def test_training_with_it_is_refused(llama):
    llama.set_attn_implementation("powerquant")
    llama.train()
    try:
        with pytest.raises(PowerQuantUnsupportedError, match="no gradients"):
            llama(tokens(5)[0][None], past_key_values=PowerQuantCache(llama), use_cache=True)
    finally:
        llama.eval()


def test_without_a_cache_attention_is_transformers_own(llama):
    ids, mask = left_padded(tokens(30, 11))
    with torch.no_grad():
        want = llama(ids, attention_mask=mask, use_cache=False).logits
        llama.set_attn_implementation("powerquant")
        got = llama(ids, attention_mask=mask, use_cache=False).logits
        cached = llama(ids, attention_mask=mask, past_key_values=DynamicCache(config=llama.config)).logits
    assert torch.equal(got[mask.bool()], want[mask.bool()]) and torch.equal(cached[mask.bool()], want[mask.bool()])


def test_layers_share_what_they_know_of_a_step(llama):
    llama.set_attn_implementation("powerquant")
    cache = PowerQuantCache(llama)
    for n in (50, 1):
        logits(llama, tokens(n)[0][None], cache)
        assert len({id(layer.rows) for layer in cache.layers}) == 1
    cache.reset()
    logits(llama, torch.stack(tokens(9, 9)), cache)
    cache.crop(-2)
    assert len({id(layer.rows) for layer in cache.layers}) == 1
    other = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert len({id(layer.rows) for layer in cache.layers}) == 1 and other.layers[0].rows is not cache.layers[0].rows


def test_it_goes_on_outside_of_inference_mode(either):
    """Transformers' own cache may be filled under inference_mode and used without."""
    chunks = tokens(300)[0][None].split([200, 1, 99], 1)
    cache, want = PowerQuantCache(either), PowerQuantCache(either)
    for i, chunk in enumerate(chunks):
        with torch.inference_mode() if i != 1 else torch.no_grad():
            got = either(chunk, past_key_values=cache, use_cache=True).logits
        assert torch.equal(got, logits(either, chunk, want))


def test_a_call_that_did_not_end_is_noticed(either):
    """Its first layers hold more than the others."""
    ids, cache = tokens(60)[0][None], PowerQuantCache(either)
    want = logits(either, ids[:, :20], cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = either.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(either, ids[:, 20:], cache)
    hook.remove()
    with pytest.raises(
        (PowerQuantUnsupportedError, RuntimeError), match="mask is of 62 positions and .* hold 22|must match"
    ):
        logits(either, ids[:, :2], cache)
    cache.crop(20)
    again = PowerQuantCache(either)
    assert torch.equal(logits(either, ids[:, :20], again), want)
    assert torch.equal(logits(either, ids[:, 20:], cache), logits(either, ids[:, 20:], again))


def test_a_refusal_is_of_one_call(llama):
    llama.set_attn_implementation("powerquant")
    cache, mask = PowerQuantCache(llama), torch.ones(1, 21, dtype=torch.long)
    logits(llama, tokens(20)[0][None], cache)
    for wrong in (mask.index_fill(1, torch.tensor([3]), 0), torch.ones(1, 1, 1, 21, dtype=torch.bool)):
        with pytest.raises(PowerQuantUnsupportedError, match="mask"):
            logits(llama, tokens(1)[0][None], cache, attention_mask=wrong)
    logits(llama, tokens(1)[0][None], cache, attention_mask=mask)


def test_buffers_grow_by_little(llama):
    """Without fused attention they are near an uncompressed cache's size, too, and are copied seldom."""
    llama.set_attn_implementation("sdpa")
    cache, moved, at = PowerQuantCache(llama), 0, 0
    logits(llama, torch.randint(2, 60, (1, 4000)), cache)
    for _ in range(400):
        logits(llama, tokens(1)[0][None], cache)
        moved += cache.layers[0]._keys.data_ptr() != at
        at = cache.layers[0]._keys.data_ptr()
    report = cache.memory_report()
    assert moved <= 3 and report.buffer_bytes <= 1.126 * report.uncompressed_bytes


def test_it_is_pickled_with_what_it_holds(either):
    cache = PowerQuantCache(either, residual_tokens=16)
    for n in (90, 1):
        logits(either, tokens(n)[0][None], cache)
    other = pickle.loads(pickle.dumps(cache))
    other.common.config = either.config  # a pickled config is another one
    assert torch.equal(logits(either, tokens(9)[0][None], cache), logits(either, tokens(9)[0][None], other))
    assert str(other.memory_report()) == str(cache.memory_report())


def test_a_mask_may_be_changed_in_place_for_another_sequence(either):
    """In a cache that was reset, and in copies."""
    ids, mask = torch.stack(tokens(12, 12)), torch.ones(2, 12, dtype=torch.long)
    cache = PowerQuantCache(either)
    copies = [copy.deepcopy(cache) for _ in "ab"]
    logits(either, ids, cache, attention_mask=mask)
    later = [copy.deepcopy(cache) for _ in "ab"]
    longer = torch.ones(2, 13, dtype=torch.long)
    logits(either, ids[:, :1], later[0], attention_mask=longer)
    logits(either, ids, copies[0], attention_mask=mask)
    cache.reset()
    mask[0, :3] = longer[1, 12:] = 0
    for other in (cache, copies[1]):
        logits(either, ids, other, attention_mask=mask)
        assert other.layers[0].rows.lens == (9, 12)
    logits(either, ids[:, :1], later[1], attention_mask=longer)
    assert later[1].layers[0].rows.lens == (13, 12) and later[0].layers[0].rows.lens == (13, 13)


def test_memory_is_free_as_soon_as_nobody_holds_the_cache(either):
    """Not when Python next looks for cycles, which on a GPU may be after memory has run out."""
    cache = PowerQuantCache(either)
    held = []
    gc.disable()
    try:
        for n in (90, 1, 1, 9):
            logits(either, torch.stack(tokens(n, n)), cache, attention_mask=torch.ones(2, cache.get_seq_length() + n))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits(either, torch.stack(tokens(1, 1)), cache)
        for layer in cache.layers:
            steps = [step for *_, step in layer.rows._steps]
            held += [weakref.ref(x) for x in (layer.packed, layer.exact, layer.rows, *steps)]
        copied = copy.deepcopy(cache)
        held += [weakref.ref(layer.packed) for layer in copied.layers]
        del cache, layer, copied, steps
        assert not any(x() is not None for x in held)
    finally:
        gc.enable()


@pytest.mark.parametrize(("residual_tokens", "sink_tokens"), [(128, 4), (17, 0), (0, 9), (1, 4), (0, 0)])
def test_a_step_of_one_token_follows_from_the_last_ones_tables(residual_tokens, sink_tokens):
    """What GPUs do instead of working out and copying a step's tables; through crops, chosen rows and padding."""
    rows = Rows.none(Window(residual_tokens, sink_tokens), 3)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[0, :11] = mask[2, 4:7] = False
    rows = rows.step(30, mask).after
    changes = {
        40: lambda x: x.crop(33),
        41: lambda x: x.select([2, 0, 0]),
        100: lambda x: x.crop(1),
        170: lambda x: x.crop(140),
    }
    graphs, followed = DecodeGraphs(), 0
    for i in range(200):
        step = rows.step(1, None)
        rows = step.after
        graphs._tables = {name: x.clone() for name, x in step.host.items()}
        graphs._held = torch.tensor(rows.exact_from)
        rows = changes.get(i, lambda x: x)(rows)
        next_step = rows.step(1, None)
        if rows is step.after and next_step.after.pages == rows.pages:
            graphs._to_next(step)
            followed += 1
            for name, want in next_step.host.items():
                assert torch.equal(graphs._tables[name], want), (i, name)
            assert graphs._held.tolist() == list(next_step.after.exact_from)
    assert followed > 190
