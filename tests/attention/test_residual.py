"""Exact blocks under vLLM's real KVCacheManager: hits, leaks, predictions, progress, stale ids and capacity.

`Engine` is a scheduler and a worker in small. The worker keeps the block ids it was told at allocation and a memory of
what was last written where, so a block that was freed and reused while a request still reads or writes it is an error.
"""

import random
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import CacheConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

from vllm_powerquant.attention.residual import ExactManager, ExactSpec

pytestmark = pytest.mark.vllm

kv_cache_utils.init_none_hash(sha256)

NULL = 0  # id of the null block


@dataclass(frozen=True)
class Case:
    """One engine. batches: steps in flight (2: async scheduling); drafts, lookahead, eagle: of speculative decoding."""

    block_size: int = 128
    rows: int = 16  # tokens of an exact block
    window: int = 128
    sinks: int = 4
    layers: int = 1
    kv_heads: int = 8
    max_model_len: int = 2048
    chunk: int = 512
    batches: int = 1
    drafts: int = 0
    lookahead: int = 0
    eagle: bool = False
    caching: bool = True
    watermark: float = 0.0
    stock: bool = False  # packed pages only

    @property
    def slots_ahead(self) -> int:
        return self.batches * (1 + self.drafts) + self.lookahead - 1

    def vllm_config(self) -> SimpleNamespace:
        """What vLLM's cache planning reads of a VllmConfig."""
        cache = CacheConfig(block_size=self.block_size, enable_prefix_caching=self.caching)
        cache.kv_cache_layout = "BLHNC"
        return SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=self.max_model_len, original_max_model_len=self.max_model_len),
            cache_config=cache,
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
            attention_config=SimpleNamespace(hisparse_config=None),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
            speculative_config=None,
            kv_transfer_config=None,
            max_in_flight_tokens=self.batches * self.chunk,
            num_prefill_lookahead_tokens=0,
        )

    def specs(self) -> dict:
        shape = {"num_kv_heads": self.kv_heads, "head_size": 128}
        packed = FullAttentionSpec(block_size=self.block_size, dtype=torch.uint8, state_content_bytes=100, **shape)
        exact = ExactSpec(
            block_size=self.rows,
            dtype=torch.bfloat16,
            sliding_window=self.window,
            sink_tokens=self.sinks,
            batches=self.batches,
            lookahead=self.slots_ahead,
            **shape,
        )
        # the auxiliary layers register after the model's own
        specs = {f"layers.{i}": packed for i in range(self.layers)}
        return specs if self.stock else specs | {f"layers.{i}.exact": exact for i in range(self.layers)}

    def plan(self, num_blocks: int | None = None):
        """(vLLM's worker config, its VllmConfig); num_blocks None: the fewest that vLLM accepts."""
        config = self.vllm_config()
        groups = kv_cache_utils.get_kv_cache_groups(config, self.specs())
        block_bytes = kv_cache_utils._pool_bytes_per_block(config, groups)
        if num_blocks is None:
            num_blocks = 1 + kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups) // block_bytes
        return kv_cache_utils.get_kv_cache_configs(config, [self.specs()], [num_blocks * block_bytes])[0], config


class Sequence:
    """A request, the tokens it will turn out to have, and the worker's view of it."""

    def __init__(self, request: Request, truth: list[int], max_tokens: int) -> None:
        self.request, self.truth = request, truth
        self.end = min(request.num_prompt_tokens + max_tokens, len(truth))
        # what a cache entry of position i must hold: a function of tokens 0..i
        self.content, state = [], 0
        for token in truth:
            state = hash((state, token))
            self.content.append(state)
        self.known = request.num_prompt_tokens  # tokens the worker knows, sampled ones included
        self.context = 0  # tokens the worker has computed
        self.tables: list[list[int]] = []

    @property
    def id(self) -> str:
        return self.request.request_id


