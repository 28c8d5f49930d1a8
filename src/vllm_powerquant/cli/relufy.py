"""The verb relufy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import PowerQuantConfigError
from .common import say


def add(verbs: argparse._SubParsersAction) -> None:
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


def _relufy(args: argparse.Namespace) -> int:
    from ..sparse.relufy import Text, relufy

    text = Text(args.text, args.sampled, args.samples)
    training = None
    if text:
        from ..sparse.distil import Training
        from ..sparse.text import choose_device

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
        say=None if args.json else say,
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
