"""The verb convert."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "convert",
        help="make a PowerInfer file of a Hugging Face checkpoint",
        description="With predictors the file is sparse (PWRI), without them a plain GGUF of the same weights. Families: "
        "llama (and mistral), bamboo, falcon, opt; a sparse model must be a ReLU model.",
    )
    verb.add_argument("model", type=Path, help="checkpoint folder: config.json, safetensors, tokenizer")
    verb.add_argument("-o", "--output", type=Path, required=True, help="file to write, .gguf")
    verb.add_argument("--predictor", type=Path, help="folder of model_0.pt, model_1.pt, ... (or .safetensors)")
    verb.add_argument("--type", default="f16", choices=("f16", "q4_0", "f32"), help="of the matrices (default: f16)")
    verb.add_argument("--predictor-type", choices=("f16", "q4_0", "f32"), help="of the predictors (default: --type)")
    verb.add_argument(
        "--output-type",
        choices=("f16", "q4_0", "f32", "q8_0", "q6_k"),
        help="of the output matrix (default: --type; for q4_0 q6_k where it fits, else q8_0)",
    )
    verb.add_argument("--dense", action="store_true", help="write a plain GGUF, whether predictors are there or not")
    verb.add_argument(
        "--threshold",
        type=float,
        help="a neuron is computed if predicted to be at least this (default: the predictors' own, or 0)",
    )
    verb.add_argument("--family", choices=("llama", "bamboo"), help="where the checkpoint's class does not say it")
    verb.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")
    verb.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ..sparse.convert import convert

    done = convert(
        args.model,
        args.output,
        dtype=args.type,
        predictor=args.predictor,
        threshold=args.threshold,
        dense=args.dense,
        predictor_dtype=args.predictor_type,
        output_dtype=args.output_type,
        family=args.family,
        progress=not args.json,
    )
    if args.json:
        print(json.dumps(done.as_dict()))
        return 0
    kind = f"sparse (PWRI), threshold {done.threshold:g}" if done.predictor_ranks else "dense (GGUF)"
    print(
        f"{args.output}: {done.family} {done.activation}, {kind}, {done.dtype}; {done.num_layers} layers x "
        f"{done.hidden_size}, {done.intermediate_size} neurons each; {done.file_bytes / 1e6:.1f} MB in {done.seconds:.1f} s"
    )
    return 0
