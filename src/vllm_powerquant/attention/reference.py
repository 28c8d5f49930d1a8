"""The whole method in plain PyTorch: quantize, store, gather, attend. The truth that every kernel is tested against.

A vector x (a key in its head's frame, or a value) becomes codes and one scale:

    h = H S x                      signs S, Hadamard matrix H (rotation.py)
    t = h / (rms(h) * step)        in units of the codebook's integer grid
    idx = nearest level            level n means n + 1/2 (2-bit values of the trellis codec: trellis.py)
    scale = |h|^2 / <h, n + 1/2> / (step * sqrt(head_size))

The scale is the unbiased one (<x, x^> = |x|^2): averaging many values then removes the quantization noise without
shrinking the result. In rotated coordinates x^ = scale * step * (n + 1/2). Sums run in the fixed order of `tree_sum`,
so a kernel that keeps it stores the same bytes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..codebooks.tables import Codebook
from .cache_format import CacheFormat
from .rotation import hadamard_transform, rotate, unrotate
from .trellis import encode as encode_trellis
from .trellis import levels as trellis_levels

SCALE_MIN, SCALE_MAX = 2.0**-24, 65504.0  # smallest and largest positive fp16


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension: halves are added while the length is even, the rest from left to right.

    Args:    x [..., n] fp32
    Returns: [...] fp32
    """
    n = x.shape[-1]
    while n % 2 == 0:
        n //= 2
        x = x[..., :n] + x[..., n:]
    total = x[..., 0]
    for i in range(1, n):
        total = total + x[..., i]
    return total


