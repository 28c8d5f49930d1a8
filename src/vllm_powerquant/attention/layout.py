"""PageLayout: every byte of a compressed KV-cache page. The one module that knows them.

A page holds `block_size` tokens (a multiple of 64) of one kv head as consecutive sub-pages of 64 tokens:

    sub-page   [ key planes | value planes | key scales fp16[64] | value scales fp16[64] ]

A quantized coordinate (idx, ascending: 0 is the most negative level) is stored in bit planes:
2 bits -> (2,), 3 bits -> (2, 1) low bits first, 4 bits -> (4,), 8 bits -> (8,).
A plane of n bits takes width = head_size * n / 8 bytes a token; byte k's field f (bits n*f ...) belongs to channel
f * width + k.

    key plane    [64 tokens][width]     a token's bytes are contiguous
    value plane  [width][64 positions]  a token's bytes are 64 apart
    position of token t in value planes and scales: 16 * (t >> 1 & 3) + 2 * (t >> 3) + (t & 1)

Two planes are stored in the form that the kernels decode with the fewest instructions:
    4-bit keys    each 4 bytes are one 32-bit word of 4 low-half channels A and 4 high-half channels Z, as sign and
                  magnitude: magnitude of A_i at bit 4i, of Z_i at bit 16 + 4i, sign of A_i at bit 8i + 7, of Z_i at 8i + 3
                  (idx 8..15: sign 0, magnitude idx - 8; idx 0..7: sign 1, magnitude 7 - idx)
    2-bit values  field 3 is stored with its high bit flipped (two's complement of idx - 2); not those of the trellis codec
An 8-bit idx is stored as the signed level idx - 128.

No byte is shared by two tokens: writing a token never reads, so the store needs no locks in any token order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..errors import PowerQuantConfigError
from .rotation import check_head_size

SUB_PAGE_TOKENS = 64
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@functools.cache
def token_positions() -> torch.Tensor:
    """Position of each of a sub-page's 64 tokens in its value planes and scales: [64] int64."""
    t = torch.arange(SUB_PAGE_TOKENS)
    return 16 * ((t >> 1) & 3) + 2 * (t >> 3) + (t & 1)


