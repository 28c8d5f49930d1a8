"""What only a GPU can show: steps that never wait for it, CUDA graphs replayed on longer sequences."""

import pytest
import torch

from helpers import DEVICE, Batch
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks
from vllm_powerquant.attention.kernels.gpu_kernels import GpuKernels
from vllm_powerquant.attention.kernels.step import StepPlan

pytestmark = pytest.mark.gpu
device = torch.device(DEVICE)
KERNELS = [pytest.param(False, id="portable"), pytest.param(True, id="hopper")]


class Step:
    """Store and attention of one step whose sequences may grow, on tensors that keep their addresses."""

    def __init__(self, batch: Batch, residual_tokens: int, sink_tokens: int, hopper: bool) -> None:
        self.batch, self.queries = batch, max(batch.queries)
        heads, kv_heads, requests = batch.num_kv_heads * batch.group, batch.num_kv_heads, len(batch.queries)
        self.kernels = GpuKernels(batch.format, heads, kv_heads, requests, device, batch.dtype, self.queries, hopper=hopper)
        self.cache, self.exact_cache = batch.cache.to(device), batch.exact_cache.to(device)
        self.exact = ExactBlocks(self.exact_cache, residual_tokens, sink_tokens)
        self.table, self.exact_table = batch.block_table.to(device), batch.exact_table.to(device)
        self.starts = torch.tensor([0, *batch.queries]).cumsum(0).int().to(device)
        tokens = sum(batch.queries)
        self.seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self.slots, self.exact_slots = (torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(2))
        self.query = torch.zeros(tokens, heads, batch.format.head_size, dtype=batch.dtype, device=device)
        self.key, self.value = (
            torch.zeros(tokens, kv_heads, batch.format.head_size, dtype=batch.dtype, device=device) for _ in "kv"
        )
        self.out = torch.full_like(self.query, torch.nan)

    def set(self, seq_lens: list[int], query: torch.Tensor) -> None:
        """The next step: each request's last tokens of so many."""
        batch = self.batch
        rows = [slice(n - q, n) for n, q in zip(seq_lens, batch.queries, strict=True)]
        self.seq_lens.copy_(torch.tensor(seq_lens))
        self.query.copy_(query)
        self.key.copy_(torch.cat([keys[r] for keys, r in zip(batch.keys, rows, strict=True)]))
        self.value.copy_(torch.cat([values[r] for values, r in zip(batch.values, rows, strict=True)]))
        self.slots.copy_(torch.cat([batch.slots(i)[r] for i, r in enumerate(rows)]))
        self.exact_slots.copy_(torch.cat([batch.slots(i, exact=True)[r] for i, r in enumerate(rows)]))

    def run(self) -> None:
        longest = len(self.batch.keys[0])
        plan = StepPlan.of(self.starts, self.seq_lens, self.batch.queries, [longest] * len(self.batch.queries), self.queries)
        self.kernels.store(self.cache, self.key, self.value, self.slots, None, self.exact, self.exact_slots)
        scale = self.batch.format.head_size**-0.5
        tables = (self.table, scale, None, self.exact, self.exact_table)
        self.kernels.attend(self.query, self.key, self.value, self.out, self.cache, plan, *tables)


def step_of(queries: int, hopper: bool) -> Step:
    return Step(Batch(CacheFormat(128), [700] * 3, [queries] * 3, 2, 4, torch.bfloat16), 128, 4, hopper)


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("queries", [1, 4])
def test_a_step_never_waits_for_the_device(queries, hopper):
    step = step_of(queries, hopper)
    step.set([queries] * 3, step.batch.query)
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not step.out.isnan().any()


@pytest.mark.parametrize("hopper", KERNELS)
@pytest.mark.parametrize("queries", [1, 4])
def test_a_graph_captured_once_serves_longer_sequences(queries, hopper):
    """Token after token, the replayed graph and the eager call on a second cache: the same bytes and the same bits."""
    replayed, eager = step_of(queries, hopper), step_of(queries, hopper)
    generator = torch.Generator().manual_seed(5)
    lengths = range(queries, 400, queries)
    replayed.set([queries] * 3, replayed.batch.query)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        replayed.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            replayed.run()
    torch.cuda.synchronize()
    for n in lengths:
        query = torch.randn(replayed.query.shape, generator=generator).to(torch.bfloat16)
        for step in (replayed, eager):
            step.set([n, max(queries, n - 70), n], query)
        graph.replay()
        eager.run()
        torch.cuda.synchronize()
        assert torch.equal(replayed.out, eager.out), n
    assert torch.equal(replayed.cache, eager.cache)
