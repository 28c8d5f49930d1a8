"""GPU kernels against the float64 reference on the same packed bytes; without a GPU the portable ones run interpreted."""

import itertools

import pytest
import torch

from helpers import DEVICE, Batch, expected, key_frame, relative_rms
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks
from vllm_powerquant.attention.kernels.gpu_kernels import GpuKernels
from vllm_powerquant.attention.kernels.prefill import Workspace
from vllm_powerquant.attention.kernels.rows_hopper import supports as hopper_supports
from vllm_powerquant.attention.kernels.step import StepPlan
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES

BITS = (2, 3, 4, 8)
WIDTHS = [
    *(
        pytest.param(d, k, v, "scalar", id=f"d{d}-k{k}v{v}")
        for d, k, v in itertools.product(SUPPORTED_HEAD_SIZES, BITS, BITS)
    ),
    *(pytest.param(d, k, 2, "trellis", id=f"d{d}-k{k}-trellis") for d in SUPPORTED_HEAD_SIZES for k in (3, 4)),
]
device = torch.device(DEVICE)
# Fixed point and fp16 operands leave 1e-4 to 1e-3; fp16 outputs 2e-4, bf16 outputs 2e-3 of their own (4e-3 in Triton's
# interpreter, which cuts bits off where a GPU rounds).
LIMIT = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 2.5e-3 if DEVICE == "cuda" else 5e-3}
KERNELS = [pytest.param(False, id="portable")]
# what each kind of kernels has that rounds the least
PRECISE = {False: torch.float32, True: torch.float16}
# several query tokens are two sets of eight rows for the Hopper kernel, which it multiplies otherwise than one
STEPS = [pytest.param(False, [1, 3, 2], torch.float32, id="portable")]
if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0):
    KERNELS.append(pytest.param(True, id="hopper"))
    STEPS.append(pytest.param(True, [1, 3, 2], torch.float16, id="hopper-drafts"))
    STEPS.append(pytest.param(True, [1, 1, 1], torch.bfloat16, id="hopper"))


def filled(batch: Batch, exact: ExactBlocks | None = None, frame: torch.Tensor | None = None) -> Batch:
    """Store the whole of each request (chunks too, as the backend does), packed and exactly."""
    for r, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        reference.store(batch.format, batch.cache, key, value, batch.slots(r), frame)
        if exact:
            slots = batch.slots(r, exact=True)
            real = slots >= batch.exact_block_size
            rows = torch.cat((key, value), -1)[real]
            exact.cache[slots[real] // batch.exact_block_size, :, slots[real] % batch.exact_block_size] = rows
    return batch


def attended(batch: Batch, hopper: bool, exact: ExactBlocks | None = None, frame=None, max_row_queries: int | None = None):
    kernels = GpuKernels(
        batch.format,
        batch.num_kv_heads * batch.group,
        batch.num_kv_heads,
        len(batch.queries),
        device,
        batch.dtype,
        max(batch.queries),
        hopper=hopper,
    )
    seq_lens = [len(x) for x in batch.keys]
    plan = StepPlan.of(
        torch.tensor([0, *batch.queries]).cumsum(0).int().to(device),
        torch.tensor(seq_lens).int().to(device),
        batch.queries,
        seq_lens,
        max_row_queries or max(batch.queries),
    )
    out = torch.full_like(batch.query, torch.nan).to(device)
    kernels.attend(
        batch.query.to(device),
        batch.chunk(batch.keys).to(device),
        batch.chunk(batch.values).to(device),
        out,
        None if batch.cache is None else batch.cache.to(device),
        plan,
        batch.block_table.to(device),
        batch.format.head_size**-0.5,
        None if frame is None else frame.to(device),
        ExactBlocks(exact.cache.to(device), exact.residual_tokens, exact.sink_tokens) if exact else None,
        batch.exact_table.to(device) if exact else None,
    )
    return out.cpu()


@pytest.mark.parametrize("hopper, queries, dtype", STEPS)
@pytest.mark.parametrize("head_size, key_bits, value_bits, value_codec", WIDTHS)
def test_every_width(head_size, key_bits, value_bits, value_codec, hopper, queries, dtype):
    batch = filled(Batch(CacheFormat(head_size, key_bits, value_bits, value_codec), [200, 63, 0], queries, 2, 3, dtype))
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[dtype]


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 71])
def test_query_groups(group, dtype, hopper):
    batch = filled(Batch(CacheFormat(64), [130, 1], [1, 2], 2, group, dtype))
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[dtype]


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 500, 2049])
def test_context_lengths(length, head_size, hopper):
    batch = filled(Batch(CacheFormat(head_size), [length - 1, length], [1, 1], 1, 4, PRECISE[hopper]))
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[PRECISE[hopper]]


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("residual_tokens, sink_tokens", [(128, 4), (128, 0), (0, 4), (0, 16), (1, 0), (2, 4), (4096, 4)])
@pytest.mark.parametrize("queries", [1, 5])
def test_exact_blocks(residual_tokens, sink_tokens, queries, hopper):
    batch = Batch(CacheFormat(64), [700, 90, 3, 200], [queries] * 4, 2, 3, PRECISE[hopper])
    exact = batch.exact_blocks(residual_tokens, sink_tokens)
    filled(batch, exact)
    # null blocks in the middle of the window, as after chunked prefill: read packed there
    batch.exact_table[0, 38:41] = 0
    assert relative_rms(attended(batch, hopper, exact), expected(batch, exact)) < LIMIT[PRECISE[hopper]]


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("exact_block_size", [8, 32, 64])
def test_exact_block_sizes(exact_block_size, head_size, hopper):
    batch = Batch(CacheFormat(head_size), [300, 77], [1, 3], 2, 3, PRECISE[hopper], exact_block_size=exact_block_size)
    exact = batch.exact_blocks(128, 4)
    filled(batch, exact)
    # a null block inside the window: read packed there
    batch.exact_table[0, 200 // exact_block_size] = 0
    assert relative_rms(attended(batch, hopper, exact), expected(batch, exact)) < LIMIT[PRECISE[hopper]]


@pytest.mark.parametrize("hopper", KERNELS)
def test_key_frame(hopper):
    batch = Batch(CacheFormat(64), [300, 20], [1, 4], 2, 3, PRECISE[hopper])
    frame = key_frame(2, 64)
    exact = batch.exact_blocks(64, 4)
    filled(batch, exact, frame)
    got = attended(batch, hopper, exact, frame)
    assert relative_rms(got, expected(batch, exact, frame)) < LIMIT[PRECISE[hopper]]


def test_models_in_fp32_take_the_portable_kernels():
    assert not hopper_supports(CacheFormat(128), torch.float32, torch.device("cuda"))
    assert not hopper_supports(CacheFormat(128), torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("hopper", KERNELS)
def test_only_exact_blocks(hopper):
    """Protected layers: no packed cache, every position exact; equal to plain attention."""
    batch = Batch(CacheFormat(64), [200, 0], [3, 2], 2, 3, torch.float32)
    exact = batch.exact_blocks(0, 2**31 - 1)
    want = expected(filled(batch, exact), exact)
    batch.cache = None
    assert relative_rms(attended(batch, hopper, exact), want) < 1e-5


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "plain", "spiky"])
def test_score_ranges(scale, hopper):
    batch = Batch(CacheFormat(128), [3000], [1], 2, 4, PRECISE[hopper])
    batch.query *= scale
    filled(batch)
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[PRECISE[hopper]]


