"""`powerquant relufy`: a ReLU model of a gated-SiLU one, by applying trained deltas or by training some.

The student is written as a Hugging Face checkpoint of the original's class with hidden_act "relu" and merged weights. A
run that trains keeps its deltas, its sampled text and, until it is done, its state in the folder `relufy` of the output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from .text import Source, choose_device, find_checkpoint, load_tokenizer, token_windows

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint
    from .deltas import Deltas
    from .distil import Score, Trainer, Training
    from .llama import Weights

Say = Callable[[str], None] | None

# of the embedded SmolLM2; README.md beside it says how they were made
SHIPPED_DELTAS = Path(__file__).parent / "data" / "smollm2-relu.safetensors"
COPIED = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*")
COPIED += ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
STATE_FORMAT = 1


@dataclass(frozen=True)
class Text:
    """What is trained on; more than one kind may be given."""

    paths: Sequence[Path] = ()  # UTF-8 files
    sampled: int = 0  # tokens that the original samples
    samples: Path | None = None  # what an earlier run sampled

    def __bool__(self) -> bool:
        return bool(self.paths or self.sampled or self.samples)


@dataclass(frozen=True)
class Relufied:
    """What was written, and how good it is on text that was not trained on."""

    output: str
    original: str
    deltas: str | None  # file; of a training run, the one it wrote
    steps: int
    train_tokens: int
    seconds: float
    kl: float | None  # of the last step, nats
    original_perplexity: float | None
    perplexity: float | None
    unrounded_perplexity: float | None  # before the deltas were rounded to what the file keeps; None: nothing was trained
    active_share: float | None  # mean over layers
    active_by_layer: list[float] = field(default_factory=list)
    original_positive_by_layer: list[float] = field(default_factory=list)  # gates above zero, in the original

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def relufy(
    name: str | Path | None,
    output: str | Path,
    *,
    deltas: str | Path | None = None,
    text: Text | None = None,
    training: Training | None = None,
    device: str | None = None,
    eval_windows: int = 4,
    save_every: int = 100,
    progress: bool = True,
    say: Say = None,
) -> Relufied:
    """Write a ReLU checkpoint into the folder `output`.

    Args:
        name: checkpoint folder of a llama or mistral with SiLU; None: the embedded SmolLM2
        deltas: file to apply; None without text: the shipped ones, for the embedded model
        text: what to train on; then deltas are trained, and saved as output/relufy/deltas.safetensors
        training: how; a run that was interrupted goes on if it is called again with the same arguments
        device: None: the GPU if there is one
        eval_windows: of each built-in text's second half, for the perplexities; 0: none
        save_every: steps between saves of the state

    Raises:
        PowerQuantConfigError: a bad value, no such file, text or checkpoint, deltas of another model, or an interrupted run
            with other settings
        PowerQuantUnsupportedError: a model that has ReLU already, or of another family
        PowerQuantError: a package is missing, or training diverged
        KeyboardInterrupt: after SIGINT or SIGTERM, when the state is saved
    """
    begin = time.monotonic()
    output = Path(output).absolute()
    work = output / "relufy"
    source = _original(name)
    if deltas is not None and text:
        raise PowerQuantConfigError("give deltas to apply (--deltas) or text to train on (--text, --sampled), not both")
    if deltas is None and not text:
        if name is not None:
            raise PowerQuantConfigError(
                "no text to train on: give files (--text FILE ...) or let the model sample some (--sampled TOKENS), or "
                "apply deltas that were trained before (--deltas FILE)"
            )
        deltas = SHIPPED_DELTAS
    _check_output(output, resumable=bool(text))

    import torch

    from .checkpoint import Checkpoint
    from .deltas import check_fit, fingerprint, load_deltas, save_deltas
    from .distil import Training, score
    from .llama import load_weights, relu, silu

    chosen = choose_device(device)
    checkpoint, model = Checkpoint(Path(source.name)), source.shape
    original = fingerprint(checkpoint, model)
    training = training or Training()
    if text:
        _check_training(training, model.context_length)
    if text or eval_windows:
        tokenizer = load_tokenizer(source)
        held_out = _held_out(tokenizer, min(training.length, model.context_length), eval_windows)
    weights = load_weights(checkpoint, model, chosen if text or eval_windows else torch.device("cpu"))

    trainer = None
    if text:
        work.mkdir(parents=True, exist_ok=True)
        windows, described = _windows(source, tokenizer, weights, original, text, training, work, progress)
        settings = asdict(training) | {"original": original, "text": described, "device": chosen.type}
        trainer = _train(weights, source, windows, training, settings, work, save_every, begin, progress, say)
        unrounded, changed = trainer.deltas, trainer.deltas.rounded()
    else:
        path = Path(deltas)
        found = load_deltas(path)
        check_fit(found, path, original, weights)
        changed = found.deltas.to(weights.embedding.device)

    scores: dict[str, Score] = {}
    if eval_windows:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
        with torch.no_grad():
            scores["original"] = score(weights.to(dtype), model, held_out, silu)
            scores["student"] = score(_as_written(changed, weights, dtype), model, held_out, relu)
            if trainer:
                scores["unrounded"] = score(_as_written(unrounded, weights, dtype), model, held_out, relu)

    report = Relufied(
        output=str(output),
        original=source.name,
        deltas=str(work / "deltas.safetensors" if trainer else deltas),
        steps=trainer.step if trainer else 0,
        train_tokens=trainer.step * trainer.tokens_per_step if trainer else 0,
        seconds=round(time.monotonic() - begin, 1),
        kl=trainer.last_kl if trainer else None,
        original_perplexity=_perplexity(scores.get("original")),
        perplexity=_perplexity(scores.get("student")),
        unrounded_perplexity=_perplexity(scores.get("unrounded")),
        active_share=_mean(scores["student"].active) if scores else None,
        active_by_layer=[round(share, 4) for share in scores["student"].active] if scores else [],
        original_positive_by_layer=[round(share, 4) for share in scores["original"].active] if scores else [],
    )
    if trainer:
        recipe = _recipe(source, settings, chosen, trainer) | {"result": report.as_dict() | {"output": None, "deltas": None}}
        save_deltas(work / "deltas.safetensors", changed, original, recipe)
    write_checkpoint(checkpoint, changed.to(torch.device("cpu")), output, source.name)
    (work / "state.pt").unlink(missing_ok=True)
    return report


def _original(name: str | Path | None) -> Source:
    source = find_checkpoint(name)
    if not Path(source.name).is_dir():
        raise PowerQuantConfigError(f"relufy takes a checkpoint's folder, got {source.name!r}; download it first")
    if source.shape.activation == "relu":
        raise PowerQuantUnsupportedError(f"{source.name} is a ReLU model already; go on with `powerquant train-predictor`")
    if source.shape.family != "llama" or source.shape.activation != "silu":
        raise PowerQuantUnsupportedError(
            f"relufy takes llama and mistral models with SiLU, got {source.shape.family} with {source.shape.activation}"
        )
    return source


def _check_output(output: Path, resumable: bool) -> None:
    if output.is_file() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise PowerQuantConfigError(f"cannot write {output}: give a folder, in an existing one that you may write to")
    there = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if there and not (resumable and there == ["relufy"]):
        raise PowerQuantConfigError(f"{output} is not empty (it holds {there[0]}); give a new folder, or remove it first")


def _check_training(training: Training, context: int) -> None:
    positive = ("rank", "length", "batch", "micro_batch", "lr")
    for name in positive:
        if not getattr(training, name) > 0:
            raise PowerQuantConfigError(f"{name} must be positive, got {getattr(training, name)}")
    if training.attention_rank < 0:
        raise PowerQuantConfigError(f"attention_rank must be 0 or more, got {training.attention_rank}")
    if not 2 <= training.length <= context:
        raise PowerQuantConfigError(f"length must be 2 to the model's context of {context}, got {training.length}")
    if not 0 < training.active_share <= 1:
        raise PowerQuantConfigError(f"active_share must be above 0 and at most 1 (no pressure), got {training.active_share}")
    if not 0 <= training.slide < 1:
        raise PowerQuantConfigError(f"slide must be 0 or more and below 1, got {training.slide}")
    if (training.steps is None) == (training.minutes is None):
        raise PowerQuantConfigError("give either a number of steps (--steps) or a time limit (--minutes)")
    for name in ("steps", "minutes"):
        value = getattr(training, name)
        if value is not None and not value > 0:
            raise PowerQuantConfigError(f"{name} must be positive, got {value}")


def _held_out(tokenizer: Any, length: int, count: int) -> torch.Tensor:
    """[texts * count, length] of the half of the built-in texts that nothing is trained on."""
    import torch

    from ..quality import SPLITS, cut, read_texts

    limit, tokenizer.model_max_length = tokenizer.model_max_length, 10**9
    prefix = tokenizer("")["input_ids"][:1]
    rows = []
    for name, text in read_texts().items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if count:
            rows += [[*prefix, *run] for run in cut(ids, SPLITS["report"], length - len(prefix), count, name)]
    tokenizer.model_max_length = limit
    return torch.tensor(rows)


def _windows(
    source: Source,
    tokenizer: Any,
    weights: Weights,
    original: str,
    text: Text,
    training: Training,
    work: Path,
    progress: bool,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """All windows [n, length] int32, and what they are."""
    import torch

    parts, described = [], {"paths": [str(path) for path in text.paths], "sampled": text.sampled}
    if text.paths:
        parts.append(token_windows(tokenizer, text.paths, training.length).to(torch.int32))
    if text.samples:
        parts.append(_load_samples(text.samples, original, training.length)[0])
    if text.sampled:
        parts.append(_sample(source, tokenizer, weights, original, text.sampled, training, work, progress))
    windows = torch.cat(parts)
    described["tokens"] = windows.numel()
    described["sha256"] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    return windows, described


def _sample(
    source: Source,
    tokenizer: Any,
    weights: Weights,
    original: str,
    tokens: int,
    training: Training,
    work: Path,
    progress: bool,
) -> torch.Tensor:
    """[n, length] int32: whole rounds are kept in work/samples.safetensors as they come."""
    import torch
    from safetensors.torch import save_file

    from .sampling import Sampler, end_ids, rows_that_fit, scripts

    path, length = work / "samples.safetensors", training.length
    wanted = -(-tokens // length)
    dtype = training.dtype
    rows, found = None, []
    if path.is_file():
        kept, about = _load_samples(path, original, length)
        if about.get("seed") == str(training.seed) and about.get("wanted") == str(wanted):
            rows, found = int(about["rows"]), list(kept.split(int(about["rows"])))
    if sum(map(len, found)) >= wanted:
        return torch.cat(found)[:wanted]
    eos = end_ids(tokenizer, source.config)
    rows = rows or rows_that_fit(weights, source.shape, length, wanted)
    sampler = Sampler(weights.to(dtype), source.shape, scripts(tokenizer, eos), eos, rows, length)
    with _bar("sampling text", wanted * length, "token", progress) as bar:
        bar.update(sum(map(len, found)) * length)
        while sum(map(len, found)) < wanted:
            found.append(sampler.round(training.seed * 1_000_003 + len(found), bar.update))
            about = {"original": original, "seed": str(training.seed), "wanted": str(wanted), "rows": str(rows)}
            partial = path.with_name(path.name + ".partial")
            save_file({"tokens": torch.cat(found)}, partial, about)
            partial.replace(path)
    return torch.cat(found)[:wanted]


def _load_samples(path: Path, original: str, length: int) -> tuple[torch.Tensor, dict[str, str]]:
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


def _train(
    weights: Weights,
    source: Source,
    windows: torch.Tensor,
    training: Training,
    settings: dict[str, Any],
    work: Path,
    save_every: int,
    begin: float,
    progress: bool,
    say: Say,
) -> Trainer:
    from .deltas import save_deltas
    from .distil import Progress, Trainer

    trainer = Trainer(weights, source.shape, windows, training)
    state_path = work / "state.pt"
    before = _load_state(state_path, settings) if state_path.is_file() else None
    if before:
        trainer.restore(before)
        if say:
            say(f"goes on at step {trainer.step} of {trainer.steps or 'an open number'}")

    def save() -> None:
        _save_state(state_path, {"format": STATE_FORMAT, "settings": settings, "trainer": trainer.state()})
        recipe = _recipe(source, settings, trainer.device, trainer) | {"result": "unfinished"}
        save_deltas(work / "deltas.safetensors", trainer.deltas, settings["original"], recipe)

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

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        before, state = found["settings"], found["trainer"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise PowerQuantConfigError(f"{path} can't be read ({error}); remove {path.parent} to begin anew") from None
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        told = "; ".join(f"{key} was {before.get(key)}, now {settings[key]}" for key in differing)
        raise PowerQuantConfigError(
            f"{path.parent} holds a run with other settings: {told}; give the same to go on, or another folder to begin anew"
        )
    return state


def _save_state(path: Path, state: dict[str, Any]) -> None:
    import torch

    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
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


def _recipe(source: Source, settings: dict[str, Any], device: torch.device, trainer: Trainer) -> dict[str, Any]:
    import torch

    from .. import __version__

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


def _as_written(deltas: Deltas, weights: Weights, dtype: torch.dtype) -> Weights:
    """The student as its checkpoint has it: rounded to the original's type."""
    kept = weights.stacked["gate"].dtype
    return deltas.applied(weights, kept).to(dtype)


