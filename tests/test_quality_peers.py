"""What quality_peers.py adds to other packages' caches: the common layer, counted bytes, words for a missing package."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality_peers  # noqa: E402
from quality_peers import Codec, CodecLayer, ForwardingLayer, held_bytes  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.cache_utils import Cache, DynamicCache  # noqa: E402

from vllm_powerquant import quality  # noqa: E402
from vllm_powerquant.attention.cache_format import CacheFormat  # noqa: E402
from vllm_powerquant.attention.reference_cache import ReferenceLayer  # noqa: E402
from vllm_powerquant.errors import PowerQuantError, PowerQuantUnsupportedError  # noqa: E402

IDENTITY, ZERO = Codec(lambda x: x.float(), 20), Codec(torch.zeros_like, 10)
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    initializer_range=0.2,
)


class WithoutLayers(DynamicCache):
    """As some packages write caches: `layers` stays empty."""

    def __init__(self):
        super().__init__()
        self.inner = DynamicCache()

    def update(self, keys, values, layer, *args, **kwargs):
        return self.inner.update(keys, values, layer)

    def get_seq_length(self, layer_idx=0):
        return self.inner.get_seq_length(layer_idx)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def segment(model):
    ids = torch.randint(0, 97, (201,), generator=torch.Generator().manual_seed(1)).tolist()
    return quality.make_segment(model, "random", ids, 160)


def moved(model, segment, make_layer) -> float:
    return quality.measure(model, segment, lambda: Cache(layers=[make_layer(i) for i in range(2)])).kl


def test_a_codec_that_loses_nothing_moves_nothing(model, segment):
    assert abs(moved(model, segment, lambda i: CodecLayer(IDENTITY, IDENTITY))) < 1e-6
    assert moved(model, segment, lambda i: CodecLayer(IDENTITY, ZERO)) > 1e-3


def test_a_cache_without_layers_is_masked_as_its_tokens_need(model, segment):
    inner = WithoutLayers()
    assert abs(moved(model, segment, lambda i: ForwardingLayer(inner, i))) < 1e-6
    assert quality.measure(model, segment, WithoutLayers).kl > 1e-3


@pytest.mark.parametrize("window", [0, 1, 128])
def test_a_token_is_packed_when_ours_is(window):
    """The common layer's window against ReferenceLayer's: which positions differ from what was given, chunk after chunk."""
    generator = torch.Generator().manual_seed(2)
    ours, theirs = ReferenceLayer(CacheFormat(64), window, 0), CodecLayer(ZERO, ZERO, window)
    given = torch.empty(1, 1, 0, 64)
    for n in (100, 60, 1, 1, 90):
        chunk = torch.randn(1, 1, n, 64, generator=generator)
        given = torch.cat((given, chunk), 2)
        packed = [(x != given).any(-1)[0, 0] for x in (*ours.update(chunk, chunk), *theirs.update(chunk, chunk))]
        assert all(torch.equal(packed[0], other) for other in packed[1:])


def test_bytes_of_a_codec_are_its_formats_and_bytes_of_a_cache_its_tensors():
    chunk = torch.zeros(1, 3, 200, 64, dtype=torch.bfloat16)
    layer = CodecLayer(Codec(torch.zeros_like, 36), Codec(torch.zeros_like, 20))
    layer.update(chunk, chunk)
    assert held_bytes(Cache(layers=[layer])) == 3 * (72 * 56 + 128 * 256)
    inner = DynamicCache()
    cache = Cache(layers=[ForwardingLayer(inner, i) for i in range(2)])
    quality.filled(cache, [(chunk, chunk)] * 2)
    assert held_bytes(cache) == 2 * 2 * chunk.nbytes
    # a view keeps all of its storage alive
    inner.layers[0].keys = inner.layers[0].keys[:, :, :1]
    assert held_bytes(cache) == 2 * 2 * chunk.nbytes


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    installed = {"tqai": "0.6.1", "hqq": "0.1"}

    def version(distribution):
        if distribution not in installed:
            raise quality_peers.importlib.metadata.PackageNotFoundError
        return installed[distribution]

    monkeypatch.setattr(quality_peers.importlib.metadata, "version", version)
    assert quality_peers.select(["tqai"]) and all("tqai" in name for name in quality_peers.select(["tqai"]))
    with pytest.raises(
        PowerQuantError, match="^turbo-attn is not installed; run: pip install --no-deps turbo-attn==0.70.1$"
    ):
        quality_peers.select(["tqai", "turbo-attn"])
    with pytest.raises(PowerQuantError, match=r"^hqq 0.1 is installed, not 0.2.8.post1; run: pip install hqq==0.2.8.post1$"):
        quality_peers.select(["hqq"])


def test_a_refused_model_is_told_from_an_error():
    from transformers import Gemma3TextConfig

    with pytest.raises(PowerQuantUnsupportedError, match="full attention"):
        quality_peers.make_cache("quanto K4/V4, window 128", Gemma3TextConfig(), 0, 16)


def test_every_configuration_is_drawn_once():
    pytest.importorskip("matplotlib")
    pytest.importorskip("triton")
    import re

    from plot import QUALITY_STYLES

    for name in (
        "K4/V2",
        "K4/V2, calibrated keys",
        "K4/V2 trellis",
        "K4/V2 trellis, calibrated keys",
        *quality_peers.CONFIGURATIONS,
    ):
        assert sum(bool(re.fullmatch(pattern, name)) for pattern in QUALITY_STYLES) == 1, name


def test_the_largest_run_of_a_configuration_is_drawn_or_the_last(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("triton")
    from plot import has_column, read_quality

    header = "model,text,split,prompt_tokens,configuration,seed,kl,commit,date\n"
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text(header + "m,a,report,1024,K4/V2,0,1,c1,2026-01-01\nm,a,report,1024,K4/V2,1,2,c1,2026-01-01\n")
    new.write_text(header + "m,a,report,1024,K4/V2,0,3,c2,2026-01-01\nm,a,tune,1024,K4/V2,0,4,c3,2026-01-01\n")
    assert has_column(old, "configuration")
    for files in ([old, new], [new, old]):
        assert [row["kl"] for row in read_quality(files)] == ["1", "2"]
    new.write_text(header + "m,a,report,1024,K4/V2,0,3,c2,2026-01-01\nm,a,report,1024,K4/V2,1,4,c2,2026-01-01\n")
    assert [row["kl"] for row in read_quality([old, new])] == ["3", "4"]
    assert [row["kl"] for row in read_quality([new, old])] == ["1", "2"]
