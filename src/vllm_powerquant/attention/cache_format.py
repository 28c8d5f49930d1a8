"""CacheFormat: what the bytes of a page mean: the layout and the two codebooks that go with a pair of bit widths."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..codebooks.tables import Codebook, load_codebook
from ..config import PowerQuantConfig
from ..errors import PowerQuantConfigError
from .layout import PageLayout

SCALAR, TRELLIS = "scalar", "trellis"


@dataclass(frozen=True)
class CacheFormat:
    """Layout and codebooks of one compressed cache.

    2-bit values use even levels, which the GPU kernel decodes without a table for 1 % more error; every other width up to
    4 bits uses Lloyd-Max levels, 8 bits a uniform grid. With the trellis codec, 2-bit values are what trellis.py says.

    Raises: PowerQuantConfigError for bits or a codec that do not exist, or a trellis of other than 2-bit values;
            PowerQuantUnsupportedError for a head size that has no rotation.
    """

    head_size: int
    key_bits: int = 4
    value_bits: int = 2
    value_codec: str = SCALAR

    def __post_init__(self) -> None:
        if self.value_codec not in (SCALAR, TRELLIS):
            raise PowerQuantConfigError(f"value_codec must be {SCALAR} or {TRELLIS}, got {self.value_codec!r}")
        if self.is_trellis and self.value_bits != 2:
            raise PowerQuantConfigError(
                f"value_codec {TRELLIS} is for value_bits 2, got value_bits {self.value_bits}; give value_codec {SCALAR}"
            )
        # refuses other head sizes and bits
        PageLayout(self.head_size, self.key_bits, self.value_bits)

    @classmethod
    def of(cls, config: PowerQuantConfig, head_size: int) -> CacheFormat:
        """The format that options ask for; their value_codec is that of 2-bit values."""
        codec = config.value_codec if config.value_bits == 2 else SCALAR
        return cls(head_size, config.key_bits, config.value_bits, codec)

    @property
    def is_trellis(self) -> bool:
        return self.value_codec == TRELLIS

    @functools.cached_property
    def layout(self) -> PageLayout:
        return PageLayout(self.head_size, self.key_bits, self.value_bits, flip_values=not self.is_trellis)

    @functools.cached_property
    def key_codebook(self) -> Codebook:
        return load_codebook(self.head_size, self.key_bits)

    @functools.cached_property
    def value_codebook(self) -> Codebook:
        if self.is_trellis:
            return load_codebook(self.head_size, 2, TRELLIS)
        return load_codebook(self.head_size, self.value_bits, "uniform" if self.value_bits == 2 else "lloyd_max")

    def scale_factor(self, codebook: Codebook) -> np.float32:
        """1 / (step * sqrt(head_size)): turns |h|^2 / <h, level + 1/2> of a Hadamard vector h into the stored scale."""
        return np.float32(1.0 / (float(codebook.step) * math.sqrt(self.head_size)))
