"""A run of `relufy` that trains, and what it keeps in its folder: the text it sampled, its state, its deltas so far."""

from __future__ import annotations

import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..calibration import first_line
from ..errors import PowerQuantConfigError, PowerQuantError
from ..files import whole_file
from .deltas import save_deltas
from .distil import Progress, Trainer, Training
from .sampling import Sampler, end_ids, rows_that_fit, scripts
from .text import Source

if TYPE_CHECKING:
    from .llama import Weights

STATE_FORMAT = 1


def sample(
    source: Source,
    tokenizer: Any,
    weights: Weights,
    original: str,
    tokens: int,
    training: Training,
    work: Path,
    progress: bool,
) -> torch.Tensor:
    """Text from the original itself, in whole rounds, each kept in work/samples.safetensors when it is there.

    Args:    original: the checkpoint's fingerprint; tokens: rounded up to whole texts
    Returns: [n, length] int32
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path, length = work / "samples.safetensors", training.length
    wanted = -(-tokens // length)
    rows, found = None, []
    if path.is_file():
        kept, about = load_samples(path, original, length)
        if about.get("seed") == str(training.seed) and about.get("wanted") == str(wanted):
            rows, found = int(about["rows"]), list(kept.split(int(about["rows"])))
    if sum(map(len, found)) >= wanted:
        return torch.cat(found)[:wanted]
    eos = end_ids(tokenizer, source.config)
    rows = rows or rows_that_fit(weights, source.shape, length, wanted)
    sampler = Sampler(weights.to(training.dtype), source.shape, scripts(tokenizer, eos), eos, rows, length)
    with _bar("sampling text", wanted * length, "token", progress) as bar:
        bar.update(sum(map(len, found)) * length)
        while sum(map(len, found)) < wanted:
            found.append(sampler.round(training.seed * 1_000_003 + len(found), bar.update))
            about = {"original": original, "seed": str(training.seed), "wanted": str(wanted), "rows": str(rows)}
            try:
                with whole_file(path) as unfinished:
                    save_file({"tokens": torch.cat(found)}, unfinished, about)
            except (OSError, SafetensorError) as error:
                raise PowerQuantError(f"cannot write {path}: {error}; what was sampled before is kept") from None
    del sampler
    if weights.embedding.device.type == "cuda":
        # the cache's memory is training's now
        torch.cuda.empty_cache()
    return torch.cat(found)[:wanted]


def load_samples(path: Path, original: str, length: int) -> tuple[torch.Tensor, dict[str, str]]:
    """(tokens [n, length] int32, what they are). Raises: PowerQuantConfigError for a file that does not suit the run"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about, tokens = file.metadata() or {}, file.get_tensor("tokens")
    except (OSError, SafetensorError) as error:
        raise PowerQuantConfigError(f"{path} can't be read: {error}; give a samples.safetensors of an earlier run") from None
    if about.get("original") != original:
        raise PowerQuantConfigError(f"{path} was sampled from another model; sample anew with --sampled TOKENS")
    if tokens.shape[1] != length:
        raise PowerQuantConfigError(
            f"{path} has texts of {tokens.shape[1]} tokens, not of {length}; give --length {tokens.shape[1]}"
        )
    return tokens, about


def train(
    weights: Weights,
    source: Source,
    windows: torch.Tensor,
    training: Training,
    settings: dict[str, Any],
    work: Path,
    save_every: int,
    begin: float,
    progress: bool,
    say: Callable[[str], None] | None,
) -> Trainer:
    """Trains to the end, from where an earlier run stopped if there was one.

    Args:
        settings: all that the result depends on; a state made with others is refused
        begin: when the run began, time.monotonic(): a time limit counts from there

    Raises: PowerQuantConfigError, PowerQuantError; KeyboardInterrupt after SIGINT or SIGTERM, when the state is saved
    """
    trainer = Trainer(weights, source.shape, windows, training)
    state_path = work / "state.pt"
    before = _load_state(state_path, settings) if state_path.is_file() else None
    if before:
        trainer.restore(before)
        if say:
            say(f"goes on at step {trainer.step} of {trainer.steps or 'an open number'}")

    def save() -> None:
        _save_state(state_path, {"format": STATE_FORMAT, "settings": settings, "trainer": trainer.state()})
        made = recipe(source, settings, trainer.device, trainer) | {"result": "unfinished"}
        save_deltas(work / "deltas.safetensors", trainer.deltas, settings["original"], made)

    with _stop_signals() as stopped, _bar("training", trainer.steps, "step", progress) as bar:
        bar.update(trainer.step)

        def watch(seen: Progress) -> None:
            bar.total = seen.steps
            bar.set_postfix_str(
                f"KL {seen.kl:.4f}, active {seen.active:.1%}, pressure {seen.pressure:.2g}, "
                f"{seen.tokens_per_second:,.0f} tokens/s"
            )
            bar.update(seen.step - bar.n)

        # waiting for a GPU to tell its numbers costs a little each time
        often = 1 if trainer.device.type == "cpu" else 10
        while not trainer.done:
            left = training.minutes * 60 - (time.monotonic() - begin) if training.minutes else None
            saves = (trainer.step + 1) % save_every == 0
            trainer.advance(watch if saves or (trainer.step + 1) % often == 0 else None, left)
            if saves or stopped:
                save()
            if stopped:
                if say:
                    say(f"stopped after step {trainer.step}; the same command goes on from there")
                raise KeyboardInterrupt
    save()
    return trainer


def _load_state(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    import pickle

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        before, state = found["settings"], found["trainer"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise PowerQuantConfigError(
            f"{path} can't be read ({first_line(error)}); remove {path.parent} to begin anew"
        ) from None
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        told = "; ".join(f"{key} was {before.get(key)}, now {settings[key]}" for key in differing)
        raise PowerQuantConfigError(
            f"{path.parent} holds a run with other settings: {told}; give the same to go on, or another folder to begin anew"
        )
    return state


def _save_state(path: Path, state: dict[str, Any]) -> None:
    try:
        with whole_file(path) as unfinished:
            torch.save(state, unfinished)
    except (OSError, RuntimeError) as error:
        raise PowerQuantError(f"cannot save the state in {path}: {error}") from None


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second one does what it always did."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def recipe(source: Source, settings: dict[str, Any], device: torch.device, trainer: Trainer) -> dict[str, Any]:
    """What the deltas' file says of how they were made."""
    cuda = device.type == "cuda"
    return {
        "model": Path(source.name).name,
        "settings": settings,
        "steps": trainer.step,
        "train_tokens": trainer.step * trainer.tokens_per_step,
        "train_seconds": round(trainer.seconds, 1),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "versions": {"vllm-powerquant": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _bar(what: str, total: int | None, unit: str, shown: bool) -> Any:
    from tqdm import tqdm

    interval_s = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "token",
        file=sys.stderr,
        mininterval=interval_s,
        disable=not shown,
    )
