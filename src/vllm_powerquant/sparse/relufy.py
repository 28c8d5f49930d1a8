"""`powerquant relufy`: a ReLU model of a gated-SiLU one, by applying trained deltas or by training some.

The student is written as a Hugging Face checkpoint of the original's class with hidden_act "relu" and merged weights. A
run that trains keeps its deltas, its sampled text and, until it is done, its state in the folder `relufy` of the output.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError
from ..files import sole_use
from .profile import make_folder
from .text import Source, check_seed, choose_device, find_checkpoint, load_tokenizer, token_windows

if TYPE_CHECKING:
    import torch

    from .deltas import Deltas
    from .distil import Score, Training
    from .llama import Weights

Say = Callable[[str], None] | None

# of the embedded SmolLM2; README.md beside it says how they were made
SHIPPED_DELTAS = Path(__file__).parent / "data" / "smollm2-relu.safetensors"


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
    original: str  # its folder's name
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
    if text and text.sampled < 0:
        raise PowerQuantConfigError(f"sampled must be 0 or more tokens, got {text.sampled}")
    if save_every < 1 or eval_windows < 0:
        raise PowerQuantConfigError(
            f"save_every must be 1 step or more and eval_windows 0 or more, got {save_every} and {eval_windows}"
        )
    _check_output(output, resumable=bool(text))

    import torch

    from .checkpoint import Checkpoint
    from .deltas import check_fit, fingerprint, load_deltas, save_deltas
    from .distil import Training, score
    from .llama import load_weights, relu, silu
    from .relufy_checkpoint import write_checkpoint
    from .relufy_run import recipe, train

    chosen = choose_device(device)
    checkpoint, model = Checkpoint(Path(source.name)), source.shape
    training = training or Training()
    if text:
        _check_training(training, model.context_length)
    if text or eval_windows:
        tokenizer = load_tokenizer(source)
        held_out = _held_out(tokenizer, min(training.length, model.context_length), eval_windows)
    weights = load_weights(checkpoint, model, chosen if text or eval_windows else torch.device("cpu"))
    original = fingerprint(checkpoint, model)

    with sole_use(make_folder(work)) if text else nullcontext():
        trainer = None
        if text:
            windows, described = _windows(source, tokenizer, weights, original, text, training, work, progress)
            settings = asdict(training) | {"original": original, "text": described, "device": chosen.type}
            trainer = train(weights, source, windows, training, settings, work, save_every, begin, progress, say)
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
            original=Path(source.name).name,
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
            result = report.as_dict() | {"output": None, "deltas": None}
            made = recipe(source, settings, chosen, trainer) | {"result": result}
            save_deltas(work / "deltas.safetensors", changed, original, made)
        write_checkpoint(checkpoint, changed.to(torch.device("cpu")), output, source.name)
        (work / "state.pt").unlink(missing_ok=True)
        return report


def _original(name: str | Path | None) -> Source:
    if name is not None and not Path(name).is_dir():
        raise PowerQuantConfigError(f"relufy takes a checkpoint's folder, and {str(name)!r} is none; download it first")
    source = find_checkpoint(name)
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
    if not 0 < training.active_share <= 1:
        raise PowerQuantConfigError(f"active_share must be above 0 and at most 1 (no pressure), got {training.active_share}")
    if not 0 <= training.slide < 1:
        raise PowerQuantConfigError(f"slide must be 0 or more and below 1, got {training.slide}")
    check_seed(training.seed)
    if (training.steps is None) == (training.minutes is None):
        raise PowerQuantConfigError("give either a number of steps (--steps) or a time limit (--minutes)")
    for name in ("steps", "minutes"):
        value = getattr(training, name)
        if value is not None and not value > 0:
            raise PowerQuantConfigError(f"{name} must be positive, got {value}")
    if not 2 <= training.length <= context:
        raise PowerQuantConfigError(f"length must be 2 to the model's context of {context}, got {training.length}")


def _held_out(tokenizer: Any, length: int, count: int) -> torch.Tensor:
    """[texts * count, length] of the half of the built-in texts that nothing is trained on."""
    import torch

    from ..quality import SPLITS, cut, read_texts

    limit, tokenizer.model_max_length = tokenizer.model_max_length, 10**9
    prefix = tokenizer("")["input_ids"][:1]
    rows = []
    for name, text in read_texts().items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        begin, end = (round(len(ids) * part) for part in SPLITS["report"])
        # the default is for any length, if windows must overlap
        if count > (most := max(4, (end - begin) // (length - len(prefix)))):
            raise PowerQuantConfigError(f"eval_windows must be 0 to {most} at {length} tokens each, got {count}")
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

    from .relufy_run import load_samples, sample

    parts, described = [], {"paths": [str(path) for path in text.paths], "sampled": text.sampled}
    if text.paths:
        parts.append(token_windows(tokenizer, text.paths, training.length).to(torch.int32))
    if text.samples:
        parts.append(load_samples(text.samples, original, training.length)[0])
    if text.sampled:
        parts.append(sample(source, tokenizer, weights, original, text.sampled, training, work, progress))
    windows = torch.cat(parts)
    if len(windows) < training.batch:
        raise PowerQuantConfigError(
            f"a step takes {training.batch} windows of {training.length} tokens, the text gives {len(windows)}; give more "
            f"text (--text, --sampled) or a batch of {len(windows)} or less"
        )
    described["tokens"] = windows.numel()
    described["sha256"] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    return windows, described


def _as_written(deltas: Deltas, weights: Weights, dtype: torch.dtype) -> Weights:
    """The student as its checkpoint has it: rounded to the original's type."""
    from .llama import NORMS

    kept = weights.stacked["gate"].dtype
    found = deltas.applied(weights, kept)
    norms = {name: found.stacked[name].to(kept).float() for name in NORMS}
    return replace(found, stacked=found.stacked | norms, norm=found.norm.to(kept).float()).to(dtype)


def _perplexity(found: Score | None) -> float | None:
    return None if found is None else round(math.exp(found.nll), 4)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)
