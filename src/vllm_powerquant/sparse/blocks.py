"""Tensor data in GGUF's types: through the gguf library, and Q6_K, which it only reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PowerQuantConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType

# elements converted at a time: bounds the float32 copies
CHUNK = 1 << 22

Q6_K_BLOCK = 256
Q6_K_GROUP = 16  # elements that share a scale


def encode(weight: torch.Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of a tensor as an array whose last dimension is a row.

    Args:    weight [columns] or [rows, columns], any floating type
    Raises:  PowerQuantConfigError if a value is not finite, or becomes infinite in f16
    """
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    rows = weight if weight.dim() == 2 else weight[None]
    step = max(1, CHUNK // rows.shape[1])
    data = None
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(torch.float32).numpy()
        limit = np.finfo(np.float16).max if kind is GGMLQuantizationType.F16 else np.finfo(np.float32).max
        # also false for NaN
        if not np.abs(part).max() <= limit:
            raise PowerQuantConfigError(
                f"{name} has a value that is no finite {kind.name}; use type f32 or mend the weights"
            )
        packed = quantize_q6_k(part) if kind is GGMLQuantizationType.Q6_K else quants.quantize(part, kind)
        if data is None:
            data = np.empty((len(rows), packed.shape[1]), packed.dtype)
        data[start : start + step] = packed
    return data if weight.dim() == 2 else data[0]


def quantize_q6_k(rows: np.ndarray) -> np.ndarray:
    """Q6_K: 6-bit values, an 8-bit scale for each 16 of them, a 16-bit scale for each 256.

    Args:    rows [n, columns] fp32, columns a multiple of 256
    Returns: [n, columns / 256 * 210] uint8; a block is [128 low nibbles | 64 high pairs of bits | 16 scales | d fp16]
    """
    import numpy as np

    groups = rows.reshape(-1, Q6_K_BLOCK // Q6_K_GROUP, Q6_K_GROUP)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    # the value farthest from zero becomes -32, the end of the range that has one step more
    scale = (peak / -32)[..., 0]
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[..., None], -1)
    d = (largest / -128).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.nan_to_num(np.rint(scale / d.astype(np.float32)), posinf=0, neginf=0).clip(-128, 127).astype(np.int8)
        step = (d.astype(np.float32) * scales)[..., None]
        values = np.nan_to_num(np.rint(groups / step), posinf=0, neginf=0).clip(-32, 31)
    codes = (values.astype(np.int16) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    # of each 128 values, the low nibbles of the first 64 share bytes with those of the last 64
    low = (codes[:, :, :2] & 15) | (codes[:, :, 2:] & 15) << 4
    high = codes >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    blocks = [low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(blocks, axis=1).reshape(len(rows), -1)
