"""Every solver against the Lloyd-Max optimum, and the attention objective against softmax itself."""

import sys

import numpy as np
import pytest

from vllm_powerquant.codebooks.attention_aware import AttentionSamples, attention_kl, score_weights
from vllm_powerquant.codebooks.fuzzy import Points, _fuzzy_step, lloyd
from vllm_powerquant.codebooks.lloyd_max import UnitCoordinate, mse_of, solve_lloyd_max
from vllm_powerquant.codebooks.solvers import OBJECTIVES, SOLVERS, solve
from vllm_powerquant.errors import PowerQuantConfigError

# of codebooks fitted to the samples below, in MSE of a random unit vector: a few thousand coordinates, and another objective
LOSS_ON_SAMPLES = {"lloyd_max": 0.03, "fuzzy_c_means": 0.03, "cma_es": 0.3, "attention_aware": 0.1}


def need_packages_of(name: str) -> None:
    if name == "cma_es":
        pytest.importorskip("cma", reason="the extra dev brings it")


def samples(head_size=64, heads=2, keys=60, queries=20, spread=1.0, sinks=4, seed=0, draw=None) -> AttentionSamples:
    rng = np.random.default_rng(seed)
    key = (draw or rng.standard_normal)((heads, keys, head_size))
    # queries near some keys, so that attention is neither even nor on one key alone
    query = 0.3 * key[:, rng.integers(0, keys, queries)] + rng.standard_normal((heads, queries, head_size))
    positions = rng.integers(keys // 2, keys, queries)
    scaling = spread / np.sqrt(head_size)
    return AttentionSamples(query.astype(np.float32), key.astype(np.float32), positions, scaling, sinks)


def positive(solution) -> np.ndarray:
    return solution.centroids[solution.centroids.size // 2 :]


def packed(given: AttentionSamples, half: np.ndarray) -> np.ndarray:
    """Keys after the codec, in float64: nearest centroids, the unbiased scale, sinks as they are."""
    keys = given.keys.astype(np.float64)
    centroids = np.concatenate([-half[::-1], half])
    out = keys.copy()
    for head in range(keys.shape[0]):
        for j in range(given.sink_tokens, keys.shape[1]):
            k = keys[head, j]
            u = k * np.sqrt(k.size) / np.linalg.norm(k)
            c = centroids[np.abs(u[:, None] - centroids).argmin(1)]
            out[head, j] = c * (k @ k) / (k @ c)
    return out


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max())
    return e / e.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("name", [name for name in SOLVERS if "mse" in OBJECTIVES[name]])
def test_every_solver_of_the_mse_finds_the_optimum(name, head_size, bits):
    """From starts of their own: annealing and evolution know nothing of Newton's method."""
    need_packages_of(name)
    solution, (centroids, _, optimum) = solve(name, head_size, bits), solve_lloyd_max(head_size, bits)
    assert optimum - 1e-9 <= solution.mse <= optimum * (1 + 1e-7)
    assert solution.mse == solution.loss == mse_of(head_size, solution.centroids)
    np.testing.assert_allclose(solution.centroids, centroids, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name, objective", [(name, goal) for name in SOLVERS for goal in OBJECTIVES[name]])
def test_codebooks_of_samples_are_well_formed_and_repeat(name, objective, bits):
    need_packages_of(name)
    given = samples()
    solution, again = (solve(name, 64, bits, objective=objective, samples=given, seed=3) for _ in range(2))
    assert solution.centroids.dtype == np.float64 and solution.centroids.shape == (2**bits,)
    assert np.all(np.diff(solution.centroids) > 0)
    np.testing.assert_array_equal(solution.centroids, -solution.centroids[::-1])
    np.testing.assert_array_equal(solution.centroids, again.centroids)
    assert (solution.solver, solution.objective, solution.head_size, solution.bits) == (name, objective, 64, bits)
    optimum = solve_lloyd_max(64, bits)[2]
    assert optimum - 1e-9 <= solution.mse <= optimum * (1 + LOSS_ON_SAMPLES[name])
    if objective == "attention":
        assert solution.loss == attention_kl(given, positive(solution))


@pytest.mark.parametrize("name", ["lloyd_max", "fuzzy_c_means", "cma_es"])
def test_mse_of_samples_is_no_greater_than_the_exact_optimums(name):
    need_packages_of(name)
    given = samples()
    points = Points.of_coordinates(given.coordinates)
    solution = solve(name, 64, 3, samples=given)
    u = given.coordinates.ravel()
    error = np.mean(np.abs(u[:, None] - solution.centroids).min(1) ** 2)
    # points are means of narrow bins
    np.testing.assert_allclose(solution.loss, error, rtol=1e-4)
    assert solution.loss < points.mse(positive(solve("lloyd_max", 64, 3)))


def test_lloyd_puts_centroids_on_the_weighted_means_of_their_cells():
    rng = np.random.default_rng(0)
    x, weight = rng.gamma(2.0, size=100_000), rng.uniform(size=100_000)
    half = lloyd(Points.of_coordinates(x, weight), np.array([0.5, 1.0, 2.0, 3.0]))
    cell = np.searchsorted((half[1:] + half[:-1]) / 2, x)
    means = np.bincount(cell, weight * x) / np.bincount(cell, weight)
    np.testing.assert_allclose(half, means, rtol=0, atol=3e-3)


def test_a_fuzzy_step_is_that_of_points_and_their_mirror_images():
    rng = np.random.default_rng(0)
    x, half, m = np.sort(rng.uniform(0, 3, 50)), np.array([0.4, 1.0, 2.2]), 1.7
    both, centroids = np.concatenate([x, -x]), np.concatenate([-half[::-1], half])
    distance = np.abs(both[:, None] - centroids)
    membership = 1 / np.sum((distance[:, :, None] / distance[:, None, :]) ** (2 / (m - 1)), -1)
    expected = (both @ membership**m) / (membership**m).sum(0)
    np.testing.assert_allclose(_fuzzy_step(Points(x, np.full(50, 0.02)), half, m), expected[3:], rtol=1e-10)


@pytest.mark.parametrize("head_size", [3, 64, 256])
def test_points_stand_for_the_distribution(head_size):
    dist = UnitCoordinate(head_size)
    points, half = Points.of_distribution(dist), dist.companded(4)
    np.testing.assert_allclose(points.weight.sum(), 1)
    np.testing.assert_allclose(points.mse(half), mse_of(head_size, np.concatenate([-half[::-1], half])), rtol=1e-4)


@pytest.mark.parametrize("spread, sinks", [(1.0, 4), (4.0, 4), (1.0, 0)])
def test_attention_kl_is_that_of_softmax(spread, sinks):
    given, half = samples(spread=spread, sinks=sinks), positive(solve("lloyd_max", 64, 2))
    got, divergences = packed(given, half), []
    for head in range(2):
        for query, position in zip(given.queries[head].astype(np.float64), given.positions, strict=True):
            p, q = (softmax(given.scaling * k[head, : position + 1] @ query) for k in (given.keys.astype(float), got))
            divergences.append(np.sum(p * np.log(p / q)))
    np.testing.assert_allclose(attention_kl(given, half), np.mean(divergences), rtol=1e-4)


def test_score_weights_are_those_of_the_second_order_form():
    given = samples(heads=1)
    got = score_weights(given)[0]
    for j in (4, 30, 59):
        k, expected = given.keys[0, j].astype(np.float64), np.zeros(64)
        for query, position in zip(given.queries[0].astype(np.float64), given.positions, strict=True):
            if j > position:
                continue
            p = softmax(given.scaling * given.keys[0, : position + 1] @ query)[j]
            across = query - (query @ k) / (k @ k) * k
            expected += p * (1 - p) * (k @ k) * across**2
        np.testing.assert_allclose(got[j - 4], expected, rtol=1e-3, atol=1e-5 * got.max())


def test_under_random_rotations_scores_err_by_the_angle_alone():
    """E[<q, e>^2] = |q'|^2 |k|^2 E[tan^2 t] / (d - 1), for queries along and across the key."""
    d, rng, half = 16, np.random.default_rng(0), positive(solve("lloyd_max", 16, 2))
    k, other = rng.standard_normal(d), rng.standard_normal(d)
    across = other - (other @ k) / (k @ k) * k
    queries = np.stack([k, across, k + across])
    # the columns of a random rotation that k and `across` meet are two random orthonormal directions
    basis = np.linalg.qr(rng.standard_normal((40_000, d, 2)))[0]
    basis *= rng.choice([-1.0, 1.0], size=(40_000, 1, 2))
    u = basis[..., 0] * np.sqrt(d)
    centroids = np.concatenate([-half[::-1], half])
    c = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, u)]
    along = np.einsum("nd,nd->n", u, c)
    error = (c * (d / along)[:, None] - u) * (np.linalg.norm(k) / np.sqrt(d))
    tan2 = np.einsum("nd,nd->n", c, c) * d / along**2 - 1
    rotated = np.stack([basis @ np.array([q @ k / np.linalg.norm(k), q @ across / np.linalg.norm(across)]) for q in queries])
    squares = np.einsum("qnd,nd->qn", rotated, error) ** 2
    expected = np.array([0, 1, 1]) * (across @ across) * (k @ k) * tan2.mean() / (d - 1)
    np.testing.assert_allclose(squares.mean(1), expected, rtol=0.03, atol=1e-20)


