"""A codebook for softmax scores instead of coordinates: least divergence of attention weights on captured queries and keys.

A query q attends to keys k_j with p = softmax(s), s_j = scaling <q, k_j>. Packed keys k_j + e_j give s + d with
d_j = scaling <q, e_j>, and the divergence of the weights is the cumulant generating function of d under p less its mean:

    KL(p || softmax(s + d)) = log sum_j p_j exp(d_j) - sum_j p_j d_j = 1/2 Var_p(d) + O(d^3)

If the errors of different keys are independent with mean 0, the expectation of the second-order form is

    1/2 sum_j p_j (1 - p_j) E[d_j^2]

In it the codebook appears through E[d_j^2] alone. The codec's scale is the unbiased one, <k, e> = 0, so only the part q' of
q across k meets the error; and under a uniformly random rotation every direction across k is alike:

    E[d^2] = scaling^2 |q'|^2 |k|^2 / (head_size - 1) * E[tan^2 t]     t: angle between u and the centroids c(u) of it

for any q, k and p. So the second-order objective asks for the least E[tan^2 t], whatever the model; for wide heads
tan^2 t = E[c^2] / E[u c]^2 - 1 over coordinates, and Lloyd-Max has the least, MSE / (1 - MSE) (Cauchy and Schwarz: for given
cells cos t is greatest where centroids are the cells' means). What another codebook can gain lies in the rest: one fixed
Hadamard rotation instead of a random one, errors shared by keys that are alike, terms of third order. `attention_kl` is the
exact divergence and has all of these. `attention_aware` minimises the second-order form with the captured p, q' and k in
place of expectations, coordinate by coordinate: a weighted MSE of coordinates, with weights sum_q p (1 - p) |k|^2 q'_i^2.
Source: derived here; the second-order weights p (1 - p) are softmax's Hessian, diag(p) - p p^T, without its other entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import PowerQuantConfigError
from .fuzzy import Points, lloyd


@dataclass(frozen=True, eq=False)
class AttentionSamples:
    """Queries and keys of some heads (of any layers and texts), rotated as the codec rotates keys.

    Raises: PowerQuantConfigError if shapes disagree or a key that is packed is 0 or not finite.
    """

    queries: np.ndarray  # [heads, queries, head_size] float32
    keys: np.ndarray  # [heads, keys, head_size] float32
    positions: np.ndarray  # [queries] int64: a query attends to keys 0 .. its position
    scaling: float
    sink_tokens: int = 4  # first keys that stay exact

    def __post_init__(self) -> None:
        q, k = np.shape(self.queries), np.shape(self.keys)
        at = np.shape(self.positions)
        if len(q) != 3 or len(k) != 3 or q[0] != k[0] or q[2] != k[2] or at != q[1:2] or 0 in (*q, *k):
            raise PowerQuantConfigError(
                "samples must be queries [heads, queries, head_size], keys [heads, keys, head_size] and "
                f"positions [queries], got {q}, {k} and {at}"
            )
        if np.min(self.positions) < 0 or np.max(self.positions) >= k[1]:
            raise PowerQuantConfigError(
                f"positions must be 0 to {k[1] - 1}, of the keys, got {np.min(self.positions)} to {np.max(self.positions)}"
            )
        if not 0 <= self.sink_tokens < k[1]:
            raise PowerQuantConfigError(f"sink_tokens must be 0 to {k[1] - 1} of {k[1]} keys, got {self.sink_tokens}")
        energy = np.square(self._packed, dtype=np.float64).sum(-1)
        if not np.all(np.isfinite(energy) & (energy > 0)) or not np.all(np.isfinite(self.queries)):
            raise PowerQuantConfigError("samples must be finite and no packed key 0, got one that is not")

    @property
    def head_size(self) -> int:
        return self.keys.shape[2]

    @property
    def _packed(self) -> np.ndarray:
        return self.keys[:, self.sink_tokens :]

    def by_head(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each head: coordinates and norms [keys - sink_tokens, 1] of packed keys, queries, weights of packed keys."""
        return zip(self.coordinates, self._norms, self.queries, self._weights, strict=True)

    @functools.cached_property
    def _norms(self) -> np.ndarray:
        return np.linalg.norm(self._packed, axis=-1, keepdims=True)

    @functools.cached_property
    def coordinates(self) -> np.ndarray:
        """Of the packed keys, each of mean square 1 over a key: [heads, keys - sink_tokens, head_size] float32."""
        return self._packed * (math.sqrt(self.head_size) / self._norms)

    @functools.cached_property
    def _weights(self) -> np.ndarray:
        """Softmax over the keys before and at each query's position: [heads, queries, keys - sink_tokens] of the packed."""
        scores = self.scaling * (self.queries @ self.keys.transpose(0, 2, 1))
        unseen = np.arange(self.keys.shape[1]) > np.asarray(self.positions)[:, None]
        scores[:, unseen] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        return scores[..., self.sink_tokens :]


def attention_kl(samples: AttentionSamples, positive: np.ndarray) -> float:
    """Mean over heads and queries of KL(exact weights || weights with packed keys), nats.

    Args: positive [2**(bits - 1)] float64: the codebook's positive centroids, ascending
    """
    boundaries = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    centroids = positive.astype(np.float32)
    total = 0.0
    # head by head, so that what is worked on stays in the processor's caches
    for u, norms, query, p in samples.by_head():
        c = np.copysign(centroids[np.searchsorted(boundaries, np.abs(u))], u)
        unbiased = samples.head_size / np.einsum("kd,kd->k", u, c)[:, None]
        error = (unbiased * c - u) * (norms / math.sqrt(samples.head_size))
        d = samples.scaling * (query @ error.T)
        # less the mean: then log sum p exp(d) = log1p(sum p expm1(d)) does not cancel. Sinks have d = 0
        mean = np.sum(p * d, -1, keepdims=True)
        of_sinks = 1 - p.sum(-1, dtype=np.float64)
        moved = np.sum(p * np.expm1(d - mean), -1, dtype=np.float64) + of_sinks * np.expm1(-mean[:, 0].astype(np.float64))
        total += float(np.log1p(moved).sum())
    return total / (samples.queries.shape[0] * samples.queries.shape[1])


def score_weights(samples: AttentionSamples) -> np.ndarray:
    """What the square of each coordinate's error counts in the second-order form, up to a factor.

    Returns: [heads, keys - sink_tokens, head_size] float32: sum over queries of p (1 - p) |k|^2 q'_i^2
    """
    weights = []
    for u, norms, query, p in samples.by_head():
        slope = p * (1 - p)
        # q' = q - a u: expanded, so that no tensor of queries x keys x head_size is made
        along = (query @ u.T) / samples.head_size
        across = slope.T @ query**2 - 2 * ((slope * along).T @ query) * u + (slope * along**2).sum(0)[:, None] * u**2
        weights.append(np.maximum(across, 0) * norms**2)
    return np.stack(weights)


def attention_aware(samples: AttentionSamples, start: np.ndarray) -> np.ndarray:
    """Positive centroids [count] of least second-order divergence on samples: Lloyd's iteration under score_weights."""
    return lloyd(Points.of_coordinates(samples.coordinates, score_weights(samples)), start)
