"""How close compressed answers are to bf16's: teacher-forced top-1 agreement and KL divergence through vLLM itself.

    python benchmarks/eval_agreement.py [--prompts 8] [--prompt-tokens 640] [--positions 32]

The prompt is prefilled by each engine; the following tokens of the text are then decoded one by one through its cache.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from forced import run

CONFIGURATIONS = {
    "K8/V8": {"POWERQUANT_KEY_BITS": "8", "POWERQUANT_VALUE_BITS": "8"},
    "K8/V8, nothing exact": {
        "POWERQUANT_KEY_BITS": "8",
        "POWERQUANT_VALUE_BITS": "8",
        "POWERQUANT_RESIDUAL_TOKENS": "0",
        "POWERQUANT_SINK_TOKENS": "0",
    },
    "K4/V4": {"POWERQUANT_VALUE_BITS": "4"},
    "K4/V2 (defaults)": {},
    "K4/V2, 2 + 2 layers protected": {"POWERQUANT_PROTECTED_LAYERS": "2"},
    "K4/V2, no sinks": {"POWERQUANT_SINK_TOKENS": "0"},
    "K4/V2, nothing exact": {"POWERQUANT_RESIDUAL_TOKENS": "0", "POWERQUANT_SINK_TOKENS": "0"},
}


def compare(want: np.ndarray, got: np.ndarray) -> tuple[float, np.ndarray]:
    """Top-1 agreement and the KL of each prompt, in nats: log-probabilities [prompts, positions, vocabulary]."""
    agreement = (want.argmax(-1) == got.argmax(-1)).mean()
    kl = (np.exp(want) * (want - got)).sum(-1).mean(-1)
    return float(agreement), kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face checkpoint (default: the embedded SmolLM2)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=640)
    parser.add_argument("--positions", type=int, default=32)
    args = parser.parse_args()
    import torch
    import vllm

    from vllm_powerquant.model import prepare_model

    job = {"model": args.model or str(prepare_model()), "passes": 2}
    job |= {"prompts": args.prompts, "prompt_tokens": args.prompt_tokens, "positions": args.positions}
    print(f"vLLM {vllm.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{args.prompts} prompts of {args.prompt_tokens} tokens x {args.positions} positions; KL in nats +- standard error"
    )
    stock = run({**job, "backend": None})
    want = stock["logprobs"][0]
    again = compare(want, stock["logprobs"][1])
    name, hits = "bf16 after a prefix-cache hit", stock["cached"][1].sum()
    print(f"{name:32} top-1 {again[0]:7.2%}  KL {again[1].mean():.5f}  hits {hits}")
    for name, environment in CONFIGURATIONS.items():
        got = run({**job, "backend": "POWERQUANT", "environment": environment})
        (top, kl), (hit_top, hit_kl) = compare(want, got["logprobs"][0]), compare(want, got["logprobs"][1])
        error = kl.std(ddof=1) / len(kl) ** 0.5
        print(
            f"{name:32} top-1 {top:7.2%}  KL {kl.mean():.5f} +- {error:.5f}   after a prefix-cache hit: "
            f"top-1 {hit_top:7.2%}  KL {hit_kl.mean():.5f}  hits {got['cached'][1].sum()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
