"""Exact blocks: the newest tokens of each request, and its first ones, in the model's own dtype beside their packed copies.

They are an auxiliary KV-cache group that vLLM's own KV-cache manager allocates and frees: a spec and a manager, registered
through vLLM's registry. Every token is always written packed; a position whose exact block is the null block (id 0) is read
from the packed copy, so an exact block that is not there costs quality and never correctness.

- Residual: real blocks for the last `sliding_window` tokens that are scheduled; older ones are freed as the window slides.
  Workers learn ids at allocation only, so a block is freed once no step can read or write it: after that its id is stale.
- Sinks: a request's first block lives as long as the request and is prefix-cacheable under the hash of its tokens. It is
  freed after the request's packed blocks (their layers register first, so their group has the lower id; only KV connectors
  defer frees and turn the order round), so the pool evicts it after the packed block that a hit would start from: a hit
  finds its sinks, whether it comes from another request or from resuming a preempted one.

Only vLLM's side is here; what the blocks mean to attention is reference.exact_positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv, round_down
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ..errors import PowerQuantUnsupportedError


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Blocks of `block_size` tokens for a window of `sliding_window` tokens (0: none) and for the first sink_tokens.

    batches: steps that may be in flight at once.
    lookahead: slots a decoding request may have beyond its next token: of steps in flight, drafts and the drafter's own. The
    window spans them too, as it slides by the tokens that are settled.
    """

    sink_tokens: int = 0
    batches: int = 1
    lookahead: int = 0

    @property
    def prefix_cacheable(self) -> bool:
        return self.sink_tokens > 0

    @property
    def window_blocks(self) -> int:
        """Real blocks a decoding request's window spans, at most."""
        if self.sliding_window == 0:
            return 0
        return cdiv(self.sliding_window - 1 + self.lookahead + self.extra_retained_tokens, self.block_size) + 1

    @property
    def blocks_per_request(self) -> int:
        return self.window_blocks + (self.sink_tokens > 0)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Real blocks of one request, which is what capacity is counted by.

        While a long prompt is prefilled, the previous chunk's window is held beside the new one; if the pool has no room for
        that, ExactManager leaves the new window to its packed copy.
        """
        return min(self.blocks_per_request, cdiv(max_model_len, self.block_size))


class ExactManager(SlidingWindowManager):
    """Allocates real blocks for the window and the sinks, the null block for every other position."""

    # exact groups of each pool: vLLM splits a group whose blocks would be wider than the packed group's
    _num_groups: ClassVar[WeakKeyDictionary[BlockPool, int]] = WeakKeyDictionary()

    def __init__(self, kv_cache_spec: ExactSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._num_groups[self.block_pool] = self._num_groups.get(self.block_pool, 0) + 1
        # tokens up to which a request's next allocation must use null blocks, decided when its need was asked for
        self._without_window: dict[str, int] = {}
        # blocks of a request that the window has left behind: null, but for the sinks
        self._num_behind: dict[str, int] = {}

    def _first_window_block(self, num_tokens: int) -> int:
        """Index of the first block that a chunk after num_tokens tokens reads."""
        return self.get_num_skipped_tokens(num_tokens) // self.block_size

    def _new_real_blocks(self, have: int, num_tokens: int, window: bool) -> list[int]:
        """Indices of the blocks from `have` on that need a real block to reach num_tokens."""
        spec = self.kv_cache_spec
        first = need = cdiv(num_tokens, self.block_size)
        if window and spec.sliding_window > 0:
            # slots may be for tokens that are not kept: the window starts where it would without them
            first = max(have, self._first_window_block(num_tokens - spec.lookahead))
        sink = [0] if have == 0 and need > 0 and spec.sink_tokens > 0 and first > 0 else []
        return sink + list(range(first, need))

    def _num_held(self, request_id: str) -> int:
        """Real blocks that a request holds."""
        blocks = self.req_to_blocks.get(request_id, ())
        behind = self._num_behind.get(request_id, 0)
        sinks = sum(not block.is_null for block in blocks[: min(behind, 1)])
        return sinks + sum(not block.is_null for block in blocks[behind:])

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            return min(cdiv(num_tokens, self.block_size), self.max_admission_blocks_per_request)
        have = max(len(self.req_to_blocks.get(request_id, ())), cdiv(total_computed_tokens, self.block_size))
        hits = self._get_num_evictable_blocks(new_computed_blocks)
        real = len(self._new_real_blocks(have, num_tokens, window=True))
        self._without_window.pop(request_id, None)
        # What capacity counts is the request's due and makes others wait. The window of a chunk beside those that are still
        # read is more than that: it must leave room for the other exact groups, and for packed blocks until those are freed
        # (as many steps as may be in flight). Else a lone request could fail, start again and fail again, for ever.
        if real and self._num_held(request_id) + real > self.kv_cache_spec.blocks_per_request:
            packed = self.kv_cache_spec.batches * self._packed_blocks(request_id, num_tokens)
            room = self.block_pool.get_num_free_blocks() - packed
            if real * self._num_groups[self.block_pool] > room:
                self._without_window[request_id] = num_tokens
                real = len(self._new_real_blocks(have, num_tokens, window=False))
        return real + hits

    def _packed_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks that the packed group needs for the same step, at most."""
        held = len(self.req_to_blocks.get(request_id, ())) * self.block_size
        return cdiv(num_tokens, self.scheduler_block_size) - held // self.scheduler_block_size

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Prefix-hit positions: the cached sink block if there is one, else null blocks."""
        blocks = self.req_to_blocks[request_id]
        assert not blocks
        self._extend_with_hit(blocks, new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens)
        self.num_cached_block[request_id] = 1 if blocks and not blocks[0].is_null else 0

    def _extend_with_hit(self, blocks: list, hits: Sequence, num_tokens: int) -> None:
        sinks = [block for block in hits[:1] if not block.is_null]
        if sinks:
            self.block_pool.touch(sinks)
        blocks.extend(sinks)
        blocks.extend([self._null_block] * (cdiv(num_tokens, self.block_size) - len(blocks)))

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        blocks = self.req_to_blocks[request_id]
        num_blocks = cdiv(num_local_computed_tokens + num_external_computed_tokens, self.block_size)
        blocks.extend([self._null_block] * (num_blocks - len(blocks)))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list:
        blocks = self.req_to_blocks[request_id]
        have, need = len(blocks), cdiv(num_tokens, self.block_size)
        if need <= have:
            return []
        window = self._without_window.pop(request_id, None) != num_tokens
        real = self._new_real_blocks(have, num_tokens, window)
        new = [self._null_block] * (need - have)
        for index, block in zip(real, self.block_pool.get_new_blocks(len(real)), strict=True):
            new[index - have] = block
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new if not block.is_null)
        return new

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free blocks behind the window of the next chunk, which follows processed_computed_tokens tokens or more."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks or self.kv_cache_spec.sliding_window == 0:
            return
        end = min(self._first_window_block(processed_computed_tokens), len(blocks))
        start = self._num_behind.get(request_id, 1 if self.kv_cache_spec.sink_tokens > 0 else 0)
        if end <= start:
            return
        # null blocks may stand anywhere (chunked prefill)
        freed = [block for block in blocks[start:end] if not block.is_null]
        blocks[start:end] = [self._null_block] * (end - start)
        self._num_behind[request_id] = end
        self.block_pool.free_blocks(reversed(freed))

    def cache_blocks(self, request, num_tokens: int, retention_interval: int | None = None, **kwargs) -> None:
        """Offer the sink block, once full, under the hash of its tokens."""
        request_id = request.request_id
        if self.kv_cache_spec.sink_tokens == 0 or self.num_cached_block.get(request_id) == 1:
            return
        blocks = self.req_to_blocks[request_id]
        if num_tokens < self.block_size or not blocks or blocks[0].is_null:
            return
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=blocks,
            num_cached_blocks=0,
            num_full_blocks=1,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request_id] = 1

    def pop_blocks_for_free(self, request_id: str) -> list:
        self._without_window.pop(request_id, None)
        self._num_behind.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool,
        kv_cache_spec: ExactSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ):
        """Keeps a hit's length: each group's cached sink block, or a null block, and null blocks for the rest."""
        if drop_eagle_block:
            # max_length is the hit and one block more, which is matched and dropped again
            max_length = round_down(max(0, max_length - kv_cache_spec.block_size), alignment_tokens)
        hits: list[list] = [[block_pool.null_block] * cdiv(max_length, kv_cache_spec.block_size) for _ in kv_cache_group_ids]
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
        if max_length and len(hashes):
            for group_id, blocks in zip(kv_cache_group_ids, hits, strict=True):
                blocks[:1] = block_pool.get_cached_block(hashes[0], [group_id]) or blocks[:1]
        return tuple(hits), max_length


# Where the spec object lives, its manager must be known: the worker builds it, the engine unpickles it and so imports this.
# The registry fills itself only while empty, so the built-in kinds come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)


class ExactCache(torch.nn.Module, AttentionLayerBase):
    """The exact blocks of one attention layer, as the auxiliary cache layer that vLLM sees."""

    def __init__(self, name: str, backend: type, num_kv_heads: int, head_size: int, config, vllm_config) -> None:
        super().__init__()
        self.name = name
        self.kv_cache = torch.tensor([])
        self._backend = backend
        self._num_kv_heads, self._head_size, self._config = num_kv_heads, head_size, config
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise PowerQuantUnsupportedError(f"two attention layers share the name {name}; this model is not supported")
        layers[name] = self

    def get_attn_backend(self) -> type:
        return self._backend

    def get_kv_cache_spec(self, vllm_config) -> ExactSpec:
        batches = vllm_config.max_concurrent_batches
        slots = batches * (1 + vllm_config.num_speculative_tokens) + vllm_config.num_lookahead_tokens
        return ExactSpec(
            block_size=self._config.residual_block_size,
            num_kv_heads=self._num_kv_heads,
            head_size=self._head_size,
            dtype=vllm_config.model_config.dtype,
            sliding_window=self._config.residual_tokens,
            sink_tokens=self._config.sink_tokens,
            batches=batches,
            lookahead=slots - 1,
        )
