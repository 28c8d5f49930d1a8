"""Optimal scalar quantizers for one coordinate of a random unit vector, and their rounding to small integers.

A rotated vector points in a uniformly random direction, so sqrt(d) times a coordinate of the unit vector
has variance 1 and density f(x) = c (1 - x^2/d)^((d-3)/2) on |x| <= sqrt(d), near a Gaussian for large d.
Its moments over an interval are closed forms, hence every error here is exact up to float64 rounding.
MSE is relative: 1 is the vector's energy.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special
from scipy.linalg import solve_banded

# Significant bits of a step: for 8-bit n, (n + 1/2) * step and the midpoints are then exact in float32.
STEP_BITS = 16


class UnitCoordinate:
    """Distribution of sqrt(d) * u_1 for a uniformly random unit vector u in R^d; symmetric, variance 1."""

    def __init__(self, head_size: int):
        if head_size < 2:
            raise ValueError(f"head_size must be 2 or more, got {head_size}")
        self.head_size = head_size
        self.limit = math.sqrt(head_size)
        log_peak = special.gammaln(head_size / 2) - special.gammaln((head_size - 1) / 2)
        self.peak = math.exp(log_peak) / math.sqrt(math.pi * head_size)

    def density(self, x: np.ndarray) -> np.ndarray:
        d = self.head_size
        return self.peak * np.exp(special.xlog1py((d - 3) / 2, -np.square(x) / d))

    def tail_moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Integrals of f, x f and x^2 f from x >= 0 to the end of the support."""
        d = self.head_size
        t2 = np.minimum(np.square(x) / d, 1.0)
        zeroth = special.betaincc(0.5, (d - 1) / 2, t2) / 2
        first = self.peak * d / (d - 1) * np.exp(special.xlog1py((d - 1) / 2, -t2))
        second = special.betaincc(1.5, (d - 1) / 2, t2) / 2
        return zeroth, first, second

    def companded(self, count: int) -> np.ndarray:
        """`count` positive points spread with density f^(1/3), asymptotically optimal; ascending."""
        a = (self.head_size - 3) / 6 + 1
        ranks = 0.5 + (np.arange(count) + 0.5) / (2 * count)
        return (2 * special.betaincinv(a, a, ranks) - 1) * self.limit


