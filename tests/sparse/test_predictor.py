"""Trained predictors: how well, from file to engine, resuming, thresholds, refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse.models import SHAPES, Shape, write_checkpoint
from sparse.reference import File
from vllm_powerquant.cli import main
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError
from vllm_powerquant.sparse import lowrank
from vllm_powerquant.sparse.activations import feed_forwards
from vllm_powerquant.sparse.checkpoint import Predictors
from vllm_powerquant.sparse.convert import convert
from vllm_powerquant.sparse.lowrank import BINS, EDGES, Counts, LowRank, Start, Training, choose, first_guess
from vllm_powerquant.sparse.predictor import train_predictors
from vllm_powerquant.sparse.text import find_checkpoint, load_causal_lm, load_tokenizer

pytest.importorskip("transformers")

# of neurons computed, at a recall of 98 %, where about a tenth is active: each family's tiny model decides in 32 dimensions
FAMILIES = {"tiny": 0.2, "tiny-bamboo": 0.2, "tiny-falcon": 0.2, "tiny-falcon-new": 0.3, "tiny-opt": 0.3}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(letters(1, 20_000))
    return path


OPTIONS = {"window": 64, "device": "cpu", "progress": False}
QUICK = Training(epochs=2, batch=128)  # where it does not matter how well
GOOD = Training(epochs=15)


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """name -> (checkpoint, folder of predictors, report); trained once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = write_checkpoint(SHAPES[name], tmp_path_factory.mktemp(name) / "m")
            output = tmp_path_factory.mktemp(name) / "predictor"
            made[name] = (
                folder,
                output,
                train_predictors(folder, output, texts=[text], rank=64, recall=0.98, training=GOOD, **OPTIONS),
            )
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_decides_in_few_dimensions_is_predicted_well(name, trained):
    _, output, report = trained(name)
    total = report.total
    assert total["recall"] > 0.97
    assert 0.05 < total["predicted_share"] < FAMILIES[name]
    assert total["kept"] > total["recall"]
    assert json.loads((output / "report.json").read_text()) == report.as_dict()
    assert json.loads((output / "config.json").read_text()) == {"sparse_threshold": report.threshold}
    assert not (output / "work" / "inputs").exists()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_report_is_what_the_files_do(name, trained, text):
    """Recomputed from the written predictors and the model, at every point of the report."""
    folder, output, report = trained(name)
    loaded = load_causal_lm(folder, device="cpu")
    predictors = Predictors(output, loaded.source.shape)
    assert predictors.threshold == report.threshold and predictors.ranks == [64, 64]
    from vllm_powerquant.sparse.activations import read_windows, watched
    from vllm_powerquant.sparse.text import token_windows

    windows = token_windows(loaded.tokenizer, [text], 64)
    held_out = windows[torch.arange(len(windows)) % 10 == 9]
    layers = feed_forwards(loaded)
    seen = [[], []]
    with watched([x.norm for x in layers], lambda i, p: seen[i].append(p)):
        for _ in read_windows(loaded, held_out, "", progress=False):
            pass
    scores, active = [], []
    for i, layer in enumerate(layers):
        p = torch.cat(seen[i]).half().float()
        scores.append(LowRank(predictors.load(i, "fc1"), predictors.load(i, "fc2")).scores(p))
        active.append(layer.values(p) != 0)
    scores, active = torch.stack(scores), torch.stack(active)
    for point in [*report.points, {"threshold": report.threshold, **report.total}]:
        chosen = scores >= point["threshold"]
        assert point["recall"] == pytest.approx(float((chosen & active).sum() / active.sum()), abs=2e-3)
        assert point["predicted_share"] == pytest.approx(float(chosen.float().mean()), abs=2e-3)
    assert [point["recall_wanted"] for point in report.points] == [0.9, 0.95, 0.98, 0.99, 0.995]
    recalls = [point["recall"] for point in report.points]
    assert recalls == sorted(recalls) and recalls[0] < 0.95


