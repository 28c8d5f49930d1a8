"""CPU kernels: stored bytes equal to the reference's, attention equal to it on the same bytes."""

import itertools

import pytest
import torch

from helpers import ARITHMETIC_LIMIT, Batch, expected, key_frame, relative_rms
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels import cpu_build, cpu_kernels
from vllm_powerquant.attention.kernels.cpu_kernels import BatchPlan, CpuKernels, ExactBlocks
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES

BITS = (2, 3, 4, 8)
WIDTHS = [
    *(
        pytest.param(d, k, v, "scalar", id=f"d{d}-k{k}v{v}")
        for d, k, v in itertools.product(SUPPORTED_HEAD_SIZES, BITS, BITS)
    ),
    *(pytest.param(d, k, 2, "trellis", id=f"d{d}-k{k}-trellis") for d in SUPPORTED_HEAD_SIZES for k in (3, 4)),
]


def stored(batch: Batch, exact: ExactBlocks | None = None, frame: torch.Tensor | None = None) -> CpuKernels:
    """Kernels of the batch's format, after storing every token of every request."""
    kernels = CpuKernels(batch.format)
    for r, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        kernels.store(batch.cache, key, value, batch.slots(r), frame, exact, batch.slots(r, exact=True))
    return kernels


def attended(batch: Batch, kernels: CpuKernels, exact: ExactBlocks | None = None, frame: torch.Tensor | None = None):
    kernels.attend(
        batch.query,
        batch.chunk(batch.keys),
        batch.chunk(batch.values),
        batch.out,
        batch.cache,
        batch.plan,
        batch.block_table,
        batch.format.head_size**-0.5,
        frame,
        exact,
        batch.exact_table if exact else None,
    )
    return batch.out


@pytest.mark.parametrize("head_size, key_bits, value_bits, value_codec", WIDTHS)
def test_every_width(head_size, key_bits, value_bits, value_codec):
    """Bytes and arithmetic of each width and head size: 3 requests, one of them a chunk."""
    fmt = CacheFormat(head_size, key_bits, value_bits, value_codec)
    batch = Batch(fmt, [200, 63, 0], [5, 1, 3], 2, 3, torch.float32)
    kernels = stored(batch)
    want = torch.full_like(batch.cache, 0xA5)
    for r in range(3):
        reference.store(batch.format, want, batch.keys[r], batch.values[r], batch.slots(r))
    assert torch.equal(batch.cache, want)
    assert relative_rms(attended(batch, kernels), expected(batch)) < ARITHMETIC_LIMIT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 64, 65, 71])
def test_query_groups(group, dtype):
    batch = Batch(CacheFormat(64), [130, 1], [1, 2], 2, group, dtype)
    kernels = stored(batch)
    assert relative_rms(attended(batch, kernels), expected(batch)) < ARITHMETIC_LIMIT[dtype]


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 500, 2048, 2049, 6000])
def test_context_lengths(length, head_size):
    batch = Batch(CacheFormat(head_size), [length - 1, length], [1, 1], 1, 4, torch.float32)
    kernels = stored(batch)
    assert relative_rms(attended(batch, kernels), expected(batch)) < ARITHMETIC_LIMIT[torch.float32]


@pytest.mark.parametrize("queries", [2, 17, 63, 64, 65, 300])
def test_chunks(queries):
    batch = Batch(CacheFormat(64), [0, 100, 257], [queries, 1, queries], 3, 3, torch.float32)
    kernels = stored(batch)
    assert relative_rms(attended(batch, kernels), expected(batch)) < ARITHMETIC_LIMIT[torch.float32]


@pytest.mark.parametrize("residual_tokens, sink_tokens", [(128, 4), (128, 0), (0, 4), (0, 16), (1, 0), (4096, 4)])
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_exact_blocks(residual_tokens, sink_tokens, queries):
    batch = Batch(CacheFormat(64), [700, 90, 3], [queries] * 3, 2, 3, torch.float32)
    exact = batch.exact_blocks(residual_tokens, sink_tokens)
    kernels = stored(batch, exact)
    # null blocks in the middle of the window, as after chunked prefill: read packed there
    batch.exact_table[0, 38:41] = 0
    assert relative_rms(attended(batch, kernels, exact), expected(batch, exact)) < ARITHMETIC_LIMIT[torch.float32]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 4e-4), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_long_chunks_over_a_dequantized_context(dtype, limit, monkeypatch):
    """Chunks of 64 queries and more dequantize their context, here in segments of 256 tokens; beside them a short one.

    The frame's random scales, unlike a model's, leave more to round in 16 bits.
    """
    monkeypatch.setattr(cpu_kernels, "SEGMENT_TOKENS", 256)
    batch = Batch(CacheFormat(64), [700, 5, 64], [100, 1, 64], 2, 3, dtype)
    frame = key_frame(2, 64)
    exact = batch.exact_blocks(128, 4)
    kernels = stored(batch, exact, frame)
    batch.exact_table[0, 38:41] = 0
    assert relative_rms(attended(batch, kernels, exact, frame), expected(batch, exact, frame)) < limit


