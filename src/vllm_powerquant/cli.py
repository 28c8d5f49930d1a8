"""The `powerquant` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import PowerQuantConfigError, PowerQuantError


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 refused or failed with one line of reason, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="powerquant", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser(
        "calibrate",
        help="measure a model's keys and queries, so that its cache loses less",
        description="Writes a file for POWERQUANT_CALIBRATION. A 135M model takes ten seconds on one CPU core.",
    )
    verb.add_argument("model", nargs="?", help="Hugging Face checkpoint, folder or name (default: the embedded SmolLM2)")
    verb.add_argument("-o", "--output", type=Path, required=True, help="file to write, .safetensors")
    verb.add_argument("--text", type=Path, nargs="+", help="UTF-8 text files to calibrate on (default: built-in texts)")
    verb.add_argument("--tokens", type=int, default=1024, help="of one run through the model (default: 1024)")
    verb.add_argument("--runs", type=int, default=2, help="through each text, spread evenly over it (default: 2)")
    verb.set_defaults(run=_calibrate)
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
    verb = verbs.add_parser(
        "profile",
        help="count how often each neuron of a ReLU model is active over text",
        description="Writes DIR/activation/activation_0.pt, ... (as PowerInfer's tools read them) and DIR/profile.json. "
        "A 135M model reads 32,000 tokens in a minute on two CPU cores.",
        epilog="example: powerquant profile ./my-relu-model -o ./my-profile --text book.txt --tokens 100000",
    )
    _add_model(verb)
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write, made if need be")
    _add_texts(verb)
    verb.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")
    verb.set_defaults(run=_profile)
    verb = verbs.add_parser(
        "train-predictor",
        help="train predictors of which neurons of a ReLU model are active",
        description="Writes what `powerquant convert --predictor DIR` reads, and DIR/report.json with recall, precision and "
        "active share by layer on text that was not trained on. Interrupted, the same command goes on where it was.",
        epilog="example: powerquant train-predictor ./my-relu-model -o ./my-predictors --text book.txt --recall 0.99",
    )
    _add_model(verb)
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write, made if need be")
    _add_texts(verb)
    verb.add_argument("--rank", type=_rank, help="of every layer, a multiple of 32, or auto: by --budget (default: auto)")
    verb.add_argument(
        "--budget", type=float, default=0.1, help="weights over the feed-forwards' for --rank auto (default: 0.1)"
    )
    verb.add_argument("--recall", type=float, default=0.99, help="share of active neurons to be found (default: 0.99)")
    verb.add_argument("--epochs", type=int, help="times that the text is trained on (default: 30)")
    verb.add_argument("--seed", type=int, default=0, help="of the order of tokens (default: 0)")
    verb.add_argument("--restart", action="store_true", help="begin anew where DIR holds something made otherwise")
    verb.add_argument("--keep-inputs", action="store_true", help="leave what was captured of the text in DIR/work")
    verb.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")
    verb.set_defaults(run=_train_predictor)
    verb = verbs.add_parser(
        "split",
        help="plan which neurons of a sparse model a GPU should hold",
        description="Writes a gpuidx file, which PowerInfer's own engine reads; this project's engine has no GPU part. "
        "Neurons are chosen by their counts in groups of 256.",
        epilog="example: powerquant split model.gguf --profile ./my-profile --budget 2GiB -o model.gguf.generated.gpuidx",
    )
    verb.add_argument("model", type=Path, metavar="FILE", help="sparse model (PWRI)")
    verb.add_argument("--profile", type=Path, required=True, metavar="DIR", help="what `powerquant profile` wrote")
    verb.add_argument("--budget", required=True, help="for neurons alone: bytes, or with KiB, MiB, GiB, KB, MB, GB")
    verb.add_argument("-o", "--output", type=Path, required=True, help="file to write, .gpuidx")
    verb.add_argument("--json", action="store_true", help="print the report as JSON")
    verb.set_defaults(run=_split)
    verb = verbs.add_parser(
        "serve",
        help="serve a model by OpenAI's protocol",
        description="A file in GGUF or PowerInfer format (whatever its name) is served by the sparse engine, a Hugging Face "
        "checkpoint by vLLM with --attention-backend POWERQUANT. The process becomes that server: signals and exit status "
        "are its own.",
        usage="powerquant serve [-h] [--dry-run] MODEL [the server's flags ...]",
        allow_abbrev=False,
    )
    verb.add_argument("--dry-run", action="store_true", help="print the server's command instead (before MODEL)")
    verb.add_argument("model", metavar="MODEL", help="file, checkpoint folder or name on the Hugging Face hub")
    verb.add_argument("flags", nargs=argparse.REMAINDER, help="passed on to the server, e.g. --host 0.0.0.0 --port 8000")
    verb.set_defaults(run=_serve)
    verb = verbs.add_parser("info", help="what is installed here and what of it can run")
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=_info)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except PowerQuantError as error:
        print(f"powerquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _calibrate(args: argparse.Namespace) -> int:
    from .calibration import calibrate

    folder = args.output.absolute().parent
    if args.output.is_dir() or not os.access(folder, os.W_OK):
        raise PowerQuantConfigError(f"cannot write {args.output}: give a file in an existing folder that you may write to")
    calibration = calibrate(args.model, args.text, args.tokens, args.runs)
    calibration.save(args.output)
    shape = calibration.shape
    print(
        f"{args.output}: key statistics of {shape.layers} layers x {shape.kv_heads} heads x {shape.head_size} over "
        f"{calibration.tokens} tokens; serve with POWERQUANT_CALIBRATION={args.output}"
    )
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .sparse.convert import convert

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


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", nargs="?", help="Hugging Face checkpoint, folder or name (default: the embedded SmolLM2, a SiLU model)"
    )
    verb.add_argument("--family", choices=("llama", "bamboo"), help="where the checkpoint's class does not say it")


def _add_texts(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 files (default: built-in texts, 32,000 tokens)"
    )
    verb.add_argument("--tokens", type=int, help="how many to read, spread evenly over the texts (default: all)")
    verb.add_argument("--window", type=int, default=512, help="tokens read at a time (default: 512, or the model's context)")
    verb.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """What _add_model and _add_texts parsed, for a function that reads texts with a model."""
    return {
        "texts": args.text,
        "tokens": args.tokens,
        "window": args.window,
        "device": args.device,
        "family": args.family,
        "progress": not args.json,
        "say": None if args.json else _say,
    }


def _profile(args: argparse.Namespace) -> int:
    from .sparse.profile import profile

    done = profile(args.model, args.output, **_reading(args))
    if args.json:
        print(json.dumps(done.as_dict()))
        return 0
    print("layer  active  neurons that make up 80 % of activations")
    for layer, (active, hot) in enumerate(zip(done.active_share, done.hot_share, strict=True)):
        print(f"{layer:5}  {active:6.1%}  {hot:6.1%}")
    mean = sum(done.active_share) / done.num_layers
    print(f"{args.output}: {done.tokens} tokens in {done.seconds:.1f} s; {mean:.1%} of neurons active on average")
    return 0


def _rank(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _train_predictor(args: argparse.Namespace) -> int:
    from .sparse.lowrank import Training
    from .sparse.predictor import train_predictors

    done = train_predictors(
        args.model,
        args.output,
        rank=args.rank,
        budget=args.budget,
        recall=args.recall,
        training=Training() if args.epochs is None else Training(epochs=args.epochs),
        seed=args.seed,
        restart=args.restart,
        keep_inputs=args.keep_inputs,
        **_reading(args),
    )
    if args.json:
        print(json.dumps(done.as_dict()))
        return 0
    print("layer  rank  recall  precision  active  predicted")
    for layer, row in enumerate(done.layers):
        print(
            f"{layer:5}  {row['rank']:4}  {row['recall']:6.2%}  {row['precision']:9.1%}  {row['active_share']:6.1%}  "
            f"{row['predicted_share']:9.1%}"
        )
    print("threshold  recall  predicted   (powerquant convert --threshold)")
    for point in done.points:
        print(f"{point['threshold']:9.4f}  {point['recall']:6.2%}  {point['predicted_share']:9.1%}")
    total = done.total
    print(
        f"{args.output}: threshold {done.threshold:g} finds {total['recall']:.2%} of active neurons and predicts "
        f"{total['predicted_share']:.1%} where {total['active_share']:.1%} are active, on {done.reported_tokens} tokens "
        f"that were not trained on; {done.weights_share:.1%} of the feed-forwards' weights; {done.seconds:.0f} s"
    )
    return 0


def _split(args: argparse.Namespace) -> int:
    from .sparse.split import parse_bytes, split

    done = split(args.model, args.profile, parse_bytes(args.budget), args.output)
    if args.json:
        print(json.dumps(done.as_dict()))
        return 0
    print(
        f"{args.output}: {sum(done.hot)} hot neurons ({done.hot_share:.1%}) with {done.covered:.1%} of all activations; "
        f"{done.used / 1e6:.1f} of {done.total / 1e6:.1f} MB, the budget is {done.budget / 1e6:.1f} MB"
    )
    return 0


def _serve(args: argparse.Namespace) -> int:
    from .serve import choose, command, replace_process

    choice = choose(args.model)
    words = command(choice, args.flags, say=_build_progress(), build=not args.dry_run)
    if args.dry_run:
        print(shlex.join(words))
        return 0
    _say(f"{args.model} is {choice.reason}; starting: {shlex.join(words)}")
    replace_process(words)
    return 1


def _info(args: argparse.Namespace) -> int:
    from .info import collect, text

    facts = collect()
    print(json.dumps(facts) if args.json else text(facts))
    return 0


def _build_progress() -> Callable[[str], None]:
    """Prints lines over each other on a terminal, else one every 10 s."""
    terminal = sys.stderr.isatty()
    printed = float("-inf")

    def show(line: str) -> None:
        nonlocal printed
        if terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= printed + 10:
            printed = time.monotonic()
            _say(line)

    return show


def _say(line: str) -> None:
    over = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{over}powerquant: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
