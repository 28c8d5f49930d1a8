"""Long chunks on the GPU: what the workspace holds, and attention over it, against the float64 reference on the same bytes.

Without a GPU the kernels run in Triton's interpreter, and the portable attention stands in for FlashAttention.
"""

import itertools

import pytest
import torch

from helpers import DEVICE, Batch, expected, key_frame, relative_rms
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels import prefill
from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks
from vllm_powerquant.attention.kernels.flash import attend_pages
from vllm_powerquant.attention.kernels.prefill import ChunkPlan, Workspace, attend_chunks, gather_context
from vllm_powerquant.attention.rotation import SUPPORTED_HEAD_SIZES, unrotate

BITS = (2, 3, 4, 8)
WIDTHS = [
    *(
        pytest.param(d, k, v, "scalar", id=f"d{d}-k{k}v{v}")
        for d, k, v in itertools.product(SUPPORTED_HEAD_SIZES, BITS, BITS)
    ),
    *(pytest.param(d, k, 2, "trellis", id=f"d{d}-k{k}-trellis") for d in SUPPORTED_HEAD_SIZES for k in (3, 4)),
]
device = torch.device(DEVICE)
# fp32: products of three TF32 terms. 16 bits: keys, values, weights and outputs are rounded, fp16 2e-4 and bf16 2e-3 each;
# where a GPU rounds bf16 Triton's interpreter cuts it off, 3e-3 of each value, weight and output, always towards 0.
LIMIT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1.2e-2}
VERSIONS = [pytest.param(False, id="portable")]
if prefill.flash_attention_version(64, torch.bfloat16, device) is not None:
    VERSIONS.append(pytest.param(True, id="flash"))


