"""PowerQuantCache: a cache for Transformers' `generate` and `forward` that holds packed keys and values."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..attention.cache_format import SCALAR
from ..calibration import head_size_of, load_calibration
from ..config import PowerQuantConfig
from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError
from .common import Common
from .gradients import refuse_gradients
from .layer import PackedLayer
from .sequences import Window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ARGUMENTS = "_powerquant_arguments"  # of a model that is watched: the names of forward's
# what a model's forward and generate call the cache: since transformers 5.24, and before
CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer's tensors hold. kind: packed, exact (protected), sliding or other (linear attention, ...)"""

    kind: str
    tokens: int  # of all rows of the batch
    packed_bytes: int = 0  # pages
    exact_bytes: int = 0  # window and sinks; or all there is
    buffer_bytes: int = 0  # decoded copies, without fused attention
    table_bytes: int = 0  # centres and scales of calibrated keys
    uncompressed_bytes: int = 0  # of a DynamicCache's layer for the same tokens

    @property
    def total_bytes(self) -> int:
        return self.packed_bytes + self.exact_bytes + self.buffer_bytes + self.table_bytes


@dataclass(frozen=True)
class MemoryReport:
    """What a cache holds, in bytes of its tensors, beside a DynamicCache's for the same positions.

    table_bytes: centres and scales of calibrated keys, and what CUDA graphs of decode steps read and write.

    path: "fused": attention reads packed pages; "dequantized": it reads `buffer_bytes` of decoded copies, which are held as
    well; "none": nothing was cached yet. tokens_packed: read as packed codes in the next step; tokens_exact: the others;
    both of all rows, in packed layers alone.
    """

    path: str
    tokens: int
    tokens_packed: int
    tokens_exact: int
    packed_bytes: int
    exact_bytes: int
    buffer_bytes: int
    table_bytes: int
    uncompressed_bytes: int
    layers: tuple[LayerMemory, ...] = dataclasses.field(repr=False)

    @property
    def total_bytes(self) -> int:
        return self.packed_bytes + self.exact_bytes + self.buffer_bytes + self.table_bytes

    @property
    def ratio(self) -> float | None:
        """Uncompressed bytes over those held; None while nothing is."""
        return self.uncompressed_bytes / self.total_bytes if self.total_bytes else None

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        layers = fields.pop("layers")
        return {**fields, "total_bytes": self.total_bytes, "ratio": self.ratio, "layers": list(layers)}

    def __str__(self) -> str:
        if not self.tokens:
            return f"KV cache: no tokens in {_mib(self.total_bytes)}" if self.packed_bytes else "KV cache: empty"
        kinds = [layer.kind for layer in self.layers]
        layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        lines = [
            f"KV cache: {self.tokens:,} tokens in {_mib(self.total_bytes)}, uncompressed {_mib(self.uncompressed_bytes)} "
            f"({self.ratio:.2f} times)",
            f"  packed {_mib(self.packed_bytes)}, exact {_mib(self.exact_bytes)}, layers: {layers}",
        ]
        if self.path == "fused":
            lines.append("  attention reads the packed pages")
        elif self.path == "dequantized":
            lines.append(
                f"  attention reads decoded copies, {_mib(self.buffer_bytes)}: attn_implementation='powerquant' does without"
            )
        return "\n".join(lines)