class Engine:
    def __init__(self, case: Case, num_blocks: int | None = None, seed: int = 0) -> None:
        self.case, self.random = case, random.Random(seed)
        worker, config = case.plan(num_blocks)
        scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([worker])
        self.sizes = kv_cache_utils.resolve_kv_cache_block_sizes(scheduler, config)
        self.specs = [group.kv_cache_spec for group in scheduler.kv_cache_groups]
        self.manager = KVCacheManager(
            scheduler,
            max_model_len=case.max_model_len,
            scheduler_block_size=self.sizes[0],
            hash_block_size=self.sizes[1],
            max_in_flight_tokens=config.max_in_flight_tokens,
            enable_caching=case.caching,
            use_eagle=case.eagle,
            watermark=case.watermark,
        )
        self.pool = self.manager.block_pool
        self.free_at_start = self.pool.get_num_free_blocks()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: deque[list] = deque()
        self.memory: dict[int, tuple[int, dict]] = {}  # block id -> (group, row -> content)
        self.hits: list[int] = []
        self.count = {"steps": 0, "preempted": 0, "exact": 0, "wanted": 0, "sink hits": 0, "requests": 0}
        predict = self.manager.coordinator.get_num_blocks_to_allocate

        def recorded(*args, **kwargs):
            need = predict(*args, **kwargs)
            if not kwargs.get("apply_admission_cap"):
                self.predicted = need, self.pool.get_num_free_blocks()
            return need

        self.manager.coordinator.get_num_blocks_to_allocate = recorded

    def exact_managers(self) -> list[ExactManager]:
        return [m for m in self.manager.coordinator.single_type_managers if isinstance(m, ExactManager)]

    def add(self, prompt: list[int], max_tokens: int) -> Sequence:
        truth = prompt + [self.random.randrange(1000) for _ in range(self.case.max_model_len - len(prompt))]
        request = Request(
            request_id=str(self.count["requests"]),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens),
            pooling_params=None,
            block_hasher=kv_cache_utils.get_request_block_hasher(self.sizes[1], sha256) if self.case.caching else None,
        )
        self.count["requests"] += 1
        self.waiting.append(Sequence(request, truth, max_tokens))
        return self.waiting[-1]

    def allocate(self, sequence: Sequence, num_new: int, **kwargs):
        blocks = self.manager.allocate_slots(sequence.request, num_new, num_lookahead_tokens=self.case.lookahead, **kwargs)
        if blocks is not None:
            need, free = self.predicted
            assert free - self.pool.get_num_free_blocks() == need, "the prediction and the allocation differ"
        return blocks

    def preempt(self, sequence: Sequence) -> None:
        request = sequence.request
        self.running.remove(sequence)
        self.manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.spec_token_ids = []
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self.count["preempted"] += 1

    def abort(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.manager.free(sequence.request)
        sequence.request.status = RequestStatus.FINISHED_ABORTED

    def step(self) -> None:
        self.count["steps"] += 1
        budget, scheduled, preempted = self.case.chunk, [], False
        for sequence in list(self.running):
            request = sequence.request
            if sequence not in self.running or not budget:
                continue
            num_new = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            num_new = min(num_new, budget, self.case.max_model_len - request.num_computed_tokens - 1)
            # no step beyond the one that is sure to reach the end
            if num_new <= 0 or (
                request.num_output_placeholders
                and request.num_computed_tokens + 2 - request.num_output_placeholders >= sequence.end
            ):
                continue
            while (blocks := self.allocate(sequence, num_new)) is None:
                victim = self.running[-1]
                self.preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            if blocks is None:
                break
            for table, ids in zip(sequence.tables, blocks.get_block_ids(), strict=True):
                table.extend(ids)
            scheduled.append((sequence, num_new))
            budget -= num_new
        while self.waiting and budget and not preempted:
            sequence = self.waiting[0]
            request = sequence.request
            if request.num_in_flight_tokens:
                break
            hits, num_hit, _ = self.manager.get_computed_blocks(request)
            assert not self.case.caching or num_hit == self.packed_hit(request)
            num_new = min(request.num_tokens - num_hit, budget)
            blocks = self.allocate(
                sequence,
                num_new,
                num_new_computed_tokens=num_hit,
                new_computed_blocks=hits,
                full_sequence_must_fit=True,
                has_scheduled_reqs=bool(self.running),
            )
            if blocks is None:
                assert self.running or self.in_flight, "a lone request must be admitted"
                break
            self.check_sinks(sequence, num_hit)
            self.waiting.popleft()
            self.running.append(sequence)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = sequence.context = num_hit
            sequence.tables = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
            scheduled.append((sequence, num_new))
            budget -= num_new
        self.in_flight.append([self.execute(sequence, num_new) for sequence, num_new in scheduled])
        while self.in_flight and (len(self.in_flight) >= self.case.batches or not scheduled):
            self.settle(self.in_flight.popleft())
        self.check_ownership()

    def packed_hit(self, request: Request) -> int:
        """Tokens that the packed group alone would hit."""
        manager = self.manager.coordinator.single_type_managers[0]
        # with EAGLE one block more is matched and dropped
        longest = request.num_tokens - 1 + self.case.eagle * self.case.block_size
        return manager.find_longest_cache_hit(
            block_hashes=request.block_hashes,
            max_length=min(longest, len(request.block_hashes) * self.sizes[1]),
            kv_cache_group_ids=[0],
            block_pool=self.pool,
            kv_cache_spec=self.specs[0],
            drop_eagle_block=self.case.eagle,
            alignment_tokens=self.case.block_size,
        )[1]

    def check_sinks(self, sequence: Sequence, num_hit: int) -> None:
        """A hit brings the sink block of every exact group."""
        self.hits.append(num_hit)
        if num_hit and self.case.sinks:
            for manager in self.exact_managers():
                assert not manager.req_to_blocks[sequence.id][0].is_null, "a hit without its sinks"
            self.count["sink hits"] += 1

    def execute(self, sequence: Sequence, num_new: int):
        """The worker's step: read what the kernel reads, write the scheduled tokens, sample."""
        case, request, context = self.case, sequence.request, sequence.context
        # tokens beyond those known are drafts
        drafts = max(0, context + num_new - sequence.known)
        accepted = min(self.random.randint(0, drafts), len(sequence.truth) - sequence.known) if drafts else 0
        num_real = num_new - drafts + accepted
        for group, table in enumerate(sequence.tables):
            owned = self.owned(group, sequence.id)
            rows = self.specs[group].block_size
            is_exact = isinstance(self.specs[group], ExactSpec)
            if is_exact:
                window = range(max(case.sinks, context - case.window + 1), context)
                reads = [*range(min(case.sinks, context)), *window]
            else:
                reads = self.random.sample(range(context), min(context, 8))
            for position in reads:
                block = table[position // rows]
                self.count["wanted"] += is_exact
                if is_exact and block == NULL:
                    continue
                assert block == owned[position // rows], f"stale id read at position {position} of {context}"
                found_group, content = self.memory[block]
                assert (found_group, content[position % rows]) == (group, sequence.content[position]), (
                    f"wrong content at position {position} of {context}"
                )
                self.count["exact"] += is_exact
            for position in range(context, context + num_new):
                block = table[position // rows]
                if is_exact and block == NULL:
                    continue
                assert block == owned[position // rows], f"stale id written at position {position}"
                if block not in self.memory or self.memory[block][0] != group:
                    self.memory[block] = group, {}
                value = sequence.content[position] if position < context + num_real else None
                self.memory[block][1][position % rows] = value
        sequence.context += num_real
        sampled = 1 + accepted if sequence.context >= sequence.known else 0
        sampled = min(sampled, len(sequence.truth) - sequence.known)
        sequence.known += sampled
        request.num_computed_tokens += num_new
        request.num_in_flight_tokens += num_new
        if case.batches > 1 and request.num_computed_tokens >= request.num_tokens + request.num_output_placeholders:
            request.num_output_placeholders += 1 + drafts
        if sampled and case.drafts:
            request.spec_token_ids = [-1] * case.drafts
        return sequence, num_new, drafts - accepted, sampled

    def settle(self, outputs) -> None:
        for sequence, num_new, rejected, sampled in outputs:
            request = sequence.request
            request.num_in_flight_tokens -= num_new
            stale = request.num_stale_output_tokens > 0
            if stale:
                request.num_stale_output_tokens -= num_new
            if request.is_finished():
                continue
            if not stale:
                request.num_computed_tokens -= rejected
                if request.num_output_placeholders:
                    request.num_output_placeholders -= rejected + sampled
            known = request.num_tokens
            for token in sequence.truth[known : known + sampled]:
                request.append_output_token_ids(token)
            if request.num_tokens >= sequence.end:
                (self.running if sequence in self.running else self.waiting).remove(sequence)
                self.manager.free(request)
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED

    def owned(self, group: int, request_id: str) -> list[int]:
        return [block.block_id for block in self.manager.coordinator.single_type_managers[group].req_to_blocks[request_id]]

    def check_ownership(self) -> None:
        """Every block is free or held as often as its count says."""
        held: dict[int, int] = {}
        for manager in self.manager.coordinator.single_type_managers:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    if not block.is_null:
                        held[block.block_id] = held.get(block.block_id, 0) + 1
        assert all(self.pool.blocks[i].ref_cnt == n for i, n in held.items())
        assert self.pool.get_num_free_blocks() == self.free_at_start - len(held), "blocks leaked"

    def finish(self, limit: int = 20_000) -> None:
        while self.waiting or self.running or self.in_flight:
            self.step()
            assert self.count["steps"] < limit, "no progress"
        assert self.pool.get_num_free_blocks() == self.free_at_start
        for manager in self.exact_managers():
            assert not any((manager.req_to_blocks, manager.num_cached_block, manager._without_window, manager._num_behind))


CASES = {
    "plain": Case(),
    "async": Case(batches=2),
    "ngram": Case(drafts=3, window=112),
    "draft-model": Case(drafts=4, lookahead=4),
    "eagle": Case(batches=2, drafts=4, lookahead=4, eagle=True),
    "eagle-small": Case(block_size=64, rows=64, window=64, chunk=96, max_model_len=512, drafts=2, lookahead=2, eagle=True),
    "small-blocks": Case(block_size=64, rows=8, window=25, sinks=8, chunk=96, max_model_len=512),
    "async-small": Case(block_size=64, rows=8, window=24, chunk=100, max_model_len=512, batches=2, watermark=0.05),
    "split": Case(block_size=64, layers=4, chunk=256, max_model_len=1024),
    "async-split": Case(block_size=64, layers=4, chunk=256, max_model_len=1024, batches=2, drafts=2, lookahead=2),
    "sinks-only": Case(window=0),
    "async-sinks-only": Case(window=0, batches=2, drafts=3),
    "window-only": Case(sinks=0),
    "window-1": Case(window=1, sinks=0, rows=8),
    "window-2": Case(window=2, rows=8),
    "wide": Case(window=700, rows=64, sinks=64, batches=2),
    "no-caching": Case(caching=False, batches=2),
    "pipeline": Case(caching=False, batches=3, block_size=64, rows=32, window=64, chunk=256, max_model_len=1000),
    "four-groups": Case(caching=False, batches=2, block_size=64, rows=32, layers=4, chunk=256),
}


def by_id(cases: dict):
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


def workload(engine: Engine, requests: int, chaos: bool = True) -> None:
    """Prompts that share prefixes, arriving while others run; with chaos, some preempted and some aborted midway."""
    choose, longest = engine.random, engine.case.max_model_len
    shared = [[choose.randrange(1000) for _ in range(longest)] for _ in range(4)]
    for _ in range(requests):
        common = choose.choice(shared)[: choose.choice((0, 10, 64, 128, 300, longest // 2))]
        prompt = common + [choose.randrange(1000) for _ in range(choose.randint(1, longest // 3))]
        engine.add(prompt[: longest - 2], max_tokens=choose.choice((1, 5, 40, 150, longest)))
        for _ in range(choose.randint(0, 25)):
            engine.step()
            if chaos and engine.running and choose.random() < 0.02:
                engine.preempt(choose.choice(engine.running))
            if chaos and engine.running and choose.random() < 0.01:
                engine.abort(choose.choice(engine.running))
    engine.finish()


@by_id(CASES)
@pytest.mark.parametrize("pool", [1.0, 1.6, 6.0], ids=["tight", "busy", "roomy"])
def test_simulation(case, pool):
    """Claims 1 to 5 at every step; pool is in lone requests of max_model_len."""
    least = case.plan()[0].num_blocks
    engine = Engine(case, num_blocks=int(least * pool), seed=17)
    workload(engine, requests=30)
    count = engine.count
    if case.sinks and case.caching:
        assert count["sink hits"] > 0
    if pool > 2 and case.window > 2:
        assert count["exact"] > 0.5 * count["wanted"]


@by_id(CASES)
def test_lone_request_never_waits(case):
    """A request of max_model_len in the smallest pool that vLLM accepts is never preempted, also when it comes again."""
    engine = Engine(case)
    for prompt_len in (case.max_model_len // 2 + 3, case.max_model_len - 2):
        prompt = [engine.random.randrange(1000) for _ in range(prompt_len)]
        for _ in range(2):
            engine.add(prompt, case.max_model_len)
            engine.finish(limit=20 * case.max_model_len)
    assert engine.count["preempted"] == 0


@pytest.mark.parametrize("sinks, window", [(4, 128), (0, 128), (4, 0)], ids=["both", "window", "sinks"])
def test_hits_equal_stock(sinks, window):
    """The same requests hit as many tokens as with one full-attention group."""
    hits = []
    for stock in (True, False):
        engine = Engine(Case(sinks=sinks, window=window, stock=stock), num_blocks=4000)
        workload(engine, requests=60, chaos=False)
        hits.append(engine.hits)
    assert hits[0] == hits[1] and sum(hits[0]) > 0


def test_evicted_sinks_keep_the_hit():
    """A sink block that is gone reads as the null block and never shortens a hit."""
    engine = Engine(Case(), num_blocks=200)
    prompt = [engine.random.randrange(1000) for _ in range(400)]
    engine.add(prompt, max_tokens=2)
    engine.step()
    engine.pool.evict_blocks({engine.running[0].tables[1][0]})
    engine.finish()
    hits, num_hit, _ = engine.manager.get_computed_blocks(engine.add(prompt, max_tokens=2).request)
    assert num_hit == 384 and len(hits.blocks[0]) == 3 and all(block.is_null for block in hits.blocks[1])


def test_groups_are_freed_packed_first():
    """Sinks outlive the packed blocks of their request only if the packed group has the lower id, split or not."""
    for case, num_groups in ((CASES["plain"], 2), (CASES["split"], 3), (CASES["four-groups"], 5)):
        specs = [type(spec) for spec in Engine(case).specs]
        assert specs == [FullAttentionSpec] + [ExactSpec] * (num_groups - 1)


def test_capacity():
    """Qwen3-8B's geometry (36 layers, 8 kv heads, head_size 128) at 8,192 tokens: more than 4.4 times bf16's concurrency."""
    case = Case(layers=36, max_model_len=8192, chunk=2048, batches=2)
    budget = 20 << 30
    config = case.vllm_config()
    plain = FullAttentionSpec(block_size=128, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    concurrency = []
    for specs in (case.specs(), {f"layers.{i}": plain for i in range(36)}):
        planned = kv_cache_utils.get_kv_cache_configs(config, [specs], [budget])[0]
        concurrency.append(kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, planned))
    assert concurrency[0] / concurrency[1] >= 4.4, concurrency
