"""The verb doctor."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from typing import TYPE_CHECKING

from .common import coloured, waiting
from .engine_options import quiet

if TYPE_CHECKING:
    from ..doctor import Check

_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "doctor",
        help="try what is installed here, and say what to do where it does not work",
        description="Versions, devices, vLLM's plugin, the codec, compiled kernels, the sparse engine, the embedded model: "
        "each is tried. warn: something is missing, the rest works.",
        epilog="examples:\n  powerquant doctor\n  powerquant doctor --json | jq '.checks[] | select(.status != \"ok\")'\n\n"
        "exit code: 0 nothing failed, 1 a problem was found, 2 it could not run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    verb.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    quiet()
    try:
        from ..doctor import checks, report

        done, waits = [], checks()
        while True:
            with waiting("checking ..."):
                check = next(waits, None)
            if check is None:
                break
            done.append(check)
            if not args.json:
                print(_line(check), flush=True)
        found = report(done)
    except Exception:
        # not a finding about this machine: a fault of the doctor
        traceback.print_exc()
        print("powerquant: doctor could not run", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    else:
        count = found["problems"]
        print(f"{count} problem{'s' * (count != 1)} found" if count else "no problem found")
    return 1 if found["problems"] else 0


def _line(check: Check) -> str:
    mark = coloured(f"{check.status:<4}", _COLOURS[check.status], sys.stdout)
    advice = f"\n     -> {check.advice}" if check.advice and check.status != "ok" else ""
    return f"{mark} {check.name}: {check.found}{advice}"
