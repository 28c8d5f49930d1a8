"""Where this package keeps what it makes once: converted models, compiled kernels."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """POWERQUANT_CACHE_DIR, or ~/.cache/vllm-powerquant."""
    named = os.environ.get("POWERQUANT_CACHE_DIR")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "vllm-powerquant"
