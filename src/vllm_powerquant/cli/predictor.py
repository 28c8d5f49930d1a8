"""The verbs profile, train-predictor and split: which neurons of a ReLU model are active."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import say


def add(verbs: argparse._SubParsersAction) -> None:
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
        "say": None if args.json else say,
    }


def _profile(args: argparse.Namespace) -> int:
    from ..sparse.profile import profile

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
    from ..sparse.lowrank import Training
    from ..sparse.predictor import train_predictors

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
    from ..sparse.split import parse_bytes, split

    done = split(args.model, args.profile, parse_bytes(args.budget), args.output)
    if args.json:
        print(json.dumps(done.as_dict()))
        return 0
    print(
        f"{args.output}: {sum(done.hot)} hot neurons ({done.hot_share:.1%}) with {done.covered:.1%} of all activations; "
        f"{done.used / 1e6:.1f} of {done.total / 1e6:.1f} MB, the budget is {done.budget / 1e6:.1f} MB"
    )
    return 0
