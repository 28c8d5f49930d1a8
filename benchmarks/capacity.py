"""How many tokens, and how many 8k-token requests, vLLM itself reports for the same KV memory: bf16 against POWERQUANT.

    python benchmarks/capacity.py

Two shapes: the embedded SmolLM2 (head size 64) and a 36-layer model with 8 kv heads of size 128 (Qwen3-8B's cache, narrow
dummy weights). Each engine starts in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALL_PACKED = {"POWERQUANT_RESIDUAL_TOKENS": "0", "POWERQUANT_SINK_TOKENS": "0"}
WIDE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="KV memory of each engine")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    import vllm

    from vllm_powerquant.config import PRESET_ENV, PRESETS
    from vllm_powerquant.model import prepare_model

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(WIDE))
        shapes = {"SmolLM2, head size 64": str(prepare_model()), "36 layers x 8 x 128": folder}
        print(f"vLLM {vllm.__version__}, {args.gib} GiB of KV cache, max_model_len 8192, {time.strftime('%Y-%m-%d')}")
        for name, model in shapes.items():
            job = {"model": model, "bytes": int(args.gib * 2**30)}
            stock = start(job, None, {})
            print(
                f"{name:24} {'bf16':14} {stock['tokens']:>10,} tokens  {stock['requests']:8.2f} requests of 8,192",
                flush=True,
            )
            presets = [(preset, {PRESET_ENV: preset}) for preset in PRESETS]
            for label, environment in (("all packed", ALL_PACKED), *presets):
                ours = start(job, "POWERQUANT", environment)
                print(
                    f"{'':24} {label:14} {ours['tokens']:>10,} tokens  {ours['requests']:8.2f} requests: "
                    f"{ours['tokens'] / stock['tokens']:.3f} and {ours['requests'] / stock['requests']:.3f} times",
                    flush=True,
                )


def start(job: dict, backend: str | None, environment: dict) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("POWERQUANT_") or k == "POWERQUANT_CACHE_DIR"}
    clean |= environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, __file__, "--worker", json.dumps({**job, "backend": backend})]
    result = subprocess.run(command, env=clean, capture_output=True, text=True)
    rows = [line for line in result.stdout.splitlines() if line.startswith("REPORT ")]
    if not rows:
        sys.exit(f"the engine failed:\n{result.stderr[-3000:]}")
    return json.loads(rows[0].removeprefix("REPORT "))


def worker(job: dict) -> None:
    from vllm import LLM
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    llm = LLM(
        job["model"],
        attention_backend=job["backend"],
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        kv_cache_memory_bytes=job["bytes"],
        enforce_eager=True,
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    requests = get_max_concurrency_for_kv_cache_config(engine.vllm_config, scheduler.kv_cache_config)
    print("REPORT", json.dumps({"requests": requests, "tokens": int(requests * 8192)}))


if __name__ == "__main__":
    main()