@dataclass(frozen=True)
class PageLayout:
    """Offsets and sizes in bytes of one sub-page; a slot is a size (one token of one kv head), not a contiguous record.

    At head_size 128, K4/V2: slot 100 bytes (bf16: 512), sub-page 6,400.
    """

    head_size: int
    key_bits: int = 4
    value_bits: int = 2
    flip_values: bool = True  # of 2 bits, field 3

    def __post_init__(self) -> None:
        check_head_size(self.head_size)
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in _PLANES:
                raise PowerQuantConfigError(f"{name} must be 2, 3, 4 or 8, got {getattr(self, name)}")

    @property
    def key_bytes(self) -> int:
        """A key's planes."""
        return self.head_size * self.key_bits // 8

    @property
    def value_bytes(self) -> int:
        """A value's planes."""
        return self.head_size * self.value_bits // 8

    @property
    def slot_bytes(self) -> int:
        """Planes and a scale of 2 bytes of a key and of a value."""
        return self.key_bytes + self.value_bytes + 4

    @property
    def sub_page_bytes(self) -> int:
        return SUB_PAGE_TOKENS * self.slot_bytes

    @property
    def key_plane_offsets(self) -> tuple[int, ...]:
        """Start of each key plane in the sub-page."""
        return self._plane_offsets(self.key_bits, 0)

    @property
    def value_plane_offsets(self) -> tuple[int, ...]:
        """Start of each value plane in the sub-page."""
        return self._plane_offsets(self.value_bits, SUB_PAGE_TOKENS * self.key_bytes)

    @property
    def key_scale_offset(self) -> int:
        return SUB_PAGE_TOKENS * (self.key_bytes + self.value_bytes)

    @property
    def value_scale_offset(self) -> int:
        return self.key_scale_offset + 2 * SUB_PAGE_TOKENS

    def _plane_offsets(self, bits: int, start: int) -> tuple[int, ...]:
        offsets = []
        for plane in _PLANES[bits]:
            offsets.append(start)
            start += SUB_PAGE_TOKENS * self.head_size * plane // 8
        return tuple(offsets)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one kv head's page of block_size tokens. Raises PowerQuantConfigError unless a multiple of 64."""
        if block_size % SUB_PAGE_TOKENS or block_size <= 0:
            raise PowerQuantConfigError(f"block_size must be a multiple of {SUB_PAGE_TOKENS}, got {block_size}")
        return block_size * self.slot_bytes

    @functools.cached_property
    def slot_offsets(self) -> torch.Tensor:
        """Where each byte of a token's slot lies in its sub-page: [64, slot_bytes] int64.

        A slot's bytes in order: key planes, value planes, key scale (2, little endian), value scale (2).
        """
        t, pos = torch.arange(SUB_PAGE_TOKENS)[:, None], token_positions()[:, None]
        parts = []
        for plane, start in zip(_PLANES[self.key_bits], self.key_plane_offsets, strict=True):
            width = self.head_size * plane // 8
            parts.append(start + t * width + torch.arange(width))
        for plane, start in zip(_PLANES[self.value_bits], self.value_plane_offsets, strict=True):
            width = self.head_size * plane // 8
            parts.append(start + torch.arange(width) * SUB_PAGE_TOKENS + pos)
        for start in (self.key_scale_offset, self.value_scale_offset):
            parts.append(start + 2 * pos + torch.arange(2))
        return torch.cat(parts, dim=1)

    def pack_slots(
        self,
        key_idx: torch.Tensor,
        key_scale: torch.Tensor,
        value_idx: torch.Tensor,
        value_scale: torch.Tensor,
    ) -> torch.Tensor:
        """Codes and scales to slot bytes.

        Args:    key_idx, value_idx [..., head_size] uint8; key_scale, value_scale [...] fp16
        Returns: [..., slot_bytes] uint8
        """
        scales = [s.contiguous().unsqueeze(-1).view(torch.uint8) for s in (key_scale, value_scale)]
        return torch.cat((self.pack_key(key_idx), self.pack_value(value_idx), *scales), dim=-1)

    def unpack_slots(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inverse of pack_slots: slots [..., slot_bytes] uint8 -> key_idx, key_scale, value_idx, value_scale."""
        keys, values, scales = slots.split((self.key_bytes, self.value_bytes, 4), dim=-1)
        scales = scales.contiguous().view(torch.float16)
        return self.unpack_key(keys), scales[..., 0], self.unpack_value(values), scales[..., 1]

    def pack_key(self, idx: torch.Tensor) -> torch.Tensor:
        """idx [..., head_size] uint8 -> the planes of a key, one after the other: [..., key_bytes] uint8."""
        return torch.cat(_pack(idx, self.key_bits, self.key_bits == 4, False), dim=-1)

    def unpack_key(self, planes: torch.Tensor) -> torch.Tensor:
        """Inverse of pack_key."""
        return _unpack(planes, self.head_size, self.key_bits, self.key_bits == 4, False)

    def pack_value(self, idx: torch.Tensor) -> torch.Tensor:
        """idx [..., head_size] uint8 -> the planes of a value, one after the other: [..., value_bytes] uint8."""
        return torch.cat(_pack(idx, self.value_bits, False, self._flips), dim=-1)

    def unpack_value(self, planes: torch.Tensor) -> torch.Tensor:
        """Inverse of pack_value."""
        return _unpack(planes, self.head_size, self.value_bits, False, self._flips)

    @property
    def _flips(self) -> bool:
        return self.value_bits == 2 and self.flip_values

    def slot_addresses(self, slot_mapping: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Byte addresses of slots in a cache tensor's storage.

        Args:    slot_mapping [n] int64, all >= 0; cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8, of which
                 the last two dimensions are contiguous (their meaning is this layout's, not the shape's)
        Returns: [n, num_kv_heads, slot_bytes] int64, relative to the cache tensor's first byte
        """
        block_size = cache.shape[2]
        self.page_bytes(block_size)
        block, token = slot_mapping // block_size, slot_mapping % block_size
        base = block * cache.stride(0) + (token // SUB_PAGE_TOKENS) * self.sub_page_bytes
        heads = torch.arange(cache.shape[1], device=cache.device) * cache.stride(1)
        in_page = self.slot_offsets.to(cache.device)[token % SUB_PAGE_TOKENS]
        return base[:, None, None] + heads[None, :, None] + in_page[:, None, :]


def _pack(idx: torch.Tensor, bits: int, sign_magnitude_words: bool, flip_top_field: bool) -> list[torch.Tensor]:
    """idx [..., head_size] uint8 -> one [..., width] uint8 tensor for each plane."""
    if sign_magnitude_words:
        return [_pack_key_words(idx)]
    if bits == 8:
        return [idx ^ 0x80]
    planes, shift = [], 0
    for plane in _PLANES[bits]:
        field = (idx >> shift) & ((1 << plane) - 1)
        fields = field.unflatten(-1, (8 // plane, -1))
        if flip_top_field:
            fields = fields.clone()
            fields[..., -1, :] ^= 1 << (plane - 1)
        packed = torch.zeros_like(fields[..., 0, :])
        for f in range(8 // plane):
            packed |= fields[..., f, :] << (plane * f)
        planes.append(packed)
        shift += plane
    return planes


def _unpack(
    packed: torch.Tensor, head_size: int, bits: int, sign_magnitude_words: bool, flip_top_field: bool
) -> torch.Tensor:
    """[..., head_size * bits / 8] uint8 (planes one after the other) -> idx [..., head_size] uint8."""
    if sign_magnitude_words:
        return _unpack_key_words(packed)
    if bits == 8:
        return packed ^ 0x80
    idx, shift, start = None, 0, 0
    for plane in _PLANES[bits]:
        width = head_size * plane // 8
        part = packed[..., start : start + width]
        fields = [(part >> (plane * f)) & ((1 << plane) - 1) for f in range(8 // plane)]
        if flip_top_field:
            fields[-1] = fields[-1] ^ (1 << (plane - 1))
        field = torch.cat(fields, dim=-1) << shift
        idx = field if idx is None else idx | field
        shift, start = shift + plane, start + width
    return idx


def _pack_key_words(idx: torch.Tensor) -> torch.Tensor:
    """4-bit idx [..., head_size] -> sign-and-magnitude words as bytes [..., head_size / 2]."""
    sign = (idx < 8).to(torch.uint8)
    mag = torch.where(idx < 8, 7 - idx, idx - 8)
    (mag_a, mag_z), (sign_a, sign_z) = (x.unflatten(-1, (2, -1, 4)).unbind(-3) for x in (mag, sign))
    mags = torch.cat((mag_a, mag_z), dim=-1)  # [..., words, 8]: nibble i of the word
    packed = mags[..., 0::2] | mags[..., 1::2] << 4 | sign_a << 7 | sign_z << 3
    return packed.flatten(-2)


def _unpack_key_words(packed: torch.Tensor) -> torch.Tensor:
    words = packed.unflatten(-1, (-1, 4))
    mags = torch.stack((words & 7, (words >> 4) & 7), dim=-1).flatten(-2)  # [..., words, 8]
    mag = torch.cat((mags[..., :4].flatten(-2), mags[..., 4:].flatten(-2)), dim=-1)
    sign = torch.cat(((words >> 7).flatten(-2), ((words >> 3) & 1).flatten(-2)), dim=-1)
    return torch.where(sign == 1, 7 - mag, 8 + mag)
