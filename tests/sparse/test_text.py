"""Windows of tokens, and loading a model of each family."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse.models import SHAPES, write_checkpoint
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError
from vllm_powerquant.sparse.families import read_config
from vllm_powerquant.sparse.text import Source, choose_device, find_checkpoint, load_causal_lm, load_tokenizer, token_windows

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(SHAPES["tiny"], tmp_path_factory.mktemp("text") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(find_checkpoint(tiny))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_windows_are_consecutive_and_whole(tokenizer, tmp_path):
    texts = ["one two three four five six seven eight nine ten " * 4, "another text, not the same one; " * 5]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    got = token_windows(tokenizer, paths, 16)
    assert got.dtype == torch.int64
    want = []
    for text in texts:
        ids = ids_of(tokenizer, text)
        want += [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert got.tolist() == want


def test_fewer_tokens_are_spread_over_all_texts(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i} " for i in range(400)))
    everything = token_windows(tokenizer, [path], 16)
    some = token_windows(tokenizer, [path], 16, 16 * 4 + 15)
    step = len(everything) / 4
    assert some.tolist() == [everything[int(i * step)].tolist() for i in range(4)]


def test_the_bos_is_the_tokenizers_own_rule(tiny, tmp_path):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    path = tmp_path / "a.txt"
    path.write_text("some words for a test " * 10)
    assert (token_windows(tokenizer, [path], 16)[:, 0] != 0).any()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    got = token_windows(tokenizer, [path], 16)
    assert (got[:, 0] == 0).all()
    assert got[:, 1:].flatten().tolist() == ids_of(tokenizer, path.read_text())[: got[:, 1:].numel()]


def test_the_built_in_texts_keep_the_half_that_is_reported_on(tokenizer):
    from vllm_powerquant.quality import read_texts

    halves = [len(ids_of(tokenizer, text)) // 2 for text in read_texts().values()]
    assert len(token_windows(tokenizer, None, 64)) == sum(half // 64 for half in halves)


def test_refusals_of_texts(tokenizer, tmp_path):
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("a few words")
    latin.write_bytes("naïve".encode("latin-1"))
    for paths, length, tokens, message in (
        ([short], 64, None, "short.txt has .* tokens, a window takes 64"),
        ([latin], 64, None, "latin.txt is not UTF-8"),
        ([tmp_path / "none.txt"], 64, None, "cannot read .*none.txt"),
        ([], 64, None, "one file or more"),
        ([short], 4, 4000, "4000 tokens are 1000 windows of 4, the texts give"),
        (None, 64, 10**7, "the built-in texts give"),
        (None, 64, 63, "at least one window of 64, got 63"),
        (None, 0, None, "length of 0"),
    ):
        with pytest.raises(PowerQuantConfigError, match=message):
            token_windows(tokenizer, paths, length, tokens)


@pytest.mark.parametrize("name", ["tiny", "tiny-bamboo", "tiny-falcon", "tiny-falcon-new", "tiny-opt"])
def test_models_of_each_family(name, tmp_path):
    """Logits are those that the converter's tests hold its files to."""
    from sparse.test_convert import IDS, transformers_logits

    folder = write_checkpoint(SHAPES[name], tmp_path / name)
    said = []
    loaded = load_causal_lm(folder, device="cpu", say=said.append)
    assert said == [f"{folder}: 2 layers, float32 on cpu"]
    assert loaded.tokenizer("fox")["input_ids"]
    with torch.no_grad():
        got = loaded.model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(got, transformers_logits(name, folder), rtol=1e-4, atol=1e-4)


def test_refusals_of_checkpoints(tmp_path, tiny):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "none"):
        with pytest.raises(PowerQuantConfigError, match=f"cannot load {folder}.*give a checkpoint's folder or name"):
            load_causal_lm(folder)
    config = json.loads((Path(tiny) / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps(config))
    with pytest.raises(PowerQuantConfigError, match=f"cannot load .*{empty}"):
        load_causal_lm(Source(str(empty), config, read_config(config)))
    (empty / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(PowerQuantUnsupportedError, match="GPT2LMHeadModel"):
        load_causal_lm(empty)
    # what cannot be a name on the hub is not looked for there
    for name in (tiny / "config.json", "a/b/c", "no such name", "./none"):
        with pytest.raises(PowerQuantConfigError, match=f"cannot load {name}: there is no such folder"):
            find_checkpoint(name)


def test_damaged_weights_are_one_error(tmp_path, capfd):
    folder = write_checkpoint(SHAPES["tiny"], tmp_path / "m")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PowerQuantConfigError, match="cannot load .*m: .*not fully covered"):
        load_causal_lm(folder, device="cpu")
    tensors, name = load_file(write_checkpoint(SHAPES["tiny"], folder) / path.name), "model.layers.1.mlp.gate_proj.weight"
    save_file(tensors | {name: tensors[name][:50].clone()}, path, {"format": "pt"})
    with pytest.raises(PowerQuantConfigError, match=f"{name} must have shape .128, 64. by config.json, got .50, 64."):
        load_causal_lm(folder, device="cpu")
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(PowerQuantConfigError, match=f"it lacks 1 tensors, the first is {name}"):
        load_causal_lm(folder, device="cpu")
    assert "LOAD REPORT" not in "".join(capfd.readouterr())
    with pytest.raises(PowerQuantConfigError, match="device must be one that PyTorch finds here.*'tpu9'"):
        choose_device("tpu9")
