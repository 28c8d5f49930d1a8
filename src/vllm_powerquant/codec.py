"""Codec: the cache's compression of one kind of vector, on any tensor: Codec(head_size, bits).encode(x), .decode(packed).

The bytes are those of a cache slot (attention/layout.py), the arithmetic is the reference's (attention/reference.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .attention import reference
from .attention.cache_format import SCALAR, CacheFormat
from .attention.rotation import SUPPORTED_HEAD_SIZES, unrotate
from .codebooks.tables import BITS, Codebook
from .errors import PowerQuantConfigError, PowerQuantUnsupportedError

KEY, VALUE = "key", "value"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCALE_BYTES = 2

# vectors worked on at a time: bounds the temporary memory (about 50 bytes a coordinate), changes no result
_ROWS = 1 << 14


@dataclass(frozen=True)
class Codec:
    """Vectors of head_size coordinates to `bits` bits a coordinate and a 16-bit scale, and back.

    Args:
        head_size: 64, 80, 96, 112, 128, 192 or 256.
        bits: of a coordinate: 2, 3, 4 or 8.
        kind: whose bytes, "key" or "value". Keys have Lloyd-Max levels at every width up to 4 bits; 2-bit values have even
            ones, which GPUs decode faster for 1 % more error. Bits are ordered as each is read (attention/layout.py).
        value_codec: of 2-bit values, "scalar" or "trellis", which has a fifth less error in the same bytes.
    Raises:
        PowerQuantConfigError: bits, kind or value_codec does not exist.
        PowerQuantUnsupportedError: no rotation of this head size.
    """

    head_size: int
    bits: int = 4
    kind: str = KEY
    value_codec: str = SCALAR

    def __post_init__(self) -> None:
        if not _is_int(self.head_size) or self.head_size not in SUPPORTED_HEAD_SIZES:
            raise PowerQuantUnsupportedError(
                f"head_size must be one of {', '.join(map(str, SUPPORTED_HEAD_SIZES))}, got {self.head_size!r}; "
                "fill shorter vectors up with zeros, which changes no inner product"
            )
        if not _is_int(self.bits) or self.bits not in BITS:
            raise PowerQuantConfigError(f"bits must be 2, 3, 4 or 8, got {self.bits!r}")
        if self.kind not in (KEY, VALUE):
            raise PowerQuantConfigError(f"kind must be {KEY!r} or {VALUE!r}, got {self.kind!r}")
        if self.kind == KEY and self.value_codec != SCALAR:
            raise PowerQuantConfigError(f"value_codec is for kind {VALUE!r}, got {self.value_codec!r} for {KEY!r}")
        _ = self._format  # refuses other codecs

    @functools.cached_property
    def _format(self) -> CacheFormat:
        if self.kind == KEY:
            return CacheFormat(self.head_size, key_bits=self.bits)
        return CacheFormat(self.head_size, value_bits=self.bits, value_codec=self.value_codec)

    @property
    def codebook(self) -> Codebook:
        return self._format.key_codebook if self.kind == KEY else self._format.value_codebook

    @property
    def planes_bytes(self) -> int:
        """Bytes of a vector's bit planes."""
        return self._format.layout.key_bytes if self.kind == KEY else self._format.layout.value_bytes

    @property
    def bytes_per_vector(self) -> int:
        """The planes and the scale."""
        return self.planes_bytes + SCALE_BYTES

    def encode(self, x: torch.Tensor) -> PackedVectors:
        """Packs vectors; no gradient passes.

        A vector's scale makes <x, x^> = |x|^2, so averages of many decoded vectors lose only noise. Its square is computed
        in float32: a vector with a NaN or an infinity, or whose square passes 3e38, decodes to NaN in every coordinate
        and leaves the others as they are. The scale is an fp16 number of at least 2**-24: vectors of coordinates around
        65,504 and more come back shortened, a zero vector as coordinates below 1e-6.

        Args:   x [..., head_size] fp16, bf16 or fp32, on any device, with any strides
        Raises: PowerQuantConfigError for another dtype or last dimension, or what is no tensor
        """
        if not isinstance(x, torch.Tensor):
            raise PowerQuantConfigError(f"encode takes a torch tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise PowerQuantConfigError(f"encode takes float16, bfloat16 or float32, got {_name(x.dtype)}; cast it first")
        if x.dim() == 0 or x.shape[-1] != self.head_size:
            raise PowerQuantConfigError(
                f"encode takes [..., {self.head_size}], got shape {list(x.shape)}; reshape it, or make a Codec of its size"
            )
        factor = self._format.scale_factor(self.codebook)
        pack = self._format.layout.pack_key if self.kind == KEY else self._format.layout.pack_value
        rows = x.detach().reshape(-1, self.head_size)
        planes = torch.empty(len(rows), self.planes_bytes, dtype=torch.uint8, device=x.device)
        scale = torch.empty(len(rows), dtype=torch.float16, device=x.device)
        for at in range(0, len(rows), _ROWS):
            idx, scale[at : at + _ROWS] = reference.quantize(rows[at : at + _ROWS].float(), self.codebook, factor)
            planes[at : at + _ROWS] = pack(idx)
        lead = x.shape[:-1]
        return PackedVectors(self, planes.view(*lead, self.planes_bytes), scale.view(lead), x.dtype)

    def decode(self, packed: PackedVectors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The vectors, in `dtype` (default: that which was encoded): [..., head_size].

        Raises: PowerQuantConfigError for what another codec packed, or a dtype other than fp16, bf16 and fp32
        """
        if not isinstance(packed, PackedVectors) or packed.codec != self:
            got = packed.codec if isinstance(packed, PackedVectors) else type(packed).__name__
            raise PowerQuantConfigError(f"decode takes what an equal codec packed, got {got} for {self}")
        dtype = packed.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise PowerQuantConfigError(f"dtype must be float16, bfloat16 or float32, got {_name(dtype)}")
        unpack = self._format.layout.unpack_key if self.kind == KEY else self._format.layout.unpack_value
        planes, scale = packed.planes.reshape(-1, self.planes_bytes), packed.scale.reshape(-1)
        x = torch.empty(len(planes), self.head_size, dtype=dtype, device=planes.device)
        for at in range(0, len(planes), _ROWS):
            idx = unpack(planes[at : at + _ROWS])
            x[at : at + _ROWS] = unrotate(reference.dequantize(idx, scale[at : at + _ROWS], self.codebook))
        return x.view(*packed.shape, self.head_size)


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """What Codec.encode makes: nothing of the vectors is held but these bytes."""

    codec: Codec
    planes: torch.Tensor  # [..., codec.planes_bytes] uint8
    scale: torch.Tensor  # [...] fp16
    dtype: torch.dtype  # of what was encoded

    @property
    def shape(self) -> torch.Size:
        """Of the vectors, without their coordinates."""
        return self.scale.shape

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
        return self.planes.nbytes + self.scale.nbytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of a vector in the dtype that was encoded over those of a packed one."""
        return self.codec.head_size * self.dtype.itemsize / self.codec.bytes_per_vector

    def to(self, device: torch.device | str) -> PackedVectors:
        """The same bytes on another device."""
        return PackedVectors(self.codec, self.planes.to(device), self.scale.to(device), self.dtype)


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
