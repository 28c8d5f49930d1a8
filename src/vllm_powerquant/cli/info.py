"""The verb info."""

from __future__ import annotations

import argparse
import json


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("info", help="what is installed here and what of it can run")
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from ..info import collect, text

    facts = collect()
    print(json.dumps(facts) if args.json else text(facts))
    return 0
