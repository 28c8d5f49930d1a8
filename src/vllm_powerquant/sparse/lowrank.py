"""The maths of a predictor: s = fc2 relu(fc1 p), and neuron i is active if s_i reaches a threshold.

Start. The sign of a neuron's projection hardly depends on the norm in front of it: RMSNorm only scales by a positive number,
so the sign is that of w_i . p with w_i the projection's row times the norm's weight. Of all linear maps of rank k the best
one for these numbers, each divided by its standard deviation, comes from the eigenvectors of C^1/2 W^T W C^1/2 with C the
second moment of p (C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", 1936, in the metric of
the data). A linear map passes a ReLU as a pair of opposite rows, so rank r starts as r / 2 directions. p enters C divided by
its length: tokens that attention uses as sinks are a hundred times longer than others, and one token is one decision.

Training. Logistic loss on whether h is zero, an active neuron counting `positive_weight` times an idle one: at a recall of
98 or 99 % the threshold lies where few are active, and the capacity is wanted there. In coordinates where p is white, so
that one learning rate suits all directions. The truth is a function of p that the layer itself computes, so p is moved by a
little noise each time it is seen and the truth computed anew: one text then teaches as much as several. There are no biases,
so a score grows with the length of p; fc1 can read that length in the residual's constant directions, and learns to.

Thresholds. Every score is counted in bins, for active and for all neurons apart, so that recall and active share at any
threshold can be told without the data, and layers be weighed against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .activations import FeedForward

# scores are counted in bins of this width, from -LIMIT to LIMIT; an edge is never 0, whose sign would not scale
BIN = 1 / 64
LIMIT = 32.0
# tokens whose truth is computed at a time
CHUNK = 2048
# so that directions in which p hardly varies are not blown up: of the largest eigenvalue of C
SMALLEST_EIGENVALUE = 1e-7
# spread of the scores that training starts from; sigmoid(3) = 0.95
FIRST_SCALE = 3.0


@dataclass(frozen=True)
class Training:
    """How a layer's predictor is trained."""

    epochs: int = 30
    batch: int = 512  # tokens
    learning_rate: float = 1e-2
    positive_weight: float = 8.0  # of an active neuron's error
    weight_decay: float = 0.1
    noise: float = 0.2  # added to p, relative to its length, where p is white
    warmup_steps: int = 20
    clip_norm: float = 200.0  # of the gradient


@dataclass(frozen=True)
class Start:
    """What p's second moment and the deciding projection say of a layer.

    whiten, colour [hidden_size, hidden_size] fp32: to white coordinates and back (symmetric). directions
    [hidden_size, hidden_size] fp32: rows, in white coordinates, by falling energy. energy [hidden_size] fp64: share of the
    neurons' variance along each. reading [intermediate_size, hidden_size] fp32: each neuron's value along each direction,
    of unit variance in total. length: typical |p| / sqrt(hidden_size), by which p is divided.
    """

    whiten: torch.Tensor
    colour: torch.Tensor
    directions: torch.Tensor
    energy: torch.Tensor
    reading: torch.Tensor
    length: float

    @classmethod
    @torch.no_grad()
    def of(cls, layer: FeedForward, p: torch.Tensor) -> Start:
        """Args: p [tokens, hidden_size] fp16"""
        size = p.shape[1]
        moment = torch.zeros(size, size, dtype=torch.float64, device=p.device)
        lengths = []
        for part in p.split(CHUNK):
            rows = part.float()
            lengths.append(rows.norm(dim=1, keepdim=True) / math.sqrt(size))
            rows = (rows / lengths[-1].clamp(min=1e-12)).double()
            moment += rows.T @ rows
        values, vectors = torch.linalg.eigh(moment / len(p))
        roots = values.clamp(min=float(values[-1]) * SMALLEST_EIGENVALUE).sqrt()
        colour, whiten = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
        weight = layer.deciding.weight.double()
        # LayerNorm has a bias, the input's mean is taken off: both are left to training
        weight = weight * layer.norm.weight.double()
        if isinstance(layer.norm, torch.nn.LayerNorm):
            weight = weight - weight.mean(1, keepdim=True)
        weight = weight @ colour
        weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        energy, directions = torch.linalg.eigh(weight.T @ weight)
        directions = directions.flip(1)
        return cls(
            whiten.float(),
            colour.float(),
            directions.T.float().contiguous(),
            energy.flip(0).clamp(min=0) / len(weight),
            (weight @ directions).float(),
            float(torch.cat(lengths).median().clamp(min=1e-12)),
        )


@dataclass(frozen=True)
class LowRank:
    """A predictor: fc1 [rank, hidden_size], fc2 [intermediate_size, rank], fp32."""

    fc1: torch.Tensor
    fc2: torch.Tensor

    def scores(self, p: torch.Tensor) -> torch.Tensor:
        """[tokens, intermediate_size] of p [tokens, hidden_size]."""
        return (p.float() @ self.fc1.T).relu() @ self.fc2.T


