"""Store: rotate, quantize and pack new tokens into their pages, and copy them into their exact blocks.

Every operation is the one attention/reference.py names, in its order, so the bytes are equal to the reference's whatever the
batch. This kernel runs wherever Triton does; NVIDIA GPUs take its twin in store_nvidia.py, which stores the same bytes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ...errors import PowerQuantUnsupportedError
from ..cache_format import CacheFormat
from .cpu_kernels import ExactBlocks
from .hadamard import hadamard, join_columns, split_columns
from .quantize import StoreFormat, find_slots, pack_key_words, pack_plane, quantize
from .store_nvidia import store_nvidia

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _places(FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Coordinates (or bytes of a plane) that columns FIRST, FIRST + STEP, .. hold (hadamard.py): [1, LANES, COUNT]."""
    column = FIRST + STEP * tl.arange(0, COUNT)[None, None, :]
    return (column // GROUP * LANES + tl.arange(0, LANES)[None, :, None]) * GROUP + column % GROUP


@triton.jit
def _store_columns(ptr, columns, mask, APART: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Columns of a plane's bytes (STEP 1), or words of four (STEP 4), to ptr [TOKENS, 1]; bytes are APART from each other.

    Tensors have powers of two as sizes: one part for each bit of the number of columns.
    """
    for bit in tl.static_range(9):
        if (len(columns) >> bit) & 1:
            part = join_columns(columns, (len(columns) >> (bit + 1)) << (bit + 1), 1 << bit)
            offs = APART * _places(STEP * ((len(columns) >> (bit + 1)) << (bit + 1)), 1 << bit, STEP, LANES, GROUP)
            if STEP == 4:
                tl.store((ptr[:, :, None] + offs).to(tl.pointer_type(tl.int32)), part, mask=mask[:, :, None])
            else:
                tl.store(ptr[:, :, None] + offs, part.to(tl.uint8), mask=mask[:, :, None])


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots_ptr", "exact_slots_ptr"])
def _store_kernel(
    x_ptr,            # [num_tokens, num_kv_heads, head_size]: keys or values
    frame_ptr,        # [num_kv_heads, 3, head_size] fp32: centre, scale, 1 / scale; or None
    slots_ptr,        # [num_tokens] int64
    cache_ptr,        # [num_blocks, num_kv_heads, BLOCK_SIZE, slot_bytes] uint8, or None
    exact_slots_ptr,  # [num_tokens] int64
    exact_ptr,        # [num_exact_blocks, num_kv_heads, EXACT_BLOCK_SIZE, 2 * head_size], or None
    num_tokens,
    stride_token: tl.int64, stride_head: tl.int64, stride_block: tl.int64, stride_cache_head: tl.int64,
    stride_exact_block: tl.int64, stride_exact_head: tl.int64, stride_exact_token: tl.int64,
    BLOCK_SIZE: tl.constexpr, EXACT_BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, IS_KEY: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    HEAD_SIZE: tl.constexpr = FORMAT.head_size
    SIGNS: tl.constexpr = FORMAT.signs
    OUTER: tl.constexpr = FORMAT.outer
    VECTORS: tl.constexpr = FORMAT.keys if IS_KEY else FORMAT.values
    COUNT: tl.constexpr = HEAD_SIZE // LANES
    head = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
    real = row < num_tokens
    from_ptr = (x_ptr + head * stride_head + row * stride_token)[:, :, None]
    if exact_ptr is not None:
        exact_slot = tl.load(exact_slots_ptr + row, mask=real, other=-1)
        copied = (exact_slot >= EXACT_BLOCK_SIZE)[:, :, None]
        to_ptr = exact_ptr + exact_slot // EXACT_BLOCK_SIZE * stride_exact_block + head * stride_exact_head
        to_ptr = (to_ptr + exact_slot % EXACT_BLOCK_SIZE * stride_exact_token)[:, :, None]
        if not IS_KEY:
            to_ptr += HEAD_SIZE
    x = ()
    for bit in tl.static_range(8, -1, -1):
        if (COUNT >> bit) & 1:
            offs = _places((COUNT >> (bit + 1)) << (bit + 1), 1 << bit, 1, LANES, GROUP)
            part = tl.load(from_ptr + offs, mask=real[:, :, None], other=0.0)
            if exact_ptr is not None:
                tl.store(to_ptr + offs, part, mask=copied)
            if cache_ptr is not None:
                part = part.to(tl.float32)
                if frame_ptr is not None:
                    frame = frame_ptr + head * (3 * HEAD_SIZE) + offs
                    part = (part - tl.load(frame)) * tl.load(frame + HEAD_SIZE)
                x = x + split_columns(part, 1 << bit)
    if cache_ptr is not None:
        slot = tl.load(slots_ptr + row, mask=real, other=-1)
        packed = slot >= 0
        cache_ptr += head * stride_cache_head
        sub_page, token, position = find_slots(cache_ptr, slot, stride_block, BLOCK_SIZE, FORMAT.sub_page_bytes)
        lane = tl.arange(0, LANES)[None, :]
        h = hadamard(x, lane, COUNT, LANES, GROUP, SIGNS, OUTER)
        codes, scale = quantize(h, lane, COUNT, LANES, GROUP, VECTORS)
        scale_ptr = (sub_page + VECTORS.scales + 2 * position).to(tl.pointer_type(tl.int16))
        tl.store(scale_ptr + lane, scale, mask=packed & (lane == 0))
        if IS_KEY and VECTORS.bits == 4:
            ptr = sub_page + VECTORS.planes[0][0] + token * (HEAD_SIZE // 2)
            _store_columns(ptr, pack_key_words(codes), packed, 1, 4, LANES, GROUP)
        else:
            for plane in tl.static_range(len(VECTORS.planes)):
                column_bytes = pack_plane(codes, 2 * plane, VECTORS.planes[plane][1], VECTORS, not IS_KEY)
                ptr = sub_page + VECTORS.planes[plane][0]
                if IS_KEY:
                    _store_columns(ptr + token * (len(column_bytes) * LANES), column_bytes, packed, 1, 1, LANES, GROUP)
                else:
                    _store_columns(ptr + position, column_bytes, packed, 64, 1, LANES, GROUP)


def store(
    cache_format: CacheFormat,
    cache: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor | None,
    key_frame: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_slot_mapping: torch.Tensor | None = None,
    portable: bool = False,
) -> None:
    """Write tokens into their packed pages (unless None) and, with `exact`, into their exact blocks.

    Args:   cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; key, value [n or more, num_kv_heads, head_size];
            slot_mapping, exact_slot_mapping [n] int64, below 0: padding (exact slots of block 0 are not written either);
            portable: not the NVIDIA kernel, wherever this runs
    Raises: ValueError for tensors of another form, PowerQuantUnsupportedError for other dtypes of keys and values
    """
    exact_cache = exact.cache if exact else None
    slots, exact_slots = slot_mapping if cache is not None else None, exact_slot_mapping if exact else None
    _check(cache_format, cache, key, value, slots, key_frame, exact_cache, exact_slots)
    num_tokens = (exact_slots if cache is None else slots).shape[0]
    if num_tokens == 0:
        return
    # a trellis's rings are spread over lanes there
    nvidia = _has_nvidia_kernel(key.device) and not (
        cache_format.is_trellis and cache_format.head_size & (cache_format.head_size - 1)
    )
    launch = store_nvidia if nvidia and not portable else _store_portable
    launch(cache_format, cache, key, value, slots, key_frame, exact_cache, exact_slots, num_tokens)


@functools.cache
def _has_nvidia_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and not triton.knobs.runtime.interpret


def _check(cache_format, cache, key, value, slots, key_frame, exact_cache, exact_slots) -> None:
    if key.dtype != value.dtype or key.dtype not in _DTYPES:
        raise PowerQuantUnsupportedError(
            f"keys and values must share one of float32, bfloat16, float16, got {key.dtype} and {value.dtype}"
        )
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(f"the last dimension must be contiguous, got strides {key.stride()} and {value.stride()}")
    for tensor, dtype in ((slots, torch.int64), (exact_slots, torch.int64), (key_frame, torch.float32)):
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(f"expected a contiguous {dtype} tensor, got {tensor.dtype} with strides {tensor.stride()}")
    if cache is not None:
        slot_bytes = cache_format.layout.slot_bytes
        block, head, *inner = cache.stride()
        if cache.dtype != torch.uint8 or cache.shape[3] != slot_bytes or inner != [slot_bytes, 1]:
            raise ValueError(
                f"cache must be uint8 [blocks, kv heads, tokens, {slot_bytes}] with contiguous pages, "
                f"got {cache.dtype} {tuple(cache.shape)} with strides {cache.stride()}"
            )
        if (block | head | cache.data_ptr()) % 16:
            raise ValueError(f"pages must start at multiples of 16 bytes, got strides {cache.stride()}")
        cache_format.layout.page_bytes(cache.shape[2])
    if exact_cache is not None and (exact_cache.dtype != key.dtype or exact_cache.stride(3) != 1):
        raise ValueError(
            f"exact blocks must be contiguous {key.dtype} rows, got {exact_cache.dtype} with strides {exact_cache.stride()}"
        )


def _store_portable(cache_format, cache, key, value, slots, key_frame, exact_cache, exact_slots, num_tokens) -> None:
    head_size, num_kv_heads = cache_format.head_size, key.shape[1]
    # the columns of a byte lie in one lane: eight of each in planes of one bit, which 3 bits have
    for is_key, x, frame in ((True, key, key_frame), (False, value, None)):
        rings = cache_format.is_trellis and not is_key
        # and those of a ring of the trellis
        group, fields = 16 if rings else 4, 8 if (cache_format.key_bits if is_key else cache_format.value_bits) == 3 else 4
        lanes = head_size // (group * fields) if head_size & (head_size - 1) == 0 else 1
        # interpreted, a large program costs as much as a small one; rings in one lane are many registers
        tokens = (32 if rings and lanes == 1 else 128 // lanes) if key.is_cuda else 256
        _store_kernel[(num_kv_heads, triton.cdiv(num_tokens, tokens))](
            x,
            frame,
            slots,
            cache,
            exact_slots,
            exact_cache,
            num_tokens,
            x.stride(0),
            x.stride(1),
            *(cache.stride()[:2] if cache is not None else (0, 0)),
            *(exact_cache.stride()[:3] if exact_cache is not None else (0, 0, 0)),
            BLOCK_SIZE=cache.shape[2] if cache is not None else 0,
            EXACT_BLOCK_SIZE=exact_cache.shape[2] if exact_cache is not None else 0,
            FORMAT=StoreFormat.of(cache_format),
            IS_KEY=is_key,
            TOKENS=tokens,
            LANES=lanes,
            GROUP=group,
            num_warps=4,
            enable_fp_fusion=False,
        )
