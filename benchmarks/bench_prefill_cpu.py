"""Time to the first token of one prompt in vLLM, against the stock backend, on a CPU (on a GPU: bench_prefill.py).

    python benchmarks/bench_prefill_cpu.py [--model PATH] [--prompts 512 2048 6000] [--rounds 3]

Each backend is an engine in a process of its own; they take turns, round by round, on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time

PROVIDERS = {"cpu_attn": None, "powerquant": "POWERQUANT"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face checkpoint (default: the embedded SmolLM2)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 6000], help="prompt lengths, tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    import vllm
    from bench_serving_cpu import cells

    from vllm_powerquant.model import prepare_model

    args.model = args.model or str(prepare_model())
    seconds = {(name, length): [] for name in PROVIDERS for length in args.prompts}
    for _ in range(args.rounds):
        for name in PROVIDERS:
            command = [sys.executable, __file__, "--worker", name, "--model", args.model]
            command += ["--prompts", *map(str, args.prompts)]
            result = subprocess.run(command, capture_output=True, text=True)
            rows = [line for line in result.stdout.splitlines() if line.startswith("REPORT ")]
            if not rows:
                sys.exit(f"the {name} engine failed:\n{result.stderr[-3000:]}")
            for length, median in zip(args.prompts, json.loads(rows[0].removeprefix("REPORT ")), strict=True):
                seconds[name, length].append(median)
    print(f"vLLM {vllm.__version__}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; s, median (min to max)")
    for length in args.prompts:
        rows = {name: seconds[name, length] for name in PROVIDERS}
        ratios = [ours / stock for ours, stock in zip(rows["powerquant"], rows["cpu_attn"], strict=True)]
        print(f"prompt {length}: " + cells({**rows, "powerquant / cpu_attn": ratios}), flush=True)


def worker(args: argparse.Namespace) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        attention_backend=PROVIDERS[args.worker],
        max_model_len=max(args.prompts) + 8,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    medians = []
    for length in args.prompts:
        times = []
        for i in range(5):
            rng = random.Random(i)
            prompt = {"prompt_token_ids": [rng.randrange(100, 40000) for _ in range(length)]}
            begin = time.perf_counter()
            llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
            times.append(time.perf_counter() - begin)
        medians.append(sorted(times)[2])
    print("REPORT", json.dumps(medians))


if __name__ == "__main__":
    main()
