"""Kernels that only a GPU runs, compiled and emulated: attention against the float64 reference, stores byte for byte."""

import pytest
import torch

from attention import test_gpu_kernels as attention
from attention import test_store as stores
from helpers import Batch, expected, key_frame, relative_rms
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels import store_nvidia
from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks

pytestmark = pytest.mark.emulated

HEAD_SIZES = (64, 128, 256)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Those of a GPU: bf16 is rounded here, not cut off."""
    monkeypatch.setitem(attention.LIMIT, torch.bfloat16, 2.5e-3)


@pytest.fixture(params=["in-order", "reversed"])
def landing(request, device):
    """The order in which asynchronous copies land."""
    device.reverse_copies = request.param == "reversed"


def check(batch: Batch, exact=None, frame=None) -> None:
    attention.filled(batch, exact, frame)
    error = relative_rms(attention.attended(batch, True, exact, frame), expected(batch, exact, frame))
    assert error < attention.LIMIT[batch.dtype]


# each width of keys and of values at every head size that has a kernel for it; a variant takes seconds to compile
SCALAR_WIDTHS = [
    (64, 4, 2),
    (64, 2, 8),
    (64, 8, 3),
    (128, 4, 2),
    (128, 2, 3),
    (128, 3, 4),
    (128, 8, 8),
    (256, 4, 2),
    (256, 3, 4),
    (256, 8, 8),
]
WIDTHS = [*((*w, "scalar") for w in SCALAR_WIDTHS), *((d, 4, 2, "trellis") for d in HEAD_SIZES), (128, 3, 2, "trellis")]


@pytest.mark.parametrize(
    "queries, dtype", [([1, 1, 1], torch.bfloat16), ([1, 3, 2], torch.float16)], ids=["plain", "drafts"]
)
@pytest.mark.parametrize("head_size, key_bits, value_bits, value_codec", WIDTHS)
def test_every_width(head_size, key_bits, value_bits, value_codec, queries, dtype):
    attention.test_every_width(head_size, key_bits, value_bits, value_codec, True, queries, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 3, 71])
def test_query_groups(group, dtype):
    attention.test_query_groups(group, dtype, True)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 500])
def test_context_lengths(length, head_size):
    attention.test_context_lengths(length, head_size, True)


@pytest.mark.parametrize(
    "residual_tokens, sink_tokens, queries",
    [(128, 4, 1), (128, 0, 1), (0, 4, 1), (0, 16, 1), (1, 0, 1), (4096, 4, 1), (128, 4, 5), (0, 16, 5), (2, 4, 5)],
)
def test_exact_blocks(residual_tokens, sink_tokens, queries, landing):
    attention.test_exact_blocks(residual_tokens, sink_tokens, queries, True)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("exact_block_size", [8, 16, 64])
def test_exact_block_sizes(exact_block_size, head_size, landing):
    attention.test_exact_block_sizes(exact_block_size, head_size, True)


def test_gaps_between_exact_tokens_are_refused():
    batch = Batch(CacheFormat(64), [100], [1], 1, 1, torch.float16)
    exact = batch.exact_blocks(128, 4)
    gaps = ExactBlocks(exact.cache.repeat(1, 1, 1, 2)[..., :128], 128, 4)
    with pytest.raises(ValueError, match="must end in 128, 1"):
        attention.attended(batch, True, gaps)


def test_key_frame(landing):
    attention.test_key_frame(True)


@pytest.mark.parametrize("exact_tokens", [(128, 4), (300, 0), (0, 20)])
def test_exact_blocks_and_frame(exact_tokens, landing):
    batch = Batch(CacheFormat(128, 3, 3), [500, 90, 0], [3, 1, 3], 2, 5, torch.float16, seed=7)
    frame = key_frame(2, 128)
    check(batch, batch.exact_blocks(*exact_tokens), frame)


@pytest.mark.parametrize("scale", [0.1, 6.0], ids=["flat", "spiky"])
def test_score_ranges(scale):
    attention.test_score_ranges(scale, True)


def test_a_packed_sink_does_not_hide_the_tail():
    attention.test_a_packed_sink_does_not_hide_the_tail(True)


def test_requests_without_queries_or_context():
    attention.test_requests_without_queries_or_context(True)


def test_pages_of_several_layers_in_one_pool():
    attention.test_pages_of_several_layers_in_one_pool(True)


@pytest.mark.parametrize("multiprocessors", [2, 9])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_many_partials(head_size, multiprocessors, device):
    """Up to 144 runs of one or two segments: merges of four warps, and more runs than tiles, so empty ones too."""
    device.multiprocessors = multiprocessors
    check(Batch(CacheFormat(head_size), [3000], [1], 1, 4, torch.float16))


@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_a_long_context_with_exact_blocks(multiprocessors, device, landing):
    device.multiprocessors = multiprocessors
    batch = Batch(CacheFormat(128), [3000, 0, 200], [4] * 3, 1, 4, torch.bfloat16)
    exact = batch.exact_blocks(128, 4)
    batch.exact_table[0, 2900 // 16] = 0
    check(batch, exact)


@pytest.mark.parametrize("requests", [1, 2, 3, 5, 9, 17])
def test_numbers_of_requests(requests, device):
    """2 to 34 segments of 1 to 18 runs: every number of warps and rows that a program of the merge has."""
    device.multiprocessors = 3
    check(Batch(CacheFormat(128), [300 + r for r in range(requests)], [1] * requests, 2, 4, torch.bfloat16))


@pytest.mark.parametrize("seed", range(9))
def test_random_batches(seed, device):
    g = torch.Generator().manual_seed(1000 + seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    head_size, kv_heads, size = HEAD_SIZES[seed % 3], draw(1, 2, 3), draw(8, 16, 32, 64)
    device.multiprocessors, device.reverse_copies = draw(1, 2, 3), draw(False, True)
    key_bits, value_bits = draw(2, 4, 8) if head_size == 64 else draw(2, 3, 4, 8), draw(2, 3, 4, 8)
    cache_format = CacheFormat(head_size, key_bits, value_bits, draw("scalar", "trellis") if value_bits == 2 else "scalar")
    queries = [draw(1, 2, 3, 4), *(draw(0, 1, 2, 3) for _ in range(draw(0, 1, 2, 5)))]
    contexts = [draw(0, 1, *range(900)) if n else 0 for n in queries]
    dtype, group = draw(torch.float16, torch.bfloat16), draw(1, 2, 3, 4, 6, 8, 12)
    batch = Batch(cache_format, contexts, queries, kv_heads, group, dtype, exact_block_size=size, seed=seed)
    exact = batch.exact_blocks(draw(1, *range(260)), draw(*range(40))) if draw(False, True, True) else None
    frame = key_frame(kv_heads, head_size, seed) if draw(False, True) else None
    if exact:
        for r, tokens in enumerate(map(len, batch.keys)):
            full_blocks = tokens // size
            batch.exact_table[r, :full_blocks][torch.rand(full_blocks, generator=g) < 0.1] = 0
    check(batch, exact, frame)


@pytest.fixture(params=["nvidia-small", "nvidia-large"])
def kernel(request, monkeypatch) -> str:
    monkeypatch.setattr(store_nvidia, "LARGE_BATCH", 0 if request.param == "nvidia-large" else 2**62)
    return request.param


@pytest.mark.parametrize(
    "head_size, key_bits, value_bits, value_codec",
    [
        *((*w, "scalar") for w in [(64, 4, 2), (64, 2, 8), (80, 4, 2), (128, 4, 2), (128, 3, 4), (128, 8, 3), (256, 4, 2)]),
        *((d, 4, 2, "trellis") for d in HEAD_SIZES),
        (128, 3, 2, "trellis"),
    ],
)
def test_stores_of_every_width(head_size, key_bits, value_bits, value_codec, kernel):
    stores.test_every_width(head_size, key_bits, value_bits, value_codec, kernel)


@pytest.mark.parametrize(
    "dtype, head_size",
    [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256)],
    ids=["fp32", "fp16", "bf16", "bf16-128", "bf16-256"],
)
def test_stores_of_dtypes_and_frame(dtype, head_size, kernel):
    stores.test_dtypes_and_frame(dtype, head_size, kernel)


@pytest.mark.parametrize("value_codec", ["scalar", "trellis"])
def test_stores_of_extremes(value_codec, kernel):
    stores.test_extremes(value_codec, kernel)


def test_stores_of_padding(kernel):
    stores.test_padding_is_not_written(kernel)


def test_stores_in_any_order(kernel):
    stores.test_slots_in_any_order(kernel)


def test_stores_of_strided_inputs(kernel):
    stores.test_strided_inputs(kernel)


def test_stores_into_one_pool(kernel):
    stores.test_pages_of_several_layers_in_one_pool(kernel)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "only-exact"])
@pytest.mark.parametrize("head_size", [80, 128])
def test_stores_of_exact_rows(head_size, packed, kernel):
    stores.test_exact_blocks_hold_the_rows_given(head_size, packed, kernel)
