"""Counts of activations: against the model's own forward, upstream's files, refusals, the command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse.models import SHAPES, Shape, write_checkpoint
from vllm_powerquant.cli import main
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError
from vllm_powerquant.sparse.activations import feed_forwards, watched
from vllm_powerquant.sparse.profile import hot_share, profile, read_counts
from vllm_powerquant.sparse.text import load_causal_lm, token_windows

pytest.importorskip("transformers")

TINY = ["tiny", "tiny-bamboo", "tiny-falcon", "tiny-falcon-new", "tiny-opt"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox, 1234 birds and a lazy dog; each of them walks home. " * 40)
    return path


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_counts_are_the_models_own(name, text, tmp_path):
    folder = write_checkpoint(SHAPES[name], tmp_path / name)
    done = profile(folder, tmp_path / "p", texts=[text], tokens=640, window=64, device="cpu", progress=False)
    assert (done.tokens, done.num_layers, done.intermediate_size) == (640, 2, 128)
    loaded = load_causal_lm(folder, device="cpu")
    values = [None, None]

    def see(layer: int, h: torch.Tensor) -> None:
        values[layer] = h

    with watched([x.down for x in feed_forwards(loaded)], see):
        loaded.model(token_windows(loaded.tokenizer, [text], 64, 640))
    counts = read_counts(tmp_path / "p", 2, 128)
    for layer in range(2):
        # as upstream reads it
        row = torch.load(tmp_path / "p" / "activation" / f"activation_{layer}.pt", weights_only=True)
        assert row.dtype == torch.int64 and row.shape == (128,) and torch.equal(row, counts[layer])
        # batches of another size round otherwise
        assert (row - (values[layer] != 0).sum(0)).abs().sum() <= 2
        assert done.active_share[layer] == pytest.approx(float(row.sum()) / 640 / 128, abs=1e-5)
    report = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert report == done.as_dict()


def test_the_neurons_that_make_up_most():
    assert hot_share(torch.tensor([80, 20, 0, 0])) == 0.25
    assert hot_share(torch.tensor([79, 21, 0, 0])) == 0.5
    assert hot_share(torch.tensor([1, 1, 1, 1, 1])) == 0.8
    assert hot_share(torch.zeros(4, dtype=torch.int64)) == 0


def test_upstreams_folder_alone_is_read_too(text, tmp_path):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    profile(folder, tmp_path / "p", texts=[text], window=64, device="cpu", progress=False)
    assert torch.equal(read_counts(tmp_path / "p" / "activation", 2, 128), read_counts(tmp_path / "p", 2, 128))


def test_a_second_run_replaces_the_first(text, tmp_path):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    options = {"texts": [text], "window": 64, "device": "cpu", "progress": False}
    profile(folder, tmp_path / "p", **options)
    first = read_counts(tmp_path / "p", 2, 128)
    profile(folder, tmp_path / "p", tokens=128, **options)
    assert read_counts(tmp_path / "p", 2, 128).sum() < first.sum()


@pytest.mark.parametrize("activation", ["silu"])
def test_a_model_whose_neurons_are_never_zero(activation, text, tmp_path):
    folder = write_checkpoint(Shape(activation=activation), tmp_path / "m")
    with pytest.raises(PowerQuantUnsupportedError, match="SILU model, whose neurons are never exactly zero.*relufy"):
        profile(folder, tmp_path / "p", texts=[text])
    assert not (tmp_path / "p").exists()


def test_refusals(text, tmp_path):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    (tmp_path / "file").write_text("")
    for output, options, message in (
        ("file", {}, "cannot write .*file"),
        ("p", {"device": "tpu9"}, "device must be one that PyTorch finds here"),
        ("p", {"tokens": 10**6}, "the texts give"),
        ("p", {"texts": [tmp_path / "none"]}, "cannot read .*none"),
    ):
        with pytest.raises(PowerQuantConfigError, match=message):
            profile(folder, tmp_path / output, **({"texts": [text], "progress": False} | options))
    assert not (tmp_path / "p" / "profile.json").exists()
    # what is no number is not zero, but no active neuron either
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name] * torch.nan}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PowerQuantConfigError, match="layer 1 of .*no finite numbers"):
        profile(folder, tmp_path / "p", texts=[text], progress=False)


def test_command(text, tmp_path, capsys):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    options = ["--text", str(text), "--tokens", "256", "--window", "64", "--device", "cpu"]
    assert main(["profile", str(folder), "-o", str(tmp_path / "p"), *options]) == 0
    out = capsys.readouterr()
    assert "2 layers, float32 on cpu" in out.err and "256 tokens in" in out.out
    assert main(["profile", str(folder), "-o", str(tmp_path / "p"), *options, "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["tokens"] == 256 and out.err == ""
    assert main(["profile", str(tmp_path / "none"), "-o", str(tmp_path / "p")]) == 1
    assert capsys.readouterr().err.startswith("powerquant: cannot load")
