"""What the layers of this package's Transformers caches have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers.cache_utils import CacheLayerMixin

from ..errors import PowerQuantUnsupportedError


class UpdatedLayer(CacheLayerMixin):
    """A layer of full attention whose keys and values come through update() alone, and which stays on its device."""

    is_croppable = True
    is_sliding = False

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, values [batch, num_kv_heads, positions, head_size] as attention reads them; asked once initialized."""

    @property
    def keys(self) -> torch.Tensor | None:
        """[batch, num_kv_heads, positions, head_size], as attention reads them."""
        return self.read()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        return self.read()[1] if self.is_initialized else None

    @keys.setter
    def keys(self, keys: None) -> None:
        self._only_none(keys)

    @values.setter
    def values(self, values: None) -> None:
        self._only_none(values)

    @staticmethod
    def _only_none(tensor: torch.Tensor | None) -> None:
        # the base class starts with None; what anyone does to keys and values later would leave the packed slots behind
        if tensor is not None:
            raise PowerQuantUnsupportedError("a packed layer's keys and values come through update(), not by assignment")

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def offload(self) -> None:
        raise PowerQuantUnsupportedError("a compressed cache stays on its device; use it without offloading")
