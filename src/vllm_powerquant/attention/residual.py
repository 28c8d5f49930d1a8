"""Exact blocks: the newest tokens of each request, and its first ones, in the model's own dtype beside their packed copies.

They are an auxiliary KV-cache group that vLLM's own KV-cache manager allocates and frees: a spec and a manager, registered
through vLLM's registry. Every token is always written packed; a position whose exact block is the null block (id 0) is read
from the packed copy, so an exact block that is not there costs quality and never correctness.

- Residual: real blocks for the last `sliding_window` tokens that are scheduled; older ones are freed as the window slides.
- Sinks: a request's first block lives as long as the request and is prefix-cacheable under the hash of its tokens. It is
  freed after the request's packed blocks, so the pool evicts it after the packed block that a hit would start from: a hit
  finds its sinks, whether it comes from another request or from resuming a preempted one.

Only vLLM's side is here; what the blocks mean to attention is reference.exact_positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ..errors import PowerQuantUnsupportedError


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Blocks of `block_size` tokens for a window of `sliding_window` tokens (0: none) and for the first sink_tokens.

    lookahead: tokens a step may schedule beyond those it keeps (rejected drafts), by which the window must reach further back.
    """

    sink_tokens: int = 0
    lookahead: int = 0

    @property
    def prefix_cacheable(self) -> bool:
        return self.sink_tokens > 0

    @property
    def window_blocks(self) -> int:
        """Real blocks a decoding request's window spans, at most."""
        if self.sliding_window == 0:
            return 0
        return cdiv(self.sliding_window - 1 + 2 * self.lookahead, self.block_size) + 1

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Real blocks of one request, which is what capacity is counted by.

        While a long prompt is prefilled, the previous chunk's window is held beside the new one; if the pool has no room for
        that, ExactManager leaves the new window to its packed copy.
        """
        return min(self.window_blocks + (self.sink_tokens > 0), cdiv(max_model_len, self.block_size))


class ExactManager(SlidingWindowManager):
    """Allocates real blocks for the window and the sinks, the null block for every other position."""

    def __init__(self, kv_cache_spec: ExactSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # tokens up to which a request's next allocation must use null blocks, decided when its need was asked for
        self._without_window: dict[str, int] = {}

    def _first_window_block(self, num_tokens: int) -> int:
        """Index of the first block of the window that ends at token num_tokens."""
        spec = self.kv_cache_spec
        if spec.sliding_window == 0:
            return cdiv(num_tokens, self.block_size)
        return max(0, num_tokens - spec.lookahead - spec.sliding_window + 1) // self.block_size

    def _new_real_blocks(self, have: int, num_tokens: int, window: bool) -> list[int]:
        """Indices of the blocks from `have` on that need a real block to reach num_tokens."""
        need = cdiv(num_tokens, self.block_size)
        first = max(have, self._first_window_block(num_tokens)) if window else need
        sink = [0] if have == 0 and need > 0 and self.kv_cache_spec.sink_tokens > 0 and first > 0 else []
        return sink + list(range(first, need))

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
        if real > 2 and real * 2 + self._packed_blocks(request_id, num_tokens) > self.block_pool.get_num_free_blocks():
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
        """Free blocks behind the window. Null blocks may stand anywhere (chunked prefill), so all of them are looked at."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        # the next query is token processed_computed_tokens: its window ends there
        end = min(self._first_window_block(processed_computed_tokens + 1), len(blocks))
        first = 1 if self.kv_cache_spec.sink_tokens > 0 else 0
        freed = []
        for i in range(end - 1, first - 1, -1):
            if not blocks[i].is_null:
                freed.append(blocks[i])
                blocks[i] = self._null_block
        if freed:
            self.block_pool.free_blocks(freed)

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
        """Never shortens a hit: the cached sink block, or a null block, and null blocks for the rest."""
        num_blocks = cdiv(max_length, kv_cache_spec.block_size)
        hits: list[list] = [[block_pool.null_block] * num_blocks for _ in kv_cache_group_ids]
        if num_blocks:
            hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
            found = block_pool.get_cached_block(hashes[0], kv_cache_group_ids) if len(hashes) else None
            for blocks, block in zip(hits, found or (), strict=False):
                blocks[0] = block
        return tuple(hits), max_length


# Where the spec object lives, its manager must be known: the worker builds it, the engine imports this module to unpickle it.
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
        speculative = vllm_config.speculative_config
        return ExactSpec(
            block_size=self._config.residual_block_size,
            num_kv_heads=self._num_kv_heads,
            head_size=self._head_size,
            dtype=vllm_config.model_config.dtype,
            sliding_window=self._config.residual_tokens,
            sink_tokens=self._config.sink_tokens,
            lookahead=speculative.num_speculative_tokens if speculative else 0,
        )