@pytest.mark.parametrize("hopper", KERNELS)
def test_a_packed_sink_does_not_hide_the_tail(hopper):
    """Token 0 takes most of the weight; what the others add must still count."""
    batch = Batch(CacheFormat(64), [2000], [1], 1, 1, PRECISE[hopper])
    batch.keys[0][0] = batch.query[0] * 2
    batch.values[0][:] = batch.values[0].abs()
    batch.values[0][0] = 0
    filled(batch)
    assert relative_rms(attended(batch, hopper), expected(batch)) < 2e-3


@pytest.mark.parametrize("hopper", KERNELS)
def test_requests_without_queries_or_context(hopper):
    """Padding of a CUDA graph's batch, in front, between and behind."""
    batch = filled(Batch(CacheFormat(128), [0, 300, 0, 0, 70, 0], [0, 1, 0, 1, 1, 0], 2, 4, PRECISE[hopper]))
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[PRECISE[hopper]]


@pytest.mark.parametrize("hopper", KERNELS)
def test_pages_of_several_layers_in_one_pool(hopper):
    batch = filled(Batch(CacheFormat(128), [300, 77], [1, 2], 2, 4, PRECISE[hopper]))
    want, (blocks, heads, size, slot) = expected(batch), batch.cache.shape
    pool = torch.full((blocks, 3, heads, size, slot), 0xA5, dtype=torch.uint8, device=device)
    pool[:, 1] = batch.cache.to(device)
    batch.cache = pool[:, 1]
    assert relative_rms(attended(batch, hopper), want) < LIMIT[PRECISE[hopper]]


@pytest.mark.parametrize("hopper", KERNELS)
def test_same_bits_every_time(hopper):
    batch = Batch(CacheFormat(128), [1500, 3, 640], [1, 2, 1], 2, 4, torch.bfloat16)
    exact = batch.exact_blocks(128, 4)
    filled(batch, exact)
    first = attended(batch, hopper, exact)
    assert torch.equal(attended(batch, hopper, exact), first)


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("exact_block_size", [None, 16], ids=["all-packed", "exact"])
def test_warm_up_runs_every_launch(exact_block_size, hopper):
    kernels = GpuKernels(CacheFormat(64), 6, 2, 5, device, torch.bfloat16, 3, hopper=hopper)
    workspace = Workspace(2, 64, torch.bfloat16, device, 1024)
    kernels.warm_up(workspace, 128, exact_block_size, (128, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", KERNELS)
def test_long_context_beside_short_ones(hopper):
    batch = filled(Batch(CacheFormat(64), [150_001, 300, 0], [1, 1, 1], 1, 4, torch.float16))
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("requests", [5, 20, 70, 150])
def test_many_requests(requests, head_size, hopper):
    """40 to 1,200 (request, kv head) pairs: every number of warps and rows that merge_hopper.py's programs have."""
    contexts = [300 + r for r in range(requests)]
    batch = filled(Batch(CacheFormat(head_size), contexts, [1] * requests, 8, 4, torch.bfloat16))
    assert relative_rms(attended(batch, hopper), expected(batch)) < LIMIT[torch.bfloat16]
