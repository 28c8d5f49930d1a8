"""The converter: tensors, metadata and tokenizer against the checkpoint, logits against transformers, refusals.

The files under test are made of random models (models.py), so these tests also hold the models to their promise: sparse
and dense give the same logits.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse.models import _HF_LAYER, _HF_TOP, SHAPES, TEXT, Shape, q4_0_exact, write_checkpoint
from sparse.reference import File
from vllm_powerquant.cli import main
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from vllm_powerquant.model import _hf_tokenizer, unpermute_rotary_rows
from vllm_powerquant.sparse import blocks
from vllm_powerquant.sparse.blocks import quantize_q6_k
from vllm_powerquant.sparse.convert import convert
from vllm_powerquant.sparse.vocabulary import read_vocabulary

gguf = pytest.importorskip("gguf")

TINY = ["tiny", "tiny-bamboo", "tiny-falcon", "tiny-falcon-new", "tiny-opt"]
IDS = torch.randint(320, (48,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name -> checkpoint folder; made once, not to be changed."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_checkpoint(SHAPES[name], tmp_path_factory.mktemp(name) / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def file(checkpoint, tmp_path_factory):
    """(name, dtype, sparse) -> the converted file, read back."""
    made = {}

    def get(name: str, dtype: str = "f32", sparse: bool = True) -> File:
        key = name, dtype, sparse
        if key not in made:
            path = tmp_path_factory.mktemp("files") / "model.gguf"
            folder = checkpoint(name)
            convert(folder, path, dtype=dtype, predictor=folder / "predictor" if sparse else None, progress=False)
            made[key] = File(path)
        return made[key]

    return get


@pytest.fixture
def own(tmp_path):
    """A tiny llama checkpoint that a test may change, after changing its shape."""

    def get(name: str = "tiny", **changes) -> Path:
        return write_checkpoint(replace(SHAPES[name], **changes), tmp_path / "own")

    return get


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def expected(folder: Path, shape: Shape) -> dict[str, torch.Tensor]:
    """The file's tensors by GGUF's names from the checkpoint's, by this module's own reckoning."""
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    found = {}
    for ours, theirs in _HF_TOP[shape.family].items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                found[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
    for layer in range(shape.num_layers):
        for ours, theirs in _HF_LAYER[shape.family].items():
            for kind in ("weight", "bias"):
                if f"{theirs.format(layer)}.{kind}" in state:
                    found[f"blk.{layer}.{ours}.{kind}"] = state.pop(f"{theirs.format(layer)}.{kind}")
        if shape.family == "falcon":
            prefix = f"transformer.h.{layer}"
            if shape.two_norms:
                # the feed-forward's norm is GGUF's attn_norm
                for kind in ("weight", "bias"):
                    found[f"blk.{layer}.attn_norm_2.{kind}"] = found.pop(f"blk.{layer}.attn_norm.{kind}")
                    found[f"blk.{layer}.attn_norm.{kind}"] = found.pop(f"blk.{layer}.ffn_norm.{kind}")
            else:
                for kind in ("weight", "bias"):
                    found[f"blk.{layer}.attn_norm.{kind}"] = state.pop(f"{prefix}.input_layernorm.{kind}")
            fused = state.pop(f"{prefix}.self_attention.query_key_value.weight")
            heads = list(fused.split(shape.head_size))
            group = shape.num_heads // shape.num_kv_heads + 2
            order = [i for i in range(len(heads)) if i % group < group - 2]
            order += [i for i in range(len(heads)) if i % group == group - 2]
            order += [i for i in range(len(heads)) if i % group == group - 1]
            found[f"blk.{layer}.attn_qkv.weight"] = torch.cat([heads[i] for i in order])
    assert not state
    return found


@pytest.mark.parametrize("dtype", ["f32", "f16", "q4_0"])
@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_the_checkpoints(name, dtype, checkpoint, file):
    shape, folder, got = SHAPES[name], checkpoint(name), file(name, dtype)
    want = expected(folder, shape)
    for layer in range(shape.num_layers):
        for kind in ("weight", "bias"):
            if f"blk.{layer}.ffn_down.{kind}" in want:
                value = want.pop(f"blk.{layer}.ffn_down.{kind}")
                want[f"blk.{layer}.ffn_down_t.{kind}"] = value.T if value.dim() == 2 else value
        predictor = torch.load(folder / "predictor" / f"model_{layer}.pt", weights_only=True)
        want |= {f"blk.{layer}.{part}": tensor.float() for part, tensor in predictor.items()}
    assert set(got.data) == set(want)
    for tensor, value in want.items():
        values = got.tensor(tensor)
        kind = got.kinds[tensor].name
        if tensor.endswith((".attn_q.weight", ".attn_k.weight")) and shape.family in ("llama", "bamboo"):
            heads = shape.num_heads if "attn_q" in tensor else shape.num_kv_heads
            values = torch.from_numpy(unpermute_rotary_rows(values.numpy(), heads).copy())
        if value.dim() == 1:
            assert kind == "F32"
        elif tensor == "output.weight" and dtype == "q4_0":
            assert kind == "Q8_0"
        elif tensor == "position_embd.weight" and dtype == "q4_0":
            assert kind == "F16"
        else:
            assert kind == dtype.upper()
        if kind == "Q4_0":
            packed = gguf.quants.quantize(value.contiguous().numpy(), gguf.GGMLQuantizationType.Q4_0)
            value = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_0))
        if kind == "Q8_0":
            assert relative_error(values, value) < 0.01
        else:
            assert torch.equal(values, value), tensor


@pytest.mark.parametrize("name", TINY)
def test_the_plain_file_differs_in_the_feed_forward_alone(name, file):
    sparse, dense = file(name, "f16"), file(name, "f16", sparse=False)
    assert (sparse.magic, dense.magic) == (b"PWRI", b"GGUF")
    assert set(sparse.entries) - set(dense.entries) == {"powerinfer.sparse_threshold"}
    for tensor in sparse.data:
        part = tensor.split(".")[2] if tensor.startswith("blk.") else tensor
        if part == "ffn_down_t":
            value = dense.tensor(tensor.replace("ffn_down_t", "ffn_down"))
            assert torch.equal(sparse.tensor(tensor), value.T if value.dim() == 2 else value)
        elif part not in ("fc1", "fc2"):
            assert np.array_equal(sparse.data[tensor], dense.data[tensor])


def transformers_logits(name: str, folder: Path) -> torch.Tensor:
    """[tokens, vocab_size] fp32; Bamboo, which transformers lacks, is Mistral with ReLU on the up projection too."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    if name == "tiny-bamboo":
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).float()
        missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not missing and not unexpected
        for layer in model.model.layers:
            mlp = layer.mlp
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(name, checkpoint, file):
    want = transformers_logits(name, checkpoint(name))
    for sparse in (True, False):
        got, _ = file(name, "f32", sparse).logits(IDS)
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("dtype", ["f32", "f16", "q4_0"])
@pytest.mark.parametrize("name", [*TINY, "small"])
def test_sparse_is_dense(name, dtype, file):
    sparse, dense = file(name, dtype), file(name, dtype, sparse=False)
    got, share = sparse.logits(IDS)
    all_neurons, positive = sparse.logits(IDS, sparse=False)
    want, _ = dense.logits(IDS)
    assert relative_error(got, all_neurons) < 1e-6
    # the down projection is the same matrix in both files, in q4_0 too
    assert relative_error(got, want) < 1e-6
    assert 0.06 < share < 0.15
    # beside the positive ones: opt's that biases switch off, and predictions of exactly 0, which products of q4_0 can give
    assert positive <= share + 1e-4 and share - positive < (0.02 if name == "tiny-opt" else 4e-3)


