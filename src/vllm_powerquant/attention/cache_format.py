"""CacheFormat: what the bytes of a page mean: the layout and the two codebooks that go with a pair of bit widths."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..codebooks.tables import Codebook, load_codebook
from .layout import PageLayout


@dataclass(frozen=True)
class CacheFormat:
    """Layout and codebooks of one compressed cache.

    2-bit values use even levels, which the GPU kernel decodes without a table for 1 % more error; every other width up to
    4 bits uses Lloyd-Max levels, 8 bits a uniform grid.
    """

    head_size: int
    key_bits: int = 4
    value_bits: int = 2

    @functools.cached_property
    def layout(self) -> PageLayout:
        return PageLayout(self.head_size, self.key_bits, self.value_bits)

    @functools.cached_property
    def key_codebook(self) -> Codebook:
        return load_codebook(self.head_size, self.key_bits)

    @functools.cached_property
    def value_codebook(self) -> Codebook:
        return load_codebook(self.head_size, self.value_bits, "uniform" if self.value_bits == 2 else "lloyd_max")

    def scale_factor(self, codebook: Codebook) -> np.float32:
        """1 / (step * sqrt(head_size)): turns |h|^2 / <h, level + 1/2> of a Hadamard vector h into the stored scale."""
        return np.float32(1.0 / (float(codebook.step) * math.sqrt(self.head_size)))
