"""The `powerquant` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    _add_relufy(verbs)
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
        with _sigterm_interrupts():
            return args.run(args)
    except PowerQuantError as error:
        print(f"powerquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C is: what is half written is removed, instead of left under a passing name."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _add_relufy(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "relufy",
        help="make a ReLU model of one with SiLU, so that its neurons can be skipped",
        description="Without text it applies deltas that were trained before: the shipped ones, for the embedded SmolLM2. "
        "With --text or --sampled it trains some, from what the original itself predicts; a run that was interrupted goes "
        "on when it is given again. Llama and mistral checkpoints.",
    )
    verb.add_argument("model", nargs="?", help="checkpoint folder (default: the embedded SmolLM2)")
    verb.add_argument("-o", "--output", type=Path, required=True, help="folder to write the ReLU checkpoint to")
    verb.add_argument("--deltas", type=Path, help="apply these, a deltas.safetensors of an earlier run")
    verb.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 text files to train on")
    verb.add_argument("--sampled", type=int, default=0, metavar="TOKENS", help="of text that the model samples to train on")
    verb.add_argument("--samples", type=Path, help="text that an earlier run sampled, its relufy/samples.safetensors")
    verb.add_argument("--steps", type=int, help="of training (or --minutes)")
    verb.add_argument("--minutes", type=float, help="for sampling and training; the steps follow from the speed")
    verb.add_argument("--active-share", type=float, default=0.2, help="of neurons to be left active; 1: all that are")
    verb.add_argument("--rank", type=int, default=32, help="of the changes to gate, up and down (default: 32)")
    verb.add_argument("--attention-rank", type=int, default=32, help="to q, k, v and o; 0: none (default: 32)")
    verb.add_argument("--length", type=int, default=1024, help="tokens of a window (default: 1024)")
    verb.add_argument("--batch", type=int, default=32, help="windows of a step (default: 32)")
    verb.add_argument("--micro-batch", type=int, help="windows computed at once, for less memory (default: --batch)")
    verb.add_argument("--lr", type=float, default=8e-3, help="learning rate at first; falls to zero (default: 0.008)")
    verb.add_argument(
        "--slide", type=float, default=0.15, help="part of training in which SiLU becomes ReLU (default: 0.15)"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--type", choices=("bf16", "f32"), help="of matrix products (default: bf16 on a GPU, else f32)")
    verb.add_argument("--compile", action="store_true", help="compile the layers: a minute at first, then faster steps")
    verb.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="save the state (default: 100)")
    verb.add_argument(
        "--eval-windows", type=int, help="of each built-in text for the perplexities (default: 4 after training, else 0)"
    )
    verb.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    verb.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")
    verb.set_defaults(run=_relufy)


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


def _relufy(args: argparse.Namespace) -> int:
    from .sparse.relufy import Text, relufy

    text = Text(args.text, args.sampled, args.samples)
    training = None
    if text:
        from .sparse.distil import Training
        from .sparse.text import choose_device

        training = Training(
            rank=args.rank,
            attention_rank=args.attention_rank,
            length=args.length,
            batch=args.batch,
            micro_batch=args.batch if args.micro_batch is None else args.micro_batch,
            steps=args.steps,
            minutes=args.minutes,
            lr=args.lr,
            active_share=args.active_share,
            slide=args.slide,
            seed=args.seed,
            bf16=args.type == "bf16" if args.type else choose_device(args.device).type == "cuda",
            compiled=args.compile,
        )
    elif args.steps is not None or args.minutes is not None:
        raise PowerQuantConfigError("--steps and --minutes are for training, which needs --text, --sampled or --samples")
    done = relufy(
        args.model,
        args.output,
        deltas=args.deltas,
        text=text,
        training=training,
        device=args.device,
        eval_windows=(4 if text else 0) if args.eval_windows is None else args.eval_windows,
        save_every=args.save_every,
        progress=not args.json,
        say=None if args.json else _say,
    )
    if args.json:
        print(json.dumps(done.as_dict()))
        return 0
    if done.steps:
        print(f"{done.deltas}: {done.steps} steps, {done.train_tokens / 1e6:.1f} M tokens, KL {done.kl:.4f}")
    print(f"{done.output}: ReLU in place of SiLU, in {done.seconds:.0f} s")
    if done.perplexity is not None:
        rounding = f" ({done.unrounded_perplexity} before rounding)" if done.unrounded_perplexity else ""
        print(
            f"perplexity {done.perplexity}{rounding}, the original's {done.original_perplexity}; active neurons "
            f"{done.active_share:.1%}, by layer: {' '.join(f'{share:.0%}' for share in done.active_by_layer)}"
        )
    return 0


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
