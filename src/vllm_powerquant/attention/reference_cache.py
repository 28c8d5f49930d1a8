"""A Transformers cache that holds packed slots, in plain PyTorch: what quality is measured with.

Every token is packed as in vLLM's pages; the newest and the first tokens of a sequence stay exact, as vllm_backend.py keeps
them. What attention reads lies in one buffer a layer: a token is exact there until it leaves the window, then it is what its
packed slot decodes to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers.cache_utils import Cache

from ..errors import PowerQuantConfigError
from . import reference
from .cache_format import SCALAR, CacheFormat
from .cache_layer import UpdatedLayer
from .qjl import ResidualSketch
from .rotation import unrotate

_GROWTH = 256  # tokens by which buffers grow, at least


class ReferenceLayer(UpdatedLayer):
    """One layer's packed keys and values, and the buffer that attention reads.

    Args: cache_format: None keeps every token exact (a protected layer); residual_tokens, sink_tokens: as in vLLM's options;
          key_frame [num_kv_heads, 3, head_size] fp32: see reference.in_frame; signs [head_size] fp32 of +-1, another
          rotation than the shipped one; sketch: of what the key codes leave over, whose bytes follow each slot's
    """

    def __init__(
        self,
        cache_format: CacheFormat | None,
        residual_tokens: int = 128,
        sink_tokens: int = 4,
        key_frame: torch.Tensor | None = None,
        signs: torch.Tensor | None = None,
        sketch: ResidualSketch | None = None,
    ) -> None:
        super().__init__()
        self.format = cache_format
        self.residual_tokens, self.sink_tokens = residual_tokens, sink_tokens
        self.key_frame, self.signs, self.sketch = key_frame, signs, sketch
        self.length = 0
        self.packed_until = 0  # positions before it are read as packed, but for the sinks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = key_states.new_empty(batch, heads, 0, head_size)
        self._values = value_states.new_empty(batch, heads, 0, value_states.shape[-1])
        slot_bytes = self.slot_bytes if self.format else 0
        self.packed = torch.empty(batch, 0, heads, slot_bytes, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    @property
    def slot_bytes(self) -> int:
        """Of one packed token of one head, with its sketch."""
        return self.format.layout.slot_bytes + (self.sketch.sketch_bytes if self.sketch else 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a chunk [batch, num_kv_heads, n, head_size] -> keys, values of the whole sequence for its queries.

        The chunk itself is exact, and the residual_tokens - 1 tokens before it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.format is not None:
            self._leave_window(self.length - max(self.residual_tokens - 1, 0))
        end = self.length + key_states.shape[-2]
        self._reserve(end)
        self._keys[..., self.length : end, :] = key_states
        self._values[..., self.length : end, :] = value_states
        if self.format is not None:
            self.packed[:, self.length : end] = self._encode(key_states, value_states)
        self.length = end
        return self.keys, self.values

    def _reserve(self, length: int) -> None:
        """Room for so many tokens in every buffer; the history is copied a number of times that grows with its logarithm."""
        have = self._keys.shape[-2]
        if length > have:
            more = max(length - have, have, _GROWTH)
            self._keys = torch.cat((self._keys, self._keys.new_zeros(*self._keys.shape[:2], more, self._keys.shape[-1])), -2)
            self._values = torch.cat(
                (self._values, self._values.new_zeros(*self._values.shape[:2], more, self._values.shape[-1])), -2
            )
            batch, _, heads, slot_bytes = self.packed.shape
            self.packed = torch.cat((self.packed, self.packed.new_zeros(batch, more, heads, slot_bytes)), 1)

    def _encode(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[batch, heads, n, head_size] -> slots [batch, n, heads, slot_bytes]."""
        batch, heads, n, head_size = key.shape
        key, value = (x.transpose(1, 2).reshape(batch * n, heads, head_size).float() for x in (key, value))
        key = reference.in_frame(key, self.key_frame)
        if self.signs is not None:
            key, value = key * self.signs, value * self.signs
        slots = reference.encode(self.format, key, value)
        if self.sketch is not None:
            codes, scale, _, _ = self.format.layout.unpack_slots(slots)
            packed_key = unrotate(reference.dequantize(codes, scale, self.format.key_codebook)).float()
            slots = torch.cat((slots, self.sketch.encode(key - packed_key)), -1)
        return slots.view(batch, n, heads, -1)

    def _decode(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of _encode, as far as there is one, in the model's dtype."""
        slots, sketch = slots.tensor_split((self.format.layout.slot_bytes,), -1)
        key_idx, key_scale, value_idx, value_scale = self.format.layout.unpack_slots(slots)
        key = unrotate(reference.dequantize(key_idx, key_scale, self.format.key_codebook)).float()
        if self.sketch is not None:
            key = key + self.sketch.decode(sketch)
        value = unrotate(reference.dequantize(value_idx, value_scale, self.format.value_codebook)).float()
        if self.signs is not None:
            key, value = key * self.signs, value * self.signs
        if self.key_frame is not None:
            centre, _, inverse = self.key_frame.unbind(1)
            key = key * inverse + centre
        return key.transpose(1, 2).to(self.dtype), value.transpose(1, 2).to(self.dtype)

    def _leave_window(self, start: int) -> None:
        """From now on tokens before `start` are read as packed, but for the sinks."""
        first = max(self.packed_until, self.sink_tokens)
        if start > first:
            keys, values = self._decode(self.packed[:, first:start])
            self._keys[..., first:start, :], self._values[..., first:start, :] = keys, values
        self.packed_until = max(self.packed_until, start)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.is_initialized, self.length, self.packed_until = False, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; what had left the window before stays packed."""
        self.length = max(0, self.length - abs(tokens_to_remove))
        self.packed_until = min(self.packed_until, self.length)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.device)
            self._keys, self._values, self.packed = (x[indices] for x in (self._keys, self._values, self.packed))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = (self._keys, self._values, self.packed)
            self._keys, self._values, self.packed = (x.repeat_interleave(repeats, dim=0) for x in rows)

    def held_bytes(self) -> int:
        """Bytes that a cache of this layer has to hold: a packed slot a token, and the exact rows of window and sinks."""
        if not self.is_initialized:
            return 0
        batch, heads, _, head_size = self._keys.shape
        row = 2 * head_size * self._keys.element_size()
        if self.format is None:
            return batch * heads * self.length * row
        exact = min(self.length, self.residual_tokens + self.sink_tokens)
        return batch * heads * (self.length * self.slot_bytes + exact * row)


class ReferenceCache(Cache):
    """A ReferenceLayer for every layer of a model.

    Args: num_layers; head_size; protected_layers: so many first and last layers keep every token exact; key_frames: one
          [num_kv_heads, 3, head_size] fp32 a layer; seed: of a rotation other than the shipped one (0); qjl_bits: sign
          projections a coordinate of what the key codes leave over (qjl.py), 0 for none: it costs more than it gives,
          see benchmarks/QUALITY_LOG.md; layer_bits: (key_bits, value_bits) of layers that have others, by index, negative
          from the end

    Raises: PowerQuantConfigError for bits, a codec or a layer that does not exist.
    """

    def __init__(
        self,
        num_layers: int,
        head_size: int,
        key_bits: int = 4,
        value_bits: int = 2,
        value_codec: str = "scalar",
        residual_tokens: int = 128,
        sink_tokens: int = 4,
        protected_layers: int = 0,
        key_frames: Sequence[torch.Tensor] | None = None,
        seed: int = 0,
        qjl_bits: int = 0,
        layer_bits: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        formats = [CacheFormat(head_size, key_bits, value_bits, value_codec)] * num_layers
        named = set()
        for i, (key, value) in (layer_bits or {}).items():
            if not -num_layers <= i < num_layers:
                raise PowerQuantConfigError(f"layer_bits must name layers from {-num_layers} to {num_layers - 1}, got {i}")
            if i % num_layers in named or not protected_layers <= i % num_layers < num_layers - protected_layers:
                raise PowerQuantConfigError(f"layer_bits names layer {i}, which is protected or named twice; leave one out")
            named.add(i % num_layers)
            formats[i] = CacheFormat(head_size, key, value, value_codec if value == 2 else SCALAR)
        signs = None
        if seed:
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (head_size,), generator=generator).float() * 2 - 1
        sketch = ResidualSketch(head_size, qjl_bits) if qjl_bits != 0 else None
        layers = [
            ReferenceLayer(
                formats[i] if protected_layers <= i < num_layers - protected_layers else None,
                residual_tokens,
                sink_tokens,
                None if key_frames is None else key_frames[i],
                signs,
                sketch,
            )
            for i in range(num_layers)
        ]
        super().__init__(layers=layers)

    def held_bytes(self) -> int:
        """Bytes that a cache of these layers has to hold, frames counted."""
        frames = [layer.key_frame for layer in self.layers if layer.format and layer.key_frame is not None]
        tables = sum(frame.numel() * 4 for frame in frames)
        return sum(layer.held_bytes() for layer in self.layers) + tables
