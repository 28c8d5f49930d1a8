"""Decode tokens/s of attention backends in vLLM on a GPU, at equal batch and with the memory full (on a CPU:
bench_serving_cpu.py).

    python benchmarks/bench_serving.py --first-token --out ROWS.csv           everything: two engines
    python benchmarks/bench_serving.py --only batch --providers flash_attn_fp8 --out ROWS.csv

Qwen3-8B's shape, dummy weights, random prompts (engine.py). Only engine steps with no prompt token in them are timed.
  single    one request of 1,024 tokens: time per token
  batch     --batches requests of 16,384 tokens
  full      as many of them as the backend's KV cache holds (flash_attn and powerquant only)
"""

from __future__ import annotations

import argparse
import re

import bench_prefill
import engine

# row of the issue -> (unit, pattern of the case, goal against flash_attn, larger is better)
GOALS = {
    "batch 32": ("tokens/s", r", batch 32(?!\d)(?!, memory full)", 2.2, True),
    "memory full": ("tokens/s", r", memory full", 3.3, True),
    "one request": ("ms/step", r"context 1024, batch 1(?!\d)", 1.03, False),
}
FULL_PROVIDERS = ("flash_attn", "powerquant")


def table(rows: list) -> None:
    """Print each provider's figure beside FLASH_ATTN's, and ours beside the goal."""
    for name, (unit, pattern, limit, more) in GOALS.items():
        values = {row.provider: row.q50 for row in rows if row.unit == unit and re.search(pattern, row.case)}
        stock = values.pop("flash_attn", None)
        if stock is None:
            continue
        for provider, value in values.items():
            ratio, goal = value / stock, ""
            if provider == "powerquant":
                met = ratio >= limit if more else ratio <= limit
                goal = f", goal {'>=' if more else '<='} {limit}: {'met' if met else 'MISSED'}"
            print(f"{name}: {provider} {value:.5g} {unit}, {ratio:.3f} times flash_attn's {stock:.5g}{goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("single", "batch", "full"), default=["single", "batch", "full"])
    parser.add_argument("--first-token", action="store_true", help="measure what bench_prefill.py does as well")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, default=24, help="steps timed")
    parser.add_argument("--providers", nargs="+", choices=engine.PROVIDERS, default=["flash_attn", "powerquant"])
    engine.add_arguments(parser)
    args = parser.parse_args()
    measurements = {}
    for provider in args.providers:
        jobs = measurements[provider] = []
        if "single" in args.only:
            jobs.append({"kind": "decode", "context": min(1024, args.context), "batch": 1, "steps": 100})
        if args.first_token:
            jobs.append({"kind": "first_token", "context": 2 * args.context, "rounds": 5})
        if "batch" in args.only:
            jobs += [{"kind": "decode", "context": args.context, "batch": n, "steps": args.steps} for n in args.batches]
        if "full" in args.only and provider in FULL_PROVIDERS:
            jobs.append({"kind": "decode", "context": args.context, "batch": "full", "steps": args.steps})
    rows = engine.run(args, args.providers, measurements)
    print()
    table(rows)
    bench_prefill.table(rows)


if __name__ == "__main__":
    main()