def write_checkpoint(checkpoint: Checkpoint, deltas: Deltas, output: Path, origin: str) -> None:
    """The original's files, weights changed file by file, config.json last; whole or not at all.

    Raises: PowerQuantError if it can't be written
    """
    from safetensors.torch import save_file

    folder = checkpoint.folder
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for name in checkpoint.shards:
            tensors = {key: deltas.merged(key, tensor) for key, tensor in checkpoint.load_shard(name).items()}
            save_file(tensors, unfinished / name, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        for path in (*(found for pattern in COPIED for found in sorted(folder.glob(pattern))), index):
            if path.is_file():
                shutil.copyfile(path, unfinished / path.name)
        (unfinished / "README.md").write_text(_readme(folder, origin), encoding="utf-8")
        config = {**checkpoint.config, "hidden_act": "relu"}
        (unfinished / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        umask = os.umask(0o077)
        os.umask(umask)
        for path in unfinished.iterdir():
            path.chmod(0o666 & ~umask)
        unfinished.chmod(0o777 & ~umask)
        if not output.is_dir():
            unfinished.rename(output)
            return
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(output / path.name)
    except OSError as error:
        raise PowerQuantError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _readme(folder: Path, origin: str) -> str:
    licence = next((path.name for path in sorted(folder.glob("LICEN[SC]E*"))), None)
    told = (
        f"# {Path(origin).name} with ReLU\n\n"
        f"Made by vllm-powerquant (`powerquant relufy`) from the checkpoint `{Path(origin).name}`: ReLU in place of SiLU, "
        "and low-rank changes of the layers' matrices and norms, trained to predict what the original predicts. Everything "
        "else, the tokenizer included, is the original's.\n\n"
        f"Licence: the original's{f', in {licence}' if licence else ''}.\n"
    )
    original = folder / "README.md"
    if original.is_file():
        told += f"\n## The original's README\n\n{original.read_text(encoding='utf-8', errors='replace')}"
    return told


def _perplexity(found: Score | None) -> float | None:
    return None if found is None else round(math.exp(found.nll), 4)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


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
