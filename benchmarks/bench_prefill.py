"""Time to the first token of one long prompt in vLLM on a GPU, beside FLASH_ATTN (on a CPU: bench_prefill_cpu.py).

    python benchmarks/bench_prefill.py [--context 32768] [--providers flash_attn powerquant] [--out ROWS.csv]

Qwen3-8B's shape, chunks of 8,192 tokens, prefix caching on but every prompt new (engine.py). bench_serving.py --first-token
measures the same in the engines it starts anyway.
"""

from __future__ import annotations

import argparse

import engine

GOAL = 1.05  # times FLASH_ATTN, at most


def table(rows: list) -> None:
    """Print each provider's time beside FLASH_ATTN's."""
    times = {(row.case, row.provider): row.q50 for row in rows if row.bench == "prefill"}
    for (case, provider), seconds in times.items():
        stock = times.get((case, "flash_attn"))
        if provider == "flash_attn" or not stock:
            continue
        ratio = seconds / stock
        goal = f", goal <= {GOAL}: {'met' if ratio <= GOAL else 'MISSED'}" if provider == "powerquant" else ""
        print(f"first token, {case}: {provider} {seconds:.3f} s, {ratio:.3f} times flash_attn's {stock:.3f}{goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", choices=engine.PROVIDERS, default=["flash_attn", "powerquant"])
    engine.add_arguments(parser)
    args = parser.parse_args()
    job = {"kind": "first_token", "context": args.context, "rounds": args.rounds}
    table(engine.run(args, args.providers, {provider: [job] for provider in args.providers}))


if __name__ == "__main__":
    main()
