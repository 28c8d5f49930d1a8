"""One line for a model that is loaded: `patch(model)`, and what can be compressed of it: `check_model(model)`."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..attention.rotation import SUPPORTED_HEAD_SIZES
from ..calibration import head_size_of
from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError
from .cache import (
    CACHE_NAMES,
    PowerQuantCache,
    argument,
    argument_names,
    cache_given,
    cache_name,
    decoder_config,
    layer_config,
    watch_padding,
)
from .common import FUSED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_STATE = "_powerquant_patch"
# parts of a multimodal model that have no cache
_TOWERS = ("vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector")
# models whose attention looks like the others' from outside
_OTHER_ATTENTION = {
    "diffllama": "attention is the difference of two over the same keys",
    "doge": "attention makes a mask of its own",
}


@dataclass(frozen=True)
class LayerSupport:
    """One layer. packed: whether its tokens are compressed; reason: why not."""

    index: int
    kind: str
    packed: bool
    reason: str = ""


@dataclass(frozen=True)
class ModelSupport:
    """What of a model's cache can be packed. fused: whether packed attention can be used; reason: why not."""

    model: str
    layers: tuple[LayerSupport, ...]
    fused: bool
    reason: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether any layer is packed."""
        return any(layer.packed for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        packed = sum(layer.packed for layer in self.layers)
        lines = [f"{self.model}: {packed} of {len(self.layers)} layers packed"]
        lines.append("fused attention: yes" if self.fused else f"fused attention: no, {self.reason}")
        if self.skipped:
            lines.append(f"skipped (no cache): {', '.join(self.skipped)}")
        for layer in self.layers:
            lines.append(f"  layer {layer.index}: {layer.kind}, {'packed' if layer.packed else layer.reason}")
        return "\n".join(lines)


def check_model(model: PreTrainedModel) -> ModelSupport:
    """What PowerQuantCache does with each layer of a model, and why; runs nothing.

    Raises: PowerQuantUnsupportedError for an encoder-decoder
    """
    if not isinstance(model, torch.nn.Module):
        raise PowerQuantConfigError(f"check_model needs a Transformers model that is loaded, got {type(model).__name__}")
    config, _ = decoder_config(model)
    own_cache = _own_cache(model)
    layers = []
    for i, layer in enumerate(DynamicCache(config=config).layers):
        kind, reason = _kind(layer)
        if reason is None:
            reason = f"the model's code takes no cache but its {own_cache}" if own_cache else _why_not(config, i)
        layers.append(LayerSupport(i, kind, reason is None, reason or ""))
    reason = ""
    if not any(layer.packed for layer in layers):
        reason = "no layer is packed"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "the model's code does not let its attention be replaced"
    elif getattr(config, "num_kv_shared_layers", None):
        reason = "layers share keys and values"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "attention has a logit soft cap"
    elif any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters()):
        reason = "attention has learned sink logits"
    else:
        reason = _OTHER_ATTENTION.get(config.model_type, "")
    skipped = tuple(name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in _TOWERS)
    return ModelSupport(type(model).__name__, tuple(layers), not reason, reason, skipped)


def _why_not(config: PreTrainedConfig, layer: int) -> str | None:
    """Why a layer of full attention is not packed; None: it is."""
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention caches keys and values of different sizes"
    head_size = head_size_of(layer_config(config, layer))
    if head_size is None:
        return "the model has no attention"
    if head_size not in SUPPORTED_HEAD_SIZES:
        return f"head size {head_size} has no rotation, only {', '.join(map(str, SUPPORTED_HEAD_SIZES))} do"
    return None


def _own_cache(model: PreTrainedModel) -> str | None:
    """The cache class of a model's own (MiniMax's) that its code asks for."""
    for module in model.modules():
        hints = getattr(type(module).forward, "__annotations__", {})
        hint = next((hints[name] for name in CACHE_NAMES if name in hints), None)
        for kind in typing.get_args(hint) or (hint,):
            if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ != Cache.__module__:
                return kind.__name__
    return None


def _kind(layer: CacheLayerMixin | Any) -> tuple[str, str | None]:
    """(what a layer of a DynamicCache is, why it is not packed or None)."""
    if type(layer) is DynamicLayer:
        return "full attention", None
    if getattr(layer, "is_sliding", False) and isinstance(layer, CacheLayerMixin):
        return "sliding window", f"kept exact, {layer.sliding_window} tokens at most"
    return type(layer).__name__, "kept as Transformers keeps it"


def patch(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """From now on the model's `generate`, and `forward` with use_cache, hold a PowerQuantCache and attend to it packed.

    A cache that is given (`past_key_values=`, `cache=` since transformers 5.24) is used as it is. Where fused attention
    cannot be used (check_model says why) the model keeps its own, and the cache decodes for it.

    Args:    options: PowerQuantCache's
    Returns: the model
    Raises:  PowerQuantConfigError for an option, or if the model is patched; PowerQuantUnsupportedError if no layer can be
             packed
    """
    if is_patched(model):
        raise PowerQuantConfigError("this model is patched; unpatch(model) first")
    support = check_model(model)
    if not support.ok:
        reasons = sorted({layer.reason for layer in support.layers})
        raise PowerQuantUnsupportedError(f"no layer of {support.model} can be packed: {'; '.join(reasons)}")
    make = functools.partial(PowerQuantCache, model, **options)
    make()  # refuses bad options now
    watch_padding(model)
    state = {"attn_implementation": _attentions(model.config), "options": options}
    if support.fused:
        model.set_attn_implementation(FUSED)
    state["hook"] = model.register_forward_pre_hook(functools.partial(_give_cache, make), with_kwargs=True)
    prepare = getattr(model, "_prepare_cache_for_generation", None)
    if prepare is not None:
        model._prepare_cache_for_generation = functools.partial(_prepare_cache, prepare, make)
    setattr(model, _STATE, state)
    return model


def _attentions(config: PreTrainedConfig) -> dict[str, str]:
    """attn_implementation of a model ("") and of its parts, as set_attn_implementation takes them."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    return {"": config._attn_implementation} | {name: x._attn_implementation for name, x in parts.items() if x is not None}


