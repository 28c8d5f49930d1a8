"""Decode attention: this package's kernels beside FlashAttention 3 and vLLM's other compressed caches, on one GPU.

    python benchmarks/bench_decode.py [--cases base short2k ...] [--providers fa3 powerquant ...] [--out ROWS.csv]
    python benchmarks/bench_decode.py --widths            every pair of bit widths at 32 x 32,768
    python benchmarks/bench_decode.py --context-sweep     batches 32 and 1, contexts 1k to 128k, for plot.py

A time is a CUDA-graph replay of one layer's whole call with the L2 emptied before (harness.py). --layers N puts the calls of
N layers, each with a cache of its own, in one graph and divides by N: a call as it runs inside a model.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from dataclasses import dataclass, replace

import harness
import torch
from decode_case import Case, Options, Unsupported
from decode_providers import PROVIDERS

K = 1024
BASE = Case((32 * K,) * 32)
SINGLE = Case((16 * K,) * 32)
LONG, SHORT = 100_032, 2_048  # one request among 63; 64 requests of 3,579 tokens are as many
CASES = {
    "base": BASE,
    "heads64": replace(BASE, num_heads=64),
    "long": Case((128 * K,)),
    "short2k": Case((2 * K,) * 128),
    "short512": Case((512,) * 256),
    "single1k": Case((1 * K,)),
    "d64": replace(BASE, head_size=64),
    "d256": replace(BASE, head_size=256),
    "k4v4": replace(BASE, value_bits=4),
    "k3v2": replace(BASE, key_bits=3),
    "equal": Case(((LONG + 63 * SHORT) // 64,) * 64),
    "ragged": Case((LONG,) + (SHORT,) * 63),
    "verify1": SINGLE,
    "verify4": replace(SINGLE, num_queries=4),
}
WIDTHS = [replace(BASE, key_bits=k, value_bits=v) for k, v in itertools.product((2, 3, 4, 8), repeat=2)]
SWEEP = [Case((2**i * K,) * batch) for batch in (32, 1) for i in range(8)]


@dataclass(frozen=True)
class Goal:
    """of "fa3": at least so many times faster; of another case: at most so many times as long."""

    of: str
    factor: float

    def verdict(self, ours: float, other: float) -> str:
        if self.of == "fa3":
            text, met = f"{other / ours:.2f} times faster than fa3, goal >=", other / ours >= self.factor
        else:
            text, met = f"{ours / other:.3f} times {self.of}, goal <=", ours / other <= self.factor
        return f"{text} {self.factor}: {'met' if met else 'MISSED'}"


GOALS = {
    "base": Goal("fa3", 4.2),
    "heads64": Goal("base", 1.1),
    "long": Goal("fa3", 3),
    "short2k": Goal("fa3", 2.6),
    "short512": Goal("fa3", 1.3),
    "single1k": Goal("fa3", 1),
    "d64": Goal("fa3", 3),
    "d256": Goal("fa3", 4),
    "k4v4": Goal("fa3", 2.6),
    "k3v2": Goal("fa3", 4),
    "ragged": Goal("equal", 1.1),
    "verify4": Goal("verify1", 1.3),
}


class Bench:
    """Measures (case, provider) pairs once each; peers do not see our bit widths."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.options = Options(args.layers, args.pool_layers, args.block_size, args.window, args.sinks, args.calibrated)
        self.where = harness.environment(args.commit)
        self.measured: dict[tuple, harness.Row | None] = {}
        self.suffix = f" layers{args.layers}" if args.layers > 1 else ""
        self.suffix += f" pool{args.pool_layers}" if args.pool_layers > 1 else ""
        self.suffix += f" window{args.window} sinks{args.sinks}" if (args.window, args.sinks) != (128, 4) else ""
        self.suffix += f" block{args.block_size}" if args.block_size != 128 else ""
        self.suffix += " calibrated" if args.calibrated else ""
        self.suffix += " flush-write" if args.flush == "write" else ""

    def row(self, case: Case, provider: str) -> harness.Row | None:
        key = (provider, case if provider.startswith("powerquant") else case.shape)
        if key not in self.measured:
            self.measured[key] = self._measure(case, provider)
            gc.collect()
            torch.cuda.empty_cache()
        return self.measured[key]

    def _measure(self, case: Case, provider: str) -> harness.Row | None:
        try:
            attention = PROVIDERS[provider](case, self.options)
            ms = harness.replay_ms(attention.calls, self.args.replays, self.args.flush)
        except Unsupported as reason:
            print(f"{case.shape:32} {provider:20} not supported: {reason}", flush=True)
            return None
        except Exception as error:
            # the other rows are worth having; after a fault of the GPU itself the next line raises
            print(f"{case.shape:32} {provider:20} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            torch.cuda.synchronize()
            return None
        if not attention.out.isfinite().all():
            print(f"{case.shape:32} {provider:20} WRONG: the output is not finite", flush=True)
        name = case.shape + self.suffix
        row = harness.timed_row("decode", name, provider, attention.format, ms, attention.bytes, self.where)
        harness.append_rows(self.args.out, [row])
        floor = attention.bytes / harness.read_bandwidth() * 1e3
        print(
            f"{case.shape:32} {provider:20} {row.format:8} {row.q50:8.4f} ms ({row.q20:.4f} to {row.q80:.4f}), "
            f"floor {floor:.4f}, {row.read_percent:5.1f} %",
            flush=True,
        )
        return row

    def table(self, cases: dict[str, Case], ours: str) -> None:
        """Measure, then print our times with their ratio to FlashAttention 3 and the goal."""
        rows = {(name, provider): self.row(cases[name], provider) for name in cases for provider in self.args.providers}
        if ours not in self.args.providers:
            return
        print(f"\n{'case':10} {ours + ', ms':>16} {'floor %':>8} {'x fa3':>7}  goal")
        for name, case in cases.items():
            row, fa3 = rows[name, ours], rows.get((name, "fa3"))
            if row is None:
                continue
            goal, verdict = GOALS.get(name), ""
            if goal:
                other = fa3 if goal.of == "fa3" else rows.get((goal.of, ours))
                verdict = goal.verdict(row.q50, other.q50) if other else ""
            ratio = f"{fa3.q50 / row.q50:7.2f}" if fa3 else ""
            label = name if name in CASES else f"{case.shape} {row.format}"
            print(f"{label:10} {row.q50:16.4f} {row.read_percent:8.1f} {ratio:>7}  {verdict}")

    def widths(self) -> None:
        """Ratio to FlashAttention 3 for every pair of widths: rows are key bits, columns value bits."""
        fa3 = self.row(BASE, "fa3")
        rows = {(case.key_bits, case.value_bits): self.row(case, "powerquant") for case in WIDTHS}
        print("\ntimes faster than fa3 at", BASE.shape)
        print("        " + "".join(f"{'V' + str(v):>7}" for v in (2, 3, 4, 8)))
        for k in (2, 3, 4, 8):
            cells = [f"{fa3.q50 / rows[k, v].q50:7.2f}" if fa3 and rows[k, v] else f"{'-':>7}" for v in (2, 3, 4, 8)]
            print(f"K{k}      " + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    default = ["fa3", "fa3_fp8", "turboquant", "int4_per_token_head", "powerquant"]
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=default)
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--context-sweep", action="store_true")
    parser.add_argument("--layers", type=int, default=1, help="caches that one graph goes through")
    parser.add_argument("--pool-layers", type=int, default=1, help="our pages lie as in a pool of so many layers")
    parser.add_argument("--block-size", type=int, default=128, help="ours; peers have vLLM's default, 16")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--trellis", action="store_true", help="2-bit values of the trellis codec (POWERQUANT_VALUE_CODEC)")
    parser.add_argument("--calibrated", action="store_true", help="ours with keys in a frame (POWERQUANT_CALIBRATION)")
    harness.add_arguments(parser)
    harness.add_timer_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args)
    print(bench.where)
    print(f"read-only kernel: {harness.read_bandwidth() / 1e12:.3f} TB/s", flush=True)
    ours = "powerquant" if "powerquant" in args.providers else "powerquant_portable"
    if args.widths:
        bench.widths()
    elif args.context_sweep:
        bench.table({case.shape: case for case in SWEEP}, ours)
    else:
        cases = {name: CASES[name] for name in args.cases}
        if args.trellis:
            cases = {name: replace(case, value_codec="trellis") for name, case in cases.items() if case.value_bits == 2}
        bench.table(cases, ours)


if __name__ == "__main__":
    main()
