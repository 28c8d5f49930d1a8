"""The solvers against independent numbers: quadrature of the density, a global search, Gaussian tables."""

import numpy as np
import pytest
from scipy import integrate

from vllm_powerquant.codebooks.lloyd_max import (
    UnitCoordinate,
    integer_levels,
    mse_of,
    round_step,
    solve_lloyd_max,
    uniform_levels,
)

HEAD_SIZES = [64, 80, 96, 112, 128, 192, 256]
# so wide that the coordinate is a Gaussian for every purpose here
GAUSSIAN = 10**7

# Max, "Quantizing for minimum distortion" (1960), tables I and II: distortion of N(0, 1)
GAUSSIAN_LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
GAUSSIAN_UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


def quadrature(head_size, centroids, count=400_001):
    """Mass and mean of each nearest-centroid cell and the MSE, by summing over a fine grid of angles."""
    # x = sqrt(d) cos(theta) with density sin(theta)^(d-2): smooth even where the density of x is not
    theta = (np.arange(count) + 0.5) * np.pi / count
    weight = np.sin(theta) ** (head_size - 2)
    weight /= weight.sum()
    x = np.sqrt(head_size) * np.cos(theta)
    idx = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, x)
    mass = np.bincount(idx, weight, len(centroids))
    mean = np.bincount(idx, weight * x, len(centroids)) / mass
    return mass, mean, float(np.sum(weight * (x - centroids[idx]) ** 2))


