"""Decode tokens/s of an attention backend in vLLM, against the stock one, on a CPU (on a GPU: bench_serving.py).

    python benchmarks/bench_serving_cpu.py [--model PATH] [--requests 8] [--contexts 1024 4096] [--rounds 5]

Each backend is an engine in a process of its own. They take turns, round by round, on the same prompts; only steps in which
every request decodes one token are timed. Start-ups (process start to ready, compiled kernels in the cache) are timed first,
in turns as well. What counts on a shared machine is the ratio within one round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROVIDERS = {"cpu_attn": None, "powerquant": "POWERQUANT"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face checkpoint (default: the embedded SmolLM2)")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="decode steps timed in a round")
    parser.add_argument("--starts", type=int, default=3, help="start-ups timed for each backend")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.model is None:
        from vllm_powerquant.model import prepare_model

        args.model = str(prepare_model())
    starts = {name: [] for name in PROVIDERS}
    for _ in range(args.starts):
        for name in PROVIDERS:
            begin = time.perf_counter()
            engine = start(name, args)
            starts[name].append(time.perf_counter() - begin)
            stop(engine)
    engines = {name: start(name, args) for name in PROVIDERS}
    import torch
    import vllm

    print(f"vLLM {vllm.__version__}, torch {torch.__version__}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    if args.starts:
        print("start-up, s, median (min to max): " + cells(starts), flush=True)
    print(
        f"{args.requests} requests, {args.steps} decode steps a round, {args.rounds} rounds; tokens/s, median (min to max)"
    )
    for context in args.contexts:
        rates = {name: [] for name in engines}
        for _ in range(args.rounds):
            for name, engine in engines.items():
                rates[name].append(ask(engine, context))
        ratios = [ours / stock for ours, stock in zip(rates["powerquant"], rates["cpu_attn"], strict=True)]
        print(f"context {context}: " + cells({**rates, "powerquant / cpu_attn": ratios}), flush=True)
    for engine in engines.values():
        stop(engine)


def cells(rows: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for name, x in rows.items())


def stop(engine: subprocess.Popen) -> None:
    engine.stdin.close()
    engine.wait()


def start(name: str, args: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", name, "--model", args.model, "--requests", str(args.requests)]
    command += ["--steps", str(args.steps), "--contexts", *map(str, args.contexts)]
    log = open(Path(tempfile.gettempdir()) / f"bench_serving_cpu.{name}.{os.getpid()}.log", "w")
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    while (line := engine.stdout.readline()) and not line.startswith("READY"):
        log.write(line)
    if not line:
        sys.exit(f"the {name} engine did not start, see {log.name}")
    return engine


def ask(engine: subprocess.Popen, context: int) -> float:
    engine.stdin.write(f"{context}\n")
    engine.stdin.flush()
    while line := engine.stdout.readline():
        if line.startswith("RATE"):
            return json.loads(line.split(maxsplit=1)[1])
    sys.exit("an engine died")


def worker(args: argparse.Namespace) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    longest = max(args.contexts) + args.steps + 8
    llm = LLM(
        args.model,
        attention_backend=PROVIDERS[args.worker],
        max_model_len=longest,
        max_num_seqs=args.requests,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    engine = llm.llm_engine
    print("READY", flush=True)
    for line in sys.stdin:
        context = int(line)
        rng = random.Random(context)
        for i in range(args.requests):
            tokens = [rng.randrange(100, 40000) for _ in range(context)]
            parameters = SamplingParams(max_tokens=args.steps + 4, ignore_eos=True, temperature=0)
            engine.add_request(f"{context}-{time.monotonic_ns()}-{i}", {"prompt_token_ids": tokens}, parameters)
        started, times = set(), []
        while engine.has_unfinished_requests():
            decoding = len(started) == args.requests
            begin = time.perf_counter()
            outputs = engine.step()
            elapsed = time.perf_counter() - begin
            if decoding and len(outputs) == args.requests and not any(output.finished for output in outputs):
                times.append(elapsed)
            started |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        print("RATE", args.requests / statistics.median(times), flush=True)


if __name__ == "__main__":
    main()
