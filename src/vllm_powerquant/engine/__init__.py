"""One object that generates text with a compressed KV cache, whichever of three backends computes it.

Importing this package loads neither torch nor Transformers nor vLLM; a backend loads what it needs when it is made.
"""

from .engine import Engine
from .result import GenerationResult, TextStream
from .sampling import Sampling

__all__ = ["Engine", "GenerationResult", "Sampling", "TextStream"]
