"""How a step is cut into runs: the plan's arrays and the arithmetic by which kernels find their way."""

import pytest
import torch
import triton
import triton.language as tl

from helpers import DEVICE
from vllm_powerquant.attention.kernels.plan import RUN_FIELDS, plan_runs, run_of, run_start
from vllm_powerquant.attention.kernels.step import StepPlan

COST = 4


@triton.jit
def _runs_kernel(start_ptr, of_ptr, total, num_runs, RUNS: tl.constexpr, POSITIONS: tl.constexpr):
    run = tl.arange(0, RUNS)
    tl.store(start_ptr + run, run_start(run, total, num_runs))
    position = tl.arange(0, POSITIONS)
    tl.store(of_ptr + position, run_of(position, total, num_runs))


@pytest.mark.parametrize("total, num_runs", [(0, 7), (3, 7), (7, 7), (100, 7), (97, 64), (64, 100), (1000, 1)])
def test_runs_cover_the_total_and_differ_by_one(total, num_runs):
    starts = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    of = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    _runs_kernel[(1,)](starts, of, total, num_runs, RUNS=128, POSITIONS=1024)
    starts = starts[: num_runs + 1].tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert starts[0] == 0 and starts[num_runs] == total
    assert max(lengths) - min(lengths) <= 1
    for position in range(total):
        assert of[position] == max(i for i in range(num_runs) if starts[i] <= position)


def plan(contexts, queries, heads=6, residual=0, sinks=0, table=None, num_runs=40):
    lens = torch.tensor([c + q for c, q in zip(contexts, queries, strict=True)], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *queries], device=DEVICE).cumsum(0).int()
    n = len(contexts)
    tiles = torch.full((2 * n,), -1, dtype=torch.int32, device=DEVICE)
    cost = torch.full((2 * n + 1,), -1, dtype=torch.int32, device=DEVICE)
    runs = torch.full((num_runs, RUN_FIELDS), -1, dtype=torch.int32, device=DEVICE)
    table = None if table is None else table.to(DEVICE)
    plan_runs(starts, lens, tiles, cost, runs, heads, COST, n, residual, sinks, 16, table)
    return tiles[:n].tolist(), tiles[n:].tolist(), cost.tolist(), runs.tolist()


def test_tiles_and_their_cost():
    units, tiles, cost, _ = plan([0, 1, 64, 65, 500, 9], [1, 1, 20, 1, 1, 0])
    # a request without queries is padding, whatever its length says
    assert units == [1, 1, 2, 1, 1, 0]
    assert tiles == [0, 1, 1, 2, 8, 0]
    assert cost == [0, 30, 60, 96, 126, 156, 156, 156, 186, 216, 252, 324, 324]


def test_units_of_exact_tokens():
    """Sixteen positions each of the sinks' block, of the window's blocks, and of the queries themselves."""
    table = torch.ones(4, 40, dtype=torch.int32)
    units, *_ = plan([500, 130, 100, 2], [1, 4, 17, 1], residual=128, sinks=4, table=table)
    # windows are 373 .. 500, 4 .. 130, 4 .. 100 and nothing: the last request is all sinks
    assert units == [1 + 9 + 1, 1 + 9 + 1, 1 + 7 + 2, 1 + 0 + 1]
    units, *_ = plan([500, 0], [1, 1], sinks=4)
    assert units == [1 + 0 + 1, 1]


def test_tiles_inside_a_whole_window_are_not_read():
    table = torch.ones(4, 40, dtype=torch.int32)
    table[1, 30] = 0  # one block of the second request's window is null: its last 127 tokens are read packed
    table[2, 20] = 0  # before the window: does not count
    contexts = [500, 500, 500, 100]
    _, tiles, *_ = plan(contexts, [1, 1, 1, 1], residual=128, table=table)
    assert tiles == [-(-(500 - 127) // 64), 8, -(-(500 - 127) // 64), 0]


def test_a_window_of_one_token_is_the_query_itself():
    table = torch.ones(1, 40, dtype=torch.int32)
    assert plan([500], [1], residual=1, table=table)[1] == [8]


@pytest.mark.parametrize("num_runs", [1, 40, 1000])
def test_runs_begin_in_their_entry(num_runs):
    contexts, queries = [0, 700, 64, 9, 3000, 9], [1, 1, 2, 0, 1, 0]
    units, tiles, cost, runs = plan(contexts, queries, sinks=4, num_runs=num_runs)
    end_of_run = 0
    for x, x_end, entry, entry_tiles, begin, end, query0, num_queries, context in runs:
        assert x == end_of_run
        end_of_run = x_end
        if x == x_end:
            continue
        request = entry % len(contexts)
        assert begin <= x < end and (begin, end) == (cost[entry], cost[entry + 1])
        assert entry_tiles == (units + tiles)[entry]
        assert (query0, num_queries, context) == (sum(queries[:request]), queries[request], contexts[request])
    assert end_of_run == cost[-1]


def test_longest_sequence_while_a_graph_is_captured():
    """The dummy batch is short, the steps that replay it are not."""
    lens = torch.ones(2, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    assert StepPlan.of(starts, lens, [1, 1], [1, 1], max_seq_len=8192).max_seq_len == 8192
    assert StepPlan.of(starts, lens, [1, 1], [5, 9], max_seq_len=0).max_seq_len == 9
