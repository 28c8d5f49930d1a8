"""Codec: the reference's bytes, errors of the theory, any tensor in and out, refusals."""

import dataclasses

import pytest
import torch

from helpers import DEVICE
from vllm_powerquant import Codec, PowerQuantError, codec
from vllm_powerquant.attention import reference
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

HEAD_SIZES = (64, 80, 96, 128, 256)
BITS = (2, 3, 4, 8)
# name: kind, value_codec, bits
CODECS = {f"{kind}{bits}": (kind, "scalar", bits) for kind in ("key", "value") for bits in BITS}
CODECS["trellis"] = ("value", "trellis", 2)
# How far the distortion of 4,000 random vectors may be from theory: sampling noise, and at 2 bits the second order of the
# scale's fit. At 8 bits rare coordinates beyond the last level dominate. The trellis's own figure is a measurement.
DISTORTION_LIMIT = {2: 0.03, 3: 0.04, 4: 0.04, 8: 0.12}
# The unbiased scale is stored in 11 significant bits
SCALE_LIMIT = 2**-10.5
# Rounding to the dtype that comes out, relative RMS: an eighth of the last bit, with room
ROUNDING_LIMIT = {torch.float32: 1e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def vectors(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def make(head_size, name):
    kind, value_codec, bits = CODECS[name]
    return Codec(head_size, bits, kind, value_codec)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_bytes_are_those_of_a_cache_slot(head_size, name):
    kind, value_codec, bits = CODECS[name]
    x, other = vectors(33, 2, head_size), vectors(33, 2, head_size, seed=1)
    packed = make(head_size, name).encode(x)
    planes = bits * head_size // 8
    assert packed.planes.shape == (33, 2, planes) and packed.scale.shape == (33, 2)
    if kind == "key":
        slots = reference.encode(CacheFormat(head_size, key_bits=bits), x, other)
        want, scale = slots[..., :planes], slots[..., -4:-2]
    else:
        slots = reference.encode(CacheFormat(head_size, value_bits=bits, value_codec=value_codec), other, x)
        want, scale = slots[..., -4 - planes : -4], slots[..., -2:]
    assert torch.equal(packed.planes, want)
    assert torch.equal(packed.scale, scale.contiguous().view(torch.float16)[..., 0])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_error_is_that_of_the_theory(head_size, name):
    # the unbiased scale's error is the codebook's D / (1 - D): tests/attention/test_reference.py
    one = make(head_size, name)
    x = vectors(4000, head_size, seed=2)
    error = one.decode(one.encode(x)).double() - x.double()
    distortion = (error.square().sum() / x.double().square().sum()).item()
    theory = one.codebook.mse / (1 - one.codebook.mse)
    assert distortion == pytest.approx(theory, rel=DISTORTION_LIMIT[one.bits])
    inner = (x.double() * one.decode(one.encode(x)).double()).sum(-1) / x.double().square().sum(-1)
    assert (inner - 1).abs().max() < SCALE_LIMIT


@pytest.mark.parametrize("name", [name for name in CODECS if "8" not in name])
def test_error_is_between_the_bound_and_what_lloyd_max_never_exceeds(name):
    # of Gaussian vectors no codec of this rate has less than 4**-bits, Lloyd-Max never more than sqrt(3) pi / 2 times that
    # (Panter and Dite, 1951; 8 bits are an even grid and have more)
    one = make(128, name)
    assert 1 < one.codebook.mse * 4**one.bits < 3**0.5 * torch.pi / 2


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["key4", "value2", "trellis"])
def test_any_leading_shape(name, shape):
    one = make(64, name)
    x = vectors(*shape, 64)
    packed = one.encode(x)
    assert packed.shape == shape and packed.planes.shape == (*shape, one.planes_bytes)
    back = one.decode(packed)
    assert back.shape == x.shape and back.dtype == x.dtype and back.device == x.device
    flat = one.decode(one.encode(x.reshape(-1, 64)))
    assert torch.equal(back.reshape(-1, 64), flat)


@pytest.mark.parametrize("name", ["key3", "value4"])
def test_vectors_do_not_depend_on_each_other(name, monkeypatch):
    one, x = make(80, name), vectors(300, 80)
    whole = one.encode(x)
    monkeypatch.setattr(codec, "_ROWS", 7)
    parts = one.encode(x)
    assert torch.equal(parts.planes, whole.planes) and torch.equal(parts.scale, whole.scale)
    assert torch.equal(one.decode(parts), one.decode(whole))
    alone = one.encode(x[123])
    assert torch.equal(alone.planes, whole.planes[123]) and alone.scale == whole.scale[123]


@pytest.mark.parametrize("dtype", codec.DTYPES, ids=str)
def test_dtypes(dtype):
    one = Codec(96, 8)
    x = vectors(50, 96, dtype=dtype)
    packed = one.encode(x)
    back = one.decode(packed)
    assert packed.dtype == back.dtype == dtype
    # the same bytes as of the same numbers in float32, and the same result but for rounding
    wide = one.encode(x.float())
    assert torch.equal(packed.planes, wide.planes) and torch.equal(packed.scale, wide.scale)
    error = (back.float() - one.decode(wide)).norm() / x.float().norm()
    assert error <= ROUNDING_LIMIT[dtype]
    assert torch.equal(one.decode(packed, torch.float32), one.decode(wide))


def test_strides_and_gradients_do_not_matter():
    one = Codec(64, 4)
    x = vectors(8, 64, 6, 2).requires_grad_()
    packed = one.encode(x.transpose(1, 3)[:, ::2])
    plain = one.encode(x.detach().transpose(1, 3)[:, ::2].contiguous())
    assert torch.equal(packed.planes, plain.planes) and torch.equal(packed.scale, plain.scale)
    assert not one.decode(packed).requires_grad
    sliced = dataclasses.replace(packed, planes=packed.planes.transpose(0, 2), scale=packed.scale.transpose(0, 2))
    assert torch.equal(one.decode(sliced), one.decode(packed).transpose(0, 2))


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_those_of_the_tensors(name):
    one = make(128, name)
    packed = one.encode(vectors(7, 3, 128, dtype=torch.bfloat16))
    assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in (packed.planes, packed.scale))
    assert packed.nbytes == 21 * one.bytes_per_vector == 21 * (128 * one.bits // 8 + 2)
    assert packed.compression_ratio == 21 * 128 * 2 / packed.nbytes
    assert one.encode(vectors(0, 128)).nbytes == 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e20], ids=str)
