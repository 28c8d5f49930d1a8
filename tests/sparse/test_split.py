"""Plans of hot neurons: the file read back by gguf's own reader and by ours, budgets, order of layers, refusals."""

import json

import numpy as np
import pytest
import torch

from sparse.models import SHAPES, Shape, write_checkpoint
from sparse.reference import _open
from vllm_powerquant.cli import main
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError
from vllm_powerquant.sparse.convert import convert
from vllm_powerquant.sparse.header import read_tensors
from vllm_powerquant.sparse.split import Split, parse_bytes, read_split, split, write_split

gguf = pytest.importorskip("gguf")

LAYERS = 12
SHAPE = Shape(intermediate_size=512, num_layers=LAYERS)
ENOUGH = 1 << 20  # bytes, of some groups


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(type) -> a sparse file of 12 layers of 512 neurons."""
    folder = tmp_path_factory.mktemp("split")
    write_checkpoint(SHAPE, folder / "m")
    made = {}

    def get(dtype: str = "f16"):
        if dtype not in made:
            made[dtype] = folder / f"{dtype}.gguf"
            convert(folder / "m", made[dtype], dtype=dtype, predictor=folder / "m" / "predictor", progress=False)
        return made[dtype]

    return get


def write_counts(folder, counts) -> None:
    (folder / "activation").mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(counts):
        torch.save(row, folder / "activation" / f"activation_{i}.pt")


@pytest.fixture
def profiled(tmp_path):
    """Every layer's hot neurons are others, and each layer is a little hotter than the one before."""
    g = torch.Generator().manual_seed(5)
    counts = torch.stack([torch.randperm(512, generator=g) + 10 * i for i in range(LAYERS)])
    write_counts(tmp_path / "profile", counts)
    return tmp_path / "profile", counts


def brute_force(counts, groups: int) -> int:
    """The most activations that `groups` groups of 256 can hold, taking every layer's best first."""
    sums = [row.sort(descending=True).values.view(-1, 256).sum(1) for row in counts]
    return int(torch.cat(sums).sort(descending=True).values[:groups].sum())


@pytest.mark.parametrize("dtype", ["f16", "q4_0", "f32"])
def test_a_plan_fills_the_budget_with_the_hottest(dtype, model, profiled, tmp_path):
    folder, counts = profiled
    neuron_bytes = 3 * {"f16": 128, "q4_0": 36, "f32": 256}[dtype]
    budget = 256 * neuron_bytes * 5 + 100
    plan = split(model(dtype), folder, budget, tmp_path / "m.gpuidx")
    assert plan.neuron_bytes == [neuron_bytes] * LAYERS
    assert plan.used == budget - 100 and sum(plan.hot) == 5 * 256 and plan.group == 256
    got = read_split(tmp_path / "m.gpuidx")
    assert got.capacity == budget and got.intermediate_sizes == [512] * LAYERS
    held = sum(int(row[torch.from_numpy(ids).long()].sum()) for row, ids in zip(counts, got.hot, strict=True))
    assert held == brute_force(counts, 5)
    assert plan.covered == pytest.approx(held / int(counts.sum()), abs=1e-5)