def global_optimum(head_size, levels, grid=1200):
    """Least MSE of any quantizer, symmetric or not, whose boundaries lie on a grid: dynamic programming."""
    theta = (np.arange(400_000) + 0.5) * np.pi / 400_000
    weight = np.sin(theta) ** (head_size - 2)
    weight /= weight.sum()
    x = np.sqrt(head_size) * np.cos(theta)
    reach = min(np.sqrt(head_size), 5.0)
    cell = np.clip(((x + reach) * grid / (2 * reach)).astype(int), 0, grid - 1)
    sums = [np.append(0, np.cumsum(np.bincount(cell, weight * x**power, grid))) for power in range(3)]
    zeroth, first, second = (s[None, :] - s[:, None] for s in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(zeroth > 1e-15, second - first**2 / zeroth, 0.0)
    cost[np.tril_indices(grid + 1, -1)] = np.inf
    best = cost[0]
    for _ in range(levels - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1]


@pytest.mark.parametrize("head_size", [2, 3, 4, 64, 80, 128, 256])
def test_moments_match_quadrature(head_size):
    dist = UnitCoordinate(head_size)

    def tail(power, x):
        def f(theta):
            return np.sin(theta) ** (head_size - 2) * (dist.limit * np.cos(theta)) ** power

        return integrate.quad(f, 0, np.arccos(min(x / dist.limit, 1)))[0]

    total = 2 * tail(0, 0)
    for x in (0.0, 0.3, 1.0, 1.3, 2.5):
        expected = [tail(power, x) / total for power in range(3)]
        np.testing.assert_allclose(dist.tail_moments(np.array(x)), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(2 * dist.tail_moments(np.array(0.0))[2], 1.0, rtol=1e-12)


@pytest.mark.parametrize("head_size", [3, 64, 128, 256])
def test_density_matches_moments(head_size):
    dist = UnitCoordinate(head_size)
    for x in (0.0, 0.5, 1.5):
        high, low = (dist.tail_moments(np.array(x + h))[0] for h in (-1e-5 if x else 0.0, 1e-5))
        width = 2e-5 if x else 1e-5
        np.testing.assert_allclose((high - low) / width, dist.density(np.array(x)), rtol=1e-5)


@pytest.mark.parametrize("bits, mse", [(2, 0.1160), (3, 0.03397), (4, 0.009315)])
def test_known_mse_at_head_size_128(bits, mse):
    np.testing.assert_allclose(solve_lloyd_max(128, bits)[2], mse, rtol=1e-3)


@pytest.mark.parametrize("bits", GAUSSIAN_LLOYD_MAX)
def test_wide_heads_reach_published_gaussian_values(bits):
    np.testing.assert_allclose(solve_lloyd_max(GAUSSIAN, bits)[2], GAUSSIAN_LLOYD_MAX[bits], rtol=1e-3)
    np.testing.assert_allclose(uniform_levels(GAUSSIAN, bits)[2], GAUSSIAN_UNIFORM[bits], rtol=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_size", [2, 3, 4, 17, *HEAD_SIZES, 1024])
def test_solution_is_well_formed_and_stationary(head_size, bits):
    centroids, boundaries, mse = solve_lloyd_max(head_size, bits)
    assert centroids.shape == (2**bits,) and boundaries.shape == (2**bits - 1,)
    assert np.all(np.diff(centroids) > 0) and np.abs(centroids).max() < np.sqrt(head_size)
    np.testing.assert_array_equal(centroids, -centroids[::-1])
    np.testing.assert_array_equal(boundaries, (centroids[1:] + centroids[:-1]) / 2)
    # each centroid is the mean of its cell, by the exact moments
    dist = UnitCoordinate(head_size)
    ends = np.append(boundaries[2 ** (bits - 1) - 1 :], np.inf)
    mass, first, _ = (-np.diff(m) for m in dist.tail_moments(ends))
    np.testing.assert_allclose(first / mass, centroids[2 ** (bits - 1) :], rtol=0, atol=1e-10)
    # for cell means, error = variance - energy of the means
    np.testing.assert_allclose(mse, 1 - 2 * np.sum(first**2 / mass), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_solution_matches_quadrature(head_size, bits):
    centroids, _, mse = solve_lloyd_max(head_size, bits)
    mass, mean, error = quadrature(head_size, centroids)
    np.testing.assert_allclose(error, mse, rtol=1e-4)
    np.testing.assert_allclose(mse_of(head_size, centroids), mse, rtol=1e-12)
    # the grid leaves a handful of points in the outermost cells at 8 bits
    inner = mass > 1e-4
    np.testing.assert_allclose(mean[inner], centroids[inner], rtol=0, atol=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("head_size", [3, 64, 128])
def test_no_quantizer_on_a_grid_is_better(head_size, bits):
    least, mse = global_optimum(head_size, 2**bits), solve_lloyd_max(head_size, bits)[2]
    # a boundary off by half a grid step costs a little, never gains
    assert mse * (1 - 1e-4) < least < mse * (1 + 2e-3)


def test_lloyd_iterations_from_elsewhere_reach_the_same_solution():
    centroids, _, _ = solve_lloyd_max(128, 3)
    dist = UnitCoordinate(128)
    positive = np.array([0.1, 0.2, 0.3, 4.0])
    for _ in range(2000):
        ends = np.concatenate([[0.0], (positive[1:] + positive[:-1]) / 2, [np.inf]])
        mass, first, _ = (-np.diff(m) for m in dist.tail_moments(ends))
        positive = first / mass
    np.testing.assert_allclose(positive, centroids[4:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("head_size, bits", [(1, 4), (0, 4), (128, 0), (128, 9)])
def test_refuses_what_has_no_solution(head_size, bits):
    with pytest.raises(ValueError, match="must be"):
        solve_lloyd_max(head_size, bits)


def test_mse_of_known_integer_table_for_a_gaussian():
    half = (np.array([5, 16, 27, 39, 52, 67, 86, 114]) + 0.5) / 41.86
    centroids = np.concatenate([-half[::-1], half])
    np.testing.assert_allclose(mse_of(GAUSSIAN, centroids), 0.009505, rtol=1e-4)
    assert integer_levels(GAUSSIAN, 4)[2] <= mse_of(GAUSSIAN, centroids)


def test_mse_of_refuses_asymmetric_centroids():
    with pytest.raises(ValueError, match="symmetric"):
        mse_of(128, [-1.0, 1.1])


# loss against the Lloyd-Max optimum
INTEGER_LOSS = {2: 1e-5, 3: 1e-4, 4: 1e-3}


@pytest.mark.parametrize("bits", INTEGER_LOSS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_integer_levels(head_size, bits):
    levels, step, mse = integer_levels(head_size, bits)
    assert len(levels) == 2**bits and all(isinstance(n, int) for n in levels)
    assert list(levels) == sorted(set(levels)) and levels[0] >= -128 and levels[-1] <= 127
    assert [-n - 1 for n in reversed(levels)] == list(levels)
    optimum = solve_lloyd_max(head_size, bits)[2]
    assert optimum <= mse < optimum * (1 + INTEGER_LOSS[bits])
    centroids = (np.array(levels) + 0.5) * step
    np.testing.assert_allclose(quadrature(head_size, centroids)[2], mse, rtol=1e-4)
    # no other step does better
    for scale in (0.999, 1.001):
        assert mse_of(head_size, centroids * scale) > mse


@pytest.mark.parametrize("max_magnitude", [7, 15, 31, 63, 127])
def test_integer_levels_keep_to_their_limit(max_magnitude):
    levels, _, mse = integer_levels(128, 4, max_magnitude)
    assert levels[-1] <= max_magnitude
    assert mse <= uniform_levels(128, 4)[2] * (1 + 1e-9)
    with pytest.raises(ValueError, match="max_magnitude"):
        integer_levels(128, 4, 6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_uniform_levels(head_size, bits):
    levels, step, mse = uniform_levels(head_size, bits)
    assert levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    centroids = (np.array(levels) + 0.5) * step
    np.testing.assert_allclose(quadrature(head_size, centroids)[2], mse, rtol=1e-4)
    # the best of a wide scan of steps
    steps = step * np.geomspace(0.3, 3, 301)
    assert min(mse_of(head_size, (np.array(levels) + 0.5) * s) for s in steps) >= mse * (1 - 1e-9)


def test_round_step_is_exact_in_float32_for_every_level():
    for step in (0.0237, 0.99301, 1 / 41.86, 1e-4, 3.0):
        rounded = round_step(step)
        assert abs(rounded / step - 1) <= 2**-16
        assert np.float32(rounded) == rounded
        halves = np.arange(-255, 256) / 2 * rounded
        np.testing.assert_array_equal(halves.astype(np.float32).astype(np.float64), halves)