def test_vectors_without_a_finite_square_are_nan_and_leave_the_others(name, bad):
    one = make(64, name)
    x = vectors(5, 64)
    want = one.decode(one.encode(x))
    x[2, 17] = bad
    back = one.decode(one.encode(x))
    assert back[2].isnan().all()
    assert torch.equal(back[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


def test_ends_of_the_scale():
    one = Codec(64, 4)
    assert one.decode(one.encode(torch.zeros(64))).abs().max() < 1e-6
    long = vectors(64) * 1e6
    rms = one.decode(one.encode(long)).square().mean().sqrt()
    assert rms == pytest.approx(65504, rel=0.05) and rms < long.square().mean().sqrt() / 10


def test_to_another_device_and_back():
    one = Codec(64, 3)
    packed = one.encode(vectors(4, 64))
    assert torch.equal(one.decode(packed.to("cpu")), one.decode(packed).cpu())


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"head_size": 100}, PowerQuantUnsupportedError, "head_size must be one of 64, 80, .*, got 100; fill"),
        ({"head_size": 64.0}, PowerQuantUnsupportedError, "got 64.0"),
        ({"bits": 5}, PowerQuantConfigError, "bits must be 2, 3, 4 or 8, got 5"),
        ({"bits": 2.0}, PowerQuantConfigError, "bits must be 2, 3, 4 or 8, got 2.0"),
        ({"kind": "query"}, PowerQuantConfigError, "kind must be 'key' or 'value', got 'query'"),
        ({"kind": "value", "bits": 2, "value_codec": "vq"}, PowerQuantConfigError, "value_codec must be scalar or trellis"),
        (
            {"kind": "value", "value_codec": "trellis"},
            PowerQuantConfigError,
            "trellis is for value_bits 2, got value_bits 4",
        ),
        ({"bits": 2, "value_codec": "trellis"}, PowerQuantConfigError, "value_codec is for kind 'value', got 'trellis'"),
    ],
)
def test_codecs_that_do_not_exist(arguments, kind, message):
    with pytest.raises(kind, match=message) as caught:
        Codec(**{"head_size": 64, **arguments})
    assert isinstance(caught.value, PowerQuantError)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, 80), r"takes \[\.\.\., 64\], got shape \[3, 80\]"),
        (torch.zeros(()), r"takes \[\.\.\., 64\], got shape \[\]"),
        (torch.zeros(64, 0), r"got shape \[64, 0\]"),
        (torch.zeros(64, dtype=torch.float64), "takes float16, bfloat16 or float32, got float64; cast"),
        (torch.zeros(64, dtype=torch.int8), "got int8"),
        ([0.0] * 64, "takes a torch tensor, got list"),
    ],
    ids=["width", "scalar", "empty", "float64", "int8", "list"],
)
def test_what_cannot_be_encoded(x, message):
    with pytest.raises(PowerQuantConfigError, match=message):
        Codec(64, 4).encode(x)


def test_what_cannot_be_decoded():
    packed = Codec(64, 4).encode(torch.zeros(2, 64))
    # 64 coordinates of 4 bits take as many bytes as 128 of 2
    with pytest.raises(PowerQuantConfigError, match="an equal codec packed, got Codec.head_size=64, bits=4.* for Codec"):
        Codec(128, 2).decode(packed)
    with pytest.raises(PowerQuantConfigError, match="an equal codec packed, got Tensor"):
        Codec(64, 4).decode(packed.planes)
    with pytest.raises(PowerQuantConfigError, match="dtype must be float16, bfloat16 or float32, got float64"):
        Codec(64, 4).decode(packed, torch.float64)
    assert torch.equal(Codec(64, 4).decode(packed), Codec(64, 4).decode(packed, torch.float32))
