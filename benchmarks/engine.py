"""Runs measurements in stock vLLM engines, a process for each backend, for bench_prefill.py and bench_serving.py.

The model is Qwen3-8B's shape with dummy weights and random prompts. The engine runs inside the worker process
(VLLM_ENABLE_V1_MULTIPROCESSING=0), everything else at vLLM's defaults unless said: prefix caching, asynchronous scheduling,
full CUDA graphs. A worker prints its rows as it measures them, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import harness
from dummy_model import write_config
from harness import Row, quantiles

# name -> (cache format, LLM arguments)
PROVIDERS = {
    "flash_attn": ("bf16", {"attention_backend": "FLASH_ATTN"}),
    "flash_attn_fp8": ("fp8", {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"}),
    "turboquant": ("4bit_nc", {"attention_backend": "TURBOQUANT", "kv_cache_dtype": "turboquant_4bit_nc"}),
    "int4_per_token_head": ("int4", {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "int4_per_token_head"}),
    "powerquant": ("K4/V2", {"attention_backend": "POWERQUANT"}),
}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
SETTLING_STEPS = 4  # steps after the last prompt token that are not timed
OUTPUT_TOKENS = 1024  # of a request, for the rate that counts its prefill
SPARE_TOKENS = 24  # that a request may have beyond context and timed steps: the settling ones and those in flight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_arguments(parser)
    parser.add_argument("--num-layers", type=int, default=36)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="full CUDA graphs of decode steps without torch.compile")
    parser.add_argument("--capture-sizes", type=int, nargs="+", help="batches to capture CUDA graphs of")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--max-num-seqs", type=int, default=288)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--kv-cache-gib", type=float, help="KV cache of this size instead")
    parser.add_argument("--tiny", action="store_true", help="a model a CPU can run, to try the script")


def run(args: argparse.Namespace, providers: list[str], measurements: dict[str, list[dict]]) -> list[Row]:
    """Measure, and return the rows; with --out also those that it already held for the same cases.

    Args: measurements: of each provider, in order: {"kind": a method of Engine, and its arguments}
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(folder, args.num_layers, args.tiny)
        shape = ("tiny " if args.tiny else "") + (f"{args.num_layers} layers" if args.num_layers != 36 else "")
        for provider in providers:
            job = {k: v for k, v in vars(args).items() if k != "out"}
            job |= {"provider": provider, "model": folder, "measurements": measurements[provider], "shape": shape.strip()}
            job["vocab_size"] = config["vocab_size"]
            rows += _run_worker(job, args.out)
    if args.out is None or not args.out.exists():
        return rows
    measured = {(_alike(row.case), row.gpu) for row in rows}
    return [row for row in harness.read_rows(args.out) if (_alike(row.case), row.gpu) in measured]


def _alike(case: str) -> str:
    """The case without how many requests filled the memory, which differs between providers."""
    return re.sub(r"batch \d+, memory full", "memory full", case)


def _run_worker(job: dict, out: Path | None) -> list[Row]:
    begin, rows = time.perf_counter(), []
    log = Path(tempfile.gettempdir()) / f"bench_engine.{job['provider']}.log"
    command = [sys.executable, "-u", __file__, json.dumps(job)]
    with log.open("w") as file:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in worker.stdout:
            if line.startswith("ROW "):
                rows.append(Row(**json.loads(line[4:])))
                harness.append_rows(out, rows[-1:])
                row = rows[-1]
                print(
                    f"{job['provider']:20} {row.case:45} {row.q50:10.4g} {row.unit} ({row.q20:.4g} to {row.q80:.4g})",
                    flush=True,
                )
            elif line.startswith("NOTE "):
                print(f"{job['provider']:20} {line[5:]}", end="", flush=True)
            else:
                file.write(line)
    if worker.wait():
        print(f"{job['provider']} FAILED, see {log}:", *log.read_text().splitlines()[-25:], sep="\n", flush=True)
    print(f"{job['provider']:20} whole process {time.perf_counter() - begin:.0f} s", flush=True)
    return rows