def _mib(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"


class PowerQuantCache(Cache):
    """Keys of 4 bits and values of 2, rotated, with the newest and the first tokens of each row exact.

    With `attn_implementation="powerquant"` (or after `patch(model)`) attention reads the packed pages and nothing else is
    held; with any other the cache decodes what leaves the window into buffers, O(new tokens) a step, which costs more memory
    than it saves: `memory_report()` says which of both it was. Layers with a sliding window keep their few tokens exact, as
    Transformers' own cache does; so do protected layers, all their tokens; linear attention has its usual state.

    Args: model: the model, or its config; without either layers come as they are used, as full attention, and are never read
              packed. With a model, attention masks are seen, so that padding is never stored and each row's first tokens are
              its sinks; with a config that is so with fused attention only, and with neither padding counts as tokens
          key_bits, value_bits: 2, 3, 4 or 8; value_codec: "scalar" or, for 2-bit values, "trellis" (a fifth less error)
          residual_tokens: newest tokens kept exact, up to 4,096; sink_tokens: first tokens kept exact, up to 16
          protected_layers: so many first and as many last layers stay exact; or a list of layers, negative from the end
          calibration: what `powerquant calibrate` wrote for this model: keys are packed centred and scaled
          layer_bits: (key_bits, value_bits) of layers that have others, by index, negative from the end

    Raises: PowerQuantConfigError for an option's value, PowerQuantUnsupportedError for a model whose attention cannot be
            packed; check_model(model) says of each layer why
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig | None = None,
        *,
        key_bits: int = 4,
        value_bits: int = 2,
        value_codec: str = SCALAR,
        residual_tokens: int = 128,
        sink_tokens: int = 4,
        protected_layers: int | Sequence[int] = 0,
        calibration: str | Path | None = None,
        layer_bits: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        protect = protected_layers if isinstance(protected_layers, int) else 0
        # the limit that layouts share; under vLLM it is that of another option
        most = PowerQuantConfig().residual_block_size
        if isinstance(sink_tokens, int) and not 0 <= sink_tokens <= most:
            raise PowerQuantConfigError(f"sink_tokens must be 0 to {most}, got {sink_tokens}")
        if value_codec != SCALAR and value_bits != 2:
            raise PowerQuantConfigError(
                f"value_codec {value_codec} is for value_bits 2, got value_bits {value_bits}; give value_codec {SCALAR}"
            )
        self.options = PowerQuantConfig(
            key_bits=key_bits,
            value_bits=value_bits,
            value_codec=value_codec,
            residual_tokens=residual_tokens,
            sink_tokens=sink_tokens,
            protected_layers=protect,
        )
        self.window = Window(residual_tokens, sink_tokens)
        if model is None:
            if protected_layers or layer_bits or calibration is not None:
                raise PowerQuantConfigError(
                    "protected_layers, layer_bits and calibration are of a model's layers; give PowerQuantCache the model"
                )
            self.common = Common(self.options, None)
            super().__init__(layers=[])
            return
        config, is_model = decoder_config(model)
        self.common = Common(self.options, config)
        layers: list[CacheLayerMixin] = DynamicCache(config=config).layers
        if not layers:
            raise PowerQuantUnsupportedError(f"{type(config).__name__} has no attention layers to cache")
        exact = _protected(protected_layers, len(layers))
        bits = _layer_bits(layer_bits or {}, len(layers))
        if both := sorted(exact & bits.keys()):
            raise PowerQuantConfigError(f"layers {both} have layer_bits and are protected, which keeps them exact; give one")
        frames = None
        if calibration is not None:
            measured = load_calibration(str(calibration))
            measured.check(config, calibration)
            frames = measured.keys.frames()
        for i, layer in enumerate(layers):
            # other kinds (sliding, linear attention, ...) hold a bounded state and stay Transformers' own
            if type(layer) is DynamicLayer and i not in exact:
                cache_format = self.common.format_of(head_size_of(layer_config(config, i)), *bits.get(i, ()))
                layers[i] = PackedLayer(self.common, cache_format, self.window, None if frames is None else frames[i])
        super().__init__(layers=layers)
        if is_model:
            watch_padding(model)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a chunk to a layer: PackedLayer.update."""
        while len(self.layers) <= layer_idx and self.common.config is None:
            self.layers.append(PackedLayer(self.common, None, self.window))
        if self.layers[layer_idx].is_initialized:
            self.common.forget_shared()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if torch.is_grad_enabled() and isinstance(self.layers[layer_idx], PackedLayer):
            layer = getattr(keys, "powerquant_layer", None)
            keys, values = refuse_gradients(keys, key_states), refuse_gradients(values, value_states)
            if layer is not None:
                keys.powerquant_layer = layer
        return keys, values

    # --- report ------------------------------------------------------------------------------------------------------

    def memory_report(self) -> MemoryReport:
        """Bytes of every tensor that is held; without tensors of a step that is under way."""
        layers = tuple(_layer_memory(layer) for layer in self.layers)
        packed = [layer for layer in self.layers if isinstance(layer, PackedLayer) and layer.is_initialized]
        tokens = sum(packed[0].rows.lens) if packed else max((layer.tokens for layer in layers), default=0)
        exact = sum(_exact_tokens(layer) for layer in packed)
        path = "none"
        if packed and any(layer.rows.length for layer in packed):
            path = "dequantized" if any(layer.buffer_bytes for layer in packed) else "fused"
        return MemoryReport(
            path=path,
            tokens=tokens,
            tokens_packed=sum(sum(layer.rows.lens) for layer in packed) - exact,
            tokens_exact=exact,
            layers=layers,
            table_bytes=sum(layer.table_bytes for layer in layers) + self.common.graph_bytes,
            **{
                name: sum(getattr(layer, name) for layer in layers)
                for name in ("packed_bytes", "exact_bytes", "buffer_bytes", "uncompressed_bytes")
            },
        )


def decoder_config(model: PreTrainedModel | PreTrainedConfig) -> tuple[PreTrainedConfig, bool]:
    """The config of a model's text decoder, and whether a model was given."""
    is_model = isinstance(model, torch.nn.Module)
    config = getattr(model, "config", None) if is_model else model
    if not hasattr(config, "get_text_config"):
        raise PowerQuantConfigError(f"PowerQuantCache needs a Transformers model or its config, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise PowerQuantUnsupportedError(
            f"{type(config).__name__} is an encoder-decoder; its cross attention is not packed, use Transformers' own cache"
        )
    return config.get_text_config(decoder=True), is_model


def layer_config(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """A layer's own config where layers differ (Gemma 4: in head size), else the one of all."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def _protected(layers: int | Sequence[int], count: int) -> set[int]:
    if isinstance(layers, int):
        if 2 * layers > count:
            raise PowerQuantConfigError(f"protected_layers must be at most half of {count} layers, got {layers}")
        return {*range(layers), *range(count - layers, count)}
    if not isinstance(layers, Iterable):
        raise PowerQuantConfigError(f"protected_layers must be a number of layers or a list of them, got {layers!r}")
    return {_index(i, count, "protected_layers") for i in layers}


def _layer_bits(bits: dict[int, tuple[int, int]], count: int) -> dict[int, tuple[int, int]]:
    if not isinstance(bits, dict) or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in bits.values()):
        raise PowerQuantConfigError(f"layer_bits must be {{layer: (key_bits, value_bits)}}, got {bits!r}")
    found = {_index(i, count, "layer_bits"): pair for i, pair in bits.items()}
    if len(found) < len(bits):
        raise PowerQuantConfigError(f"layer_bits must name a layer once, of {count} layers, got {list(bits)}")
    return found


def _index(i: Any, count: int, option: str) -> int:
    if not isinstance(i, int) or isinstance(i, bool) or not -count <= i < count:
        raise PowerQuantConfigError(f"{option} must name layers from {-count} to {count - 1}, got {i!r}")
    return i % count


def _layer_memory(layer: CacheLayerMixin) -> LayerMemory:
    if isinstance(layer, PackedLayer):
        if not layer.is_initialized:
            return LayerMemory("packed", 0)
        row = 2 * layer.num_kv_heads * layer.format.head_size * layer.dtype.itemsize
        return LayerMemory(
            kind="packed",
            tokens=sum(layer.rows.lens),
            packed_bytes=layer.packed.nbytes,
            exact_bytes=0 if layer.exact is None else layer.exact.nbytes,
            buffer_bytes=layer.buffer_bytes,
            table_bytes=0 if layer.key_frame is None else layer.key_frame.nbytes,
            uncompressed_bytes=layer.rows.batch * layer.rows.length * row,
        )
    held = sum(x.nbytes() for x in _storages(layer))
    if not isinstance(layer, CacheLayerMixin):
        return LayerMemory("other", 0, exact_bytes=held, uncompressed_bytes=held)
    keys = layer.keys if layer.is_initialized else None
    tokens = 0 if keys is None or keys.dim() < 4 else keys.shape[0] * keys.shape[2]
    kind = "sliding" if getattr(layer, "is_sliding", False) else "exact" if type(layer) is DynamicLayer else "other"
    return LayerMemory(kind, tokens, exact_bytes=held, uncompressed_bytes=held)


def _storages(layer: Any) -> list[torch.UntypedStorage]:
    """What the tensors of one of Transformers' own layers lie in, each once: a view holds all of it."""
    found = {}
    for value in vars(layer).values():
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, torch.Tensor):
                found[x.untyped_storage().data_ptr()] = x.untyped_storage()
    return list(found.values())


def _exact_tokens(layer: PackedLayer) -> int:
    """Tokens of all rows that the next step reads exactly."""
    return sum(len(layer.rows.exact_positions(row)) for row in range(layer.rows.batch))


def watch_padding(model: PreTrainedModel) -> None:
    """Tell every PowerQuantCache that the model is called with of the call's attention mask. Once a model."""
    if hasattr(model, _ARGUMENTS):
        return
    setattr(model, _ARGUMENTS, tuple(inspect.signature(model.forward).parameters))
    model.register_forward_pre_hook(_tell_padding, with_kwargs=True)
    # the mask is of one call: parts of the model may be called with the same cache, too
    model.register_forward_hook(_forget_padding, with_kwargs=True, always_call=True)


def argument_names(model: PreTrainedModel, args: tuple) -> tuple[str, ...]:
    """Of those that forward is called with by position; the model is watched."""
    return getattr(model, _ARGUMENTS)[: len(args)]


def argument(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """What forward is called with, by name or by position; None: not given."""
    names = argument_names(model, args)
    return args[names.index(name)] if name in names else kwargs.get(name)


def cache_name(model: PreTrainedModel) -> str:
    """The name by which the model's forward takes a cache."""
    names = getattr(model, _ARGUMENTS, None) or inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[-1])


def cache_given(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What forward is called with for a cache, by either name or by position; None: nothing. The model is watched."""
    # a model that has the new name takes the old one, too
    given = [argument(model, args, kwargs, name) for name in CACHE_NAMES]
    return next((cache for cache in given if cache is not None), None)


def _tell_padding(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    cache = cache_given(module, args, kwargs)
    if isinstance(cache, PowerQuantCache):
        mask = argument(module, args, kwargs, "attention_mask")
        cache.common.padding_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _forget_padding(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    cache = cache_given(module, args, kwargs)
    if isinstance(cache, PowerQuantCache):
        cache.common.padding_mask = None
