"""How close compressed answers are to bf16's: teacher-forced top-1 agreement and KL divergence through vLLM itself.

    python benchmarks/eval_agreement.py [--prompts 8] [--prompt-tokens 640] [--positions 32]
    python benchmarks/eval_agreement.py --at-once 8 --graphs --reference FOLDER     on a GPU

The prompt is prefilled by each engine; the following tokens of the text are then decoded one by one through its cache.
--save keeps what the engines said, --reference compares with what was kept, e.g. a GPU's answers with a CPU's. --library
measures the same texts through the Transformers cache of bench_quality.py too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import time
from pathlib import Path

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
    "K4/V2 trellis": {"POWERQUANT_VALUE_CODEC": "trellis"},
    "K3/V2 trellis (max-context)": {"POWERQUANT_PRESET": "max-context"},
    "K4/V2, 2 + 2 layers protected": {"POWERQUANT_PROTECTED_LAYERS": "2"},
    "K4/V2, no sinks": {"POWERQUANT_SINK_TOKENS": "0"},
    "K4/V2, nothing exact": {"POWERQUANT_RESIDUAL_TOKENS": "0", "POWERQUANT_SINK_TOKENS": "0"},
}


def compare(want: np.ndarray, got: np.ndarray) -> tuple[float, np.ndarray]:
    """Top-1 agreement and the KL of each prompt, in nats: log-probabilities [prompts, positions, vocabulary]."""
    agreement = (want.argmax(-1) == got.argmax(-1)).mean()
    kl = (np.exp(want) * (want - got)).sum(-1).mean(-1)
    return float(agreement), kl


def library_kl(model: str, rows: np.ndarray, prompt_tokens: int, environments: dict[str, dict]) -> dict[str, np.ndarray]:
    """KL of each prompt [prompts] by vllm_powerquant.quality, prompts' keys and values exact."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_powerquant import quality
    from vllm_powerquant.attention.reference_cache import ReferenceCache
    from vllm_powerquant.calibration import Calibration, ModelShape
    from vllm_powerquant.config import PowerQuantConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    shape = ModelShape.of(loaded.config)
    kl = {name: [] for name in environments}
    for i, row in enumerate(rows.tolist()):
        segment = quality.make_segment(loaded, str(i), row, prompt_tokens, chunk=1)
        for name, environment in environments.items():
            config = PowerQuantConfig.from_sources(environment)
            frames = Calibration.load(config.calibration).keys.frames() if config.calibration else None
            cache = ReferenceCache(
                shape.layers,
                shape.head_size,
                config.key_bits,
                config.value_bits,
                config.value_codec if config.value_bits == 2 else "scalar",
                config.residual_tokens,
                config.sink_tokens,
                config.protected_layers,
                frames,
            )
            kl[name].append(quality.measure(loaded, segment, lambda cache=cache: cache, chunk=1).kl)
    return {name: np.array(values) for name, values in kl.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face checkpoint (default: the embedded SmolLM2)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=640)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--calibration", help="what `powerquant calibrate` wrote, for every configuration")
    parser.add_argument("--library", action="store_true", help="measure the same texts through a Transformers cache too")
    parser.add_argument("--graphs", action="store_true", help="decode steps as CUDA graphs instead of eager")
    parser.add_argument("--at-once", type=int, default=1, help="engines that run beside one another")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep each configuration's log-probabilities here")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FOLDER",
        help="what --save kept elsewhere; its texts, prompts and positions are used",
    )
    args = parser.parse_args()
    import torch
    import vllm

    from vllm_powerquant.model import prepare_model

    job = {"model": args.model or str(prepare_model()), "passes": 2, "engine": {}}
    if args.reference:
        tokens = np.load(args.reference / "tokens.npy")
        args.prompts, args.positions, _ = np.load(args.reference / "bf16.npy", mmap_mode="r").shape
        args.prompt_tokens = tokens.shape[1] - args.positions
        job["tokens"] = tokens.tolist()
    job |= {"prompts": args.prompts, "prompt_tokens": args.prompt_tokens, "positions": args.positions}
    where = "CPU"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
        job["engine"] |= {"gpu_memory_utilization": 0.8 / args.at_once, "max_num_seqs": args.prompts}
    if args.graphs:
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, args.prompts]}
        job["engine"] |= {"enforce_eager": False, "compilation_config": graphs}
    print(f"{where}, vLLM {vllm.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{args.prompts} prompts of {args.prompt_tokens} tokens x {args.positions} positions; KL in nats +- standard error"
    )
    jobs = {"bf16": {**job, "backend": None}}
    calibrated = {"POWERQUANT_CALIBRATION": args.calibration} if args.calibration else {}
    jobs |= {name: {**job, "backend": "POWERQUANT", "environment": CONFIGURATIONS[name] | calibrated} for name in args.only}
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        running = {name: pool.submit(run, job) for name, job in jobs.items()}
        stock = running["bf16"].result()
        want = stock["logprobs"][0]
        again = compare(want, stock["logprobs"][1])
        name, hits = "bf16 after a prefix-cache hit", stock["cached"][1].sum()
        print(f"{name:32} top-1 {again[0]:7.2%}  KL {again[1].mean():.5f}  hits {hits}", flush=True)
        for name, future in running.items():
            got = future.result()
            if name != "bf16":
                (top, kl), (hit_top, hit_kl) = compare(want, got["logprobs"][0]), compare(want, got["logprobs"][1])
                error = kl.std(ddof=1) / len(kl) ** 0.5
                print(
                    f"{name:32} top-1 {top:7.2%}  KL {kl.mean():.5f} +- {error:.5f}   after a prefix-cache hit: "
                    f"top-1 {hit_top:7.2%}  KL {hit_kl.mean():.5f}  hits {got['cached'][1].sum()}",
                    flush=True,
                )
            file = re.sub(r"\W+", "-", name.lower()) + ".npy"
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                np.save(args.save / "tokens.npy", got["tokens"])
                np.save(args.save / file, got["logprobs"][0].astype(np.float16))
            if args.reference and (args.reference / file).exists():
                top, kl = compare(np.load(args.reference / file).astype(np.float32), got["logprobs"][0])
                print(f"{'':8}against the reference's own {name}: top-1 {top:7.2%}  KL {kl.mean():.5f}", flush=True)
    if args.library:
        environments = {name: CONFIGURATIONS[name] | calibrated for name in args.only}
        for name, kl in library_kl(job["model"], stock["tokens"], args.prompt_tokens, environments).items():
            print(
                f"{name:32} through a Transformers cache: KL {kl.mean():.5f} +- {kl.std(ddof=1) / len(kl) ** 0.5:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