def test_the_file_as_gguf_reads_it(model, profiled, tmp_path):
    """Layers by number, not by name: of more than 10, layer 2 does not get layer 10's neurons."""
    folder, counts = profiled
    split(model(), folder, 256 * 384 * LAYERS + 256 * 384 * 3, tmp_path / "m.gpuidx")
    assert (tmp_path / "m.gpuidx").read_bytes()[:8] == b"PWRI\3\0\0\0"
    reader = _open(tmp_path / "m.gpuidx")
    entries = {key: field.contents() for key, field in reader.fields.items()}
    assert entries["general.architecture"] == "generic.gpu_index"
    assert entries["generic.gpu_index.block_count"] == LAYERS
    assert entries["split.vram_capacity"] == 256 * 384 * (LAYERS + 3)
    assert reader.fields["generic.gpu_index.block_count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["split.vram_capacity"].types == [gguf.GGUFValueType.UINT64]
    names = [f"blk.{i}.{part}" for i in range(LAYERS) for part in ("gpu_idx", "gpu_bucket")]
    assert [tensor.name for tensor in reader.tensors] == names
    for i, row in enumerate(counts):
        on_gpu, bucket = (tensor.data for tensor in reader.tensors[2 * i : 2 * i + 2])
        assert on_gpu.dtype == bucket.dtype == np.int32 and on_gpu.shape == (512,)
        want = row.sort(descending=True).indices[: len(bucket)].sort().values
        assert bucket.tolist() == want.tolist() == np.flatnonzero(on_gpu).tolist()
        assert len(bucket) in (256, 512)


@pytest.mark.parametrize(("budget", "hot"), [(512 * 384 * LAYERS, 512), (10**12, 512)])
def test_everything(budget, hot, model, profiled, tmp_path):
    plan = split(model(), profiled[0], budget, tmp_path / "m.gpuidx")
    assert plan.hot == [hot] * LAYERS and plan.covered == plan.hot_share == 1
    got = read_split(tmp_path / "m.gpuidx")
    assert [len(ids) for ids in got.hot] == [hot] * LAYERS and got.capacity == budget


def test_every_family_has_neurons_to_place(tmp_path):
    for name, matrices, size in (("tiny", 3, 64), ("tiny-bamboo", 3, 64), ("tiny-falcon", 2, 128), ("tiny-opt", 2, 128)):
        folder = write_checkpoint(SHAPES[name], tmp_path / name)
        convert(folder, tmp_path / "m.gguf", predictor=folder / "predictor", progress=False)
        write_counts(tmp_path / name / "p", torch.ones(2, 128, dtype=torch.int64))
        plan = split(tmp_path / "m.gguf", tmp_path / name / "p", 128 * matrices * size * 2, tmp_path / "m.gpuidx")
        assert plan.neuron_bytes == [matrices * size * 2] * 2
        # equal counts: the first layer first
        assert plan.hot == [128, 0] and plan.group == 128


def test_files_that_contradict_themselves(tmp_path):
    path = tmp_path / "m.gpuidx"
    ids = np.array([1, 4], np.int32)
    write_split(path, Split(7, [ids, ids], [32, 32]))
    got = read_split(path)
    assert got.capacity == 7 and [x.tolist() for x in got.hot] == [[1, 4], [1, 4]]
    whole = path.read_bytes()
    _, tensors = read_tensors(path)
    at = tensors[3].start
    path.write_bytes(whole[:at] + np.array([1, 5], "<i4").tobytes() + whole[at + 8 :])
    with pytest.raises(PowerQuantConfigError, match="layer 1's gpu_idx and gpu_bucket differ"):
        read_split(path)
    for length in range(0, len(whole) - 32, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(PowerQuantConfigError):
            read_split(path)
    path.write_bytes(b"GGUF" + whole[4:])
    with pytest.raises(PowerQuantConfigError, match="no gpuidx file: it is GGUF"):
        read_split(path)


def test_sizes():
    for text, want in {"0": 0, "1500": 1500, "2GiB": 2 << 30, "1.5 GB": 1_500_000_000, "3 mib": 3 << 20, "1.5": 1}.items():
        assert parse_bytes(text) == want
    for text in ("-1", "2 furlongs", "", "GiB", "1e9", str(1 << 63), "9999999999GiB"):
        with pytest.raises(PowerQuantConfigError, match="budget"):
            parse_bytes(text)


def test_refusals(model, profiled, tmp_path):
    folder, counts = profiled
    output = tmp_path / "out" / "m.gpuidx"
    output.parent.mkdir()
    write_checkpoint(SHAPE, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "dense.gguf", progress=False)
    with pytest.raises(PowerQuantUnsupportedError, match="dense.gguf is no sparse model.*powerquant convert"):
        split(tmp_path / "dense.gguf", folder, ENOUGH, output)
    write_split(tmp_path / "x.gpuidx", Split(0, [np.empty(0, np.int32)], [32]))
    with pytest.raises(PowerQuantUnsupportedError, match="x.gpuidx is no sparse model"):
        split(tmp_path / "x.gpuidx", folder, ENOUGH, output)
    (tmp_path / "text").write_text("none")
    for path, message in ((tmp_path / "text", "is no model file"), (tmp_path / "nothing", "cannot read")):
        with pytest.raises(PowerQuantConfigError, match=message):
            split(path, folder, ENOUGH, output)
    for budget in (-1, 0, 40, 256 * 384 - 1):
        with pytest.raises(PowerQuantConfigError, match=f"a group of 256 neurons.* got {budget}; give 98304 or more"):
            split(model(), folder, budget, output)
    kept = model().read_bytes()
    for path in (model(), tmp_path / "text"):
        with pytest.raises(PowerQuantConfigError, match=f"{path.name} is there and is no gpuidx file"):
            split(model(), folder, 1 << 20, path)
    assert model().read_bytes() == kept and (tmp_path / "text").read_text() == "none"
    with pytest.raises(PowerQuantConfigError, match="give a file in an existing folder"):
        split(model(), folder, ENOUGH, tmp_path / "nowhere" / "m.gpuidx")
    with pytest.raises(PowerQuantConfigError, match="profile must be a folder.*powerquant profile"):
        split(model(), tmp_path / "none", ENOUGH, output)
    for change, message in (
        (counts[:-1], "activation_11.pt can't be read .*the model has 12 layers"),
        (torch.cat([counts, counts[:1]]), "it has activation_12.pt, the model 12 layers"),
        (counts[:, :256], "counts of 512 neurons, none below 0, got .256."),
        (-counts, "none below 0"),
    ):
        other = tmp_path / f"profile-{len(message)}-{len(change)}"
        write_counts(other, [row.clone() for row in change])
        with pytest.raises(PowerQuantConfigError, match=message):
            split(model(), other, ENOUGH, output)
    (folder / "profile.json").write_text(json.dumps({"num_layers": 12, "intermediate_size": 1536}))
    with pytest.raises(PowerQuantConfigError, match="of another model: intermediate_size 1536, the model's 512"):
        split(model(), folder, ENOUGH, output)
    (folder / "profile.json").unlink()
    (folder / "activation" / "activation_3.pt").write_bytes(b"PK")
    with pytest.raises(PowerQuantConfigError, match="activation_3.pt can't be read"):
        split(model(), folder, ENOUGH, output)
    assert not list(output.parent.iterdir())


def test_command(model, profiled, tmp_path, capsys):
    output = tmp_path / "m.gpuidx"
    command = ["split", str(model()), "--profile", str(profiled[0]), "--budget", "1MiB", "-o", str(output)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "m.gpuidx: " in out and "of all activations" in out
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["budget"] == 1 << 20
        and report["used"] <= 1 << 20
        and sum(report["hot"]) == sum(map(len, read_split(output).hot))
    )
    assert main([*command[:5], "lots", *command[6:]]) == 1
    assert "a budget is a number of bytes" in capsys.readouterr().err
