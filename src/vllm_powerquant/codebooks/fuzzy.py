"""Lloyd's iteration and fuzzy c-means on weighted points of one coordinate.

Fuzzy c-means gives each point x a membership u_i = d_i^(-2/(m-1)) / sum_j d_j^(-2/(m-1)) in every centroid (d_i: its
distance to centroid i) and moves centroids to the means of the points under weights u_i^m. At fuzzifier m = 1 memberships
are 0 or 1 and this is Lloyd's iteration; a larger m smooths the objective. Annealing m down to 1 makes the outcome depend
less on where the centroids start.
Source: Bezdek, "Pattern Recognition with Fuzzy Objective Function Algorithms", 1981; annealing as in Rose, "Deterministic
annealing for clustering", Proc. IEEE 86 (1998), with the fuzzifier in the place of the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from .lloyd_max import UnitCoordinate

# m - 1 falls by this factor, with so many steps at each value, until m is about 1.02
_COOLING, _STAGES, _STEPS = 0.8, 18, 10


@dataclass(frozen=True, eq=False)
class Points:
    """Weighted magnitudes of a coordinate whose distribution is symmetric about 0."""

    x: np.ndarray  # [n] float64, ascending, >= 0
    weight: np.ndarray  # [n] float64, sums to 1

    @classmethod
    def of_distribution(cls, dist: UnitCoordinate, count: int = 8192) -> Points:
        """Midpoints of a grid of angles, over which the density of a random unit vector is smooth."""
        theta = (count - 0.5 - np.arange(count)) * (np.pi / 2 / count)
        weight = np.exp((dist.head_size - 2) * np.log(np.sin(theta)))
        kept = weight > 1e-20
        return cls(dist.limit * np.cos(theta[kept]), weight[kept] / weight[kept].sum())

    @classmethod
    def of_coordinates(cls, coordinates: np.ndarray, weights: np.ndarray | None = None, bins: int = 8192) -> Points:
        """Coordinates of any shape, weighted alike or by weights of that shape: mean and share of bins of equal width."""
        magnitudes = np.abs(np.ravel(coordinates)).astype(np.float64)
        weights = np.ones_like(magnitudes) if weights is None else np.ravel(weights).astype(np.float64)
        bin_of = np.minimum((magnitudes * (bins / magnitudes.max())).astype(np.int64), bins - 1)
        shares = np.bincount(bin_of, weights, bins)
        sums = np.bincount(bin_of, weights * magnitudes, bins)
        used = shares > 0
        return cls(sums[used] / shares[used], shares[used] / shares.sum())

    def mse(self, positive: np.ndarray) -> float:
        """Of nearest-centroid rounding to +- these centroids [count], ascending."""
        nearest = np.searchsorted((positive[1:] + positive[:-1]) / 2, self.x)
        return float(np.sum(self.weight * (self.x - positive[nearest]) ** 2))


def lloyd(points: Points, positive: np.ndarray) -> np.ndarray:
    """Every centroid to the mean of its cell, until none moves: positive centroids [count] float64, ascending."""
    # moments below each boundary, interpolated: boundaries between two points would otherwise not move at all
    edges = np.append(0.0, (points.x[1:] + points.x[:-1]) / 2)
    below = [np.append(0.0, np.cumsum(points.weight * points.x**power)) for power in (0, 1)]
    edges = np.append(edges, points.x[-1])
    for _ in range(20_000):
        ends = np.concatenate(([0.0], (positive[1:] + positive[:-1]) / 2, [edges[-1]]))
        mass, first = (np.diff(np.interp(ends, edges, moment)) for moment in below)
        moved = np.where(mass > 0, first / np.maximum(mass, 1e-300), positive)
        if np.max(np.abs(moved - positive)) < 1e-12:
            return moved
        positive = moved
    return positive


def fuzzy_c_means(points: Points, positive: np.ndarray) -> np.ndarray:
    """Annealed fuzzy c-means from positive centroids [count] and their mirror images, then Lloyd's iteration."""
    for stage in range(_STAGES):
        fuzzifier = 1 + _COOLING**stage
        for _ in range(_STEPS):
            positive = _fuzzy_step(points, positive, fuzzifier)
    return lloyd(points, positive)


def _fuzzy_step(points: Points, positive: np.ndarray, fuzzifier: float) -> np.ndarray:
    centroids = np.concatenate((-positive[::-1], positive))
    # in logarithms: near m = 1 the powers overflow
    distance = np.log(np.maximum(np.abs(points.x[:, None] - centroids), 1e-12))
    weight = special.softmax(-2 / (fuzzifier - 1) * distance, axis=1) ** fuzzifier * points.weight[:, None]
    # a point -x has in centroid i the membership that x has in centroid -i
    mirrored, own = weight[:, : positive.size][:, ::-1], weight[:, positive.size :]
    return np.sort((points.x @ (own - mirrored)) / (own + mirrored).sum(0))