def is_patched(model: PreTrainedModel) -> bool:
    return hasattr(model, _STATE)


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undo patch(). Raises: PowerQuantConfigError if the model is not patched."""
    if not is_patched(model):
        raise PowerQuantConfigError("this model is not patched; patch(model) does that")
    state = getattr(model, _STATE)
    state["hook"].remove()
    vars(model).pop("_prepare_cache_for_generation", None)
    model.set_attn_implementation(state["attn_implementation"])
    delattr(model, _STATE)
    return model


def _prepare_cache(prepare, make, generation_config, model_kwargs, *args, **kwargs) -> None:
    """In place of the model's own method, which puts a cache into model_kwargs."""
    had = any(model_kwargs.get(name) is not None for name in CACHE_NAMES)
    prepare(generation_config, model_kwargs, *args, **kwargs)
    name = next((name for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    if had or name is None:
        return
    cache = model_kwargs[name]
    if type(cache) is not DynamicCache or cache.offloading:
        raise PowerQuantUnsupportedError(
            "this model is patched to hold a PowerQuantCache, got cache_implementation="
            f"{generation_config.cache_implementation!r}; leave it out, or unpatch(model)"
        )
    model_kwargs[name] = make()
    if generation_config.is_assistant:
        model_kwargs[name].activate_past_recording()  # tokens will be taken back


def _give_cache(make, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before forward: a cache where one would be made."""
    use_cache = argument(module, args, kwargs, "use_cache")
    if use_cache is None:
        use_cache = getattr(decoder_config(module)[0], "use_cache", False)
    if not use_cache or cache_given(module, args, kwargs) is not None or (module.training and torch.is_grad_enabled()):
        return None
    names, name = argument_names(module, args), cache_name(module)
    if name in names:
        at = names.index(name)
        return (*args[:at], make(), *args[at + 1 :]), kwargs
    return args, {**{key: value for key, value in kwargs.items() if key not in CACHE_NAMES}, name: make()}
