"""PowerQuantCache on a GPU: the same behaviours, read by the GPU kernels."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf.tiny_models import left_padded, tiny_model, tokens
from vllm_powerquant import PowerQuantCache, patch, unpatch
from vllm_powerquant.hf.graphs import LayerGraph

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["llama", "gemma3", "lfm2"])
def on_gpu(request):
    return copy.deepcopy(tiny_model(request.param)).to("cuda", torch.bfloat16)


@pytest.fixture(params=["powerquant", "sdpa"])
def model(request, on_gpu):
    on_gpu.set_attn_implementation(request.param)
    return on_gpu


@torch.no_grad()
def logits(model, ids, cache, **kwargs):
    kwargs = {name: x.cuda() for name, x in kwargs.items()}
    return model(ids.cuda(), past_key_values=cache, use_cache=True, **kwargs).logits.float()


def close(got, want, limit=0.03):
    assert torch.isfinite(got).all() and (got - want).norm() < limit * want.norm(), float((got - want).norm() / want.norm())


@pytest.mark.parametrize("options", [{"residual_tokens": 4096}, {"key_bits": 8, "value_bits": 8, "residual_tokens": 24}])
@pytest.mark.parametrize("batch", [1, 5])
def test_chunks(model, options, batch):
    cache, want = PowerQuantCache(model, **options), DynamicCache(config=model.config)
    for chunk in torch.stack(tokens(*[400] * batch)).split([290, 1, 1, 5, 40, 1, 62], 1):
        close(logits(model, chunk, cache), logits(model, chunk, want))
    assert cache.memory_report().path == ("fused" if model.config._attn_implementation == "powerquant" else "dequantized")


def test_left_padding(model):
    prompts = tokens(140, 61, 3)
    ids, mask = left_padded(prompts)
    cache, positions = PowerQuantCache(model), (mask.cumsum(1) - 1).clamp(min=0)
    logits(model, ids, cache, attention_mask=mask, position_ids=positions)
    mask = torch.cat((mask, torch.ones(3, 1)), 1)
    got = logits(model, torch.full((3, 1), 7), cache, attention_mask=mask, position_ids=positions[:, -1:] + 1)
    for row, prompt in enumerate(prompts):
        alone = PowerQuantCache(model)
        logits(model, prompt[None], alone)
        close(got[row], logits(model, torch.full((1, 1), 7), alone)[0])


def test_rows_and_crops(model):
    cache, want = PowerQuantCache(model, key_bits=8, value_bits=8), DynamicCache(config=model.config)
    if any(want.is_linear):
        pytest.skip("Transformers' own state of convolutions has no rows to choose")
    tails = torch.stack(tokens(9, 9, seed=3))
    for c in (cache, want):
        c.activate_past_recording()
        logits(model, tokens(300)[0][None], c)
        c.batch_repeat_interleave(2)
        c.crop(-40)
        c.reorder_cache(torch.tensor([1, 0], device="cuda"))
    close(logits(model, tails, cache), logits(model, tails, want))


def test_generate_with_a_patched_model(on_gpu):
    on_gpu.set_attn_implementation("sdpa")
    ids = tokens(300)[0][None].cuda()
    want = on_gpu.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    patch(on_gpu, residual_tokens=4096)
    got = on_gpu.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    beams = on_gpu.generate(ids, max_new_tokens=8, min_new_tokens=8, num_beams=3, do_sample=False)
    unpatch(on_gpu)
    assert (got == want)[:, 300:].float().mean() > 0.5 and beams.shape == (1, 308)


def test_float32_is_decoded_into_buffers():
    model = copy.deepcopy(tiny_model("llama")).to("cuda")
    model.set_attn_implementation("powerquant")
    cache, want = PowerQuantCache(model, key_bits=8, value_bits=8), DynamicCache(config=model.config)
    for chunk in tokens(300)[0][None].split([200, 1, 99], 1):
        close(logits(model, chunk, cache), logits(model, chunk, want), 0.02)
    assert cache.memory_report().path == "dequantized"


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("batch", "residual_tokens", "sink_tokens"), [(1, 16, 4), (3, 16, 4), (3, 0, 0), (3, 13, 0), (3, 1, 9)]
)
def test_steps_are_replayed(batch, residual_tokens, sink_tokens, padding):
    """Steps of one token run as CUDA graphs; through growth, crops and chosen rows they give what single launches give."""
    model = copy.deepcopy(tiny_model("llama")).to("cuda", torch.bfloat16)
    model.set_attn_implementation("powerquant")
    options = {"residual_tokens": residual_tokens, "sink_tokens": sink_tokens}
    cache, want = PowerQuantCache(model, **options), PowerQuantCache(model, **options)
    prompt = torch.stack(tokens(*[100] * batch))
    mask = torch.ones(batch, 200, dtype=torch.int64, device="cuda")
    if padding:
        for row in range(batch):
            mask[row, : 7 * (batch - row)] = 0

    def fed(step, c):
        return logits(model, step, c, attention_mask=mask[:, : c.get_seq_length() + step.shape[1]])

    for c in (cache, want):
        fed(prompt, c)
    for i in range(90):
        step = torch.stack(tokens(*[1] * batch, seed=i))
        # what one context allocates, the next writes to
        with torch.inference_mode() if i % 20 < 10 else torch.no_grad():
            got = fed(step, cache)
        for layer in want.layers:
            layer.graph = LayerGraph()
        assert torch.equal(got, fed(step, want)), i
        if i:
            graphs = cache.common.graphs_on(cache.layers[0].device)
            # whether they were made of the step's before, or uploaded
            for name, want_table in graphs._step.host.items():
                assert torch.equal(graphs._tables[name].cpu(), want_table), (i, name)
        if i == 40:
            for c in (cache, want):
                c.crop(-7)
        if i == 60:
            for c in (cache, want):
                c.reorder_cache(torch.arange(batch - 1, -1, -1, device="cuda"))
            mask = mask.flip(0)
    assert cache.layers[0].graph.graph is not None and want.layers[0].graph.graph is None
    assert cache.memory_report().table_bytes > 0
    other = copy.deepcopy(cache)
    step = torch.stack(tokens(*[1] * batch))
    for _ in range(4):
        assert torch.equal(logits(model, step, cache), logits(model, step, other))
