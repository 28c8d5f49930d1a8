"""Store kernels: every byte equal to the reference's; without a GPU the portable one runs interpreted."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from helpers import DEVICE, Batch, key_frame
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels import store_nvidia
from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks
from vllm_powerquant.attention.kernels.quantize import StoreFormat, find_codes
from vllm_powerquant.attention.kernels.store import store
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES, outer_order

# numpy's, in the interpreter: divisions whose result is not used
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BITS = (2, 3, 4, 8)
# every pair at one head size; elsewhere each width once, as keys and values are stored independently
EVERY_PAIR, PAIRS = list(itertools.product(BITS, BITS)), [(2, 8), (3, 4), (4, 2), (8, 3)]
WIDTHS = [
    *(
        pytest.param(d, k, v, "scalar", id=f"d{d}-k{k}v{v}")
        for d in SUPPORTED_HEAD_SIZES
        for k, v in (EVERY_PAIR if d == 64 else PAIRS)
    ),
    *(pytest.param(d, k, 2, "trellis", id=f"d{d}-k{k}-trellis") for d in SUPPORTED_HEAD_SIZES for k in (3, 4)),
]
KERNELS = ["portable"] if DEVICE == "cpu" or torch.version.hip else ["portable", "nvidia-small", "nvidia-large"]


@pytest.fixture(params=KERNELS, autouse=True)
def kernel(request, monkeypatch) -> str:
    """Every test runs each kernel; the NVIDIA kernel has one form for small batches, one for a tile's 64 tokens or more."""
    monkeypatch.setattr(store_nvidia, "LARGE_BATCH", 0 if request.param == "nvidia-large" else 2**62)
    return request.param


