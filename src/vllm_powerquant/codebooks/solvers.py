"""Every way of choosing a codebook behind one function: solve(name, head_size, bits).

    lloyd_max         Newton's method on the exact distribution of a rotated coordinate; Lloyd's iteration on samples
    fuzzy_c_means     fuzzy c-means whose fuzzifier is annealed to 1 (fuzzy.py)
    cma_es            CMA-ES on the codebook's gaps, for either objective (cmaes.py)
    attention_aware   Lloyd's iteration on the second-order divergence of attention weights (attention_aware.py)

The shipped tables are lloyd_max's, rounded to 8-bit integers (build.py). `compare` sets the solvers that need no samples
beside them, benchmarks/compare_codebooks.py all of them on a model.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import PowerQuantConfigError
from .attention_aware import AttentionSamples, attention_aware, attention_kl
from .cmaes import cma_es
from .fuzzy import Points, fuzzy_c_means, lloyd
from .lloyd_max import UnitCoordinate, mse_of, solve_lloyd_max
from .tables import KINDS, Codebook, load_codebook, supported_head_sizes

# what each solver can minimise, the default first
OBJECTIVES = {
    "lloyd_max": ("mse",),
    "fuzzy_c_means": ("mse",),
    "cma_es": ("mse", "attention"),
    "attention_aware": ("attention",),
}
SOLVERS = tuple(OBJECTIVES)
BITS = (2, 3, 4)
MSE_SOLVERS = tuple(name for name, objectives in OBJECTIVES.items() if "mse" in objectives)
# much finer than any loss here can tell, and exact in float32
_STEP = 2.0**-12


@dataclass(frozen=True, eq=False)
class Solution:
    """A codebook in units where a vector's norm is sqrt(head_size)."""

    solver: str
    objective: str  # "mse" or "attention"
    head_size: int
    bits: int
    centroids: np.ndarray  # [2**bits] float64, ascending, symmetric about 0
    mse: float  # exact and relative, of a coordinate of a random unit vector, whatever was minimised
    loss: float  # the objective's, on what the codebook was fitted to: a relative MSE, or nats (attention_kl)

    def codebook(self) -> Codebook:
        """For the Transformers cache: centroids to within 2**-13. Its levels are 16-bit, which the kernels cannot read."""
        half = np.rint(self.centroids[self.centroids.size // 2 :] / _STEP - 0.5).astype(int)
        levels = (*(-n - 1 for n in half[::-1].tolist()), *half.tolist())
        return Codebook(self.head_size, self.bits, self.solver, levels, _STEP, self.mse)


def solve(
    name: str,
    head_size: int,
    bits: int,
    *,
    objective: str | None = None,
    samples: AttentionSamples | None = None,
    seed: int = 0,
) -> Solution:
    """The codebook that a solver finds.

    Args:
        name: one of SOLVERS.
        bits: 2, 3 or 4.
        objective: "mse" or "attention", as OBJECTIVES allows (default: the first); "attention" needs samples.
        samples: captured queries and keys; without them "mse" is that of a random unit vector's coordinate.
        seed: of cma_es, the only solver that draws random numbers.
    Raises:
        PowerQuantConfigError: an argument is none of those, or cma_es is asked for without the package cma.
    """
    objective = _check(name, head_size, bits, objective, samples, seed)
    dist = UnitCoordinate(head_size)
    spread = dist.companded(2 ** (bits - 1))
    optimum = solve_lloyd_max(head_size, bits)[0][2 ** (bits - 1) :]
    points = None
    if objective == "mse" and (samples is not None or name == "fuzzy_c_means"):
        points = Points.of_distribution(dist) if samples is None else Points.of_coordinates(samples.coordinates)

    def loss(positive: np.ndarray) -> float:
        if objective == "attention":
            return attention_kl(samples, positive)
        return mse_of(head_size, _mirrored(positive)) if samples is None else points.mse(positive)

    if name == "lloyd_max":
        positive = optimum if samples is None else lloyd(points, optimum)
    elif name == "fuzzy_c_means":
        positive = fuzzy_c_means(points, spread)
    elif name == "attention_aware":
        positive = attention_aware(samples, optimum)
    elif objective == "mse":
        # from elsewhere: so it says by itself where the optimum is
        positive = cma_es(loss, spread, seed, max_evaluations=20_000, tolerance=1e-11)
    else:
        # every evaluation rounds all samples: a good start saves many
        positive = cma_es(loss, optimum, seed, max_evaluations=50 * spread.size, tolerance=1e-5)
    centroids = _mirrored(positive)
    return Solution(name, objective, head_size, bits, centroids, mse_of(head_size, centroids), loss(positive))


@dataclass(frozen=True)
class Compared:
    """One codebook of a comparison."""

    head_size: int
    bits: int
    codebook: str  # a solver's name, or "shipped" and the kind of table
    mse: float  # exact and relative, of a coordinate of a random unit vector; of the shipped trellis: measured
    over_optimum: float  # relative, over the least that a codebook without memory can have
    seconds: float | None  # to solve; None: shipped


def can_solve(name: str) -> bool:
    """Whether the packages that a solver needs are installed (scipy aside, which all of them need)."""
    return name != "cma_es" or importlib.util.find_spec("cma") is not None


def compare(
    head_size: int, widths: Iterable[int], names: Iterable[str], progress: Callable[[str], None] | None = None
) -> list[Compared]:
    """Codebooks that solvers find for random vectors, and the shipped ones where this head size has them.

    Args:    widths: bits, each 2, 3 or 4; names: of MSE_SOLVERS; progress: called with a line before each solution
    Raises:  PowerQuantConfigError as `solve`
    """
    rows = []
    for bits in widths:
        optimum = solve("lloyd_max", head_size, bits).mse
        found: list[tuple[str, float, float | None]] = []
        for name in names:
            if progress:
                progress(f"{bits} bits: {name}")
            start = time.perf_counter()
            mse = solve(name, head_size, bits, objective="mse").mse
            found.append((name, mse, time.perf_counter() - start))
        if head_size in supported_head_sizes():
            kinds = (*KINDS, "trellis") if bits == 2 else KINDS
            found += [(f"shipped {kind}", load_codebook(head_size, bits, kind).mse, None) for kind in kinds]
        rows += [Compared(head_size, bits, name, mse, mse / optimum - 1, seconds) for name, mse, seconds in found]
    return rows


def _mirrored(positive: np.ndarray) -> np.ndarray:
    return np.concatenate((-positive[::-1], positive))


def _check(name: object, head_size: object, bits: object, objective: object, samples: object, seed: object) -> str:
    """The objective; raises PowerQuantConfigError as `solve` says."""
    if name not in SOLVERS:
        raise PowerQuantConfigError(f"solver must be {_either(SOLVERS)}, got {name!r}")
    if not _is_int(head_size) or head_size < 3:
        raise PowerQuantConfigError(f"head_size must be an integer of 3 or more, got {head_size!r}")
    if not _is_int(bits) or bits not in BITS:
        raise PowerQuantConfigError(f"bits must be 2, 3 or 4, got {bits!r} (8 bits use an even grid)")
    if objective is None:
        objective = OBJECTIVES[name][0]
    if objective not in OBJECTIVES[name]:
        raise PowerQuantConfigError(f"objective of {name} must be {_either(OBJECTIVES[name])}, got {objective!r}")
    if samples is not None and not isinstance(samples, AttentionSamples):
        raise PowerQuantConfigError(f"samples must be AttentionSamples, got {type(samples).__name__}")
    if objective == "attention" and samples is None:
        raise PowerQuantConfigError("objective 'attention' needs samples (captured queries and keys), got none")
    if samples is not None and samples.head_size != head_size:
        raise PowerQuantConfigError(f"samples must have head_size {head_size}, got {samples.head_size}")
    if not _is_int(seed) or seed < 0:
        raise PowerQuantConfigError(f"seed must be an integer of 0 or more, got {seed!r}")
    return objective


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