def test_exact_blocks_hold_the_rows_given():
    batch = Batch(CacheFormat(64), [40], [1], 2, 1, torch.bfloat16)
    exact = batch.exact_blocks(128, 4)
    batch.exact_table[0, 1] = 0
    stored(batch, exact)
    slots = batch.slots(0, exact=True)
    rows = exact.cache[slots // 16, :, slots % 16]
    real = slots >= 16
    assert torch.equal(rows[real], torch.cat((batch.keys[0], batch.values[0]), -1)[real])
    assert exact.cache[0].isnan().all()  # the null block is not written


def test_only_exact_blocks():
    """Protected layers: no packed cache, every position exact; equal to plain attention."""
    batch = Batch(CacheFormat(64), [200, 0], [3, 70], 2, 3, torch.float32)
    exact = batch.exact_blocks(0, 2**31 - 1)
    kernels = CpuKernels(batch.format)
    for r in range(2):
        kernels.store(None, batch.keys[r], batch.values[r], None, exact=exact, exact_slot_mapping=batch.slots(r, exact=True))
    batch.cache = None
    out, start = attended(batch, kernels, exact), 0
    for r, queries in enumerate(batch.queries):
        keys, values = (x[r].double().repeat_interleave(3, dim=1).transpose(0, 1) for x in (batch.keys, batch.values))
        total = keys.shape[1]
        mask = torch.arange(total)[None] <= torch.arange(total - queries, total)[:, None]
        query = batch.query[start : start + queries].double().transpose(0, 1)
        want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(0, 1)
        assert relative_rms(out[start : start + queries], want) < 1e-5
        start += queries


def test_key_frame():
    batch = Batch(CacheFormat(64), [300, 20], [1, 4], 2, 3, torch.float32)
    frame = key_frame(2, 64)
    exact = batch.exact_blocks(64, 4)
    kernels = stored(batch, exact, frame)
    want = torch.full_like(batch.cache, 0xA5)
    for r in range(2):
        reference.store(batch.format, want, batch.keys[r], batch.values[r], batch.slots(r), frame)
    assert torch.equal(batch.cache, want)
    got = attended(batch, kernels, exact, frame)
    assert relative_rms(got, expected(batch, exact, frame)) < ARITHMETIC_LIMIT[torch.float32]


@pytest.mark.parametrize(
    "pieces", [[300], [1] * 300, [37] * 8 + [4], [63, 1, 64, 65, 107]], ids=["whole", "ones", "37s", "mixed"]
)
def test_store_does_not_depend_on_the_pieces(pieces):
    """The same bytes in whatever alignment tokens arrive, rewritten drafts included."""
    batch = Batch(CacheFormat(64, 4, 2), [299], [1], 3, 1, torch.bfloat16)
    key, value, slots = batch.keys[0], batch.values[0], batch.slots(0)
    reference.store(batch.format, batch.cache, key, value, slots)
    got, kernels, start = torch.full_like(batch.cache, 0xA5), CpuKernels(batch.format), 0
    for n in pieces:
        drafts = slice(start, min(start + n + 3, 300))  # three more than are kept: rejected, then written again
        kernels.store(got, -key[drafts], -value[drafts], slots[drafts])
        part = slice(start, start + n)
        kernels.store(got, key[part], value[part], slots[part])
        start += n
    assert torch.equal(got, batch.cache)


def test_padding_is_not_written():
    batch = Batch(CacheFormat(64), [5], [1], 2, 1, torch.bfloat16)
    slots = torch.full_like(batch.slots(0), -1)
    CpuKernels(batch.format).store(batch.cache, batch.keys[0], batch.values[0], slots)
    assert (batch.cache == 0xA5).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "plain", "spiky"])
def test_score_ranges(scale):
    batch = Batch(CacheFormat(128), [3000], [1], 2, 4, torch.float32)
    batch.query *= scale
    kernels = stored(batch)
    assert relative_rms(attended(batch, kernels), expected(batch)) < ARITHMETIC_LIMIT[torch.float32]