def stored(
    kernel: str,
    cache_format: CacheFormat,
    cache: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor | None,
    frame: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_slots: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """What a copy of the cache is after a store on the device; exact blocks are written in place."""
    cache = None if cache is None else cache.clone()
    on_device = [x if x is None else x.to(DEVICE) for x in (cache, key, value, slots, frame, exact_slots)]
    cache, key, value, slots, frame, exact_slots = on_device
    moved = exact and ExactBlocks(exact.cache.to(DEVICE), exact.residual_tokens, exact.sink_tokens)
    store(cache_format, cache, key, value, slots, frame, moved, exact_slots, portable=kernel == "portable")
    if exact:
        exact.cache.copy_(moved.cache)
    return None if cache is None else cache.cpu()


def expected(cache_format, cache, key, value, slots, frame=None) -> torch.Tensor:
    cache = cache.clone()
    reference.store(cache_format, cache, key, value, slots, frame)
    return cache


@pytest.mark.parametrize("head_size, key_bits, value_bits, value_codec", WIDTHS)
def test_every_width(head_size, key_bits, value_bits, value_codec, kernel):
    if kernel == "portable" and DEVICE == "cuda" and outer_order(head_size) > 1 and key_bits != 4:
        pytest.skip("compiles for half a minute; runs interpreted where there is no GPU")
    batch = Batch(CacheFormat(head_size, key_bits, value_bits, value_codec), [67], [3], 1, 1, torch.float32)
    arguments = (batch.format, batch.cache, batch.keys[0], batch.values[0], batch.slots(0))
    assert torch.equal(stored(kernel, *arguments), expected(*arguments))


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_dtypes_and_frame(dtype, head_size, kernel):
    batch = Batch(CacheFormat(head_size), [70], [9], 2, 1, dtype)
    frame = key_frame(2, head_size)
    arguments = (batch.format, batch.cache, batch.keys[0], batch.values[0], batch.slots(0), frame)
    assert torch.equal(stored(kernel, *arguments), expected(*arguments))


@triton.jit
def _find_codes_kernel(t_ptr, code_ptr, magnitude_ptr, VECTORS: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    code, magnitude = find_codes(tl.load(t_ptr + offs), VECTORS)
    tl.store(code_ptr + offs, code)
    tl.store(magnitude_ptr + offs, magnitude)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
def test_codes_at_every_boundary(head_size, bits, kernel):
    """The polynomial is as good as comparisons: on each half step, next to it, and at every extreme of fp32."""
    if kernel != "portable":
        pytest.skip("found in the portable kernel only")
    steps = torch.arange(-512, 512) / 2
    extremes = torch.tensor([0.0, 1e-45, 1e-30, 700.0, 1e30, 3e38, torch.inf])
    around = torch.cat((steps, steps.nextafter(steps - 1), steps.nextafter(steps + 1)))
    t = torch.cat((around, extremes, -extremes, torch.tensor([torch.nan]), torch.randn(4096 - len(around) - 15) * 42))
    cache_format = CacheFormat(head_size, bits, bits)
    books = (cache_format.key_codebook, cache_format.value_codebook)
    for book, vectors in zip(books, (StoreFormat.of(cache_format).keys, StoreFormat.of(cache_format).values), strict=True):
        levels = torch.tensor(book.levels, dtype=torch.float32)
        idx = (t[:, None] >= (levels[1:] + levels[:-1] + 1.0) * 0.5).sum(-1)
        code, magnitude = torch.empty(4096, dtype=torch.int32, device=DEVICE), torch.empty(4096, device=DEVICE)
        _find_codes_kernel[(1,)](t.to(DEVICE), code, magnitude, VECTORS=vectors, N=4096)
        assert torch.equal(code.cpu() + 2 ** (bits - 1), idx.int())
        assert torch.equal(magnitude.cpu(), (levels[idx] + 0.5).abs())


@pytest.mark.parametrize("value_codec", ["scalar", "trellis"])
def test_extremes(value_codec, kernel):
    """Zeros of both signs, vectors that cancel, and norms from below to above the range of fp32."""
    cache_format = CacheFormat(64, value_codec=value_codec)
    g = torch.Generator().manual_seed(0)
    zeros, ones = torch.zeros(64), torch.ones(64)
    one_hot = zeros.index_fill(0, torch.tensor([5]), 3.0)
    rows = [zeros, -zeros, ones, one_hot, one_hot - one_hot.roll(1), torch.cat((zeros[:32], ones[:32])), ones * 1e-30]
    exponents = (-45, -42, -40, -38, -30, -24, -23, -22, -20, -10, 0, 10, 18, 19, 20, 38)
    rows += [torch.randn(64, generator=g) * 10.0**e for e in exponents]
    for special in (torch.nan, torch.inf, -torch.inf, 3e38, 1e-45):
        rows += [torch.full((64,), special), torch.randn(64, generator=g).index_fill_(0, torch.tensor([7]), special)]
    x = torch.stack(rows)[:, None]
    cache = torch.full((3, 1, 64, cache_format.layout.slot_bytes), 0xA5, dtype=torch.uint8)
    arguments = (cache_format, cache, x, x.flip(-1), torch.arange(64, 64 + len(x)))
    assert torch.equal(stored(kernel, *arguments), expected(*arguments))


@pytest.mark.parametrize("pieces", [[300], [1] * 6 + [294], [63, 1, 64, 65, 107]], ids=["whole", "ones", "mixed"])
def test_result_does_not_depend_on_the_pieces(pieces, kernel):
    """The same bytes in whatever alignment tokens arrive, rewritten drafts included."""
    batch = Batch(CacheFormat(64), [299], [1], 1, 1, torch.bfloat16)
    key, value, slots = batch.keys[0], batch.values[0], batch.slots(0)
    got, start = batch.cache, 0
    for n in pieces:
        drafts = slice(start, min(start + n + 3, 300))  # three more than are kept: rejected, then written again
        got = stored(kernel, batch.format, got, -key[drafts], -value[drafts], slots[drafts])
        part = slice(start, start + n)
        got = stored(kernel, batch.format, got, key[part], value[part], slots[part])
        start += n
    assert torch.equal(got, expected(batch.format, batch.cache, key, value, slots))


def test_padding_is_not_written(kernel):
    """Negative slots, and rows of keys and values beyond the slots."""
    batch = Batch(CacheFormat(128), [80], [1], 2, 1, torch.bfloat16)
    slots = batch.slots(0)[:77].clone()
    slots[[0, 7, 8, 76]] = -1
    arguments = (batch.format, batch.cache, batch.keys[0], batch.values[0], slots)
    got = stored(kernel, *arguments)
    assert torch.equal(got, expected(batch.format, batch.cache, batch.keys[0][:77], batch.values[0][:77], slots))
    nothing = torch.full_like(slots, -1)
    assert torch.equal(stored(kernel, *arguments[:-1], nothing), batch.cache)
    assert torch.equal(stored(kernel, *arguments[:-1], nothing[:0]), batch.cache)


def test_slots_in_any_order(kernel):
    batch = Batch(CacheFormat(64, 3, 3), [700], [4], 1, 1, torch.float16, block_size=192)
    order = torch.randperm(704, generator=torch.Generator().manual_seed(1))
    arguments = (batch.format, batch.cache, batch.keys[0][order], batch.values[0][order], batch.slots(0)[order])
    assert torch.equal(stored(kernel, *arguments), expected(*arguments))


def test_strided_inputs(kernel):
    """Keys and values as slices of one projection, as vLLM hands them over, or of odd strides."""
    batch = Batch(CacheFormat(64), [50], [1], 2, 1, torch.bfloat16)
    key, value, slots = batch.keys[0], batch.values[0], batch.slots(0)
    want = expected(batch.format, batch.cache, key, value, slots)
    joined = torch.cat((torch.randn(51, 3, 64).bfloat16(), key, value), dim=1).to(DEVICE)
    assert torch.equal(stored(kernel, batch.format, batch.cache, joined[:, 3:5], joined[:, 5:], slots), want)
    odd = torch.cat((key, value, key[:, :, :1]), dim=2).to(DEVICE)[..., :128]
    assert torch.equal(stored(kernel, batch.format, batch.cache, odd[..., :64], odd[..., 64:], slots), want)


def test_pages_of_several_layers_in_one_pool(kernel):
    """A block's stride is larger than its content; other layers' bytes stay."""
    batch = Batch(CacheFormat(128), [300], [1], 2, 1, torch.bfloat16)
    blocks, _, block_size, slot_bytes = batch.cache.shape
    pool = torch.full((blocks, 3, block_size, slot_bytes), 0xA5, dtype=torch.uint8)
    want = pool.clone()
    slots = batch.slots(0)
    reference.store(batch.format, want[:, 1:], batch.keys[0], batch.values[0], slots)
    pool, key, value, slots = (x.to(DEVICE) for x in (pool, batch.keys[0], batch.values[0], slots))
    store(batch.format, pool[:, 1:], key, value, slots, portable=kernel == "portable")
    assert torch.equal(pool.cpu(), want)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "only-exact"])