@pytest.mark.parametrize("name", [*TINY, "small"])
def test_sparse_is_dense_with_rounded_activations(name, tmp_path):
    """Q8_0 inputs may hide a neuron near zero; a margin of 0.1 is beyond their error."""
    folder = write_checkpoint(SHAPES[name], tmp_path / "m", margin=0.1)
    convert(folder, tmp_path / "m.gguf", dtype="q4_0", predictor=folder / "predictor", progress=False)
    got = File(tmp_path / "m.gguf")
    sparse, share = got.logits(IDS, q8=True)
    dense, positive = got.logits(IDS, sparse=False, q8=True)
    assert relative_error(sparse, dense) < 1e-6
    assert positive < share < positive + 0.03
    assert relative_error(dense, got.logits(IDS, sparse=False)[0]) < 0.02


def test_a_neuron_left_out_would_show(file):
    """Against a model in which the feed-forward hardly matters, where sparse would be dense whatever is skipped."""
    sparse = file("tiny")
    want, _ = sparse.logits(IDS, sparse=False)
    sparse.entries["powerinfer.sparse_threshold"] = 0.5
    got, _ = sparse.logits(IDS)
    sparse.entries["powerinfer.sparse_threshold"] = 0.0
    assert relative_error(got, want) > 0.01


def test_the_down_projection_survives_q4_0_both_ways():
    exact = q4_0_exact(96, 128, 0.05, torch.Generator().manual_seed(1)).float()
    exact[::32] = 0  # what the models do
    for weight in (exact, exact.T):
        packed = gguf.quants.quantize(weight.contiguous().numpy(), gguf.GGMLQuantizationType.Q4_0)
        assert np.array_equal(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_0), weight)
    assert abs(exact.std().item() / 0.05 - 1) < 0.5


