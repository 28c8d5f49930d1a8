"""How often each neuron is active over text: `powerquant profile`.

The counts are written as PowerInfer's tools name and read them, activation/activation_{layer}.pt with one number per neuron;
profile.json beside that folder says of what they are.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError
from .activations import feed_forwards, read_windows, require_relu, watched
from .checkpoint import read_json
from .text import Say, find_checkpoint, load_causal_lm, token_windows

if TYPE_CHECKING:
    import torch

WINDOW_TOKENS = 512
# of a layer's activations, that its hot neurons are said to make up
HOT_SHARE = 0.8


@dataclass(frozen=True)
class Profile:
    """What was counted. Lists are by layer."""

    model: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    tokens: int
    texts: list[str]  # files, or "built-in"
    active_share: list[float]  # of neurons, mean over tokens
    hot_share: list[float]  # of neurons: the fewest that make up 80 % of the layer's activations
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile(
    name: str | Path | None,
    output: str | Path,
    *,
    texts: Sequence[str | Path] | None = None,
    tokens: int | None = None,
    window: int = WINDOW_TOKENS,
    device: str | None = None,
    family: str | None = None,
    progress: bool = True,
    say: Say = None,
) -> Profile:
    """Count activations of a ReLU model over text and write them into the folder `output`, made if need be.

    Args:
        name: checkpoint folder or name; None: the embedded model
        texts, tokens, window: as text.token_windows; a window is cut to the model's context
        device: None: the GPU if there is one
        family: "bamboo" for Bamboo's weights under another class's name

    Raises: PowerQuantUnsupportedError for a model that is not ReLU; PowerQuantConfigError for bad texts, checkpoint, device
        or output; PowerQuantError if it can't be written
    """
    import torch

    start = time.monotonic()
    output = Path(output)
    source = find_checkpoint(name, family)
    require_relu(source.shape, source.name, "profile")
    folder = make_folder(output / "activation").parent
    loaded = load_causal_lm(source, device=device, say=say)
    shape = source.shape
    windows = token_windows(loaded.tokenizer, texts, min(window, shape.context_length), tokens)
    counts = torch.zeros(shape.num_layers, shape.intermediate_size, dtype=torch.int64, device=loaded.device)

    def see(layer: int, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            raise PowerQuantConfigError(
                f"layer {layer} of {source.name} gives values that are no finite numbers; mend its weights"
            )
        counts[layer] += (values != 0).sum(0)

    with watched([x.down for x in feed_forwards(loaded)], see):
        for _ in read_windows(loaded, windows, "counting activations", progress):
            pass
    counts = counts.cpu()
    done = Profile(
        model=source.name,
        family=shape.family,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        tokens=windows.numel(),
        texts=[str(path) for path in texts] if texts else ["built-in"],
        active_share=[round(float(x), 5) for x in counts.double().mean(1) / windows.numel()],
        hot_share=[round(hot_share(x), 5) for x in counts],
        seconds=round(time.monotonic() - start, 2),
    )
    try:
        # a profile counts as whole once its profile.json is there
        (folder / "profile.json").unlink(missing_ok=True)
        for layer, row in enumerate(counts):
            torch.save(row.clone(), folder / "activation" / f"activation_{layer}.pt")
        (folder / "profile.json").write_text(json.dumps(done.as_dict(), indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise PowerQuantError(f"cannot write {folder}: {error}") from error
    return done


def hot_share(counts: torch.Tensor, share: float = HOT_SHARE) -> float:
    """The fewest neurons, as a share of counts [n], whose counts add up to `share` of all; 0 if nothing was active."""
    ordered = counts.sort(descending=True).values.cumsum(0)
    if not int(ordered[-1]):
        return 0.0
    return (int((ordered < share * int(ordered[-1])).sum()) + 1) / len(counts)


def make_folder(folder: Path) -> Path:
    """Raises: PowerQuantConfigError if it can't be made"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PowerQuantConfigError(
            f"cannot write {folder}: {error.strerror}; give a folder that you may write to"
        ) from error
    return folder


def read_counts(folder: str | Path, num_layers: int, intermediate_size: int) -> torch.Tensor:
    """[num_layers, intermediate_size] int64 of a folder that `profile` wrote, or of upstream's activation folder.

    Files are taken by their layers' numbers: sorted by name, layer 10 would come before 2.

    Raises: PowerQuantConfigError if a layer's is missing, damaged or of another shape, or the folder is of another model
    """
    import torch

    from ..calibration import first_line

    folder = Path(folder)
    remedy = "make one with `powerquant profile MODEL -o DIR`"
    if not folder.is_dir():
        raise PowerQuantConfigError(f"profile must be a folder, got {folder}; {remedy}")
    about = folder / "profile.json"
    wanted = {"num_layers": num_layers, "intermediate_size": intermediate_size}
    if about.is_file():
        said = read_json(about)
        if different := [f"{key} {said.get(key)}, the model's {n}" for key, n in wanted.items() if said.get(key) != n]:
            raise PowerQuantConfigError(f"{folder} is the profile of another model: {'; '.join(different)}; {remedy}")
    inner = folder / "activation" if (folder / "activation").is_dir() else folder
    rows = []
    for layer in range(num_layers):
        path = inner / f"activation_{layer}.pt"
        try:
            row = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise PowerQuantConfigError(
                f"{path} can't be read ({first_line(error)}), the model has {num_layers} layers; {remedy}"
            ) from None
        if not isinstance(row, torch.Tensor) or row.shape != (intermediate_size,) or not bool((row >= 0).all()):
            got = list(row.shape) if isinstance(row, torch.Tensor) else type(row).__name__
            raise PowerQuantConfigError(
                f"{path} must hold counts of {intermediate_size} neurons, none below 0, got {got}; {remedy}"
            )
        rows.append(row.long())
    extra = inner / f"activation_{num_layers}.pt"
    if extra.exists():
        raise PowerQuantConfigError(
            f"{inner} is of another model: it has {extra.name}, the model {num_layers} layers; {remedy}"
        )
    return torch.stack(rows)
