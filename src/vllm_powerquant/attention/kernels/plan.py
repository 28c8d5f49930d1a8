"""How a step's exact and packed tokens are cut into equal runs for decode_hopper.py: small arrays, made once a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import SUB_PAGE_TOKENS

EXACT_TOKENS = 16  # of a unit of exact tokens, for which a run counts what it counts for a packed tile
TILE: tl.constexpr = tl.constexpr(SUB_PAGE_TOKENS)
UNIT: tl.constexpr = tl.constexpr(EXACT_TOKENS)
RUN_FIELDS = 9  # consecutive int32 that describe a run: load_run's
_RUNS = 16  # described by one program


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


@triton.jit
def load_run(run_ptr):
    """(x, x_end, entry, tiles, begin, end, query0, queries, context): a run is x .. x_end on the line and begins in an entry
    of the plan; the rest is of that entry, as load_entry gives it. No load waits for another: a program starts with it."""
    return (
        tl.load(run_ptr),
        tl.load(run_ptr + 1),
        tl.load(run_ptr + 2),
        tl.load(run_ptr + 3),
        tl.load(run_ptr + 4),
        tl.load(run_ptr + 5),
        tl.load(run_ptr + 6),
        tl.load(run_ptr + 7),
        tl.load(run_ptr + 8),
    )


@triton.jit
def load_entry(entry, tiles_ptr, cost_ptr, query_start_ptr, seq_lens_ptr, num_requests):
    """(tiles, begin, end, query0, queries, context) of an entry of the plan: where it lies on the line, and its request's
    first query, number of queries and tokens before them."""
    request = tl.where(entry < num_requests, entry, entry - num_requests)
    query0 = tl.load(query_start_ptr + request)
    queries = tl.load(query_start_ptr + request + 1) - query0
    context = tl.load(seq_lens_ptr + request) - queries
    begin, end = tl.load(cost_ptr + entry), tl.load(cost_ptr + entry + 1)
    return tl.load(tiles_ptr + entry), begin, end, query0, queries, context


@triton.jit(do_not_specialize=["num_requests", "residual", "sinks", "heads", "stride_exact_table"])
def _plan_kernel(
    query_start_ptr, seq_lens_ptr, exact_table_ptr, tiles_ptr, cost_ptr, runs_ptr,
    num_requests, residual, sinks, heads, num_runs, stride_exact_table,
    EXACT_BLOCK: tl.constexpr, WINDOW_BLOCKS: tl.constexpr, COST: tl.constexpr, REQUESTS: tl.constexpr,
    RUNS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, REQUESTS)
    real = b < num_requests
    queries = tl.load(query_start_ptr + b + 1, mask=real, other=0) - tl.load(query_start_ptr + b, mask=real, other=0)
    context = tl.where(queries > 0, tl.load(seq_lens_ptr + b, mask=real, other=0) - queries, 0)
    num_sinks = tl.minimum(sinks, context)
    window = tl.where(residual > 0, tl.maximum(context - residual + 1, num_sinks), context)
    # of sinks, window and the queries themselves: exact_hopper.py's
    units = tl.cdiv(num_sinks, UNIT) + tl.cdiv(queries, UNIT)
    units += tl.where(window < context, tl.cdiv(context, UNIT) - window // UNIT, 0)
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
    exact_cost = tl.where(units > 0, units + COST, 0) * heads
    packed_cost = tl.where(tiles > 0, tiles + COST, 0) * heads
    exact_end = tl.cumsum(exact_cost, 0)
    packed_end = tl.sum(exact_cost, 0) + tl.cumsum(packed_cost, 0)
    total = tl.sum(exact_cost, 0) + tl.sum(packed_cost, 0)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr + b, units, mask=real)
        tl.store(tiles_ptr + num_requests + b, tiles, mask=real)
        tl.store(cost_ptr + b + 1, exact_end, mask=real)
        tl.store(cost_ptr + num_requests + b + 1, packed_end, mask=real)
        tl.store(cost_ptr + b, tl.zeros([REQUESTS], tl.int32), mask=b == 0)
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    x = run_start(run, total, num_runs)
    # the entry in which a run begins: the first that ends behind it
    exact_before = real[None, :] & (exact_end[None, :] <= x[:, None])
    packed_before = real[None, :] & (packed_end[None, :] <= x[:, None])
    num_exact = tl.sum(exact_before.to(tl.int32), 1)
    num_packed = tl.sum(packed_before.to(tl.int32), 1)
    request = tl.minimum(tl.where(num_exact < num_requests, num_exact, num_packed), num_requests - 1)
    here = b[None, :] == request[:, None]
    is_exact = num_exact < num_requests
    entry_tiles = tl.sum(tl.where(here, tl.where(is_exact[:, None], units[None, :], tiles[None, :]), 0), 1)
    end = tl.sum(tl.where(here, tl.where(is_exact[:, None], exact_end[None, :], packed_end[None, :]), 0), 1)
    begin = end - tl.sum(tl.where(here, tl.where(is_exact[:, None], exact_cost[None, :], packed_cost[None, :]), 0), 1)
    query0 = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - query0
    at = runs_ptr + run * FIELDS
    inside = run < num_runs
    tl.store(at, x, mask=inside)
    tl.store(at + 1, run_start(run + 1, total, num_runs), mask=inside)
    tl.store(at + 2, tl.where(is_exact, request, num_requests + request), mask=inside)
    tl.store(at + 3, entry_tiles, mask=inside)
    tl.store(at + 4, begin, mask=inside)
    tl.store(at + 5, end, mask=inside)
    tl.store(at + 6, query0, mask=inside)
    tl.store(at + 7, num_queries, mask=inside)
    tl.store(at + 8, tl.load(seq_lens_ptr + request) - num_queries, mask=inside)


def plan_runs(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tiles: torch.Tensor,
    cost: torch.Tensor,
    runs: torch.Tensor,
    heads: int,
    segment_cost: int,
    max_requests: int,
    residual_tokens: int = 0,
    sink_tokens: int = 0,
    exact_block_size: int = 1,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Units of exact tokens and packed tiles of each request, the cost of the segments before each, and where runs begin.

    Args: query_start_loc [num_requests + 1], seq_lens [num_requests] int32 (0 queries: nothing to do); tiles [2 *
          num_requests] int32, written: units of EXACT_TOKENS, then tiles; cost [2 * num_requests + 1] and runs [num_runs,
          RUN_FIELDS] int32, written; heads: kv heads * row blocks; max_requests: of any step; residual_tokens,
          sink_tokens: 0 without exact_table [num_requests, ...] int32
    """
    num_requests = seq_lens.shape[0]
    window = exact_table is not None and residual_tokens > 1
    num_runs = runs.shape[0]
    _plan_kernel[(triton.cdiv(num_runs, _RUNS),)](
        query_start_loc,
        seq_lens,
        exact_table if window else seq_lens,
        tiles,
        cost,
        runs,
        num_requests,
        residual_tokens,
        sink_tokens,
        heads,
        num_runs,
        exact_table.stride(0) if window else 0,
        EXACT_BLOCK=exact_block_size,
        WINDOW_BLOCKS=triton.cdiv(residual_tokens - 2, exact_block_size) + 1 if window else 0,
        COST=segment_cost,
        # below 128, and without a window, Triton 3.6 does not compile it
        REQUESTS=max(128, triton.next_power_of_2(max_requests)),
        RUNS=_RUNS,
        FIELDS=RUN_FIELDS,
        num_warps=4,
    )