@pytest.mark.parametrize("name", TINY)
def test_metadata(name, file):
    shape, got = SHAPES[name], file(name, "q4_0")
    norm = "layer_norm_rms_epsilon" if shape.family in ("llama", "bamboo") else "layer_norm_epsilon"
    want = {
        "context_length": shape.context_length,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        f"attention.{norm}": pytest.approx(1e-5),
        "vocab_size": shape.vocab_size,
    }
    if shape.family != "opt":
        want |= {"rope.freq_base": 10000.0, "rope.dimension_count": shape.head_size}
    prefix = f"{shape.family}."
    assert {key.removeprefix(prefix): value for key, value in got.entries.items() if key.startswith(prefix)} == want
    assert got.entries["general.architecture"] == shape.family
    assert got.entries["general.file_type"] == 2
    assert got.entries["powerinfer.activation"] == "relu"
    assert got.entries["powerinfer.sparse_threshold"] == 0.0


def test_opt_keeps_the_unused_rows_of_its_positions(file):
    assert file("tiny-opt").sizes["position_embd.weight"][0] == file("tiny-opt").entry("context_length") + 2


def test_a_silu_model_becomes_a_plain_file_that_says_so(own, tmp_path):
    folder = own(activation="silu")
    assert convert(folder, tmp_path / "m.gguf", dtype="f32", progress=False).activation == "silu"
    got, _ = File(tmp_path / "m.gguf").logits(IDS)
    assert relative_error(got, transformers_logits("silu", folder)) < 2e-5


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_tied_embeddings(kind, own, tmp_path):
    """Repeated in a sparse file, whose readers know no tying; left out of a plain one."""
    folder = own(tied=True)
    predictor = folder / "predictor" if kind == "sparse" else None
    convert(folder, tmp_path / "m.gguf", predictor=predictor, dtype="f32", progress=False)
    got = File(tmp_path / "m.gguf")
    assert ("output.weight" in got.data) == (kind == "sparse")
    assert relative_error(got.logits(IDS)[0], transformers_logits("tied", folder)) < 2e-5


def test_shards_bfloat16_and_predictors_in_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse.models.SHARD_BYTES", 100_000)
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m", dtype=torch.bfloat16, predictor_suffix=".safetensors")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    report = convert(folder, tmp_path / "m.gguf", predictor=folder / "predictor", dtype="f32", progress=False)
    assert report.predictor_ranks == [64, 64]
    got, _ = File(tmp_path / "m.gguf").logits(IDS)
    assert relative_error(got, transformers_logits("tiny", folder)) < 2e-5


def test_the_threshold_is_the_predictors_unless_it_is_given(own, tmp_path):
    folder = own()
    edit(folder / "predictor" / "config.json", sparse_threshold=-0.25)
    for given, want in ((None, -0.25), (0.5, 0.5), (0.0, 0.0)):
        convert(folder, tmp_path / "m.gguf", predictor=folder / "predictor", threshold=given, progress=False)
        assert File(tmp_path / "m.gguf").entries["powerinfer.sparse_threshold"] == want


def test_types_of_predictor_and_output(own, tmp_path):
    folder = own("small", num_layers=1)
    for options, predictor, output in (
        ({}, "Q4_0", "Q6_K"),
        ({"predictor_dtype": "f16", "output_dtype": "q8_0"}, "F16", "Q8_0"),
        ({"output_dtype": "f16"}, "Q4_0", "F16"),
    ):
        convert(folder, tmp_path / "m.gguf", dtype="q4_0", predictor=folder / "predictor", progress=False, **options)
        kinds = File(tmp_path / "m.gguf").kinds
        assert (kinds["blk.0.fc1.weight"].name, kinds["blk.0.fc2.weight"].name) == (predictor, predictor)
        assert kinds["output.weight"].name == output


