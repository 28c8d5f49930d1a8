"""The verb calibrate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import PowerQuantConfigError


def add(verbs: argparse._SubParsersAction) -> None:
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


def _calibrate(args: argparse.Namespace) -> int:
    from ..calibration import Calibration, calibrate

    folder = args.output.absolute().parent
    if (args.output.exists() and not args.output.is_file()) or not os.access(folder, os.W_OK):
        raise PowerQuantConfigError(f"cannot write {args.output}: give a file in an existing folder that you may write to")
    if args.output.exists() and args.output.stat().st_size:
        try:
            Calibration.load(args.output)
        except PowerQuantConfigError:
            raise PowerQuantConfigError(
                f"{args.output} is there and is no calibration; give another name, or remove it first"
            ) from None
    calibration = calibrate(args.model, args.text, args.tokens, args.runs)
    calibration.save(args.output)
    shape = calibration.shape
    print(
        f"{args.output}: key statistics of {shape.layers} layers x {shape.kv_heads} heads x {shape.head_size} over "
        f"{calibration.tokens} tokens; serve with POWERQUANT_CALIBRATION={args.output}"
    )
    return 0
