"""The names of the package turboquant 0.2.0: `from vllm_powerquant.compat.turboquant import TurboQuantCache, TurboQuantMSE`.

What differs from that package: rotation and codebooks are this package's (randomized Hadamard transforms, Lloyd-Max tables),
and so are head sizes and bits: 1 bit and other dimensions are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..attention import reference
from ..attention.rotation import rotation_matrix, unrotate
from ..codec import Codec
from ..errors import PowerQuantConfigError
from ..hf import PowerQuantCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["TurboQuantCache", "TurboQuantMSE"]


class TurboQuantMSE:
    """Codes and norms of vectors, each code in a byte of its own; Codec packs them.

    The squared error of a vector is the codebook's share of its square: norms are the vectors' own here, where Codec's scale
    is unbiased.

    Args:
        dim: 64, 80, 96, 112, 128, 192 or 256.
        bits: of a coordinate: 2, 3, 4 or 8.
        device: where `rotation` and `codebook` are; vectors may be elsewhere.
        seed: kept; there is one rotation, whatever it is.
    Raises:
        PowerQuantConfigError: bits that do not exist, or a device that is not here.
        PowerQuantUnsupportedError: no rotation of this dimension.
    """

    def __init__(self, dim: int, bits: int = 3, device: str | torch.device = "cuda", seed: int = 42) -> None:
        self._codec = Codec(dim, bits)
        self.dim, self.bits, self.device, self.seed = dim, bits, device, seed
        self.num_centroids = 2**bits
        try:
            # R of y = R x [dim, dim] and centroids of a unit vector's coordinate [2**bits], both fp32
            self.rotation = rotation_matrix(dim).to(device)
            self.codebook = (torch.from_numpy(self._codec.codebook.centroids) / math.sqrt(dim)).to(device)
        # PyTorch built without CUDA raises an AssertionError
        except (RuntimeError, AssertionError) as error:
            raise PowerQuantConfigError(
                f"device must be one that PyTorch has here, got {str(device)!r}; give device='cpu'"
            ) from error
        self.rotation_t = self.rotation.T

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., dim] float -> indices [..., dim] uint8, norms [..., 1] fp32.

        Raises: PowerQuantConfigError for another last dimension or no floating-point tensor
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else type(x).__name__
            raise PowerQuantConfigError(f"quantize takes a floating-point tensor, got {got}")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise PowerQuantConfigError(f"quantize takes [..., {self.dim}], got shape {list(x.shape)}")
        x = x.detach().float()
        # the factor is of Codec's scale, which is not used
        indices, _ = reference.quantize(x, self._codec.codebook, 1.0)
        return indices, x.norm(dim=-1, keepdim=True)

    def dequantize(self, indices: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """indices [..., dim], norms [..., 1] -> vectors [..., dim] fp32."""
        if indices.shape[-1:] != (self.dim,) or norms.shape != (*indices.shape[:-1], 1):
            raise PowerQuantConfigError(
                f"dequantize takes indices [..., {self.dim}] and norms [..., 1] of the same vectors, got shapes "
                f"{list(indices.shape)} and {list(norms.shape)}"
            )
        return unrotate(self.codebook.to(indices.device)[indices.long()]) * norms


class TurboQuantCache(PowerQuantCache):
    """A cache for `past_key_values=`, by that package's arguments: 128 newest tokens exact, no sinks.

    Args:
        bits: of keys and of values: 2, 3, 4 or 8.
        key_bits, value_bits: instead of `bits`, each for itself.
        protected_layers: so many first and last layers, or a list of layers, stay exact; needs `config`.
        config: the model's config, or the model: then, and with attn_implementation="powerquant", attention reads packed
        pages.
    Raises:
        PowerQuantConfigError: bits that do not exist or are given twice, or protected_layers without a config.
    """

    def __init__(
        self,
        bits: int | None = None,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        protected_layers: int | Sequence[int] = 0,
        config: PreTrainedModel | PreTrainedConfig | None = None,
    ) -> None:
        if bits is not None and (key_bits is not None or value_bits is not None):
            raise PowerQuantConfigError(f"give bits ({bits}), or key_bits and value_bits, not both")
        bits = 3 if bits is None else bits  # that package's default
        super().__init__(
            config,
            key_bits=bits if key_bits is None else key_bits,
            value_bits=bits if value_bits is None else value_bits,
            sink_tokens=0,
            protected_layers=protected_layers,
        )

    def memory_usage_bytes(self) -> dict[str, float]:
        """That package's names for memory_report(): bytes of packed pages, of exact tokens, of all, and of an uncompressed
        cache, and the last over the last but one."""
        report = self.memory_report()
        return {
            "compressed_bytes": report.packed_bytes,
            "residual_bytes": report.exact_bytes,
            "total_bytes": report.total_bytes,
            "fp16_equivalent_bytes": report.uncompressed_bytes,
            "savings_ratio": report.uncompressed_bytes / max(report.total_bytes, 1),
        }
