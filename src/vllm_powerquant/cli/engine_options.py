"""The flags of verbs that run an Engine: its model, backend and cache, and how text is sampled."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, options
from ..errors import PowerQuantConfigError
from .common import progress_lines, waiting

if TYPE_CHECKING:
    from ..engine import Engine

# of the pages that vLLM allocates, which an engine for one command does not need
_NOT_HERE = ("residual_block_size",)
BACKENDS = ("auto", "transformers", "vllm", "sparse")

EXIT_CODES = "exit code: 0 done, 1 refused or failed with one line of reason, 2 usage, 130 interrupted"


def add_model(verb: argparse.ArgumentParser, what: str = "checkpoint folder or name, or GGUF or PWRI file") -> None:
    verb.add_argument("--model", metavar="MODEL", help=f"{what} (default: the embedded SmolLM2)")


def add_cache(verb: argparse.ArgumentParser) -> None:
    """The compressed cache's options, by the names of the environment's."""
    group = verb.add_argument_group("compressed cache")
    group.add_argument("--preset", choices=PRESETS, help="defaults of the options below (default: balanced)")
    for option in options():
        if option.field in _NOT_HERE:
            continue
        number = isinstance(option.default, int)
        default = option.default if option.default != "" else "none"
        group.add_argument(
            f"--{option.field.replace('_', '-')}",
            type=int if number else str,
            metavar="N" if number else "FILE" if option.field == "calibration" else "NAME",
            help=f"{option.help}; {option.allowed} (default: {default})",
        )


def cache_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    names = ["preset", *(option.field for option in options())]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def add_engine(verb: argparse.ArgumentParser) -> None:
    add_model(verb)
    verb.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what computes (default: by the model and the machine)"
    )
    verb.add_argument("--uncompressed", action="store_true", help="a cache in the model's own type, to compare with")
    verb.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto", help="of the weights")
    verb.add_argument("--device", help="of backend transformers: cpu, cuda, cuda:1 (default: the GPU if there is one)")
    verb.add_argument("--load-in-4bit", action="store_true", help="weights through bitsandbytes, where that is installed")
    verb.add_argument("--load-in-8bit", action="store_true", help="the same in 8 bits")
    add_cache(verb)


def open_engine(args: argparse.Namespace) -> Engine:
    """Raises: PowerQuantError if it cannot be made"""
    from ..engine import Engine

    quiet()
    extra = {"say": progress_lines()} if _is_sparse(args) else {}
    with waiting(f"loading {args.model or 'the embedded model'} ..."):
        return Engine.from_pretrained(
            args.model,
            backend=args.backend,
            compress=not args.uncompressed,
            load_in_4bit=args.load_in_4bit,
            load_in_8bit=args.load_in_8bit,
            dtype=args.dtype,
            device=args.device,
            **cache_options(args),
            **extra,
        )


def _is_sparse(args: argparse.Namespace) -> bool:
    from ..engine.choose import find_source

    return args.backend == "sparse" or (args.model is not None and find_source(args.model, args.backend).backend == "sparse")


def quiet() -> None:
    """Keep what libraries say of themselves off stdout, and off the terminal but for warnings that matter."""
    # vLLM logs to stdout otherwise
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|torch")


def add_sampling(verb: argparse.ArgumentParser, max_tokens: int) -> None:
    from ..engine.sampling import Sampling

    default = {field.name: field.default for field in fields(Sampling)}
    group = verb.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"of the answer (default: {max_tokens})"
    )
    group.add_argument("--greedy", action="store_true", help="the most likely token each time")
    for name, kind, what in (
        ("temperature", float, "0: the most likely token each time"),
        ("top_p", float, "sample among the likeliest tokens of this probability together"),
        ("top_k", int, "sample among so many; 0: all"),
        ("min_p", float, "sample among those at least this probable beside the likeliest"),
        ("repetition_penalty", float, "above 1: tokens that are there become less likely"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="X", help=f"{what} (default: {default[name]:g})"
        )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer (default: none)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer there; may be given again")
    group.add_argument("--ignore-eos", action="store_true", help="go on where the model would end")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """For Engine's methods. Raises: PowerQuantConfigError for flags that contradict each other"""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.greedy:
        if given.get("temperature", 0) != 0:
            raise PowerQuantConfigError(
                f"--greedy is temperature 0, got --temperature {given['temperature']:g}; leave one out"
            )
        given["temperature"] = 0
    return given | {"max_tokens": args.max_tokens, "ignore_eos": args.ignore_eos}
