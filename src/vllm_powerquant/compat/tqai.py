"""The names of the package tqai 0.6: `import vllm_powerquant.compat.tqai as tqai`, or `from ... import patch, unpatch`.

`patch` returns a cache for `past_key_values=` as that package's does, here with packed storage and with attention that reads
it where the model allows. What differs: widths are 2, 3, 4 and 8; the newest tokens are exact whatever the strategy; what
that package does outside the KV cache (forward compression, pipelines, QJL, MLX) is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError
from ..hf import PowerQuantCache
from ..hf import patch as _patch
from ..hf import unpatch as _unpatch
from ..hf.patch import is_patched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["patch", "unpatch"]

# strategies of that package: how it rebuilds what it stores, which here attention does without
_STRATEGIES = ("auto", "incremental", "residual", "full", "compressed")
# argument -> the value that asks for nothing
_ELSEWHERE = {
    "compress_hidden": False,
    "compress_ffn": False,
    "compress_attn_logits": False,
    "use_qjl": False,
    "pipeline": None,
    "chunk_attention": False,
    "config_path": None,
}
# of no effect without the arguments above
_IDLE = ("bits_hidden", "bits_ffn", "bits_attn", "qjl_sketch_size", "attention_chunk_size", "device")


def patch(
    model: PreTrainedModel,
    bits_k: int = 8,
    bits_v: int = 8,
    sink_tokens: int = 0,
    backend: str | None = None,
    *,
    cache_strategy: str = "auto",
    residual_window: int = 128,
    kv_compression: bool = True,
    **others: Any,
) -> PowerQuantCache | None:
    """Compress a model's KV cache.

    Args:    bits_k, bits_v: 2, 3, 4 or 8; sink_tokens: first tokens kept exact; residual_window: newest tokens kept exact;
             cache_strategy: one of that package's, all the same here; kv_compression: False does nothing; others: the rest
             of that package's arguments, at values that ask for nothing
    Returns: a cache for `past_key_values=`; `generate` without one makes its own
    Raises:  PowerQuantConfigError, PowerQuantUnsupportedError for what is not here
    """
    if backend not in (None, "torch"):
        raise PowerQuantUnsupportedError(f"backend must be torch or left out, got {backend!r}")
    if cache_strategy not in _STRATEGIES:
        raise PowerQuantConfigError(f"cache_strategy must be {', '.join(_STRATEGIES)}, got {cache_strategy!r}")
    for name, value in others.items():
        if name in _ELSEWHERE:
            if value != _ELSEWHERE[name]:
                raise PowerQuantUnsupportedError(
                    f"{name} is not of the KV cache, or is worse than doing without, and is not here, got {value!r}; "
                    "leave it out"
                )
        elif name not in _IDLE:
            known = ", ".join(("bits_k, bits_v, sink_tokens, cache_strategy, residual_window, kv_compression", *_ELSEWHERE))
            raise PowerQuantConfigError(f"patch has no argument {name}; known: {known}")
    if not kv_compression:
        return None
    options = {"key_bits": bits_k, "value_bits": bits_v, "sink_tokens": sink_tokens, "residual_tokens": residual_window}
    _patch(model, **options)
    return PowerQuantCache(model, **options)


def unpatch(model: PreTrainedModel) -> None:
    """The model as it was before patch; nothing if it was not patched."""
    if is_patched(model):
        _unpatch(model)
