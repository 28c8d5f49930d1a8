"""The shipped codebooks: shape, symmetry, loss, and that the build command makes the same file."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from vllm_powerquant.codebooks import build
from vllm_powerquant.codebooks.lloyd_max import mse_of, solve_lloyd_max
from vllm_powerquant.codebooks.tables import BITS, DATA_FILE, KINDS, load_codebook, supported_head_sizes
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
ALL = [
    pytest.param(head_size, bits, kind, id=f"d{head_size}-b{bits}-{kind}")
    for head_size in HEAD_SIZES
    for bits in BITS
    for kind in KINDS
]


def test_supported_head_sizes():
    assert supported_head_sizes() == HEAD_SIZES


@pytest.mark.parametrize("head_size, bits, kind", ALL)
def test_codebook_is_well_formed(head_size, bits, kind):
    book = load_codebook(head_size, bits, kind)
    assert (book.head_size, book.bits) == (head_size, bits)
    assert book.kind == ("uniform" if bits == 8 else kind)
    assert len(book.levels) == 2**bits and all(type(n) is int for n in book.levels)
    assert all(a < b for a, b in zip(book.levels, book.levels[1:], strict=False))
    assert book.levels[0] >= -128 and book.levels[-1] <= 127
    assert tuple(-n - 1 for n in reversed(book.levels)) == book.levels
    if book.kind == "uniform":
        assert book.levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert book.step > 0 and float(np.float32(book.step)) == book.step


@pytest.mark.parametrize("head_size, bits, kind", ALL)
def test_centroids_and_boundaries_are_exact_in_float32(head_size, bits, kind):
    book = load_codebook(head_size, bits, kind)
    centroids, boundaries = book.centroids, book.boundaries
    assert centroids.dtype == boundaries.dtype == np.float32
    assert centroids.shape == (2**bits,) and boundaries.shape == (2**bits - 1,)
    exact = (np.array(book.levels, dtype=np.float64) + 0.5) * book.step
    np.testing.assert_array_equal(centroids.astype(np.float64), exact)
    np.testing.assert_array_equal(boundaries.astype(np.float64), (exact[1:] + exact[:-1]) / 2)
    np.testing.assert_array_equal(centroids, -centroids[::-1])
    assert boundaries[2 ** (bits - 1) - 1] == 0


@pytest.mark.parametrize("head_size, bits, kind", ALL)
def test_stored_mse_is_the_exact_one(head_size, bits, kind):
    book = load_codebook(head_size, bits, kind)
    np.testing.assert_allclose(book.mse, mse_of(head_size, book.centroids.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_losses_against_the_optimum(head_size):
    for bits, loss in {2: 1e-5, 3: 1e-4, 4: 1e-3}.items():
        optimum = solve_lloyd_max(head_size, bits)[2]
        assert optimum * (1 - 1e-6) <= load_codebook(head_size, bits).mse < optimum * (1 + loss)
        assert load_codebook(head_size, bits, "uniform").mse >= load_codebook(head_size, bits).mse
    assert load_codebook(head_size, 8).mse < 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_random_vectors_have_the_stored_error(bits):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 128))
    x *= np.sqrt(128) / np.linalg.norm(x, axis=1, keepdims=True)
    # at 8 bits a tenth of the error comes from a few hundred coordinates beyond the last level
    rtol = 0.05 if bits == 8 else 0.01
    for kind in KINDS:
        book = load_codebook(128, bits, kind)
        error = x - book.centroids[np.searchsorted(book.boundaries, x)]
        np.testing.assert_allclose(np.mean(error**2), book.mse, rtol=rtol)


def test_default_kind_is_lloyd_max():
    assert load_codebook(128, 4) == load_codebook(128, 4, "lloyd_max") != load_codebook(128, 4, "uniform")
    assert load_codebook(128, 8) == load_codebook(128, 8, "uniform")


def test_codebook_is_frozen_and_hashable():
    book = load_codebook(64, 2)
    assert hash(book) == hash(load_codebook(64, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        book.step = 1.0


def test_unknown_head_size_names_the_known_ones_and_the_command():
    with pytest.raises(PowerQuantUnsupportedError) as caught:
        load_codebook(160, 4)
    assert "head_size 160, only for 64, 80, 96, 112, 128, 192, 256" in str(caught.value)
    assert "powerquant codebook build --add 160" in str(caught.value)


@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4", None])
def test_unknown_bits(bits):
    with pytest.raises(PowerQuantConfigError, match="bits must be 2, 3, 4 or 8, got"):
        load_codebook(128, bits)


def test_unknown_kind():
    with pytest.raises(PowerQuantConfigError, match="kind must be 'lloyd_max' or 'uniform', got 'optimum'"):
        load_codebook(128, 4, "optimum")


def test_file_holds_the_float_optimum_beside():
    tables = json.loads(DATA_FILE.read_text())["head_sizes"]
    for head_size in HEAD_SIZES:
        for bits in (2, 3, 4):
            entry = tables[str(head_size)]["optimum"][str(bits)]
            centroids, _, mse = solve_lloyd_max(head_size, bits)
            np.testing.assert_allclose(entry["centroids"], centroids, rtol=1e-8)
            np.testing.assert_allclose(entry["mse"], mse, rtol=1e-6)


def test_build_adds_head_sizes():
    text = build.build_tables([160, 64])
    assert list(json.loads(text)["head_sizes"]) == ["64", "160"]


def test_tables_import_needs_neither_scipy_nor_torch():
    code = (
        "import sys; from vllm_powerquant.codebooks.tables import load_codebook; "
        "load_codebook(128, 4).centroids; "
        "assert not {'scipy', 'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