def letters(seed: int, count: int) -> str:
    """In no order: the models are random, so any text serves, as long as it does not repeat itself."""
    found = torch.randint(97, 123, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(chr(c) if i % 6 else " " for i, c in enumerate(found))


def other_ids(folder: Path) -> list[int]:
    """48 tokens of text that was not trained on."""
    return load_tokenizer(find_checkpoint(folder))(letters(2, 400))["input_ids"][:48]


@pytest.mark.parametrize("name", ["tiny", "tiny-bamboo"])
def test_from_the_checkpoint_to_logits(name, trained, tmp_path):
    """The sparse file's logits stay close to the dense ones, by the reference implementation of the format."""
    folder, output, _ = trained(name)
    convert(folder, tmp_path / "m.gguf", dtype="f32", predictor=output, progress=False)
    file, ids = File(tmp_path / "m.gguf"), other_ids(folder)
    got, share = file.logits(ids)
    want, _ = file.logits(ids, sparse=False)
    assert 0.05 < share < 0.3
    assert ((got - want).norm() / want.norm()).item() < 0.1


def test_the_engine_runs_it(trained, engine_server, tmp_path):
    """Sparse against dense in the engine that is built or named: few differences."""
    pytest.importorskip("gguf")
    folder, output, _ = trained("tiny")
    ids = other_ids(folder)
    (tmp_path / "ids").write_text(" ".join(map(str, ids)))
    logits = {}
    for kind, predictor in (("sparse", output), ("dense", None)):
        convert(folder, tmp_path / f"{kind}.gguf", dtype="f32", predictor=predictor, progress=False)
        command = [engine_server.parent / "powerinfer-bench", "--model", tmp_path / f"{kind}.gguf", "--threads", "1"]
        command += ["--tokens", tmp_path / "ids", "--logits", tmp_path / kind]
        subprocess.run(command, check=True, capture_output=True)
        logits[kind] = torch.from_numpy(np.fromfile(tmp_path / kind, np.float32).reshape(len(ids), -1))
    error = (logits["sparse"] - logits["dense"]).norm() / logits["dense"].norm()
    assert 0 < error < 0.1
    assert (logits["sparse"].argmax(1) == logits["dense"].argmax(1)).float().mean() > 0.9


def test_training_beats_the_start(text, tmp_path):
    """At a rank below what the decision takes."""
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    shares = {}
    for epochs, rate in ((1, 1e-9), (10, 1e-2)):
        training = Training(epochs=epochs, learning_rate=rate)
        done = train_predictors(
            folder, tmp_path / f"p{epochs}", texts=[text], rank=32, recall=0.98, training=training, **OPTIONS
        )
        shares[epochs] = done.total["predicted_share"]
    assert shares[10] < 0.85 * shares[1]


def test_the_start_is_the_best_linear_map_of_its_rank(trained):
    folder, _, _ = trained("tiny")
    loaded = load_causal_lm(folder, device="cpu")
    layer = feed_forwards(loaded)[0]
    p = torch.randn(3000, 64, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, 64)
    start = Start.of(layer, p.half())
    assert float(start.energy.sum()) == pytest.approx(1, abs=1e-6)
    rows = p / p.norm(dim=1, keepdim=True) * 8
    weight = layer.gate.weight.detach() * layer.norm.weight.detach()
    values = rows @ weight.T
    values = (values / values.square().mean(0).sqrt()).double()
    for rank in (32, 64, 128):
        guess = first_guess(start, rank)
        white = rows @ start.whiten
        linear = ((white @ guess.fc1.T).relu() @ guess.fc2.T).double() / lowrank.FIRST_SCALE
        # Eckart and Young: what the singular values beyond leave of all
        singular = torch.linalg.svdvals(values)
        want = singular[rank // 2 :].square().sum() / singular.square().sum()
        got = (values - linear).square().sum() / values.square().sum()
        assert float(got) == pytest.approx(float(want), abs=2e-3)


def test_bins_count_scores(trained):
    folder, _, _ = trained("tiny")
    loaded = load_causal_lm(folder, device="cpu")
    layer = feed_forwards(loaded)[1]
    g = torch.Generator().manual_seed(4)
    p = torch.randn(5000, 64, generator=g).half()
    predictor = LowRank(torch.randn(32, 64, generator=g), torch.randn(128, 32, generator=g))
    counts = Counts.of(predictor, layer, p)
    scores = predictor.scores(p)
    values = layer.values(p.float()).detach()
    above = counts.at_least()
    for edge in (0, 1000, 2048, 2300, BINS - 2):
        want = scores.double() >= EDGES[edge]
        assert above[0, edge] == want.sum()
        assert above[1, edge] == (want & (values != 0)).sum()
        size = values.abs() * layer.down.weight.detach().norm(dim=0)
        torch.testing.assert_close(above[2, edge], size[want].double().sum(), rtol=1e-4, atol=1e-4)
    assert counts.predicted.sum() == scores.numel() and not (EDGES == 0).any()


def made_counts(active: dict[int, int], idle: dict[int, int]) -> Counts:
    """By the edge at or above which scores lie."""
    tensors = [torch.zeros(BINS, dtype=torch.float64) for _ in range(3)]
    for edge, n in active.items():
        for tensor in tensors:
            tensor[edge + 1] += n
    for edge, n in idle.items():
        tensors[0][edge + 1] += n
    return Counts(*tensors)


def test_thresholds_are_as_high_as_the_recall_allows():
    easy = made_counts({3000: 900, 2500: 100}, {1000: 5000})
    hard = made_counts({2600: 50, 2000: 50}, {2100: 5000})
    assert choose([easy], 0.9, 0).tolist() == [3000]
    assert choose([easy], 0.91, 0).tolist() == [2500]
    # 95 % of all 1100 without the hard layer's lower half
    assert choose([easy, hard], 0.95, 0).tolist() == [2500, 2500]
    # which a floor asks for
    assert choose([easy, hard], 0.95, 0.9).tolist() == [2500, 2000]
    assert choose([easy, hard], 0.999, 0).tolist() == [2000, 2000]


def test_a_layer_with_a_threshold_of_its_own_is_scaled(text, tmp_path, monkeypatch):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    options = {"texts": [text], "rank": 32, "training": QUICK, **OPTIONS}
    train_predictors(folder, tmp_path / "p", **options)
    plain = load_file(tmp_path / "p" / "work" / "layer_1.safetensors")

    def chosen(edges):
        monkeypatch.setattr(lowrank, "choose", lambda *args: torch.tensor(edges))
        report = train_predictors(folder, tmp_path / "p", **options)
        return report, [load_file(tmp_path / "p" / f"model_{i}.safetensors")["fc2.weight"] for i in range(2)]

    report, fc2 = chosen([2000, 1900])
    assert report.threshold == EDGES[2000]
    torch.testing.assert_close(fc2[1], plain["fc2"] * float(EDGES[2000] / EDGES[1900]))
    above = Counts(*(plain[f"report.{name}"] for name in ("predicted", "active", "kept"))).at_least()[:, 1900]
    assert report.layers[1]["recall"] == pytest.approx(float(above[1] / plain["report.active"].sum()), abs=1e-5)
    # of unlike signs: the lowest for both
    report, fc2 = chosen([2100, 1900])
    assert report.threshold == EDGES[1900] and torch.equal(fc2[1], plain["fc2"])


def test_an_interrupted_run_goes_on(text, tmp_path, monkeypatch):
    folder = write_checkpoint(replace(SHAPES["tiny"], num_layers=3), tmp_path / "m")
    options = {"texts": [text], "rank": 32, "training": QUICK, **OPTIONS}
    whole = train_predictors(folder, tmp_path / "whole", **options)
    real, calls = lowrank.train, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(lowrank, "train", interrupted)
    said = []
    with pytest.raises(KeyboardInterrupt):
        train_predictors(folder, tmp_path / "p", **options, say=said.append)
    assert said[-1] == "stopped with 1 of 3 layers finished; the same command goes on"
    assert (tmp_path / "p" / "work" / "layer_0.safetensors").is_file()
    assert not list((tmp_path / "p").glob("model_*"))
    said = []
    report = train_predictors(folder, tmp_path / "p", **options, say=said.append)
    assert said[-1] == "1 of 3 layers are finished, going on" and len(calls) == 4
    # the same numbers as without the interruption, to the bit
    assert report.threshold == whole.threshold and report.total == whole.total
    for i in range(3):
        one, other = (load_file(tmp_path / name / f"model_{i}.safetensors") for name in ("whole", "p"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    # finished: another recall needs no training
    lower = train_predictors(folder, tmp_path / "p", **options, recall=0.9)
    assert len(calls) == 4 and lower.threshold > report.threshold and lower.total["recall"] < report.total["recall"]


def test_a_folder_begun_otherwise(text, tmp_path):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    options = {"texts": [text], "rank": 32, "training": QUICK, **OPTIONS}
    train_predictors(folder, tmp_path / "p", **options)
    for change, message in (
        ({"rank": 64}, "rank 32, now 64"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"rank": None}, "rank 32, now chosen by a budget of 0.1"),
        ({"training": replace(QUICK, epochs=3)}, "epochs 2, now 3"),
        ({"tokens": 1280}, "model_and_text .*tokens .*, now 1280"),
    ):
        with pytest.raises(PowerQuantConfigError, match=f"p was begun with other settings .{message}.*--restart"):
            train_predictors(folder, tmp_path / "p", **(options | change))
    assert train_predictors(folder, tmp_path / "p", **(options | {"seed": 1}), restart=True).layers
    # weights that changed under the same name
    write_checkpoint(SHAPES["tiny"], tmp_path / "m", seed=9)
    with pytest.raises(PowerQuantConfigError, match="model_and_text"):
        train_predictors(folder, tmp_path / "p", **(options | {"seed": 1}))
    # predictors from elsewhere are not overwritten
    with pytest.raises(PowerQuantConfigError, match="holds model_0.pt, which was made elsewhere"):
        train_predictors(folder, folder / "predictor", **options)
    damaged = tmp_path / "p" / "work" / "layer_0.safetensors"
    damaged.write_bytes(b"x")
    write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    with pytest.raises(PowerQuantConfigError, match="layer_0.safetensors is damaged .*delete it"):
        train_predictors(folder, tmp_path / "p", **(options | {"seed": 1}))


def test_a_second_run_in_the_same_folder_is_refused(text, tmp_path, monkeypatch):
    """Another process holds the folder, until it is killed."""
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    options = {"texts": [text], "rank": 32, "training": QUICK, **OPTIONS}
    output = tmp_path / "p"
    output.mkdir()
    hold = "import sys, time, pathlib; from vllm_powerquant.files import sole_use\n"
    hold += "with sole_use(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(PowerQuantConfigError, match=f"another run is writing .*p .process {other.pid}.; wait"):
            train_predictors(folder, output, **options, restart=True)
        assert [path.name for path in output.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()
    # held while training
    real = lowrank.train

    def with_another(*args, **kwargs):
        with pytest.raises(PowerQuantConfigError, match=f"another run is writing .*p .process {os.getpid()}"):
            train_predictors(folder, output, **options)
        return real(*args, **kwargs)

    monkeypatch.setattr(lowrank, "train", with_another)
    train_predictors(folder, output, **options)
    assert not (output / ".lock").exists()


def test_a_rank_by_budget(text, tmp_path):
    folder = write_checkpoint(Shape(intermediate_size=512), tmp_path / "m")
    report = train_predictors(folder, tmp_path / "p", texts=[text], budget=0.45, training=QUICK, **OPTIONS)
    # 3 x 64 x 512 x 0.45 / (64 + 512) = 76.8
    assert [row["rank"] for row in report.layers] == [64, 64] and report.weights_share == 0.375


def test_a_model_that_has_nothing_to_skip(text, tmp_path):
    folder = write_checkpoint(Shape(activation="silu"), tmp_path / "m")
    with pytest.raises(PowerQuantUnsupportedError, match="cannot train predictors for .*SILU model.*powerquant relufy"):
        train_predictors(folder, tmp_path / "p", texts=[text])
    assert not (tmp_path / "p").exists()


def test_refusals(text, tmp_path):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    (tmp_path / "file").write_text("")
    for change, message in (
        ({"rank": 33}, "rank must be a multiple of 32 from 32 to 128, got 33"),
        ({"rank": 160}, "from 32 to 128, got 160"),
        ({"rank": 0}, "from 32 to 128, got 0"),
        ({"recall": 1.0}, "recall must lie between 0 and 1, such as 0.99, got 1"),
        ({"budget": 0.0}, "budget must be above 0 and at most 1, got 0"),
        ({"training": Training(epochs=0)}, "epochs, batch, .* must be above 0, got 0"),
        ({"seed": -1}, "seed must be 0 to 4294967295, got -1"),
        ({"seed": 10**20}, "seed must be 0 to 4294967295, got 1000"),
        ({"tokens": 576}, "training needs 10 windows of text or more, got 9 of 64 tokens"),
        ({"device": "tpu9"}, "device must be one that PyTorch finds here"),
    ):
        with pytest.raises(PowerQuantConfigError, match=message):
            train_predictors(folder, tmp_path / "p", **({"texts": [text], **OPTIONS} | change))
    assert not (tmp_path / "p" / "work").exists()
    before = (folder / "config.json").read_text()
    with pytest.raises(PowerQuantConfigError, match="holds the config.json of something else"):
        train_predictors(folder, folder, texts=[text], restart=True, **OPTIONS)
    assert (folder / "config.json").read_text() == before
    with pytest.raises(PowerQuantConfigError, match="cannot write .*file"):
        train_predictors(folder, tmp_path / "file", texts=[text], **OPTIONS)


def test_command(text, tmp_path, capsys):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    command = ["train-predictor", str(folder), "-o", str(tmp_path / "p"), "--text", str(text), "--window", "64"]
    command += ["--device", "cpu", "--rank", "32", "--epochs", "1", "--recall", "0.95"]
    assert main(command) == 0
    out = capsys.readouterr()
    assert "2 layers, float32 on cpu" in out.err and "% of active neurons and predicts" in out.out
    assert main([*command, "--json"]) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert out.err == "" and report["recall_wanted"] == 0.95 and len(report["layers"]) == 2
    assert main([*command[:-5], "auto", *command[-4:]]) == 1
    assert "begun with other settings" in capsys.readouterr().err
