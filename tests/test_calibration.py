"""Calibration files, and the command that makes them from a real model."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import save_file
from transformers import Gemma3TextConfig, LlamaConfig

from vllm_powerquant import cli
from vllm_powerquant.calibration import FORMAT, Calibration, KeyStatistics, ModelShape, key_statistics
from vllm_powerquant.errors import PowerQuantConfigError
from vllm_powerquant.model import prepare_model

CONFIG = LlamaConfig(hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)


def calibration() -> Calibration:
    centres = torch.arange(3 * 2 * 64).float().reshape(3, 2, 64)
    return Calibration(KeyStatistics(centres, (centres % 3 - 1).exp2()), ModelShape.of(CONFIG), "a model", 99)


def test_shape_of_a_model():
    rope = '{"rope_theta": 10000.0, "rope_type": "default"}'
    assert ModelShape.of(CONFIG) == ModelShape("llama", 3, 2, 64, 4, 256, 512, rope)
    assert ModelShape.of(Gemma3TextConfig()).rope.count("rope_theta") == 2  # of sliding and of full layers


def test_a_file_holds_what_was_saved(tmp_path):
    calibration().save(tmp_path / "x.safetensors")
    got = Calibration.load(tmp_path / "x.safetensors")
    frames = got.keys.frames()
    assert torch.equal(frames[:, :, 0], calibration().keys.centres)
    assert torch.equal(frames[:, :, 1], calibration().keys.scales)
    assert torch.equal(frames[:, :, 2] * frames[:, :, 1], torch.ones(3, 2, 64))
    assert (got.shape, got.model, got.tokens) == (ModelShape.of(CONFIG), "a model", 99)
    got.check(CONFIG, "x")
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o444 == 0o444 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(PowerQuantConfigError, match="cannot write"):
        calibration().save(tmp_path / "missing" / "x.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layers": 4}, "layers 3, the model's 4"),
        ({"num_key_value_heads": 4}, "kv_heads 2, the model's 4"),
        ({"head_dim": 128}, "head_size 64, the model's 128"),
        ({"vocab_size": 513}, "vocabulary 512, the model's 513"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            'rope {"rope_theta": 10000.0, "rope_type": "default"}, the model\'s {"factor": 4.0, "rope_theta"',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_model_is_refused(change, words):
    other = LlamaConfig(**CONFIG.to_diff_dict() | change)
    with pytest.raises(PowerQuantConfigError) as caught:
        calibration().check(other, "x.safetensors")
    assert str(caught.value).startswith(f"x.safetensors was calibrated on a model, another model: {words}")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(
        PowerQuantConfigError, match="cannot read the calibration file .*No such file.*powerquant calibrate MODEL -o"
    ):
        Calibration.load(path)
    path.write_text("nothing of the kind")
    with pytest.raises(PowerQuantConfigError, match="is not a safetensors file"):
        Calibration.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(PowerQuantConfigError, match="no calibration that this version reads .*tensors weight"):
        Calibration.load(path)
    tensors = {name: torch.zeros(3, 2, 64) for name in ("key_centres", "key_scales")}
    for about in ({}, {"about": "{"}, {"about": "[]"}, {"about": "{}"}, {"about": '{"shape": {"layers": 3}}'}):
        save_file(tensors, path, {"format": FORMAT} | about)
        with pytest.raises(PowerQuantConfigError, match="does not say what it was made of .*; make one with"):
            Calibration.load(path)
    keys = calibration().keys
    replace(calibration(), keys=replace(keys, centres=torch.full((3, 2, 64), torch.nan))).save(path)
    with pytest.raises(PowerQuantConfigError, match="key_centres are not all finite; make one with"):
        Calibration.load(path)
    replace(calibration(), keys=replace(keys, scales=keys.scales * 0.75)).save(path)
    with pytest.raises(PowerQuantConfigError, match="key_scales should be powers of two from 1/16 to 16"):
        Calibration.load(path)


@pytest.mark.slow
def test_calibrate_writes_a_models_statistics(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("Keys of one head lie around a common mean. " * 12)
    out = tmp_path / "x.safetensors"
    assert cli.main(["calibrate", "-o", str(out), "--text", str(text), "--tokens", "100", "--runs", "1"]) == 0
    assert f"serve with POWERQUANT_CALIBRATION={out}" in capsys.readouterr().out
    folder = prepare_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt")["input_ids"][:, :100]
    with torch.inference_mode():
        keys = model(ids, use_cache=True).past_key_values.layers[7].keys
    got = Calibration.load(out)
    got.check(model.config, out)
    assert got.tokens == 100
    # the first four are sinks
    torch.testing.assert_close(got.keys.centres[7], keys[0, :, 4:].float().mean(1), rtol=1e-3, atol=1e-3)


def test_scales_balance_queries_and_keys():
    """Keys of a channel eight times as large, its queries an eighth: a scale an eighth, as far as chance goes."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    runs = [torch.randint(0, 512, (200,)).tolist() for _ in range(2)]
    before = key_statistics(model, runs).scales
    assert model.config._attn_implementation == "sdpa"
    for name, factor in (("k_proj", 8.0), ("q_proj", 1 / 8)):
        weight = getattr(model.model.layers[1].self_attn, name).weight
        # a rotary pair of every head
        weight.data.view(-1, 64, 256)[:, [5, 37]] *= factor
    after = key_statistics(model, runs).scales
    others = [i for i in range(64) if i not in (5, 37)]
    assert torch.equal(after[0], before[0])
    ratio = (after[1] / before[1]).log2()
    assert (ratio[:, [5, 37]].mean(1) - ratio[:, others].mean(1)).sub(-3).abs().max() < 0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "short.txt"], "short.txt has 3 tokens for this, 1024 are wanted"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8 text (byte 1); convert it first"),
        (["--text", "missing.txt"], "cannot read missing.txt: No such file"),
        (["--tokens", "5"], "needs 1 run or more (--runs) of 64 tokens or more (--tokens), got 2 of 5"),
        (["--runs", "0"], "got 0 of 1024"),
        (["--tokens", "8300"], "a run of 8300 tokens (--tokens) is longer than the model's context of 8192"),
        (["empty-folder"], "cannot load empty-folder: "),
        (["-o", "missing/x"], "cannot write missing/x: give a file in an existing folder"),
        (["-o", "empty-folder"], "cannot write empty-folder: give a file"),
        (["-o", "fifo"], "cannot write fifo: give a file"),
        (["-o", "short.txt"], "short.txt is there and is no calibration; give another name, or remove it first"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too little.")
    (tmp_path / "latin.txt").write_bytes(b"\x61\xe4")
    (tmp_path / "empty-folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    assert cli.main(["calibrate", "-o", "x", *arguments]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("powerquant: ") and words in message
    assert not (tmp_path / "x").exists()