def test_mistral_is_llama_within_its_window(own, tmp_path):
    folder = own()
    edit(folder / "config.json", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=100)
    convert(folder, tmp_path / "m.gguf", progress=False)
    got = File(tmp_path / "m.gguf")
    assert (got.family, got.entry("context_length")) == ("llama", 100)
    assert convert(folder, tmp_path / "m.gguf", family="bamboo", progress=False).family == "bamboo"


def test_heads_of_another_size_are_named(own, tmp_path):
    """head_dim other than hidden_size / heads: here 4 heads of 32 at hidden_size 64."""
    folder = own()
    state = load_file(folder / "model.safetensors")
    for layer in range(2):
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            state[name] = torch.cat([state[name], state[name].flip(0)])
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        state[name] = torch.cat([state[name], state[name].flip(1)], 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", head_dim=32)
    convert(folder, tmp_path / "m.gguf", dtype="f32", progress=False)
    got = File(tmp_path / "m.gguf")
    assert (got.entry("attention.key_length"), got.entry("rope.dimension_count")) == (32, 32)
    assert relative_error(got.logits(IDS)[0], transformers_logits("wide", folder)) < 2e-5


@pytest.mark.parametrize("name", ["OPTForCausalLM", "OPTModel"])
def test_opt_saved_without_the_class_around_it(name, own, file, tmp_path):
    folder = own("tiny-opt")
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", architectures=[name])
    convert(folder, tmp_path / "m.gguf", dtype="f32", predictor=folder / "predictor", progress=False)
    got, want = File(tmp_path / "m.gguf"), file("tiny-opt")
    assert list(got.data) == list(want.data)
    assert all(torch.equal(got.tensor(name), want.tensor(name)) for name in want.data)
    save_file(
        state | {"decoder.layers.0.fc3.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(PowerQuantUnsupportedError, match="the first is decoder.layers.0.fc3.weight"):
        convert(folder, tmp_path / "m.gguf", progress=False)
    name = "decoder.final_layer_norm.bias"
    save_file(state | {f"model.{name}": state[name].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PowerQuantConfigError, match=f"has (model.)?{name} and (model.)?{name}, which are the same tensor"):
        convert(folder, tmp_path / "m.gguf", progress=False)


# q6_k


def test_q6_k_is_read_back_by_gguf():
    g = np.random.default_rng(0)
    rows = g.standard_normal((8, 512), np.float32) * np.exp(g.uniform(-9, 9, (8, 1))).astype(np.float32)
    rows[2, 256:] = 0
    rows[3, 16:32] = 0
    packed = quantize_q6_k(rows)
    assert packed.shape == (8, 420) and packed.dtype == np.uint8
    got = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q6_K)
    for row, back in zip(rows, got, strict=True):
        # a step is the largest of 16 values / 32: 1.77 sigma / 32 / sqrt(12) and the rounding of the scales
        assert np.linalg.norm(back - row) < 0.022 * np.linalg.norm(row)
    assert not got[2, 256:].any() and not got[3, 16:32].any()


def test_q6_k_keeps_what_it_can_express():
    """Integers -32..31 times a scale of each 16, with the end of the range in each group."""
    g = np.random.default_rng(1)
    codes = g.integers(-32, 32, (4, 16, 16))
    codes[..., 0] = -32
    scales = g.integers(1, 128, (4, 16, 1))
    scales[:, 0] = -128
    rows = (codes * scales * 2.0**-9).astype(np.float32).reshape(4, 256)
    assert np.array_equal(gguf.dequantize(quantize_q6_k(rows), gguf.GGMLQuantizationType.Q6_K), rows)


# tokenizers


def encoder(entries: dict):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(_hf_tokenizer(entries)))


def test_byte_level_tokens_survive(checkpoint, file):
    from tokenizers import Tokenizer

    want, entries = Tokenizer.from_file(str(checkpoint("tiny") / "tokenizer.json")), file("tiny").entries
    assert (entries["tokenizer.ggml.model"], entries["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    got = encoder(entries)
    for text in [*TEXT, "a<|im_start|>b<|im_end|>", "  spaces   and\r\n\n\nlines 12345"]:
        assert got.encode(text).ids == want.encode(text).ids
    assert entries["tokenizer.ggml.bos_token_id"] == 0
    assert entries["tokenizer.ggml.add_bos_token"] is False
    assert entries["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert "<|im_start|>assistant" in entries["tokenizer.chat_template"]


def test_tokens_beyond_the_tokenizers_are_unused(own, tmp_path):
    folder = own(vocab_size=512)
    convert(folder, tmp_path / "m.gguf", progress=False)
    entries = File(tmp_path / "m.gguf").entries
    tokens, types = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 512
    assert (tokens[-1], types[-1]) == ("[PAD511]", 5)


def test_sentencepiece_tokens_survive(own, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = own(tokenizer="spm", vocab_size=512)
    convert(folder, tmp_path / "m.gguf", progress=False)
    entries = File(tmp_path / "m.gguf").entries
    want = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = want.get_piece_size()
    assert entries["tokenizer.ggml.model"] == "llama"
    assert entries["tokenizer.ggml.tokens"][:size] == [want.id_to_piece(i) for i in range(size)]
    assert entries["tokenizer.ggml.scores"][:size] == pytest.approx([want.get_score(i) for i in range(size)])
    types = dict(zip(entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x00>"]) == (2, 3, 6)
    ids = {key: entries[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown")}
    assert ids == {"bos": want.bos_id(), "eos": want.eos_id(), "unknown": want.unk_id()}
    assert entries["tokenizer.ggml.add_bos_token"] is True and entries["tokenizer.ggml.add_space_prefix"] is True


def test_sentencepiece_with_added_tokens(own):
    pytest.importorskip("sentencepiece")
    folder = own(tokenizer="spm", vocab_size=512)
    plain = read_vocabulary(folder, {})
    size = len(plain.tokens)
    added = {str(size): {"content": "<tool>", "special": False}, str(size + 1): {"content": "<|end|>", "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added, add_bos_token=False, eos_token="<|end|>")
    got = read_vocabulary(folder, {"eos_token_id": [2]})
    assert (got.tokens[size:], got.types[size:], len(got.scores)) == (["<tool>", "<|end|>"], [4, 3], size + 2)
    assert got.special_ids["eos"] == size + 1 and got.special_ids["eot"] == 2
    assert got.flags["add_bos_token"] is False


@pytest.mark.parametrize("change", ["unigram", "nmt_nfkc", "damaged"])
def test_sentencepiece_refusals(change, own):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = own(tokenizer="spm", vocab_size=512)
    if change == "damaged":
        (folder / "tokenizer.model").write_bytes(b"\xff" * 100)
    else:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT * 5),
            model_prefix=str(folder / "tokenizer"),
            model_type="unigram" if change == "unigram" else "bpe",
            normalization_rule_name="identity" if change == "unigram" else "nmt_nfkc",
            vocab_size=150,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(
        PowerQuantError, match={"unigram": "BPE", "nmt_nfkc": "identity", "damaged": "no SentencePiece"}[change]
    ):
        read_vocabulary(folder, {})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        ([BYTE_LEVEL], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTE_LEVEL], "smollm"),
        ([split(LLAMA3), BYTE_LEVEL | {"use_regex": False}], "llama-bpe"),
        ([split(LLAMA3.replace("{1,3}", "")), BYTE_LEVEL | {"use_regex": False}], "qwen2"),
        (
            [
                {"type": "Punctuation", "behavior": "Contiguous"},
                BYTE_LEVEL,
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ],
            "falcon",
        ),
        ([{"type": "Digits", "individual_digits": False}, BYTE_LEVEL], None),
        ([split(LLAMA3), BYTE_LEVEL], None),
        ([{"type": "Metaspace"}], None),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2", "falcon", "digit-groups", "split-twice", "metaspace"],
)
def test_how_text_is_split(steps, pre, own):
    folder = own()
    single = len(steps) == 1
    edit(
        folder / "tokenizer.json",
        pre_tokenizer=steps[0] if single else {"type": "Sequence", "pretokenizers": steps},
        model=bpe(folder) | {"ignore_merges": pre == "llama-bpe"},
    )
    if pre is None:
        with pytest.raises(PowerQuantUnsupportedError, match="pre_tokenizer .*llama-bpe"):
            read_vocabulary(folder, {})
    else:
        assert read_vocabulary(folder, {}).pre == pre


def test_the_files_of_gpt2s_tokenizer(own):
    """vocab.json and merges.txt, as OPT has them, give what tokenizer.json gave."""
    folder = own()
    want = read_vocabulary(folder, {})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    edit(folder / "tokenizer_config.json", add_bos_token=True)
    got = read_vocabulary(folder, {})
    assert (got.tokens, got.merges, got.pre) == (want.tokens, want.merges, "gpt-2")
    assert got.types[0] == 3 and got.flags["add_bos_token"] is True


def test_a_template_that_begins_with_a_special_token_adds_it(own):
    folder = own()
    special = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    edit(folder / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": [special, text]})
    flags = read_vocabulary(folder, {}).flags
    assert (flags["add_bos_token"], flags["add_eos_token"]) == (True, False)


# refusals


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a checkpoint; None removes one."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")


def bpe(folder: Path) -> dict:
    return json.loads((folder / "tokenizer.json").read_text())["model"]


GATE = "model.layers.1.mlp.gate_proj.weight"
CASES = {
    "silu": (lambda f: edit(f / "config.json", hidden_act="silu"), "no sparse file of a SILU model.*ReLU model first"),
    "activation": (lambda f: edit(f / "config.json", hidden_act="mish"), "hidden_act = 'mish'; it must be one of relu"),
    "class": (lambda f: edit(f / "config.json", architectures=["GPTBigCode"]), "'GPTBigCode'.*LlamaForCausalLM"),
    "no-class": (lambda f: edit(f / "config.json", architectures=None), "of class None.*LlamaForCausalLM"),
    "config-entry": (lambda f: edit(f / "config.json", hidden_size=None), "config.json lacks 'hidden_size'"),
    "config-json": (lambda f: (f / "config.json").write_text("{"), "can't be read as JSON"),
    "config-list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "no-config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bias": (lambda f: edit(f / "config.json", attention_bias=True), "attention_bias"),
    "rope": (lambda f: edit(f / "config.json", rope_scaling={"rope_type": "llama3"}), "rotary embedding of type 'llama3'"),
    "quantized": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "quantization_config"),
    "text-size": (lambda f: edit(f / "config.json", hidden_size="64"), "hidden_size .*must be a positive integer, got '64'"),
    "zero-heads": (
        lambda f: edit(f / "config.json", num_attention_heads=0),
        "num_attention_heads .*must be a positive integer, got 0",
    ),
    "odd-head": (lambda f: edit(f / "config.json", head_dim=15), "rotary embedding of heads of odd size, got 15"),
    "eps": (lambda f: edit(f / "config.json", rms_norm_eps="small"), "rms_norm_eps .*must be a number, got 'small'"),
    "threshold": (
        lambda f: edit(f / "predictor" / "config.json", sparse_threshold="low"),
        "threshold must be a finite 32-bit number, got 'low'",
    ),
    "heads": (lambda f: edit(f / "config.json", num_key_value_heads=3), "multiple of num_key_value_heads, got 4 and 3"),
    "layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "model_2.safetensors .*3 layers"),
    "no-predictor": (lambda f: (f / "predictor" / "model_1.pt").unlink(), "lacks model_1.safetensors .or .pt."),
    "predictor-damaged": (lambda f: (f / "predictor" / "model_1.pt").write_bytes(b"x"), "model_1.pt can't be read"),
    "predictor-empty": (lambda f: torch.save({}, f / "predictor" / "model_1.pt"), "must hold fc1.weight and fc2.weight"),
    "predictor-list": (lambda f: torch.save([1], f / "predictor" / "model_1.pt"), "must hold fc1.weight and fc2.weight"),
    "predictor-bias": (
        lambda f: torch.save(
            {"fc1.weight": torch.ones(64, 64), "fc2.weight": torch.ones(128, 64), "fc1.bias": torch.ones(64)},
            f / "predictor" / "model_1.pt",
        ),
        "more than fc1.weight and fc2.weight.*fc1.bias",
    ),
    "fc1": (
        lambda f: torch.save(
            {"fc1.weight": torch.ones(64, 60), "fc2.weight": torch.ones(128, 64)}, f / "predictor" / "model_0.pt"
        ),
        r"fc1.weight of .*model_0.pt must be \[rank, 64\], got \[64, 60\]",
    ),
    "fc2": (
        lambda f: torch.save(
            {"fc1.weight": torch.ones(64, 64), "fc2.weight": torch.ones(64, 128)}, f / "predictor" / "model_0.pt"
        ),
        r"fc2.weight of .*model_0.pt must be \[128, 64\], got \[64, 128\]",
    ),
    "missing": (lambda f: rewrite(f, **{GATE: None}), f"lacks 1 tensors, the first is {GATE}"),
    "shape": (lambda f: rewrite(f, **{GATE: torch.ones(64, 128)}), r"must have shape \(128, 64\).*got \(64, 128\)"),
    "kind": (lambda f: rewrite(f, **{GATE: torch.ones(128, 64, dtype=torch.int8)}), "weights in I8"),
    "extra": (lambda f: rewrite(f, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias"),
    "nan": (lambda f: rewrite(f, **{GATE: torch.full((128, 64), torch.nan)}), "blk.1.ffn_gate.weight has a value"),
    "overflow": (lambda f: rewrite(f, **{GATE: torch.full((128, 64), 1e6)}), "no finite F16"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors; weights in pytorch_model.bin"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64), "model.safetensors can't be read"),
    "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "tokenizer-json": (lambda f: (f / "tokenizer.json").write_text("?"), "tokenizer.json can't be read as JSON"),
    "tokenizer-kind": (lambda f: edit(f / "tokenizer.json", model={"type": "WordPiece"}), "'WordPiece'; only byte-level"),
    "tokenizer-entry": (
        lambda f: edit(f / "tokenizer.json", model={"type": "BPE", "vocab": {}}),
        "tokenizer .*is malformed",
    ),
    "word-ends": (
        lambda f: edit(f / "tokenizer.json", model=bpe(f) | {"end_of_word_suffix": "</w>"}),
        "end_of_word_suffix",
    ),
    "whole-words": (lambda f: edit(f / "tokenizer.json", model=bpe(f) | {"ignore_merges": True}), "ignore_merges"),
    "normalizer": (lambda f: edit(f / "tokenizer.json", normalizer={"type": "Lowercase"}), "normalizer 'Lowercase'"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case, own, tmp_path):
    folder = own()
    change, message = CASES[case]
    change(folder)
    output = tmp_path / "out" / "m.gguf"
    output.parent.mkdir()
    with pytest.raises((PowerQuantConfigError, PowerQuantUnsupportedError), match=message):
        convert(folder, output, predictor=folder / "predictor", progress=False)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("falcon", {"alibi": True}, "alibi"),
        ("falcon", {"bias": True}, "bias"),
        ("falcon", {"parallel_attn": False}, "parallel_attn = False"),
        ("falcon", {"activation": "gelu"}, "GELU model"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("opt", {"word_embed_proj_dim": 64}, "word_embed_proj_dim = 64"),
        ("opt", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refusals_of_a_family(family, changes, message, own, tmp_path):
    folder = own(f"tiny-{family}")
    edit(folder / "config.json", **changes)
    with pytest.raises(PowerQuantUnsupportedError, match=message):
        convert(folder, tmp_path / "m.gguf", predictor=folder / "predictor", progress=False)


def test_sizes_that_q4_0_cannot_pack(own, tmp_path):
    folder = own(intermediate_size=112)
    with pytest.raises(PowerQuantUnsupportedError, match="q4_0 for blk.0.ffn_down.weight with rows of 112.*use type f16"):
        convert(folder, tmp_path / "m.gguf", dtype="q4_0", progress=False)
    with pytest.raises(PowerQuantUnsupportedError, match="multiple of 32, got 112"):
        convert(folder, tmp_path / "m.gguf", predictor=folder / "predictor", progress=False)
    folder = own()
    for layer in range(2):
        state = {"fc1.weight": torch.ones(20, 64), "fc2.weight": torch.ones(128, 20)}
        torch.save(state, folder / "predictor" / f"model_{layer}.pt")
    with pytest.raises(PowerQuantUnsupportedError, match="fc2.weight with rows of 20.*predictor type f16"):
        convert(folder, tmp_path / "m.gguf", dtype="q4_0", predictor=folder / "predictor", progress=False)
    options = {"dtype": "q4_0", "predictor_dtype": "f16", "predictor": folder / "predictor"}
    assert convert(folder, tmp_path / "m.gguf", **options, progress=False).predictor_ranks == [20, 20]


def test_more_tokens_than_the_model_has(own, tmp_path):
    folder = own()
    edit(folder / "config.json", vocab_size=300)
    rewrite(folder, **{name: torch.ones(300, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")})
    with pytest.raises(PowerQuantConfigError, match="the tokenizer has 320 tokens, the model's vocab_size is 300"):
        convert(folder, tmp_path / "m.gguf", progress=False)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), 1e39, "0.5"])
def test_thresholds_that_are_no_number(threshold, own, tmp_path):
    folder = own()
    with pytest.raises(PowerQuantConfigError, match="threshold must be a finite 32-bit number"):
        convert(folder, tmp_path / "m.gguf", predictor=folder / "predictor", threshold=threshold, progress=False)


@pytest.mark.parametrize("with_predictor", [False, True])
def test_a_threshold_for_a_dense_file_is_refused(with_predictor, own, tmp_path):
    folder = own()
    predictor = folder / "predictor" if with_predictor else None
    with pytest.raises(PowerQuantConfigError, match="a threshold, got 0.5, is for a sparse file: give the predictors"):
        convert(folder, tmp_path / "m.gguf", predictor=predictor, dense=with_predictor, threshold=0.5, progress=False)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("option", ["dtype", "predictor_dtype", "output_dtype"])
def test_unknown_types(option, tmp_path):
    with pytest.raises(PowerQuantConfigError, match=f"{option} must be one of f16, q4_0, f32.*got 'q5_1'"):
        convert(tmp_path, tmp_path / "m.gguf", **{option: "q5_1"})


def test_a_write_that_fails_leaves_nothing(own, tmp_path, monkeypatch):
    folder, output = own(), tmp_path / "out" / "m.gguf"
    output.parent.mkdir()

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(PowerQuantError, match="cannot write .*m.gguf: No space left on device"):
        convert(folder, output, progress=False)
    assert not list(output.parent.iterdir())


def test_a_write_that_fails_keeps_the_file_that_was_there(own, tmp_path):
    folder, output = own(), tmp_path / "m.gguf"
    output.write_text("before")
    rewrite(folder, **{GATE: torch.full((128, 64), torch.inf)})
    with pytest.raises(PowerQuantConfigError):
        convert(folder, output, progress=False)
    assert output.read_text() == "before"


# the command, and what importing costs


def test_command(checkpoint, tmp_path, capsys):
    folder, output = str(checkpoint("tiny")), tmp_path / "m.gguf"
    options = ["--predictor", f"{folder}/predictor", "--type", "q4_0", "--threshold", "-0.5"]
    assert main(["convert", folder, "-o", str(output), *options, "--json"]) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert out.err == ""
    assert {key: report[key] for key in ("format", "family", "dtype", "threshold", "file_bytes")} == {
        "format": "PWRI",
        "family": "llama",
        "dtype": "q4_0",
        "threshold": -0.5,
        "file_bytes": output.stat().st_size,
    }
    assert main(["convert", folder, "-o", str(output), *options, "--dense"]) == 1
    assert "a threshold, got -0.5, is for a sparse file" in capsys.readouterr().err
    assert main(["convert", folder, "-o", str(output), *options[:4], "--dense"]) == 0
    assert "dense (GGUF), q4_0; 2 layers x 64, 128 neurons each" in capsys.readouterr().out
    assert File(output).magic == b"GGUF"
    assert main(["convert", folder, "-o", str(tmp_path / "nowhere" / "m.gguf")]) == 1
    assert "nowhere/m.gguf: give a file in an existing folder" in capsys.readouterr().err


def test_only_model_files_are_replaced(tmp_path, capsys):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    assert main(["convert", str(folder), "-o", str(folder / "model.safetensors")]) == 1
    assert "model.safetensors is there and is no model file" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == weights
    (tmp_path / "m.gguf").touch()
    for options in ((), ("--type", "f32")):
        assert main(["convert", str(folder), "-o", str(tmp_path / "m.gguf"), *options]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing(number, tmp_path, monkeypatch, capsys):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    real = blocks.encode

    def stopped(tensor, kind, name):
        if name == "output_norm.weight":
            os.kill(os.getpid(), number)
        return real(tensor, kind, name)

    monkeypatch.setattr(blocks, "encode", stopped)
    # in place of death, if the command does not see to it
    before = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    try:
        assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--json"]) == 130
    finally:
        left = signal.signal(signal.SIGTERM, before)
    assert left is handler
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and capsys.readouterr().out == ""


def test_the_benchmarks_models(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "make_sparse_model.py"
    command = [sys.executable, script, "--shape", "tiny", "--type", "f16", "q4_0", "-o", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    names = {"sparse-f16.gguf", "dense-f16.gguf", "sparse-q4_0.gguf", "dense-q4_0.gguf"}
    assert report["files"] == {name: (tmp_path / "tiny" / name).stat().st_size for name in names}
    assert 0.06 < report["active_share_f16"] < 0.15


def test_sparse_imports_nothing_of_the_caches():
    code = (
        "import sys, vllm_powerquant.sparse.convert\n"
        "print(*sorted(name for name in sys.modules if name.startswith('vllm_powerquant.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = ("vllm_powerquant.errors", "vllm_powerquant.config", "vllm_powerquant.files", "vllm_powerquant.sparse")
    assert [name for name in done.stdout.split() if not name.startswith(allowed)] == []