def filled(batch: Batch, exact: ExactBlocks | None = None, frame: torch.Tensor | None = None) -> Batch:
    """Store every token of every request, packed and exactly, as the backend does before it attends."""
    for r, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        reference.store(batch.format, batch.cache, key, value, batch.slots(r), frame)
        if exact:
            slots, size = batch.slots(r, exact=True), batch.exact_block_size
            exact.cache[slots // size, :, slots % size] = torch.cat((key, value), -1)
    return batch


def workspace_of(batch: Batch, flash: bool = False, capacity: int = 1024) -> Workspace:
    workspace = Workspace(batch.num_kv_heads, batch.format.head_size, batch.dtype, device, capacity)
    if not flash:
        workspace.flash_version = None
    return workspace


def attended(
    batch: Batch,
    exact: ExactBlocks | None = None,
    frame: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    slack: int = 0,
) -> torch.Tensor:
    """slack: how much the host's upper bounds of the sequence lengths exceed them where there is a context."""
    lens = [len(x) for x in batch.keys]
    upper = [n + slack * (context > 0) for n, context in zip(lens, batch.contexts, strict=True)]
    plan = ChunkPlan.of(batch.queries, upper, workspace or workspace_of(batch))
    out = batch.out.to(device)
    attend_chunks(
        batch.format,
        batch.query.to(device),
        batch.chunk(batch.keys).to(device),
        batch.chunk(batch.values).to(device),
        out,
        batch.cache.to(device),
        batch.block_table.to(device),
        torch.tensor([0, *batch.queries]).cumsum(0).int().to(device),
        torch.tensor(lens).int().to(device),
        plan,
        batch.format.head_size**-0.5,
        None if frame is None else frame.to(device),
        ExactBlocks(exact.cache.to(device), exact.residual_tokens, exact.sink_tokens) if exact else None,
        batch.exact_table.to(device) if exact else None,
    )
    return out.cpu()


@pytest.mark.parametrize("head_size, key_bits, value_bits, value_codec", WIDTHS)
def test_gather_every_width(head_size, key_bits, value_bits, value_codec):
    """The workspace holds the reference's numbers, and zeros behind them."""
    batch = filled(Batch(CacheFormat(head_size, key_bits, value_bits, value_codec), [70], [30], 1, 1, torch.float32))
    workspace = workspace_of(batch, capacity=128)
    workspace.keys.fill_(torch.nan)
    workspace.values.fill_(torch.nan)
    plan = ChunkPlan.of([30], [100], workspace)
    gather_context(
        workspace,
        batch.format,
        batch.chunk(batch.keys).to(device),
        batch.chunk(batch.values).to(device),
        batch.cache.to(device),
        batch.block_table.to(device),
        torch.tensor([0, 30], dtype=torch.int32, device=device),
        torch.tensor([100], dtype=torch.int32, device=device),
        plan.rounds[0].tiles[0],
        with_chunk=True,
    )
    keys, values = reference.gather(batch.format, batch.cache, batch.slots(0)[:70])
    for got, packed, raw in (workspace.keys, keys, batch.keys[0]), (workspace.values, values, batch.values[0]):
        got = got.cpu()[0]
        assert relative_rms(got[:70], unrotate(packed)) < 1e-6
        assert torch.equal(got[70:100], raw[70:])
        assert (got[100:] == 0).all()


@pytest.mark.parametrize("flash", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_query_groups(group, dtype, flash):
    batch = filled(Batch(CacheFormat(64), [130, 1], [65, 3], 2, group, dtype))
    assert relative_rms(attended(batch, workspace=workspace_of(batch, flash)), expected(batch)) < LIMIT[dtype]


@pytest.mark.parametrize("flash", VERSIONS)
@pytest.mark.parametrize("head_size", [80, 128, 192, 256])
def test_head_sizes(head_size, flash):
    batch = filled(Batch(CacheFormat(head_size), [100], [70], 1, 2, torch.float16))
    assert relative_rms(attended(batch, workspace=workspace_of(batch, flash)), expected(batch)) < LIMIT[torch.float16]


@pytest.mark.parametrize("flash", VERSIONS)
@pytest.mark.parametrize("slack", [0, 1, 200])
@pytest.mark.parametrize(
    "contexts, queries",
    [
        ([0, 0], [70, 129]),
        ([64, 0, 127], [64, 30, 1]),
        ([0, 128, 129, 0], [5, 2, 63, 64]),
        ([200, 300, 0, 10], [40, 40, 40, 40]),
    ],
    ids=["fresh", "fresh-between", "fresh-around", "several-rounds"],
)
def test_mixed_requests(contexts, queries, slack, flash):
    """Requests with and without a context, in one round or more, with tight and loose bounds of their lengths."""
    batch = filled(Batch(CacheFormat(64), contexts, queries, 1, 2, torch.float16))
    got = attended(batch, workspace=workspace_of(batch, flash, 512), slack=slack)
    assert relative_rms(got, expected(batch)) < LIMIT[torch.float16]


@pytest.mark.parametrize("flash", VERSIONS)
@pytest.mark.parametrize("slack", [0, 300])
@pytest.mark.parametrize("context", [129, 256, 300])
def test_segments(context, slack, flash):
    """Contexts of more than the workspace's 128 tokens, beside requests that fit."""
    batch = Batch(CacheFormat(64), [context, 20, 0], [70, 10, 140], 2, 2, torch.float16)
    frame = key_frame(2, 64)
    exact = batch.exact_blocks(40, 4)
    filled(batch, exact, frame)
    got = attended(batch, exact, frame, workspace_of(batch, flash, 128), slack)
    assert relative_rms(got, expected(batch, exact, frame)) < LIMIT[torch.float16]


@pytest.mark.parametrize("residual_tokens, sink_tokens", [(128, 4), (128, 0), (0, 4), (0, 16), (1, 0), (2, 70), (4096, 4)])
def test_exact_blocks(residual_tokens, sink_tokens):
    """The workspace's precision is fp32, so one wrongly chosen position shows."""
    batch = Batch(CacheFormat(64), [300, 90, 3], [20] * 3, 2, 1, torch.float32)
    exact = batch.exact_blocks(residual_tokens, sink_tokens)
    filled(batch, exact)
    # null blocks in the middle of the window, as after chunked prefill: read packed there
    batch.exact_table[0, 14:16] = 0
    batch.exact_table[1, 0] = 0
    exact.cache[0] = torch.nan
    assert relative_rms(attended(batch, exact), expected(batch, exact)) < LIMIT[torch.float32]


@pytest.mark.parametrize("flash", VERSIONS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_only_exact_blocks(block_size, num_kv_heads, flash):
    """Protected layers: no packed cache, every position exact; equal to plain attention."""
    batch = Batch(CacheFormat(64), [200, 0], [3, 70], num_kv_heads, 3, torch.float16, exact_block_size=block_size)
    exact = batch.exact_blocks(0, 2**31 - 1)
    filled(batch, exact)
    out, start = batch.out.to(device), 0
    lens = [len(keys) for keys in batch.keys]
    attend_pages(
        workspace_of(batch, flash).flash_version,
        batch.query.to(device),
        out,
        exact.cache.to(device),
        batch.exact_table.to(device),
        torch.tensor([0, *batch.queries]).cumsum(0).int().to(device),
        torch.tensor(lens).int().to(device),
        max(batch.queries),
        max(lens),
        batch.format.head_size**-0.5,
    )
    got = out.cpu()
    for r, queries in enumerate(batch.queries):
        keys, values = (x[r].double().repeat_interleave(3, dim=1).transpose(0, 1) for x in (batch.keys, batch.values))
        total = keys.shape[1]
        mask = torch.arange(total)[None] <= torch.arange(total - queries, total)[:, None]
        query = batch.query[start : start + queries].double().transpose(0, 1)
        want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(0, 1)
        assert relative_rms(got[start : start + queries], want) < LIMIT[torch.float16]
        start += queries


@pytest.mark.parametrize("block_size", [64, 192])
def test_padded_pool(block_size):
    """Pages, and exact blocks, that lie apart in a larger pool, as vLLM lays out groups of different sizes."""
    batch = Batch(CacheFormat(64), [200, 30], [20, 9], 2, 1, torch.float32, block_size=block_size)
    exact = batch.exact_blocks(32, 4)
    filled(batch, exact)
    want = expected(batch, exact)
    blocks, heads, size, slot_bytes = batch.cache.shape
    pool = torch.full((blocks, heads * size * slot_bytes + 256), 0xA5, dtype=torch.uint8, device=device)
    pages = pool.as_strided(batch.cache.shape, (pool.stride(0), size * slot_bytes, slot_bytes, 1))
    pages.copy_(batch.cache)
    batch.cache = pages
    pool = torch.full((exact.cache.shape[0], exact.cache[0].numel() + 64), torch.nan, device=device)
    rows = pool.as_strided(exact.cache.shape, (pool.stride(0), *exact.cache.stride()[1:]))
    rows.copy_(exact.cache)
    exact = ExactBlocks(rows, 32, 4)
    assert relative_rms(attended(batch, exact), want) < LIMIT[torch.float32]


def test_key_frame():
    batch = Batch(CacheFormat(64), [150, 20], [30, 4], 2, 1, torch.float32)
    frame = key_frame(2, 64)
    exact = batch.exact_blocks(64, 4)
    filled(batch, exact, frame)
    assert relative_rms(attended(batch, exact, frame), expected(batch, exact, frame)) < LIMIT[torch.float32]


def test_strided_inputs():
    """Queries, keys and values as slices of one projection, as vLLM hands them over."""
    batch = filled(Batch(CacheFormat(64), [100, 0], [20, 7], 2, 2, torch.float16))
    joined = torch.cat((batch.query, batch.chunk(batch.keys), batch.chunk(batch.values)), dim=1).to(device)
    out = torch.empty_like(batch.query).to(device)
    attend_chunks(
        batch.format,
        joined[:, :4],
        joined[:, 4:6],
        joined[:, 6:],
        out,
        batch.cache.to(device),
        batch.block_table.to(device),
        torch.tensor([0, 20, 27], dtype=torch.int32, device=device),
        torch.tensor([120, 7], dtype=torch.int32, device=device),
        ChunkPlan.of([20, 7], [120, 7], workspace_of(batch)),
        0.125,
    )
    assert torch.equal(out.cpu(), attended(batch))


@pytest.mark.parametrize("flash", VERSIONS)
def test_one_requests_nan_stays_there(flash):
    """Neither beside it nor later, through what it leaves in the workspace, does another request see it."""
    batch = filled(Batch(CacheFormat(64), [100, 70], [20, 9], 1, 2, torch.float16))
    workspace = workspace_of(batch, flash)
    want = attended(batch, workspace=workspace)
    key, value = batch.keys[0], batch.values[0]
    batch.keys[0], batch.values[0] = (torch.cat((x[:100], torch.full_like(x[100:], torch.nan))) for x in (key, value))
    got = attended(batch, workspace=workspace)
    assert got[:20].isnan().all() and torch.equal(got[20:], want[20:])
    batch.keys[0], batch.values[0] = key[:110], value[:110]
    batch.queries, batch.query, batch.out = [10, 9], batch.query[10:], batch.out[10:]
    assert relative_rms(attended(batch, workspace=workspace), expected(batch)) < LIMIT[torch.float16]


@pytest.mark.parametrize(
    "query_lens, seq_lens, want",
    [
        ([5], [5], [(0, 1, "fresh")]),
        ([5, 700, 9], [5, 700, 9], [(0, 3, "fresh")]),
        ([5, 5, 5], [5, 100, 5], [(0, 3, "gathered")]),
        ([5, 5], [300, 300], [(0, 1, "gathered"), (1, 2, "gathered")]),
        ([5, 5], [256, 256], [(0, 2, "gathered")]),
        ([600, 5], [600, 100], [(0, 1, "fresh"), (1, 2, "gathered")]),
        ([5, 5, 5], [100, 513, 100], [(0, 1, "gathered"), (1, 2, "segmented"), (2, 3, "gathered")]),
        ([], [], []),
    ],
)
def test_rounds(query_lens, seq_lens, want):
    """A workspace of 512 tokens in pages of 128."""
    got = prefill._grouped(query_lens, seq_lens, 4)
    assert [(part.start, part.stop, kind) for part, kind in got] == want


def test_plan_of_a_round():
    workspace = Workspace(1, 64, torch.float32, device, 512)
    plan = ChunkPlan.of([5, 9, 300], [130, 9, 1000], workspace)
    first, second = plan.rounds
    assert (plan.num_tokens, plan.max_query_len, plan.max_seq_len) == (314, 300, 1000)
    assert (first.requests, first.rows, first.max_query_len, first.max_seq_len) == (slice(0, 2), slice(0, 14), 9, 130)
    assert first.query_start.tolist() == [0, 5, 14]
    assert first.tiles[0].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]
    assert first.block_table[0, :2].tolist() == [0, 1] and first.block_table[1, 0] == 2
    assert second.segmented and [len(tiles) for tiles in second.tiles] == [8, 4]
    assert second.tiles[1][0].tolist() == [2, 8] and second.rows == slice(14, 314)


def test_workspace_is_shared():
    arguments = (1, 64, torch.float32, device, 256)
    assert Workspace.of(*arguments) is Workspace.of(*arguments)


def test_log_sums_of_the_portable_kernel():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, heads, 64, generator=g).to(device) for n, heads in ((40, 4), (90, 2), (90, 2)))
    starts, keys = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 40], [0, 20, 90]))
    out = torch.empty_like(query)
    lse = prefill.flash_attention(None, query, key, value, out, starts, 37, 70, 0.125, False, key_start=keys, with_lse=True)
    for q, k in ((slice(0, 3), slice(0, 20)), (slice(3, 40), slice(20, 90))):
        scores = torch.einsum("nhd,thd->hnt", query[q].double(), key[k].double().repeat_interleave(2, dim=1)) * 0.125
        assert torch.allclose(lse[:, q].double(), scores.logsumexp(-1), atol=1e-5)
        want = torch.einsum("hnt,thd->nhd", scores.softmax(-1), value[k].double().repeat_interleave(2, dim=1))
        assert relative_rms(out[q], want) < LIMIT[torch.float32]
