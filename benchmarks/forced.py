"""Teacher-forced decoding in a real vLLM engine: the logits at each position, whatever the engine would have answered.

Each engine runs in a process of its own: `python benchmarks/forced.py JOB.json`, which eval_agreement.py calls.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

MODULES = ("argparse", "ast", "csv", "dataclasses", "datetime", "logging", "random", "textwrap")
CAPTURED: dict[str, dict[int, np.ndarray]] = {}


class ForceTokens(AdapterLogitsProcessor):
    """Keeps each step's logits under the request's name and lets only the given token pass."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        extra = params.extra_args
        if not extra or "forced" not in extra:
            return None
        rows, forced = CAPTURED.setdefault(extra["name"], {}), extra["forced"]

        def force(output_ids, logits):
            # a chunk of an unfinished prompt comes by here too and is discarded: the prompt's last one is kept
            rows[len(output_ids)] = logits.float().log_softmax(-1).cpu().numpy().copy()
            logits.fill_(float("-inf"))
            logits[forced[len(output_ids)]] = 0.0
            return logits

        return force


def texts(tokenizer, prompts: int, prompt_tokens: int, positions: int) -> list[list[int]]:
    """Token ids [prompts][prompt_tokens + positions] from the source of Python's standard library."""
    rows = []
    for i in range(prompts):
        name = MODULES[i % len(MODULES)]
        if name == "datetime" and sys.version_info >= (3, 12):
            name = "_pydatetime"  # where its source has moved
        source = inspect.getsource(__import__(name))
        ids = tokenizer.encode(source)
        start = 400 * (i // len(MODULES))
        rows.append(ids[start : start + prompt_tokens + positions])
        assert len(rows[-1]) == prompt_tokens + positions, MODULES[i % len(MODULES)]
    return rows


def run(job: dict) -> dict[str, np.ndarray]:
    """Log-probabilities of one engine in a fresh process.

    Args:    job: model, backend (None: stock), environment {name: value}, prompts, prompt_tokens, positions, passes (later
             passes find the prompts in the prefix cache), engine {LLM arguments}, tokens [prompts][prompt_tokens + ..]
             (default: `texts`, which differ between versions of Python)
    Returns: logprobs [passes, prompts, positions, vocabulary] fp32, cached [passes, prompts] (prefix-hit tokens), tokens
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({**job, "out": str(Path(folder) / "out.npz")}))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("POWERQUANT_") or k == "POWERQUANT_CACHE_DIR"}
        environment |= job.get("environment", {}) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        # ForceTokens is of the kind that the V1 model runner takes
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "0"}
        result = subprocess.run([sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the engine failed:\n{result.stderr[-3000:]}")
        with np.load(Path(folder) / "out.npz") as data:
            return dict(data)


def _worker(job: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        attention_backend=job.get("backend"),
        logits_processors=[ForceTokens],
        **{
            "enforce_eager": True,
            "kv_cache_memory_bytes": 512 << 20,
            "max_model_len": job["prompt_tokens"] + job["positions"] + 8,
            **job.get("engine", {}),
        },
    )
    rows = job.get("tokens") or texts(llm.get_tokenizer(), job["prompts"], job["prompt_tokens"], job["positions"])
    prompts = [{"prompt_token_ids": row[: job["prompt_tokens"]]} for row in rows]
    logprobs, cached = [], []
    for number in range(job.get("passes", 1)):
        parameters = [
            SamplingParams(
                max_tokens=job["positions"],
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                extra_args={"name": f"{number}-{i}", "forced": row[job["prompt_tokens"] :]},
            )
            for i, row in enumerate(rows)
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        cached.append([output.num_cached_tokens or 0 for output in outputs])
        logprobs.append([[CAPTURED[f"{number}-{i}"][k] for k in range(job["positions"])] for i in range(len(rows))])
    np.savez(job["out"], logprobs=np.array(logprobs), cached=np.array(cached), tokens=np.array(rows))


if __name__ == "__main__":
    _worker(json.loads(Path(sys.argv[1]).read_text()))
