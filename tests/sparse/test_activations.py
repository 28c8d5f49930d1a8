"""What is stored for training predictors: truth recomputed from it is what the model's own forward did."""

import shutil

import numpy as np
import pytest
import torch

from sparse.models import SHAPES, write_checkpoint
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from vllm_powerquant.sparse.activations import Inputs, feed_forwards, fingerprint, read_windows, require_relu, watched
from vllm_powerquant.sparse.checkpoint import Predictors
from vllm_powerquant.sparse.text import load_causal_lm

pytest.importorskip("transformers")

TINY = ["tiny", "tiny-bamboo", "tiny-falcon", "tiny-falcon-new", "tiny-opt"]
WINDOWS = torch.randint(320, (6, 32), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = load_causal_lm(write_checkpoint(SHAPES[name], tmp_path_factory.mktemp(name) / "m"), device="cpu")
        return made[name]

    return get


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_truth_from_the_inputs_is_the_models_own(name, tiny, tmp_path):
    loaded = tiny(name)
    layers = feed_forwards(loaded)
    inputs = Inputs(tmp_path / "inputs", loaded.source.shape, WINDOWS.numel())
    inputs.capture(loaded, WINDOWS, "here", progress=False)
    assert inputs.made_of("here") and not inputs.made_of("there")
    assert inputs.file_bytes == sum(inputs.layer(i).nbytes for i in range(2))
    exact, hooked = [[], []], [[], []]
    with watched([x.norm for x in layers], lambda i, p: exact[i].append(p)):
        with watched([x.down for x in layers], lambda i, h: hooked[i].append(h)):
            for _ in read_windows(loaded, WINDOWS, "", progress=False):
                pass
    for i, layer in enumerate(layers):
        p, want = torch.cat(exact[i]), torch.cat(hooked[i])
        torch.testing.assert_close(layer.values(p), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.values(p) != 0, want != 0)
        stored = torch.from_numpy(inputs.layer(i).copy())
        assert torch.equal(stored, p.half())
        # float16 may move a value across zero, rarely
        assert ((layer.values(stored) != 0) != (want != 0)).float().mean() < 5e-4
        assert 0.02 < (want != 0).float().mean() < 0.2


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_p_is_what_the_formats_predictor_reads(name, tiny, tmp_path):
    """The models' own predictors, exact by construction, find every active neuron from p."""
    loaded = tiny(name)
    predictors = Predictors(type(tmp_path)(loaded.source.name) / "predictor", loaded.source.shape)
    layers = feed_forwards(loaded)
    seen = [[], []]
    with watched([x.norm for x in layers], lambda i, p: seen[i].append(p)):
        for _ in read_windows(loaded, WINDOWS, "", progress=False):
            pass
    for i, layer in enumerate(layers):
        p = torch.cat(seen[i])
        s = (p @ predictors.load(i, "fc1").float().T).relu() @ predictors.load(i, "fc2").float().T
        missed = (layer.values(p) != 0) & (s < 0)
        assert missed.float().mean() < 1e-5
        assert (s >= 0).float().mean() < 0.2


def test_an_unfinished_capture_does_not_count(tiny, tmp_path):
    loaded = tiny("tiny")
    inputs = Inputs(tmp_path / "inputs", loaded.source.shape, WINDOWS.numel())
    assert not inputs.made_of("here")
    inputs.capture(loaded, WINDOWS, "here", progress=False)
    (inputs.folder / "inputs.json").unlink()
    assert not inputs.made_of("here")


def test_the_fingerprint_sees_text_and_weights(tmp_path):
    loaded = load_causal_lm(write_checkpoint(SHAPES["tiny"], tmp_path / "m"), device="cpu")
    first = fingerprint(loaded, WINDOWS)
    assert first == fingerprint(loaded, WINDOWS.clone())
    assert first != fingerprint(loaded, WINDOWS.flip(0))
    loaded.model.model.layers[1].self_attn.o_proj.weight.data *= 1.01
    assert first != fingerprint(loaded, WINDOWS)


def test_refusals(tiny, tmp_path, monkeypatch):
    loaded = tiny("tiny")
    inputs = Inputs(tmp_path / "inputs", loaded.source.shape, WINDOWS.numel())
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(PowerQuantError, match="192 tokens need 0.00 GB .*use fewer tokens or another disk"):
            inputs.capture(loaded, WINDOWS, "here", progress=False)
    with pytest.raises(PowerQuantConfigError, match="windows of 300 tokens are longer than the model's context of 256"):
        inputs.capture(loaded, torch.zeros(1, 300, dtype=torch.int64), "here", progress=False)
    with pytest.raises(PowerQuantConfigError, match="gave token 400, the model's vocabulary has 320"):
        inputs.capture(loaded, WINDOWS * 0 + 400, "here", progress=False)


def test_a_residual_that_float16_cannot_hold(tmp_path):
    loaded = load_causal_lm(write_checkpoint(SHAPES["tiny"], tmp_path / "m"), device="cpu")
    loaded.model.model.embed_tokens.weight.data *= 1e5
    inputs = Inputs(tmp_path / "inputs", loaded.source.shape, WINDOWS.numel())
    with pytest.raises(PowerQuantUnsupportedError, match="layer 0 reaches .*which float16 cannot hold"):
        inputs.capture(loaded, WINDOWS, "here", progress=False)
    assert not inputs.made_of("here")


def test_only_relu_has_neurons_to_skip(tiny):
    from dataclasses import replace

    shape = tiny("tiny").source.shape
    require_relu(shape, "m", "profile")
    for kind in ("silu", "gelu"):
        with pytest.raises(PowerQuantUnsupportedError, match=f"cannot profile m: it is a {kind.upper()} model.*relufy"):
            require_relu(replace(shape, activation=kind), "m", "profile")


def test_layers_are_mapped_not_loaded(tiny, tmp_path):
    loaded = tiny("tiny")
    inputs = Inputs(tmp_path / "inputs", loaded.source.shape, WINDOWS.numel())
    inputs.capture(loaded, WINDOWS, "here", progress=False)
    assert isinstance(inputs.layer(0), np.memmap) and inputs.layer(0).dtype == np.float16
