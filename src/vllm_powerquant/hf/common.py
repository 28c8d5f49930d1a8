"""What the layers of one Transformers cache have in common."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..attention.cache_format import SCALAR, CacheFormat
from ..config import PowerQuantConfig
from ..errors import PowerQuantUnsupportedError
from .graphs import DecodeGraphs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .layer import PackedLayer

FUSED = "powerquant"  # the attn_implementation that attends to packed pages


class Common:
    """Options, the model's config, and what one layer works out for all.

    The cache and each of its layers hold it, and it holds none of them: memory of a cache that nobody holds any more is free
    at once, and not when Python next looks for cycles.

    options: of the cache; config: of the model, None without one; padding_mask [batch, positions] of the model's present
    call, None: tokens everywhere
    """

    def __init__(self, options: PowerQuantConfig, config: PreTrainedConfig | None) -> None:
        self.options, self.config = options, config
        self.padding_mask: torch.Tensor | None = None
        self._offered: weakref.ref[PackedLayer] | None = None
        self._last: tuple | None = None
        self._graphs: dict[torch.device, DecodeGraphs] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Common:
        # a model's config changes with the model, so a copy of the cache sees the same one
        other = memo[id(self)] = Common(self.options, self.config)
        other.padding_mask = copy.deepcopy(self.padding_mask, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # what is left out belongs to a step or to a process
        return {"options": self.options, "config": self.config, "padding_mask": self.padding_mask}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"], state["config"])
        self.padding_mask = state["padding_mask"]

    def format_of(self, head_size: int, key_bits: int | None = None, value_bits: int | None = None) -> CacheFormat:
        """The format of layers of a head size, with bits of their own if given."""
        if key_bits is None:
            return CacheFormat.of(self.options, head_size)
        return CacheFormat(head_size, key_bits, value_bits, self.options.value_codec if value_bits == 2 else SCALAR)

    def is_fused_for(self, layer: PackedLayer) -> bool:
        """Whether attention will come for the chunk that a layer is given."""
        if self.config is None or self.config._attn_implementation != FUSED:
            return False
        return layer.device.type == "cpu" or layer.dtype in (torch.float16, torch.bfloat16)

    def offer(self, layer: PackedLayer) -> None:
        """A layer's chunk was handed to fused attention, which must come for it before the next layer's is."""
        before = self._offered and self._offered()
        self._offered = weakref.ref(layer)
        if before is not None and before.is_offered:
            before.is_offered = False
            raise PowerQuantUnsupportedError(
                "attn_implementation is 'powerquant', but a layer's attention did not run through it, so its result would "
                f"be wrong; use another attn_implementation for this model ({type(self.config).__name__})"
            )
        layer.is_offered = True

    def graphs_on(self, device: torch.device) -> DecodeGraphs:
        """What the layers on a GPU share for their CUDA graphs."""
        graphs = self._graphs.get(device)
        if graphs is None:
            graphs = self._graphs[device] = DecodeGraphs()
        return graphs

    @property
    def graph_bytes(self) -> int:
        return sum(graphs.nbytes for graphs in self._graphs.values())

    def shared(self, rows: Any, key: tuple, make: Callable[[], Any]) -> Any:
        """make(), or what it was for another layer that had the same rows. rows None: none yet."""
        if self._last is None or self._last[0] is not rows or self._last[1] != key:
            self._last = (rows, key, make())
        return self._last[2]

    def forget_shared(self) -> None:
        """No other layer will look for it, and it may hold on to tensors."""
        self._last = None
