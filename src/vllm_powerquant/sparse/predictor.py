"""Predictors of which neurons a token activates, trained for one's own ReLU model: `powerquant train-predictor`.

The texts' windows are dealt into three parts: eight of ten train, one sets the thresholds, one is only reported on. Layers
are trained one after the other, each from the inputs that were captured once, and kept in the folder's `work` as soon as
they are finished; a run that was interrupted goes on behind the last of them. At the end one threshold is chosen over all
layers. The format has one threshold and no biases, so a layer that needs another gets it by scaling its fc2.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantError
from ..files import sole_use, whole_file
from .activations import Inputs, bar_options, feed_forwards, fingerprint, require_relu
from .checkpoint import read_json
from .families import Model
from .profile import WINDOW_TOKENS, make_folder
from .text import LoadedModel, Say, check_seed, find_checkpoint, load_causal_lm, token_windows

if TYPE_CHECKING:
    import torch

    from .lowrank import Counts, Training

# of ten windows, by their position among them
CALIBRATE, REPORT, PARTS = 8, 9, 10
# Q4_0 packs so many values of a row of fc2
RANK_STEP = 32
# weights of all predictors over those of all feed-forwards, where the rank is chosen
BUDGET = 0.1
# a layer's own recall may be so far below what is asked of all
FLOOR_BELOW = 0.02
# what report.json lists beside the chosen threshold
POINTS = (0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Trained:
    """What was written; all shares are of the part that is only reported on."""

    output: str
    model: str
    tokens: int  # read: for training, thresholds and report
    reported_tokens: int
    recall_wanted: float
    threshold: float
    total: dict[str, float]  # recall, precision, kept, active_share, predicted_share
    layers: list[dict[str, float]]  # the same, and rank, loss, seconds
    points: list[dict[str, float]]  # recall_wanted, threshold, and total's, for `powerquant convert --threshold`
    weights_share: float  # of the predictors, over the feed-forwards'
    seconds: float  # of this run

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_predictors(
    name: str | Path | None,
    output: str | Path,
    *,
    texts: Sequence[str | Path] | None = None,
    tokens: int | None = None,
    window: int = WINDOW_TOKENS,
    rank: int | None = None,
    budget: float = BUDGET,
    recall: float = 0.99,
    training: Training | None = None,
    seed: int = 0,
    device: str | None = None,
    family: str | None = None,
    restart: bool = False,
    keep_inputs: bool = False,
    progress: bool = True,
    say: Say = None,
) -> Trained:
    """Train a predictor for each layer of a ReLU model and write what `powerquant convert --predictor` reads.

    Args:
        name: checkpoint folder or name; None: the embedded model
        output: folder, made if need be; gets model_{layer}.safetensors, config.json, report.json, and `work`
        texts, tokens, window: as text.token_windows; 10 windows or more
        rank: of every layer, a multiple of 32 up to twice the hidden size; None: chosen by `budget`
        budget: weights of the predictors over the feed-forwards' that a chosen rank may take
        recall: share of the active neurons of all layers to be predicted, in (0, 1); thresholds are set for it
        training: None: lowrank.Training's defaults
        seed: of the order of tokens; one seed gives the same predictors on one device
        restart: begin anew where the folder holds something made otherwise
        keep_inputs: leave the captured inputs in `work`, for another run in this folder

    Raises: PowerQuantUnsupportedError for a model that is not ReLU; PowerQuantConfigError for bad options, texts, checkpoint
        or device, or a folder begun with other settings; PowerQuantError if the disk is too small or can't be written
    """
    from .lowrank import Training

    began = time.monotonic()
    training = training or Training()
    source = find_checkpoint(name, family)
    require_relu(source.shape, source.name, "train predictors for")
    _check(source.shape, rank, budget, recall, training)
    check_seed(seed)
    output = make_folder(Path(output))
    with sole_use(output):
        loaded = load_causal_lm(source, device=device, say=say)
        windows = token_windows(loaded.tokenizer, texts, min(window, source.shape.context_length), tokens)
        if len(windows) < PARTS:
            raise PowerQuantConfigError(
                f"training needs {PARTS} windows of text or more, got {len(windows)} of {windows.shape[1]} tokens; give "
                "more text or shorten windows"
            )
        work = _Work(output, source.shape, restart)
        work.begin(
            {
                "model_and_text": fingerprint(loaded, windows),
                "tokens": windows.numel(),
                "window": windows.shape[1],
                "rank": f"chosen by a budget of {budget:g}" if rank is None else rank,
                "seed": seed,
                "device": loaded.device.type,
                **asdict(training),
            }
        )
        try:
            _train_layers(work, loaded, windows, rank, budget, training, seed, progress, say)
            done = _finish(work, loaded, windows, recall, began)
        except OSError as error:
            raise PowerQuantError(f"cannot write {output}: {error.strerror or error}; what is finished is kept") from error
        except KeyboardInterrupt:
            if say:
                done = source.shape.num_layers - len(work.unfinished())
                say(f"stopped with {done} of {source.shape.num_layers} layers finished; the same command goes on")
            raise
        if not keep_inputs:
            shutil.rmtree(work.inputs, ignore_errors=True)
        return done


def _check(shape: Model, rank: int | None, budget: float, recall: float, training: Training) -> None:
    largest = 2 * shape.hidden_size // RANK_STEP * RANK_STEP
    if rank is not None and (rank % RANK_STEP or not 0 < rank <= largest):
        raise PowerQuantConfigError(f"rank must be a multiple of {RANK_STEP} from {RANK_STEP} to {largest}, got {rank}")
    if not 0 < recall < 1:
        raise PowerQuantConfigError(f"recall must lie between 0 and 1, such as 0.99, got {recall:g}")
    if not 0 < budget <= 1:
        raise PowerQuantConfigError(f"budget must be above 0 and at most 1, got {budget:g}")
    if training.epochs < 1 or training.batch < 1 or not 0 < training.learning_rate < 1 or not training.positive_weight > 0:
        raise PowerQuantConfigError(
            f"epochs, batch, learning rate (below 1) and positive weight must be above 0, got {training.epochs}, "
            f"{training.batch}, {training.learning_rate:g} and {training.positive_weight:g}"
        )


class _Work:
    """The folder's state: settings.json, the layers that are finished, the captured inputs."""

    def __init__(self, output: Path, shape: Model, restart: bool) -> None:
        self.output, self.shape, self.restart = output, shape, restart
        self.folder = output / "work"
        self.inputs = self.folder / "inputs"

    def begin(self, settings: dict[str, Any]) -> None:
        """Raises: PowerQuantConfigError if what is in the folder was made with other settings"""
        config = self.output / "config.json"
        if config.is_file() and set(read_json(config)) != {"sparse_threshold"}:
            raise PowerQuantConfigError(
                f"{self.output} holds the config.json of something else, such as a model; give a folder for predictors alone"
            )
        path = self.folder / "settings.json"
        before = read_json(path) if path.is_file() else None
        if before != settings and not self.restart:
            remedy = "give the same settings, another folder, or --restart to begin anew"
            if before is not None:
                names = [key for key in settings if before.get(key) != settings[key]] + sorted(set(before) - set(settings))
                different = "; ".join(f"{key} {before.get(key)}, now {settings.get(key)}" for key in names)
                raise PowerQuantConfigError(f"{self.output} was begun with other settings ({different}); {remedy}")
            if found := sorted(self.output.glob("model_*.*")):
                raise PowerQuantConfigError(f"{self.output} holds {found[0].name}, which was made elsewhere; {remedy}")
        if before != settings or self.restart:
            shutil.rmtree(self.folder, ignore_errors=True)
            for name in ("model_*.pt", "model_*.safetensors", "config.json", "report.json"):
                for path_before in self.output.glob(name):
                    path_before.unlink()
            make_folder(self.folder)
            _write_json(path, settings)

    def layer_path(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.safetensors"

    def unfinished(self) -> list[int]:
        return [layer for layer in range(self.shape.num_layers) if not self.layer_path(layer).is_file()]

    def save_layer(self, layer: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        _save(tensors, self.layer_path(layer), {"facts": json.dumps(facts)})

    def load_layer(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        path = self.layer_path(layer)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                return {name: file.get_tensor(name) for name in file.keys()}, facts
        except (SafetensorError, KeyError, ValueError) as error:
            raise PowerQuantConfigError(f"{path} is damaged ({error}); delete it to train this layer again") from None


def _train_layers(
    work: _Work,
    loaded: LoadedModel,
    windows: torch.Tensor,
    rank: int | None,
    budget: float,
    training: Training,
    seed: int,
    progress: bool,
    say: Say,
) -> None:
    import torch
    from tqdm import tqdm

    from .lowrank import Counts, Start, total_steps, train

    todo = work.unfinished()
    if not todo:
        return
    if say and len(todo) < work.shape.num_layers:
        say(f"{work.shape.num_layers - len(todo)} of {work.shape.num_layers} layers are finished, going on")
    origin = read_json(work.folder / "settings.json")["model_and_text"]
    inputs = Inputs(work.inputs, work.shape, windows.numel())
    if not inputs.made_of(origin):
        inputs.capture(loaded, windows, origin, progress)
    layers = feed_forwards(loaded)
    part = torch.arange(len(windows)) % PARTS
    rows = {at: (part == at).repeat_interleave(windows.shape[1]).numpy() for at in (CALIBRATE, REPORT)}
    rows["train"] = ~(rows[CALIBRATE] | rows[REPORT])
    ranks = [rank] * work.shape.num_layers
    if rank is None:
        ranks = [_rank_by_budget(work.shape, budget)] * work.shape.num_layers
    steps = total_steps(int(rows["train"].sum()), training)
    bar = tqdm(total=len(todo) * steps, unit="step", disable=not progress, **bar_options())
    with bar:
        for layer in todo:
            bar.set_description(f"layer {layer} of {work.shape.num_layers}")
            start, p = time.monotonic(), inputs.layer(layer)
            seen = torch.from_numpy(p[rows["train"]]).to(loaded.device)
            guess = Start.of(layers[layer], seen)
            predictor, loss = train(guess, layers[layer], seen, ranks[layer], training, seed, bar.update)
            tensors = {"fc1": predictor.fc1, "fc2": predictor.fc2}
            for name, at in (("calibrate", CALIBRATE), ("report", REPORT)):
                held_out = torch.from_numpy(p[rows[at]]).to(loaded.device)
                tensors |= {
                    f"{name}.{key}": value for key, value in vars(Counts.of(predictor, layers[layer], held_out)).items()
                }
            facts = {"rank": ranks[layer], "loss": round(loss, 3), "seconds": round(time.monotonic() - start, 2)}
            work.save_layer(layer, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, facts)


def _rank_by_budget(shape: Model, budget: float) -> int:
    """The largest rank whose weights stay within `budget` of the feed-forwards', at least one step."""
    matrices = 3 if shape.family in ("llama", "bamboo") else 2
    whole = matrices * shape.hidden_size * shape.intermediate_size
    rank = int(budget * whole / (shape.hidden_size + shape.intermediate_size)) // RANK_STEP * RANK_STEP
    return min(max(rank, RANK_STEP), 2 * shape.hidden_size // RANK_STEP * RANK_STEP)


def _finish(work: _Work, loaded: LoadedModel, windows: torch.Tensor, recall: float, began: float) -> Trained:
    """Thresholds, the predictors as convert reads them, config.json and, last, report.json."""
    import torch

    from .lowrank import EDGES, Counts, choose

    shape = work.shape
    found = [work.load_layer(layer) for layer in range(shape.num_layers)]

    def counts(part: str) -> list[Counts]:
        names = ("predicted", "active", "kept")
        return [Counts(*(tensors[f"{part}.{name}"] for name in names)) for tensors, _ in found]

    calibrate, report = counts("calibrate"), counts("report")
    if not sum(float(one.active.sum()) for one in calibrate):
        raise PowerQuantConfigError(f"no neuron of {loaded.source.name} was active on these texts: nothing to predict")
    edges = EDGES[choose(calibrate, recall, recall - FLOOR_BELOW)]
    threshold = float(edges.max())
    if bool((edges * threshold < 0).any()):
        # no scaling turns a positive threshold into a negative one: the lowest serves all layers
        threshold = float(edges.min())
        edges = torch.full_like(edges, threshold)
    scales = threshold / edges
    for layer, (tensors, _) in enumerate(found):
        predictor = {"fc1.weight": tensors["fc1"], "fc2.weight": (tensors["fc2"].double() * scales[layer]).float()}
        _save(predictor, work.output / f"model_{layer}.safetensors", {"format": "pt"})
    _write_json(work.output / "config.json", {"sparse_threshold": threshold})
    reported = int((torch.arange(len(windows)) % PARTS == REPORT).sum()) * windows.shape[1]
    pairs = reported * shape.intermediate_size
    above, total = _above(report, scales, threshold), _totals(report)
    points = []
    for wanted in POINTS:
        at = _threshold_for(calibrate, scales, wanted)
        shares = _shares(_above(report, scales, at).sum(0), total.sum(0), pairs * shape.num_layers)
        points.append({"recall_wanted": wanted, "threshold": at, **shares})
    weights = sum(facts["rank"] for _, facts in found) * (shape.hidden_size + shape.intermediate_size)
    matrices = 3 if shape.family in ("llama", "bamboo") else 2
    done = Trained(
        output=str(work.output),
        model=loaded.source.name,
        tokens=windows.numel(),
        reported_tokens=reported,
        recall_wanted=recall,
        threshold=threshold,
        total=_shares(above.sum(0), total.sum(0), pairs * shape.num_layers),
        layers=[facts | _shares(above[layer], total[layer], pairs) for layer, (_, facts) in enumerate(found)],
        points=points,
        weights_share=round(weights / (shape.num_layers * matrices * shape.hidden_size * shape.intermediate_size), 4),
        seconds=round(time.monotonic() - began, 2),
    )
    _write_json(work.output / "report.json", done.as_dict())
    return done


def _above(counts: list[Counts], scales: torch.Tensor, threshold: float) -> torch.Tensor:
    """[layers, 3] predicted, active and kept with scaled scores at or above a threshold, to the nearest bin."""
    import torch

    from .lowrank import EDGES

    edges = torch.searchsorted(EDGES, threshold / scales - 1e-9).clamp(max=len(EDGES) - 1)
    return torch.stack([one.at_least()[:, edge] for one, edge in zip(counts, edges, strict=True)])


def _totals(counts: list[Counts]) -> torch.Tensor:
    """[layers, 3]: all neurons, the active ones, the sum of what they add."""
    import torch

    return torch.stack([torch.stack((one.predicted, one.active, one.kept)).sum(1) for one in counts])


def _threshold_for(counts: list[Counts], scales: torch.Tensor, recall: float) -> float:
    """The highest edge, common to all layers after scaling, with which `recall` is reached."""
    from .lowrank import EDGES

    wanted = recall * float(_totals(counts)[:, 1].sum())
    low, high = 0, len(EDGES) - 1
    while low < high:
        middle = (low + high + 1) // 2
        enough = float(_above(counts, scales, float(EDGES[middle]))[:, 1].sum()) >= wanted
        low, high = (middle, high) if enough else (low, middle - 1)
    return float(EDGES[low])


def _shares(above: torch.Tensor, total: torch.Tensor, pairs: int) -> dict[str, float]:
    """Args: above, total [3]; pairs: neurons times tokens"""
    predicted, hits, kept = above.tolist()
    _, active, size = total.tolist()
    shares = {
        "recall": hits / active if active else 1.0,
        "precision": hits / predicted if predicted else 1.0,
        "kept": kept / size if size else 1.0,
        "active_share": active / pairs,
        "predicted_share": predicted / pairs,
    }
    return {name: round(value, 5) for name, value in shares.items()}


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata)
    except SafetensorError as error:
        raise PowerQuantError(f"cannot write {path}: {error}; what is finished is kept") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