class Engine:
    """One vLLM engine in this process and what can be measured in it."""

    def __init__(self, job: dict) -> None:
        from vllm import LLM

        self.job = job
        self.format, backend = PROVIDERS[job["provider"]]
        if job["provider"] == "powerquant":
            from vllm_powerquant.plugin import register

            register()
        self.longest = max(self._longest(m) for m in job["measurements"])
        seqs, arguments = job["max_num_seqs"], {}
        if not job["eager"]:
            sizes = [1, 2, 4, *range(8, 65, 8), *range(80, seqs + 1, 16)]
            config = {"cudagraph_capture_sizes": job["capture_sizes"] or [n for n in sizes if n <= seqs]}
            if job["no_compile"]:
                config |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
            arguments["compilation_config"] = config
        if job["kv_cache_gib"]:
            arguments["kv_cache_memory_bytes"] = int(job["kv_cache_gib"] * 2**30)
        self.llm = LLM(
            job["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=self.longest,
            max_num_batched_tokens=job["chunk"],
            max_num_seqs=seqs,
            gpu_memory_utilization=job["gpu_memory_utilization"],
            enforce_eager=job["eager"],
            **backend,
            **arguments,
        )
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.where = harness.environment(job["commit"])
        self.prompts = 0

    @staticmethod
    def _longest(measurement: dict) -> int:
        return measurement["context"] + measurement.get("steps", 0) + SPARE_TOKENS

    def emit(self, bench: str, case: str, values: tuple[float, float, float], unit: str) -> None:
        case += f", {self.job['shape']}" if self.job["shape"] else ""
        case += ", eager" if self.job["eager"] else ", no torch.compile" if self.job["no_compile"] else ""
        row = Row(bench, case, self.job["provider"], self.format, *values, unit, **self.where)
        print("ROW", json.dumps(asdict(row)), flush=True)

    def prompt(self, length: int) -> dict:
        import numpy as np

        self.prompts += 1
        tokens = np.random.default_rng(self.prompts).integers(100, self.job["vocab_size"] - 100, length)
        return {"prompt_token_ids": tokens.tolist()}

    def parameters(self, max_tokens: int):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False, output_kind=kind)

    def first_token(self, context: int, rounds: int) -> None:
        """Seconds from handing in one prompt to its first token, after one round to warm up."""
        seconds = []
        for i in range(rounds + 1):
            prompt = self.prompt(context)
            begin = time.perf_counter()
            self.engine.add_request(f"first-token-{i}", prompt, self.parameters(1))
            while self.engine.has_unfinished_requests():
                self.engine.step()
            seconds.append(time.perf_counter() - begin)
        self.emit("prefill", f"prompt {context}, chunks of {self.job['chunk']}", quantiles(seconds[1:]), "s")

    def capacity(self, tokens: int) -> int:
        """Requests of so many tokens that the KV cache holds."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        config = copy.copy(self.engine.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.max_model_len = tokens
        return int(get_max_concurrency_for_kv_cache_config(config, self.core.scheduler.kv_cache_config))

    def decode(self, context: int, batch: int | str, steps: int) -> None:
        """Steps in which every request decodes one token, at `context` tokens each; batch "full": as many as fit.

        A request decodes while later prompts are still prefilled, so earlier prompts are shorter: all contexts are about
        equal when the timed steps begin. With asynchronous scheduling a call of step() waits for the batch before the one
        it hands out; between two returns the engine still does exactly one step's work.
        """
        full = batch == "full"
        if full:
            batch = self.capacity(context + steps + SPARE_TOKENS)
            if batch > self.job["max_num_seqs"]:
                print(f"NOTE {batch} requests fit, {self.job['max_num_seqs']} is max_num_seqs", flush=True)
                batch = self.job["max_num_seqs"]
        steps_per_prompt = context / (self.job["chunk"] - batch / 2)
        lengths = [context - int(steps_per_prompt * (batch - 1 - i)) for i in range(batch)]
        names = [f"{context}-{batch}-{self.prompts}-{i}" for i in range(batch)]
        prompts = [self.prompt(length) for length in lengths]
        begin = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, prompt, self.parameters(context))
        gc.collect()
        gc.freeze()  # or the collector walks over the prompts during timed steps
        started, generated, stamps, prefill = set(), 0, [], 0.0
        while len(stamps) <= SETTLING_STEPS + steps:
            outputs = self.engine.step()
            now = time.perf_counter()
            if any(output.finished for output in outputs) or not self.engine.has_unfinished_requests():
                raise RuntimeError("a request finished before the timed steps were over")
            generated += len(outputs)
            if len(started) == batch and len(outputs) == batch:
                stamps.append(now)
            started.update(output.request_id for output in outputs)
            if len(started) == batch and not prefill:
                prefill = now - begin
        scheduler = self.core.scheduler
        preemptions = sum(request.num_preemptions for request in scheduler.requests.values())
        longest = max(request.num_tokens for request in scheduler.requests.values())
        shortest = min(request.num_tokens for request in scheduler.requests.values())
        self.engine.abort_request(names)
        for _ in range(3):
            self.engine.step()
        stamps = stamps[SETTLING_STEPS:]
        seconds = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
        rate, mean = [batch / s for s in seconds], batch * len(seconds) / (stamps[-1] - stamps[0])
        case = f"context {context}, batch {batch}" + (", memory full" if full else "")
        self.emit("serving", case, quantiles(rate), "tokens/s")
        self.emit("serving", case, quantiles([1e3 * s for s in seconds]), "ms/step")
        total = (sum(lengths) + generated) / (stamps[-1] - begin)
        self.emit("serving", case, (total,) * 3, "prompt and output tokens/s, prefill included")
        whole = batch * OUTPUT_TOKENS / (prefill + OUTPUT_TOKENS * batch / mean)
        unit = f"output tokens/s, prefill included, {OUTPUT_TOKENS} a request (computed)"
        self.emit("serving", case, (whole,) * 3, unit)
        print(
            f"NOTE {case}: mean {mean:.1f} tokens/s over {len(seconds)} steps; prefill {prefill:.1f} s; contexts at the end "
            f"{shortest} to {longest}; {preemptions} preemptions",
            flush=True,
        )


def worker(job: dict) -> None:
    os.environ.update(ENVIRONMENT)
    begin = time.perf_counter()
    engine = Engine(job)
    print(f"NOTE engine started in {time.perf_counter() - begin:.0f} s", flush=True)
    for measurement in job["measurements"]:
        kind = measurement.pop("kind")
        getattr(engine, kind)(**measurement)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