def test_a_packed_sink_does_not_hide_the_tail():
    """Token 0 takes most of the weight; what the others add must still count."""
    batch = Batch(CacheFormat(64), [2000], [1], 1, 1, torch.float32)
    batch.keys[0][0] = batch.query[0] * 2
    batch.values[0][:] = batch.values[0].abs()
    batch.values[0][0] = 0
    kernels = stored(batch)
    assert relative_rms(attended(batch, kernels), expected(batch)) < 2e-3


def test_result_does_not_depend_on_threads_or_batch():
    whole = Batch(CacheFormat(64), [5000, 70, 900], [1, 9, 1], 2, 3, torch.bfloat16)
    kernels = stored(whole)
    out = attended(whole, kernels).clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(attended(whole, kernels), out)
    finally:
        torch.set_num_threads(threads)
    alone = torch.empty_like(whole.query[:1])
    kernels.attend(
        whole.query[:1],
        whole.keys[0][5000:],
        whole.values[0][5000:],
        alone,
        whole.cache,
        BatchPlan.of(torch.tensor([0, 1]), torch.tensor([5001])),
        whole.block_table[:1],
        0.125,
    )
    assert torch.equal(alone, out[:1])


def test_strided_inputs():
    """Queries, keys and values as slices of one projection, as vLLM hands them over."""
    batch = Batch(CacheFormat(64), [100], [4], 2, 2, torch.bfloat16)
    kernels = stored(batch)
    want = attended(batch, kernels).clone()
    joined = torch.cat((batch.query, batch.chunk(batch.keys), batch.chunk(batch.values)), dim=1)
    out = torch.empty_like(want)
    arguments = (batch.cache, batch.plan, batch.block_table, 0.125)
    kernels.attend(joined[:, :4], joined[:, 4:6], joined[:, 6:], out, *arguments)
    assert torch.equal(out, want)


def test_wrong_tensors_are_refused():
    batch = Batch(CacheFormat(64), [5], [1], 2, 1, torch.float32)
    kernels = CpuKernels(batch.format)
    with pytest.raises(ValueError, match="cache must be uint8"):
        kernels.store(batch.cache[..., :-1], batch.keys[0], batch.values[0], batch.slots(0))
    with pytest.raises(ValueError, match="int64"):
        kernels.store(batch.cache, batch.keys[0], batch.values[0], batch.slots(0).int())
    with pytest.raises(NotImplementedError, match="must share one of"):
        kernels.store(batch.cache, batch.keys[0].half(), batch.values[0], batch.slots(0))


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpu_build.KernelBuildError, match="CXX=no-such-compiler was not found; install one"):
        cpu_build.find_compiler()


def test_library_is_made_once_and_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path))
    build = cpu_build.build.__wrapped__
    library = build()
    assert library.parent == tmp_path / "kernels" and len(list(library.parent.iterdir())) == 2
    whole = library.read_bytes()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() == library  # no compiler is needed once it is there
    library.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(cpu_build.KernelBuildError, match="no-such-compiler"):
        build()
    monkeypatch.delenv("CXX")
    build()
    assert library.read_bytes() == whole


@pytest.mark.parametrize(
    "compiler, message",
    [("true", "compiling POWERQUANT's CPU kernels failed"), ("false", "failed"), ("g++ '", "must be a command")],
)
def test_bad_compiler_is_one_clear_error(compiler, message, tmp_path, monkeypatch):
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(cpu_build.KernelBuildError, match=message):
        cpu_build.build.__wrapped__()


def test_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(cpu_build.KernelBuildError, match="set POWERQUANT_CACHE_DIR to a folder that can be written"):
        cpu_build.build.__wrapped__()


def test_portable_kernels_agree(tmp_path, monkeypatch):
    """Built without AVX-512 the kernels take their portable path; same bytes, same limits."""
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_build, "_FLAGS", [f for f in cpu_build._FLAGS if f != "-march=native"])
    cpu_build.build.cache_clear()
    cpu_kernels._load.cache_clear()
    try:
        for key_bits, value_bits in ((4, 2), (3, 3), (2, 4), (8, 8)):
            batch = Batch(CacheFormat(80, key_bits, value_bits), [200, 63], [5, 1], 2, 3, torch.float32)
            kernels = stored(batch)
            want = torch.full_like(batch.cache, 0xA5)
            for r in range(2):
                reference.store(batch.format, want, batch.keys[r], batch.values[r], batch.slots(r))
            assert torch.equal(batch.cache, want)
            assert relative_rms(attended(batch, kernels), expected(batch)) < ARITHMETIC_LIMIT[torch.float32]
    finally:
        cpu_build.build.cache_clear()
        cpu_kernels._load.cache_clear()