def first_guess(start: Start, rank: int) -> LowRank:
    """In white coordinates: pairs of opposite rows along the directions with most energy. Args: rank is even"""
    rows, columns = start.directions[: rank // 2], FIRST_SCALE * start.reading[:, : rank // 2]
    return LowRank(torch.cat([rows, -rows]), torch.cat([columns, -columns], 1))


def train(
    start: Start,
    layer: FeedForward,
    p: torch.Tensor,
    rank: int,
    settings: Training,
    seed: int,
    step: Callable[[], None] | None = None,
) -> tuple[LowRank, float]:
    """A predictor, and its loss at the end, per token. Repeatable for a seed on one device.

    Args: p [tokens, hidden_size] fp16, on the device that trains; step is called after each step
    """
    guess = first_guess(start, rank)
    weights = [torch.nn.Parameter(guess.fc1.clone()), torch.nn.Parameter(guess.fc2.clone())]
    optimiser = torch.optim.AdamW(weights, settings.learning_rate, (0.9, 0.99), weight_decay=settings.weight_decay)
    positive = torch.tensor(settings.positive_weight, device=p.device)
    order_of = torch.Generator().manual_seed(seed)
    noise_of = torch.Generator(p.device).manual_seed(seed)
    steps, done, loss = total_steps(len(p), settings), 0, torch.zeros(())
    batch = min(settings.batch, len(p))
    for _ in range(settings.epochs):
        order = torch.randperm(len(p), generator=order_of).to(p.device)
        for i in range(0, len(order) - batch + 1, batch):
            rate = min(1, (done + 1) / settings.warmup_steps) * (1 + math.cos(math.pi * done / steps)) / 2
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * rate
            with torch.no_grad():
                rows = p[order[i : i + batch]].float() / start.length
                white = rows @ start.whiten
                if settings.noise:
                    noise = torch.randn(white.shape, generator=noise_of, device=p.device)
                    white += settings.noise * white.norm(dim=1, keepdim=True) / math.sqrt(white.shape[1]) * noise
                    rows = white @ start.colour
                active = (layer.values(rows * start.length) != 0).float()
            scores = (white @ weights[0].T).relu() @ weights[1].T
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, active, pos_weight=positive, reduction="sum")
            loss = loss / batch
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, settings.clip_norm)
            optimiser.step()
            done += 1
            if step:
                step()
    fc1 = (weights[0].detach().double() @ start.whiten.double() / start.length).float()
    return LowRank(fc1, weights[1].detach()), float(loss.detach())


def total_steps(tokens: int, settings: Training) -> int:
    return settings.epochs * (tokens // min(settings.batch, tokens))


BINS = int(2 * LIMIT / BIN) + 2  # with what lies below and above
# lower edge of each bin but the first, which has none
EDGES = (torch.arange(BINS - 1, dtype=torch.float64) + 0.5) * BIN - LIMIT


@dataclass(frozen=True)
class Counts:
    """How often a layer's scores fell into each bin: [BINS] fp64 each.

    predicted: of all neurons and tokens; active: of those that were active; kept: of those the sum of |h_i| |down_i|, what
    they add to the layer's output.
    """

    predicted: torch.Tensor
    active: torch.Tensor
    kept: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, predictor: LowRank, layer: FeedForward, p: torch.Tensor) -> Counts:
        """Args: p [tokens, hidden_size] fp16, on the predictor's device"""
        sums = torch.zeros(3, BINS, dtype=torch.float64, device=p.device)
        down = layer.down.weight.float().norm(dim=0)
        for part in p.split(CHUNK):
            values = layer.values(part).float()
            bins = torch.floor((predictor.scores(part).double() + LIMIT) / BIN + 0.5).clamp(0, BINS - 1).long().flatten()
            active = (values != 0).double().flatten()
            size = (values.abs() * down).double().flatten()
            for row, weights in enumerate((None, active, size)):
                sums[row] += torch.bincount(bins, weights, BINS)
        return cls(*sums.cpu())

    def at_least(self) -> torch.Tensor:
        """[3, BINS - 1]: predicted, active and kept at or above each of EDGES."""
        stacked = torch.stack((self.predicted, self.active, self.kept))
        return stacked.flip(1).cumsum(1).flip(1)[:, 1:]


def choose(counts: list[Counts], recall: float, floor: float) -> torch.Tensor:
    """Indices into EDGES [layers] int64, one per layer, with which `recall` of all layers' active neurons are predicted.

    One threshold for all layers, as high as that allows, is the one with the fewest neurons as far as scores mean the same
    everywhere; a layer that it leaves below a recall of `floor` gets a lower one of its own.
    """
    above = torch.stack([one.at_least()[1] for one in counts])
    total = torch.stack([one.active.sum() for one in counts])
    lowest = (above >= floor * total[:, None]).sum(1) - 1  # the highest edge that meets the floor
    edges = torch.arange(len(EDGES))
    capped = torch.minimum(edges[None], lowest.clamp(min=0)[:, None])  # [layers, edges]
    reached = above.gather(1, capped).sum(0)
    best = max(0, int((reached >= recall * total.sum()).sum()) - 1)
    return capped[:, best]
