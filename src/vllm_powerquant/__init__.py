"""KV-cache compression for stock vLLM, and sparse ReLU models on a CPU.

Importing the package loads neither torch nor vLLM; public names are loaded on first use.
"""

from __future__ import annotations

import importlib
from importlib import metadata

_LAZY = {
    "Codec": "codec",
    "Engine": "engine",
    "GenerationResult": "engine",
    "MemoryReport": "hf",
    "PowerQuantCache": "hf",
    "PowerQuantConfig": "config",
    "PowerQuantError": "errors",
    "SparseEngine": "sparse.executor",
    "check_model": "hf",
    "patch": "hf",
    "unpatch": "hf",
}

__all__ = ["__version__", *_LAZY]

try:
    __version__ = metadata.version("vllm-powerquant")
except metadata.PackageNotFoundError:
    # a source tree on PYTHONPATH: pyproject.toml is the only home of the number
    __version__ = "0+uninstalled"


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