@pytest.mark.parametrize("head_size", [80, 128])
def test_exact_blocks_hold_the_rows_given(head_size, packed, kernel):
    batch = Batch(CacheFormat(head_size), [70], [1], 2, 1, torch.bfloat16)
    key, value = batch.keys[0], batch.values[0]
    batch.exact_table[0, 1] = 0
    slots, exact_slots = batch.slots(0), batch.slots(0, exact=True)
    exact_slots[-1] = -1
    exact = batch.exact_blocks(128, 4)
    frame = key_frame(2, head_size)
    cache = batch.cache if packed else None
    got = stored(kernel, batch.format, cache, key, value, slots if packed else None, frame, exact, exact_slots)
    real = exact_slots >= 16
    rows = exact.cache[exact_slots // 16, :, exact_slots % 16]
    assert torch.equal(rows[real], torch.cat((key, value), -1)[real])
    assert exact.cache.isnan().all(-1).sum() == 2 * (exact.cache.shape[0] * 16 - real.sum())  # nothing else is written
    if packed:
        assert torch.equal(got, expected(batch.format, batch.cache, key, value, slots, frame))


def test_wrong_tensors_are_refused(kernel):
    batch = Batch(CacheFormat(64), [5], [1], 2, 1, torch.float32)
    cache, key, value, slots = (x.to(DEVICE) for x in (batch.cache, batch.keys[0], batch.values[0], batch.slots(0)))
    with pytest.raises(ValueError, match="cache must be uint8"):
        store(batch.format, cache[..., :-1], key, value, slots)
    with pytest.raises(ValueError, match="block_size must be a multiple of 64"):
        store(batch.format, cache[:, :, :96], key, value, slots)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        store(batch.format, cache.flatten()[8 : 8 + cache[1:].numel()].view_as(cache[1:]), key, value, slots)
    with pytest.raises(ValueError, match="int64"):
        store(batch.format, cache, key, value, slots.int())
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        store(batch.format, cache, key[..., ::2], value, slots)
    with pytest.raises(ValueError, match="exact blocks must be contiguous torch.float32 rows"):
        exact = ExactBlocks(batch.exact_cache.half().to(DEVICE), 1, 1)
        store(batch.format, cache, key, value, slots, exact=exact, exact_slot_mapping=slots)
    with pytest.raises(NotImplementedError, match="must share one of"):
        store(batch.format, cache, key.half(), value, slots)