def _cells(dist: UnitCoordinate, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Upper ends and three moments of the nearest-centroid cells of ascending positive centroids."""
    ends = np.append((centroids[1:] + centroids[:-1]) / 2, math.inf)
    # differences of tails keep their precision where cells hold little mass
    moments = (-np.diff(tail) for tail in dist.tail_moments(np.append(0.0, ends)))
    return ends, *moments


def _half_mse(dist: UnitCoordinate, centroids: np.ndarray) -> float:
    """MSE of the symmetric quantizer whose positive centroids are given (ascending)."""
    _, zeroth, first, second = _cells(dist, centroids)
    return float(2 * np.sum(second - 2 * centroids * first + centroids**2 * zeroth))


def mse_of(head_size: int, centroids: Sequence[float]) -> float:
    """Exact relative MSE of nearest-centroid quantization; centroids are ascending and symmetric about 0."""
    centroids = np.asarray(centroids, dtype=np.float64)
    if not np.allclose(centroids, -centroids[::-1], rtol=0, atol=1e-12):
        raise ValueError("centroids must be symmetric about 0")
    return _half_mse(UnitCoordinate(head_size), centroids[centroids.size // 2 :])


def solve_lloyd_max(head_size: int, bits: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The symmetric quantizer of least mean squared error.

    Newton's method on "every centroid is its cell's mean", with a Lloyd step wherever Newton's would not
    bring the centroids nearer to their means. For head_size >= 3 the density is log-concave, so the solution
    is unique.

    Returns: centroids [2**bits] and boundaries [2**bits - 1], ascending float64; relative MSE.
    Raises:  ValueError if head_size < 2 or bits is not 1 to 8.
    Source:  Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982); Max (1960).
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    dist = UnitCoordinate(head_size)
    positive = dist.companded(2 ** (bits - 1))

    def excess(points):
        """centroid * mass - first moment of each cell; zero at the solution."""
        ends, zeroth, first, _ = _cells(dist, points)
        return points * zeroth - first, zeroth, ends

    gap, mass, ends = excess(positive)
    for _ in range(1000):
        if np.max(np.abs(gap / mass)) < 1e-11:
            break
        # moving a centroid moves the boundaries beside it by half as much
        edge = dist.density(ends[:-1]) * (positive[1:] - positive[:-1]) / 4
        bands = np.zeros((3, positive.size))
        bands[0, 1:] = bands[2, :-1] = -edge
        bands[1] = mass - np.append(edge, 0) - np.append(0, edge)
        newton = positive - solve_banded((1, 1), bands, gap)
        if newton[0] > 0 and np.all(np.diff(newton) > 0) and newton[-1] < dist.limit:
            trial = excess(newton)
            if np.linalg.norm(trial[0] / trial[1]) < np.linalg.norm(gap / mass):
                positive, (gap, mass, ends) = newton, trial
                continue
        positive = positive - gap / mass
        gap, mass, ends = excess(positive)
    else:
        raise RuntimeError(f"no convergence at head_size {head_size}, {bits} bits")
    centroids = np.concatenate([-positive[::-1], positive])
    return centroids, (centroids[1:] + centroids[:-1]) / 2, _half_mse(dist, positive)


def round_step(step: float) -> float:
    """The nearest number with STEP_BITS significant bits; the MSE is flat at its minimum, so this is free."""
    mantissa, exponent = math.frexp(step)
    return math.ldexp(round(math.ldexp(mantissa, STEP_BITS)), exponent - STEP_BITS)


def _best_step(dist: UnitCoordinate, magnitudes: np.ndarray, guess: float) -> float:
    """The step near `guess` at which the MSE of the levels magnitudes * step is stationary."""

    def slope(step):
        points = magnitudes * step
        _, zeroth, first, _ = _cells(dist, points)
        return float(np.sum(magnitudes * (points * zeroth - first)))

    low = high = guess
    # slope rises through zero at a minimum
    while slope(low) > 0:
        low *= 0.98
    while slope(high) < 0:
        high *= 1.02
    return float(optimize.brentq(slope, low, high, xtol=1e-15, rtol=1e-14)) if low < high else guess


def integer_levels(head_size: int, bits: int, max_magnitude: int = 127) -> tuple[tuple[int, ...], float, float]:
    """Levels (n + 1/2) * step of least MSE under nearest-level rounding; integers n and -n - 1 come in pairs.

    Rounds the Lloyd-Max centroids at many steps, then improves the best roundings by moving one or two
    integers at a time until no move helps; the step is re-optimised for each.

    Returns: integers ascending [2**bits], step (STEP_BITS significant bits), relative MSE at that step.
    Raises:  ValueError if max_magnitude leaves no room for 2**bits levels.
    """
    count = 2 ** (bits - 1)
    if max_magnitude < count - 1:
        raise ValueError(f"{bits} bits need a max_magnitude of {count - 1} or more, got {max_magnitude}")
    dist = UnitCoordinate(head_size)
    optimum = solve_lloyd_max(head_size, bits)[0][count:]

    starts: dict[tuple[int, ...], tuple[float, float]] = {}
    for inverse_step in np.arange(1 / optimum[0], (max_magnitude + 0.5) / optimum[-1], 1 / 32):
        n = np.maximum(np.rint(optimum * inverse_step - 0.5), 0).astype(int)
        if n[-1] > max_magnitude or np.any(np.diff(n) < 1):
            continue
        step = 1 / inverse_step
        mse = _half_mse(dist, (n + 0.5) * step)
        key = tuple(n.tolist())
        starts[key] = min(starts.get(key, (math.inf, step)), (mse, step))
    if not starts:
        starts[tuple(range(count))] = (math.inf, optimum[-1] / count)

    solved: dict[tuple[int, ...], tuple[float, float]] = {}

    def solve(key: tuple[int, ...], guess: float) -> tuple[float, float]:
        if key not in solved:
            step = _best_step(dist, np.array(key) + 0.5, guess)
            solved[key] = _half_mse(dist, (np.array(key) + 0.5) * step), step
        return solved[key]

    best_key, best = None, (math.inf, math.inf)
    for key in sorted(starts, key=starts.get)[:8]:
        current = solve(key, starts[key][1])
        while True:
            candidates = [(solve(move, current[1]), move) for move in _moves(key, max_magnitude)]
            if not candidates or min(candidates)[0][0] >= current[0]:
                break
            current, key = min(candidates)
        if current < best:
            best_key, best = key, current
    # levels in the same proportions tie exactly (37.5, 124.5 and 12.5, 41.5): take the smallest integers
    shared = math.gcd(*(2 * n + 1 for n in best_key))
    positive = [((2 * n + 1) // shared - 1) // 2 for n in best_key]
    step = round_step(best[1] * shared)
    levels = (*(-n - 1 for n in reversed(positive)), *positive)
    return levels, step, _half_mse(dist, (np.array(positive) + 0.5) * step)


def _moves(key: tuple[int, ...], max_magnitude: int) -> list[tuple[int, ...]]:
    """Strictly ascending tuples that differ from `key` by one in one place or in two neighbouring places."""
    shifts = [(1,), (-1,), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    moves = []
    for start in range(len(key)):
        for shift in shifts:
            if start + len(shift) > len(key):
                continue
            moved = list(key)
            for offset, by in enumerate(shift):
                moved[start + offset] += by
            if 0 <= moved[0] and moved[-1] <= max_magnitude and all(a < b for a, b in itertools.pairwise(moved)):
                moves.append(tuple(moved))
    return moves


def uniform_levels(head_size: int, bits: int) -> tuple[tuple[int, ...], float, float]:
    """Even levels (n + 1/2) * step, n = -2**(bits-1) .. 2**(bits-1) - 1, at the step of least MSE.

    Returns: integers ascending [2**bits], step (STEP_BITS significant bits), relative MSE at that step.
    Raises:  ValueError if bits is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    half = 2 ** (bits - 1)
    dist = UnitCoordinate(head_size)
    magnitudes = np.arange(half) + 0.5
    # the outermost level lies somewhere between a tenth of the support and its end
    guesses = dist.limit * np.geomspace(0.1, 1.0, 200) / (half - 0.5)
    guess = min(guesses, key=lambda step: _half_mse(dist, magnitudes * step))
    step = round_step(_best_step(dist, magnitudes, guess))
    return tuple(range(-half, half)), step, _half_mse(dist, magnitudes * step)
