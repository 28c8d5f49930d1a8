"""Code as turboquant 0.2.0's README has it, with the import changed; the error that the names promise."""

import math

import pytest
import torch

from helpers import DEVICE
from vllm_powerquant.compat.turboquant import TurboQuantMSE
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_core_algorithm_as_its_readme_uses_it():
    tq = TurboQuantMSE(dim=128, bits=4, device=DEVICE)
    x = vectors(1000, 128)
    indices, norms = tq.quantize(x)
    x_hat = tq.dequantize(indices, norms)
    assert indices.shape == (1000, 128) and indices.dtype == torch.uint8 and indices.max() == 15
    assert norms.shape == (1000, 1) and norms.dtype == torch.float32
    assert torch.equal(norms, x.norm(dim=-1, keepdim=True))
    assert x_hat.shape == x.shape and x_hat.dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_of_unit_vectors_is_the_codebooks_and_within_the_papers_bound(bits):
    x = torch.nn.functional.normalize(vectors(4000, 128), dim=-1)
    tq = TurboQuantMSE(128, bits, DEVICE)
    mse = (x - tq.dequantize(*tq.quantize(x))).square().sum(-1).mean().item()
    # 4,000 vectors: sampling noise of about 1 %
    assert mse == pytest.approx(tq._codec.codebook.mse, rel=0.02)
    assert mse <= math.sqrt(3) * math.pi / 2 / 4**bits


def test_attributes_say_what_is_computed():
    # the formulas of its documentation: y = rotation x / |x|, nearest of codebook, x^ = codebook[indices] rotation |x|
    tq = TurboQuantMSE(dim=80, bits=3, device=DEVICE, seed=7)
    assert (tq.dim, tq.bits, tq.num_centroids, tq.device, tq.seed) == (80, 3, 8, DEVICE, 7)
    x = vectors(5, 3, 80)
    indices, norms = tq.quantize(x)
    y = (x / norms) @ tq.rotation_t
    nearest = (y.unsqueeze(-1) - tq.codebook).abs().argmin(-1)
    assert (nearest != indices).float().mean() < 1e-3  # ties within rounding
    torch.testing.assert_close(tq.dequantize(indices, norms), tq.codebook[indices.long()] @ tq.rotation * norms)
    torch.testing.assert_close(tq.rotation @ tq.rotation_t, torch.eye(80, device=DEVICE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_come_back_in_float32(dtype):
    tq = TurboQuantMSE(64, 8, DEVICE)
    x = vectors(2, 4, 9, 64).to(dtype)
    x_hat = tq.dequantize(*tq.quantize(x))
    assert x_hat.dtype == torch.float32
    assert (x_hat - x.float()).norm() < 0.02 * x.float().norm()


def test_what_is_refused():
    with pytest.raises(PowerQuantConfigError, match="bits must be 2, 3, 4 or 8, got 1"):
        TurboQuantMSE(128, bits=1, device="cpu")
    with pytest.raises(PowerQuantUnsupportedError, match="head_size must be one of 64, .*, got 384"):
        TurboQuantMSE(384, device="cpu")
    with pytest.raises(PowerQuantConfigError, match="got 'no such device'; give device='cpu'"):
        TurboQuantMSE(128, device="no such device")
    if not torch.cuda.is_available():
        with pytest.raises(PowerQuantConfigError, match="got 'cuda'; give device='cpu'"):
            TurboQuantMSE(128)
    tq = TurboQuantMSE(128, device="cpu")
    with pytest.raises(PowerQuantConfigError, match=r"takes \[..., 128\], got shape \[3, 64\]"):
        tq.quantize(torch.zeros(3, 64))
    with pytest.raises(PowerQuantConfigError, match="floating-point tensor, got int64"):
        tq.quantize(torch.zeros(3, 128, dtype=torch.int64))
    indices, norms = tq.quantize(torch.zeros(3, 128))
    with pytest.raises(PowerQuantConfigError, match=r"got shapes \[3, 128\] and \[3\]"):
        tq.dequantize(indices, norms[:, 0])
    assert tq.dequantize(indices, norms).abs().max() == 0