def quantize(x: torch.Tensor, codebook: Codebook, scale_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors to codes and scales.

    Args:    x [..., head_size] fp32; scale_factor from CacheFormat.scale_factor
    Returns: idx [..., head_size] uint8, scale [...] fp16 in [2**-24, 65504] (NaN where x is not finite)
    """
    head_size = x.shape[-1]
    h = hadamard_transform(x.float())
    energy = tree_sum(h * h)
    # through float64: torch.sqrt of float32 is not always correctly rounded
    rms = torch.sqrt((energy / head_size).double()).float()
    inverse = torch.where(energy > 0, 1.0 / (rms * np.float32(codebook.step)), torch.zeros_like(rms))
    levels = torch.tensor(codebook.levels, dtype=torch.float32, device=x.device)
    boundaries = (levels[1:] + levels[:-1] + 1.0) * 0.5
    t = h * inverse[..., None]
    if codebook.kind == "trellis":
        idx = encode_trellis(t)
    elif codebook.bits == 8:
        idx = torch.nan_to_num(torch.floor(t), nan=-128.0).clamp(-128, 127) + 128
    else:
        idx = (t.unsqueeze(-1) >= boundaries).sum(-1)
    grid = _levels(idx, codebook).float() + 0.5
    scale = energy / tree_sum(h * grid) * torch.tensor(scale_factor, dtype=torch.float32)
    scale = torch.where(energy > 0, scale, torch.zeros_like(scale)).clamp(SCALE_MIN, SCALE_MAX)
    scale = torch.where(torch.isfinite(energy), scale, torch.full_like(scale, math.nan))
    return idx.to(torch.uint8), scale.to(torch.float16)


def dequantize(idx: torch.Tensor, scale: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """idx [..., head_size] uint8, scale [...] fp16 -> [..., head_size] fp64, still in rotated space."""
    return (_levels(idx, codebook).double() + 0.5) * float(codebook.step) * scale.double()[..., None]


def _levels(idx: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Integers n of idx [..., head_size]."""
    if codebook.kind == "trellis":
        return trellis_levels(idx)
    return torch.tensor(codebook.levels, device=idx.device)[idx.long()]


def in_frame(key: torch.Tensor, key_frame: torch.Tensor | None) -> torch.Tensor:
    """(key - centre) * scale, what is packed: keys [n, num_kv_heads, head_size].

    A frame [num_kv_heads, 3, head_size] has the rows centre, scale, 1 / scale; scales are powers of two. Queries are
    multiplied by 1 / scale before they meet such keys.
    """
    if key_frame is None:
        return key
    centre, scale, _ = key_frame.to(key.dtype).unbind(1)
    return (key - centre) * scale


def encode(
    cache_format: CacheFormat, key: torch.Tensor, value: torch.Tensor, key_frame: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys and values to slot bytes.

    Args:    key, value [n, num_kv_heads, head_size] float; key_frame [num_kv_heads, 3, head_size] fp32: see in_frame
    Returns: [n, num_kv_heads, slot_bytes] uint8
    """
    key = in_frame(key.float(), key_frame)
    k_book, v_book = cache_format.key_codebook, cache_format.value_codebook
    key_idx, key_scale = quantize(key, k_book, cache_format.scale_factor(k_book))
    value_idx, value_scale = quantize(value, v_book, cache_format.scale_factor(v_book))
    return cache_format.layout.pack_slots(key_idx, key_scale, value_idx, value_scale)


def _storage_bytes(cache: torch.Tensor) -> torch.Tensor:
    """The bytes a strided uint8 cache view lives in, from its first one."""
    last = sum((n - 1) * s for n, s in zip(cache.shape, cache.stride(), strict=True))
    return cache.as_strided((last + 1,), (1,))


def store(
    cache_format: CacheFormat,
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_frame: torch.Tensor | None = None,
) -> None:
    """Write tokens into their pages; slots below 0 are padding.

    Args: cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; key, value [n, num_kv_heads, head_size];
          slot_mapping [n] int64
    """
    real = slot_mapping >= 0
    slots = encode(cache_format, key[real], value[real], key_frame)
    _storage_bytes(cache)[cache_format.layout.slot_addresses(slot_mapping[real], cache)] = slots


def gather(cache_format: CacheFormat, cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read tokens back: slots [n] int64 -> keys, values [n, num_kv_heads, head_size] fp64, in rotated space."""
    packed = _storage_bytes(cache)[cache_format.layout.slot_addresses(slots, cache)]
    key_idx, key_scale, value_idx, value_scale = cache_format.layout.unpack_slots(packed)
    return (
        dequantize(key_idx, key_scale, cache_format.key_codebook),
        dequantize(value_idx, value_scale, cache_format.value_codebook),
    )


def exact_positions(
    context_len: int,
    residual_tokens: int,
    sink_tokens: int,
    residual_table: torch.Tensor | None,
    block_size: int,
) -> torch.Tensor:
    """Context positions read from the exact copy: sinks and the residual window, where their block is real (id > 0).

    The window is anchored at the first token of the scheduled chunk: the residual_tokens - 1 tokens before it.

    Args:    residual_table [blocks] int, 0 = null block ("read the packed copy")
    Returns: [n] int64, ascending
    """
    if residual_table is None:
        return torch.empty(0, dtype=torch.int64)
    position = torch.arange(context_len)
    wanted = position < sink_tokens
    if residual_tokens > 0:
        wanted |= position > context_len - residual_tokens
    return position[wanted & (residual_table.long()[position // block_size] > 0)]


def attend(
    cache_format: CacheFormat,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    key_frame: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_table: torch.Tensor | None = None,
    residual_tokens: int = 0,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """One request's chunk over its cache, in float64.

    The chunk's own tokens are attended in raw keys and values (causally), older ones packed, except those that
    `exact_positions` names, which are read from the residual blocks.

    Args:    query [n, num_heads, head_size]; key, value [n, num_kv_heads, head_size] raw; block_table [blocks] int;
             context_len tokens before the chunk; residual [num_blocks, num_kv_heads, block_size, 2 * head_size] float, keys
             then values
    Returns: [n, num_heads, head_size] fp64
    """
    n, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    block_size = cache.shape[2]
    position = torch.arange(context_len)
    slots = block_table.long()[position // block_size] * block_size + position % block_size
    keys, values = gather(cache_format, cache, slots)
    raw_key = in_frame(key.double(), key_frame)
    if residual is not None:
        rows = residual.shape[2]
        exact = exact_positions(context_len, residual_tokens, sink_tokens, residual_table, rows)
        if len(exact):
            data = residual[residual_table.long()[exact // rows], :, exact % rows].double()
            keys[exact] = rotate(in_frame(data[..., :head_size], key_frame))
            values[exact] = rotate(data[..., head_size:])
    keys = torch.cat((keys, rotate(raw_key)))
    values = torch.cat((values, rotate(value.double())))
    q = query.double().view(n, num_kv_heads, num_heads // num_kv_heads, head_size)
    q = rotate(q if key_frame is None else q * key_frame[:, 2, None].double())
    scores = torch.einsum("nhgd,thd->hgnt", q, keys) * scale
    visible = torch.arange(context_len + n)[None, :] <= context_len + torch.arange(n)[:, None]
    scores = scores.masked_fill(~visible, -math.inf)
    out = torch.einsum("hgnt,thd->nhgd", scores.softmax(-1), values)
    return unrotate(out).reshape(n, num_heads, head_size)
