"""`attn_implementation="powerquant"`: Transformers attention over the packed pages of a PowerQuantCache.

A packed layer's `update` returns the new keys and values alone, marked with the layer; the attention function finds the mark
and has the layer attend. Where there is none (no cache, another cache, a layer whose tokens are exact) it is Transformers'
own scaled-dot-product attention. Import registers both functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import PowerQuantUnsupportedError
from .common import FUSED
from .gradients import refuse_gradients
from .layer import PackedLayer

# what packed attention would have to do otherwise; each is an argument that models pass to their attention
_UNSUPPORTED = {"softcap": "a logit soft cap", "s_aux": "learned sink logits", "position_bias": "a position bias"}


def powerquant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Args:    query [batch, num_heads, n, head_size]; key, value [batch, num_kv_heads, n or positions, head_size];
                attention_mask: what powerquant_mask made
    Returns: [batch, n, num_heads, head_size], None

    Raises: PowerQuantUnsupportedError for what packed attention cannot do, by name
    """
    # torch.compiler.disable costs as much as a kernel's launch each time, where nothing is compiled, too
    attend = _attention_uncompiled if torch.compiler.is_compiling() else _attention
    return attend(module, query, key, value, attention_mask, scaling, dropout, **kwargs)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    layer = getattr(key, "powerquant_layer", None)
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise PowerQuantUnsupportedError(
                f"attn_implementation='powerquant' has no {what}, which {type(module).__name__} asks for; use "
                "attn_implementation='eager'"
            )
    if layer is None:
        make = getattr(attention_mask, "powerquant_mask", None)
        mask = attention_mask if make is None else make()
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    try:
        _check(module, layer, key.shape[2], attention_mask, kwargs)
    except PowerQuantUnsupportedError:
        layer.is_offered = False  # this was the attention that it waited for
        raise
    padding = None if attention_mask is None else attention_mask.powerquant_padding
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, key, value, scale, padding)
    return (refuse_gradients(out, query, key, value) if torch.is_grad_enabled() else out), None


def _check(
    module: torch.nn.Module, layer: PackedLayer, n: int, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises: PowerQuantUnsupportedError for what a packed layer's attention to n new positions cannot do"""
    if module.training and torch.is_grad_enabled():
        raise PowerQuantUnsupportedError("a packed cache has no gradients; call model.eval(), or train without a cache")
    if attention_mask is not None and not hasattr(attention_mask, "powerquant_mask"):
        raise PowerQuantUnsupportedError(
            f"packed attention is causal over tokens that are not padding, got a mask of {list(attention_mask.shape)}; use "
            "attn_implementation='sdpa'"
        )
    if attention_mask is not None and not attention_mask.powerquant_causal:
        raise PowerQuantUnsupportedError(
            f"packed attention is plainly causal, {type(module).__name__} asks for another mask (blocks that see each "
            "other, or sequences side by side); use attn_implementation='sdpa'"
        )
    length = None if attention_mask is None else attention_mask.powerquant_length
    if length is not None and length != layer.rows.length + n and layer.is_offered:
        raise PowerQuantUnsupportedError(
            f"the mask is of {length} positions and this layer would hold {layer.rows.length + n}: a call of the "
            "model did not come to its end; crop the cache to what it held before, or make a new one"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise PowerQuantUnsupportedError("packed attention is causal; use attn_implementation='sdpa' for this model")
    window = kwargs.get("sliding_window")
    if window is not None and layer.rows.length + n > window:
        raise PowerQuantUnsupportedError(
            f"packed attention has no sliding window ({window} here, of a layer that the cache takes for full attention); "
            "use attn_implementation='sdpa'"
        )


_attention_uncompiled = torch.compiler.disable(_attention)


@torch.compiler.disable
def powerquant_mask(
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """A stand-in for the mask: packed attention needs to know of padding alone, and the whole mask may be large.

    Returns: an empty tensor with `powerquant_padding` [batch, positions] bool or None, `powerquant_length`: positions that
             are attended to, `powerquant_causal`: whether nothing but causality and padding is asked for, and
             `powerquant_mask()`, which makes what sdpa_mask would have, once
    """
    made: list[torch.Tensor | None] = []

    def make() -> torch.Tensor | None:
        if not made:
            mask = sdpa_mask(*args, attention_mask=attention_mask, mask_function=mask_function, device=device, **kwargs)
            made.append(mask)
        return made[0]

    stand_in = torch.empty(0, device=device)
    stand_in.powerquant_length = kwargs.get("kv_length")
    stand_in.powerquant_padding = attention_mask
    stand_in.powerquant_causal = mask_function is causal_mask_function
    stand_in.powerquant_mask = make
    return stand_in


ALL_ATTENTION_FUNCTIONS.register(FUSED, powerquant_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(FUSED, powerquant_mask)