@pytest.mark.parametrize("name", ["cma_es", "attention_aware"])
def test_solvers_of_attention_gain_on_keys_that_no_rotation_has_mixed(name):
    """Coordinates near +-1, which the codebook for mixed ones puts between two centroids."""
    need_packages_of(name)
    rng = np.random.default_rng(0)
    given = samples(draw=lambda shape: rng.choice([-1.0, 1.0], size=shape) + 0.2 * rng.standard_normal(shape))
    solution = solve(name, 64, 2, objective="attention", samples=given)
    assert solution.loss < 0.5 * attention_kl(given, positive(solve("lloyd_max", 64, 2)))


def test_cma_es_depends_on_its_seed_alone():
    need_packages_of("cma_es")
    given, state = samples(), np.random.get_state()[1].copy()
    found = [solve("cma_es", 64, 3, objective="attention", samples=given, seed=seed).centroids for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_solutions_codebook_has_its_centroids(bits):
    solution = solve("lloyd_max", 64, bits)
    book = solution.codebook()
    assert (book.head_size, book.bits, book.kind, book.mse) == (64, bits, "lloyd_max", solution.mse)
    np.testing.assert_allclose(book.centroids, solution.centroids, rtol=0, atol=2**-13)
    assert tuple(-n - 1 for n in reversed(book.levels)) == book.levels and all(type(n) is int for n in book.levels)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("newton", 64, 3), {}, "solver must be 'lloyd_max' or 'fuzzy_c_means' or 'cma_es' or .*, got 'newton'"),
        (("lloyd_max", 64, 8), {}, "bits must be 2, 3 or 4, got 8"),
        (("lloyd_max", 64, True), {}, "bits must be 2, 3 or 4, got True"),
        (("lloyd_max", 2, 3), {}, "head_size must be an integer of 3 or more, got 2"),
        (("lloyd_max", 64.0, 3), {}, "head_size must be an integer of 3 or more, got 64.0"),
        (("lloyd_max", 64, 3), {"objective": "attention"}, "objective of lloyd_max must be 'mse', got 'attention'"),
        (("attention_aware", 64, 3), {"objective": "mse"}, "objective of attention_aware must be 'attention', got 'mse'"),
        (("attention_aware", 64, 3), {}, "needs samples .* got none"),
        (("cma_es", 64, 3), {"objective": "attention"}, "needs samples .* got none"),
        (("lloyd_max", 64, 3), {"samples": [1.0]}, "samples must be AttentionSamples, got list"),
        (("lloyd_max", 128, 3), {"samples": samples()}, "samples must have head_size 128, got 64"),
        (("cma_es", 64, 3), {"seed": -1}, "seed must be an integer of 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, options, message):
    with pytest.raises(PowerQuantConfigError, match=message) as caught:
        solve(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_missing_cma_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(PowerQuantConfigError, match="needs the package cma, which is not installed; pip install cma"):
        solve("cma_es", 64, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": np.ones((2, 20, 32), np.float32)}, r"got \(2, 20, 32\), \(2, 60, 64\) and \(20,\)"),
        ({"queries": np.ones((1, 20, 64), np.float32)}, "samples must be queries"),
        ({"positions": np.arange(19)}, r"and \(19,\)"),
        ({"positions": np.full(20, 60)}, "positions must be 0 to 59, of the keys, got 60 to 60"),
        ({"sink_tokens": 60}, "sink_tokens must be 0 to 59 of 60 keys, got 60"),
        ({"keys": np.zeros((2, 60, 64), np.float32)}, "finite and no packed key 0"),
        ({"queries": np.full((2, 20, 64), np.nan, np.float32)}, "finite and no packed key 0"),
    ],
)
def test_bad_samples_are_refused(change, message):
    good = samples()
    fields = {name: getattr(good, name) for name in ("queries", "keys", "positions", "scaling", "sink_tokens")}
    with pytest.raises(PowerQuantConfigError, match=message):
        AttentionSamples(**fields | change)
