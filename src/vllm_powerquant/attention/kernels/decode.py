"""Attention of queries over packed pages in portable Triton: the twin of decode_hopper.py on the same bytes.

It runs on any GPU that Triton supports, in Triton's interpreter, and for the formats that the Hopper kernel leaves out. The
context of each request is cut into equal splits; a program leaves the partial of one split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..cache_format import CacheFormat
from ..layout import SUB_PAGE_TOKENS
from .common import token_row
from .cpu_kernels import ExactBlocks
from .unpack import PackedFormat, load_key_levels, load_key_scales, load_value_levels, load_value_scales, token_at

TILE: tl.constexpr = tl.constexpr(SUB_PAGE_TOKENS)


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "num_parts", "stride_table", "stride_exact_table", "residual", "sinks"]
)
def _packed_kernel(
    query_ptr,        # [num_rows, D] fp16, rotated, each row's largest coordinate 1
    query_scale_ptr,  # [num_rows] fp32
    cache_ptr,        # uint8, pages
    block_table_ptr,  # [num_requests, ...] int32
    exact_table_ptr,  # [num_requests, ...] int32
    query_start_ptr,  # [num_requests + 1] int32
    seq_lens_ptr,     # [num_requests] int32
    out_ptr,          # [num_splits, num_rows, D] fp32, rotated
    lse_ptr,          # [num_splits, num_rows] fp32, in bits
    num_rows, num_splits, num_parts,
    stride_block: tl.int64, stride_head: tl.int64, stride_table, stride_exact_table,
    residual, sinks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BLOCK_TILES: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, HAS_EXACT: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = FORMAT.head_size
    PADDED: tl.constexpr = FORMAT.padded_size
    b, head = tl.program_id(0), tl.program_id(1)
    split, part = tl.program_id(2) // num_parts, tl.program_id(2) % num_parts
    start = tl.load(query_start_ptr + b)
    queries = tl.load(query_start_ptr + b + 1) - start
    if part * M < queries * GROUP:
        context = tl.load(seq_lens_ptr + b) - queries
        j = part * M + tl.arange(0, M)
        valid = j // GROUP < queries
        row = token_row(start, j // GROUP, head, j, KV_HEADS, GROUP)
        d = tl.arange(0, PADDED)
        keep = valid[:, None] & (d < D)[None, :]
        q = tl.load(query_ptr + row[:, None] * D + d[None, :], mask=keep, other=0.0)
        q_scale = tl.load(query_scale_ptr + row, mask=valid, other=0.0)
        highest = tl.full([M], float("-inf"), tl.float32)
        norm = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, PADDED], tl.float32)
        window = tl.where(residual > 0, context - residual + 1, context)
        tiles = tl.cdiv(context, TILE)
        per_split = tl.cdiv(tiles, num_splits)
        pos = tl.arange(0, TILE)
        for t in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
            page = tl.load(block_table_ptr + b.to(tl.int64) * stride_table + t // BLOCK_TILES).to(tl.int64)
            tile = cache_ptr + page * stride_block + head * stride_head + (t % BLOCK_TILES) * FORMAT.sub_page_bytes
            position = t * TILE + token_at(pos)
            packed = position < context
            if HAS_EXACT:
                exact = (position < sinks) | (position >= window)
                block = tl.load(
                    exact_table_ptr + b.to(tl.int64) * stride_exact_table + position // EXACT_BLOCK,
                    mask=packed & exact,
                    other=0,
                )
                packed = packed & (block == 0)
            k = load_key_levels(tile, pos, FORMAT, tl.float16)
            k_scale = load_key_scales(tile, pos, FORMAT)
            s = tl.dot(q, tl.trans(k)) * q_scale[:, None] * k_scale[None, :]
            s = tl.where(packed[None, :] & valid[:, None], s, float("-inf"))
            above = tl.maximum(highest, tl.max(s, 1))
            base = tl.where(above == float("-inf"), 0.0, above)
            p = tl.exp2(s - base[:, None])
            factor = tl.exp2(highest - base)
            highest = above
            norm = norm * factor + tl.sum(p, 1)
            v = load_value_levels(tile, pos, FORMAT, tl.float16)
            # scales of tokens that are not read may be anything
            v_scale = tl.where(packed, load_value_scales(tile, pos, FORMAT), 0.0)
            # weights up to 2^15 in fp16: with a sink that takes most of the weight, a tail of small ones still counts
            unit = tl.maximum(tl.max(v_scale, 0), 1e-30) * (1.0 / 32768.0)
            acc = acc * factor[:, None] + tl.dot((p * (v_scale / unit)[None, :]).to(tl.float16), v) * unit
        seen = norm > 0.0
        out = acc / tl.where(seen, norm, 1.0)[:, None]
        at = split.to(tl.int64) * num_rows + row
        tl.store(out_ptr + at[:, None] * D + d[None, :], out, mask=keep)
        tl.store(lse_ptr + at, tl.where(seen, highest + tl.log2(norm), float("-inf")), mask=valid)


def attend_packed(
    cache_format: CacheFormat,
    query: torch.Tensor,
    query_scale: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    group: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    exact: ExactBlocks | None = None,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Partials of every query over its request's packed context, rotated.

    Args: query [num_rows, head_size] fp16 and query_scale [num_rows] fp32 from rotate_queries (unit without the key's step);
          num_rows = num_tokens * num_heads; cache [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; out [num_splits,
          num_rows, head_size], lse [num_splits, num_rows] fp32 (log2; -inf where a split has nothing to read)
    """
    fmt = PackedFormat.of(cache_format)
    num_splits, num_rows = lse.shape
    m = min(64, max(16, triton.next_power_of_2(max_query_len * group)))
    parts = triton.cdiv(max_query_len * group, m)
    _packed_kernel[(seq_lens.shape[0], cache.shape[1], num_splits * parts)](
        query,
        query_scale,
        cache,
        block_table,
        exact_table if exact else block_table,
        query_start_loc,
        seq_lens,
        out,
        lse,
        num_rows,
        num_splits,
        parts,
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        exact_table.stride(0) if exact else 0,
        exact.residual_tokens if exact else 0,
        exact.sink_tokens if exact else 0,
        KV_HEADS=cache.shape[1],
        GROUP=group,
        FORMAT=fmt,
        BLOCK_TILES=cache.shape[2] // SUB_PAGE_TOKENS,
        EXACT_BLOCK=exact.cache.shape[2] if exact else 1,
        HAS_EXACT=exact is not None,
        M=m,
        num_warps=4,
    )
