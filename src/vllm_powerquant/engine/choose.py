"""Which backend a model gets, and which options it takes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..config import PRESET, PowerQuantConfig, refuse_unknown
from ..errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from ..model import DEFAULT_MODEL, find_gguf, prepare_model
from ..serve import choose, installed_vllm

BACKENDS = ("transformers", "vllm", "sparse")
CACHE_OPTIONS = (*(field.name for field in fields(PowerQuantConfig)), PRESET)
TRANSFORMERS_OPTIONS = ("attn_implementation", "revision", "trust_remote_code")
SPARSE_OPTIONS = (
    "threads", "slots", "context", "batch", "dense", "prompt_ffn", "activation", "isa", "queue", "chat_template",
    "start_timeout", "request_timeout", "drain_seconds", "say",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model for a backend."""

    backend: str
    path: str  # file, checkpoint folder or name
    name: str  # for reports


def find_source(model: str | None, backend: str = "auto") -> Source:
    """Args:    model: GGUF or PWRI file, checkpoint folder or name; None: the embedded SmolLM2
    Raises: PowerQuantConfigError if there is no such model or backend, or the one does not run the other
    """
    if backend not in ("auto", *BACKENDS):
        raise PowerQuantConfigError(f"backend must be auto, {', '.join(BACKENDS)}, got {backend!r}")
    if model is None:
        path = find_gguf(DEFAULT_MODEL)
        if backend == "sparse":
            return Source("sparse", str(path), path.stem)
        return Source(_for_checkpoints(backend), str(prepare_model(DEFAULT_MODEL)), path.stem)
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise PowerQuantConfigError(f"model must be a checkpoint's folder or name, or a GGUF or PWRI file, got {model!r}")
    choice = choose(os.fspath(model))
    if choice.engine == "powerinfer":
        if backend not in ("auto", "sparse"):
            raise PowerQuantConfigError(
                f"{model} is {choice.reason}, which backend sparse runs; for {backend} give the model's Hugging Face "
                "checkpoint (folder or name)"
            )
        return Source("sparse", choice.model, os.path.basename(choice.model))
    if backend == "sparse":
        raise PowerQuantConfigError(
            f"{model} is {choice.reason}, and backend sparse runs GGUF and PWRI files; make one with "
            "`powerquant convert`, or leave the backend out"
        )
    return Source(_for_checkpoints(backend), choice.model, choice.model)


def _for_checkpoints(backend: str) -> str:
    """vLLM where it and an NVIDIA GPU are there, else Transformers, unless one is named."""
    if backend != "auto":
        return backend
    if installed_vllm() != "vllm" or importlib.util.find_spec("vllm") is None:
        return "transformers"
    import torch

    # counted without starting CUDA, which vLLM's own processes must do first
    return "vllm" if torch.cuda.device_count() else "transformers"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a backend is made with; checked."""

    source: Source
    compress: bool  # False: the backend's own cache, in the model's own type
    cache: PowerQuantConfig  # options of the compressed cache, the environment's among them
    given: dict[str, Any]  # those of the cache that were given by the caller
    load_in_4bit: bool
    load_in_8bit: bool
    dtype: str  # auto, float16, bfloat16, float32
    device: str | None
    options: dict[str, Any]  # the backend's own

    @classmethod
    def of(
        cls,
        source: Source,
        compress: bool,
        load_in_4bit: bool,
        load_in_8bit: bool,
        dtype: Any,
        device: str | None,
        options: Mapping[str, Any],
    ) -> Settings:
        """Raises: PowerQuantConfigError, PowerQuantUnsupportedError, PowerQuantError for a package that is not installed"""
        own = {"transformers": TRANSFORMERS_OPTIONS, "sparse": SPARSE_OPTIONS, "vllm": ()}[source.backend]
        # blocks of exact tokens are vLLM's; the others have none that could be set
        of_cache = [name for name in CACHE_OPTIONS if source.backend == "vllm" or name != "residual_block_size"]
        known = [*of_cache, *own]
        if source.backend == "vllm":
            known += _vllm_options()
        refuse_unknown(options, known, f"option of backend {source.backend}")
        given = {name: options[name] for name in CACHE_OPTIONS if options.get(name) is not None}
        if not isinstance(compress, bool):
            raise PowerQuantConfigError(f"compress must be True or False, got {compress!r}")
        if given and not compress:
            raise PowerQuantConfigError(f"compress=False has no compressed cache: leave out {', '.join(given)}")
        checked = dict(given)
        if isinstance(checked.get("protected_layers"), list | tuple | range):
            # layers by number: the cache checks them against the model's
            if source.backend != "transformers":
                raise PowerQuantUnsupportedError(
                    "protected_layers as a list is for backend transformers; give the number of first and last layers"
                )
            del checked["protected_layers"]
        # first by themselves, for messages that name the caller's own words; then beside the environment's
        PowerQuantConfig(**{name: value for name, value in checked.items() if name != PRESET})
        cache = PowerQuantConfig.from_sources(os.environ, checked)
        dtype = str(dtype or "auto").removeprefix("torch.")
        if dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise PowerQuantConfigError(f"dtype must be auto, float16, bfloat16 or float32, got {dtype!r}")
        if load_in_4bit and load_in_8bit:
            raise PowerQuantConfigError("load_in_4bit and load_in_8bit exclude each other; give one")
        if load_in_4bit or load_in_8bit:
            _check_weights(source, load_in_8bit)
        if source.backend != "transformers" and device is not None:
            raise PowerQuantConfigError(
                f"device is for backend transformers, got {device!r} for {source.backend}; leave it out"
            )
        if source.backend == "sparse" and dtype != "auto":
            raise PowerQuantConfigError(f"dtype is the file's on backend sparse, got {dtype!r}; leave it out")
        return cls(
            source=source,
            compress=compress,
            cache=cache,
            given=given,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            dtype=dtype,
            device=device,
            options={name: value for name, value in options.items() if name not in CACHE_OPTIONS},
        )


def _check_weights(source: Source, eight: bool) -> None:
    wanted = "load_in_8bit" if eight else "load_in_4bit"
    if source.backend == "sparse":
        raise PowerQuantConfigError(
            f"{wanted} is for checkpoints; a file keeps its own types (`powerquant convert --type q4_0`)"
        )
    if source.backend == "vllm" and eight:
        raise PowerQuantUnsupportedError("vLLM quantizes to 4 bits while it loads, not to 8; use backend='transformers'")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PowerQuantError(f"{wanted} needs bitsandbytes, which is not installed; run: pip install bitsandbytes")


def _vllm_options() -> list[str]:
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise PowerQuantError(
            f"backend vllm: {error}; run: pip install 'vllm-powerquant[cuda]' (NVIDIA GPU) or 'vllm-powerquant[cpu]'"
        ) from None

    taken = ("model", "dtype", "additional_config", "attention_backend", "quantization")
    return [field.name for field in fields(EngineArgs) if field.name not in taken]
