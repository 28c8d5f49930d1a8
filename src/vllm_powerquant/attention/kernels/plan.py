"""How a step's packed tiles are cut into equal runs for decode_hopper.py: two small arrays, made once a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SUB_PAGE_TOKENS

TILE: tl.constexpr = tl.constexpr(SUB_PAGE_TOKENS)


@triton.jit
def run_start(run, total, num_runs):
    """Where a run begins when `total` is cut into num_runs runs whose lengths differ by at most one."""
    return run * (total // num_runs) + tl.minimum(run, total % num_runs)


@triton.jit
def run_of(position, total, num_runs):
    """The last run that begins at or before a position."""
    shorter = total // num_runs
    longer = total % num_runs
    border = longer * (shorter + 1)
    return tl.where(position < border, position // (shorter + 1), longer + (position - border) // tl.maximum(shorter, 1))


@triton.jit(do_not_specialize=["num_requests", "residual", "heads", "stride_exact_table"])
def _plan_kernel(
    query_start_ptr, seq_lens_ptr, exact_table_ptr, tiles_ptr, cost_ptr,
    num_requests, residual, heads, stride_exact_table,
    EXACT_BLOCK: tl.constexpr, WINDOW_BLOCKS: tl.constexpr, COST: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, REQUESTS)
    real = b < num_requests
    queries = tl.load(query_start_ptr + b + 1, mask=real, other=0) - tl.load(query_start_ptr + b, mask=real, other=0)
    context = tl.where(queries > 0, tl.load(seq_lens_ptr + b, mask=real, other=0) - queries, 0)
    if WINDOW_BLOCKS > 0:
        # tiles that lie in the window are not read at all where each of its blocks is real
        start = tl.maximum(context - residual + 1, 0)
        whole = context > 0
        for i in range(0, WINDOW_BLOCKS):
            index = start // EXACT_BLOCK + i
            inside = real & (index * EXACT_BLOCK < context)
            block = tl.load(exact_table_ptr + b.to(tl.int64) * stride_exact_table + index, mask=inside, other=1)
            whole = whole & (block > 0)
        context = tl.where(whole, start, context)
    tiles = tl.cdiv(tl.maximum(context, 0), TILE)
    cost = tl.where(tiles > 0, tiles + COST, 0) * heads
    tl.store(tiles_ptr + b, tiles, mask=real)
    tl.store(cost_ptr + b + 1, tl.cumsum(cost, 0), mask=real)
    tl.store(cost_ptr + b, tl.zeros([REQUESTS], tl.int32), mask=b == 0)


def plan_runs(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tiles: torch.Tensor,
    cost: torch.Tensor,
    heads: int,
    segment_cost: int,
    max_requests: int,
    residual_tokens: int = 0,
    exact_block_size: int = 1,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Packed tiles of each request and the cost of the segments before it.

    Args: query_start_loc [num_requests + 1], seq_lens [num_requests] int32 (0 queries: nothing to do); tiles [num_requests],
          cost [num_requests + 1] int32, written; heads: kv heads * row blocks; max_requests: of any
          step; exact_table [num_requests, ...] int32
    """
    num_requests = seq_lens.shape[0]
    window = exact_table is not None and residual_tokens > 1
    _plan_kernel[(1,)](
        query_start_loc,
        seq_lens,
        exact_table if window else seq_lens,
        tiles,
        cost,
        num_requests,
        residual_tokens,
        heads,
        exact_table.stride(0) if window else 0,
        EXACT_BLOCK=exact_block_size,
        WINDOW_BLOCKS=triton.cdiv(residual_tokens - 2, exact_block_size) + 1 if window else 0,
        COST=segment_cost,
        REQUESTS=max(32, triton.next_power_of_2(max_requests)),
        num_warps=4,
    )
