"""Refinement of a codebook by CMA-ES, for objectives that have no usable gradient: rounding makes them jump.

The covariance matrix adaptation evolution strategy draws candidates from a normal distribution and adapts its mean and
covariance to the ranks of their losses. Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772; pycma.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import PowerQuantConfigError

# standard deviation of the first candidates' gaps between centroids, relative to the gaps at the start
SPREAD = 0.1


def from_log_gaps(start: np.ndarray, log_gaps: np.ndarray) -> np.ndarray:
    """Positive centroids whose distances to the one before (the first one: to 0) are those of `start` times exp(log_gaps).

    Whatever the numbers, they ascend.
    """
    return np.cumsum(np.diff(start, prepend=0.0) * np.exp(log_gaps))


def cma_es(
    loss: Callable[[np.ndarray], float], start: np.ndarray, seed: int, max_evaluations: int, tolerance: float
) -> np.ndarray:
    """The positive centroids of least loss that were met, the start among them.

    Args:    loss: of positive centroids [count] ascending; start [count], count >= 2; tolerance: of the loss, relative
    Returns: [count] float64, ascending
    Raises:  PowerQuantConfigError if the cma package is missing.
    """
    try:
        import cma
    except ImportError:
        raise PowerQuantConfigError(
            "solver 'cma_es' needs the package cma, which is not installed; pip install cma"
        ) from None
    rng = np.random.default_rng(seed)
    at_start = loss(start)
    options = {
        "maxfevals": max_evaluations,
        "tolfun": tolerance * at_start,
        "tolfunhist": tolerance * at_start,
        "tolx": 1e-7,
        "verbose": -9,
        # its own generator: by default cma seeds NumPy's global one
        "randn": lambda *shape: rng.standard_normal(shape),
        "seed": np.nan,
    }
    strategy = cma.CMAEvolutionStrategy(np.zeros(start.size), SPREAD, options)
    strategy.optimize(lambda log_gaps: loss(from_log_gaps(start, log_gaps)))
    best = strategy.result
    return from_log_gaps(start, best.xbest) if best.fbest < at_start else start
