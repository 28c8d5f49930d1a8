"""Attention over what is kept exactly: sinks, the residual window, and the scheduled chunk itself, in the model's own dtype.

Its result is a partial in raw (unrotated) space that merge.py joins with those over packed pages; which positions are exact
is reference.exact_positions'.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import dot, token_row
from .cpu_kernels import ExactBlocks

TOKENS, WARPS, STAGES = 64, 2, 2


@triton.jit
def _weighted_values(p, v):
    """p [rows, tokens] fp32 times v [tokens, D]; p as two bf16 where v is bf16, so that its rounding does not count."""
    if v.dtype == tl.bfloat16:
        high = p.to(tl.bfloat16)
        low = (p - high.to(tl.float32)).to(tl.bfloat16)
        return dot(high, v) + dot(low, v)
    elif v.dtype == tl.float16:
        return dot(p.to(tl.float16), v)
    else:
        return dot(p, v)


@triton.jit
def _attend_tile(q, k, v, seen, minus, highest, norm, acc, scale):
    """One tile of the online softmax. q [M, D], k, v [N, D], seen [M, N]; minus [M]: the centre's score."""
    s = dot(q, tl.trans(k)) * scale - minus[:, None]
    s = tl.where(seen, s, float("-inf"))
    above = tl.maximum(highest, tl.max(s, 1))
    # rows that have seen nothing yet: keep exp2 away from inf - inf
    base = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(s - base[:, None])
    factor = tl.exp2(highest - base)
    acc = acc * factor[:, None] + _weighted_values(p, v)
    return above, norm * factor + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["stride_table", "residual", "sinks"])
def _exact_kernel(
    query_ptr,        # [num_tokens, num_heads, D]
    key_ptr,          # [num_tokens, KV_HEADS, D]
    value_ptr,
    exact_ptr,        # [num_blocks, KV_HEADS, EXACT_BLOCK, 2 * D]
    table_ptr,        # [num_requests, ...] int32, 0 = null block
    query_start_ptr,  # [num_requests + 1] int32
    seq_lens_ptr,     # [num_requests] int32
    frame_ptr,        # [KV_HEADS, 3, D] fp32
    out_ptr,          # [num_tokens * num_heads, D] fp32
    lse_ptr,          # [num_tokens * num_heads] fp32, in bits
    scale,
    stride_q_token: tl.int64, stride_q_head: tl.int64, stride_k_token: tl.int64, stride_k_head: tl.int64,
    stride_v_token: tl.int64, stride_v_head: tl.int64,
    stride_block: tl.int64, stride_block_head: tl.int64, stride_block_token: tl.int64, stride_table,
    residual, sinks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, EXACT_BLOCK: tl.constexpr,
    HAS_EXACT: tl.constexpr, HAS_FRAME: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start_ptr + b)
    queries = tl.load(query_start_ptr + b + 1) - start
    if part * M < queries * GROUP:
        context = tl.load(seq_lens_ptr + b) - queries
        j = part * M + tl.arange(0, M)
        in_chunk = j // GROUP
        valid = in_chunk < queries
        d = tl.arange(0, PADDED)
        in_head = d < D
        token = (start + in_chunk).to(tl.int64)
        q_at = query_ptr + token * stride_q_token + (head * GROUP + j % GROUP) * stride_q_head
        q = tl.load(q_at[:, None] + d[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)
        minus = tl.zeros([M], tl.float32)
        if HAS_FRAME:
            centre = tl.load(frame_ptr + head * (3 * D) + d, mask=in_head, other=0.0)
            minus = tl.sum(q.to(tl.float32) * centre[None, :], 1) * scale
        highest = tl.full([M], float("-inf"), tl.float32)
        norm = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, PADDED], tl.float32)
        # one list of tokens: sinks, window, chunk
        num_sinks = 0
        num_exact = 0
        window = context
        if HAS_EXACT:
            num_sinks = tl.minimum(sinks, context)
            window = tl.where(residual > 0, tl.maximum(context - residual + 1, num_sinks), context)
            num_exact = num_sinks + context - window
        last = num_exact + tl.minimum(tl.cdiv((part + 1) * M, GROUP), queries)
        table = table_ptr + b.to(tl.int64) * stride_table
        for first in range(0, last, N):
            i = first + tl.arange(0, N)
            own = i - num_exact
            is_own = own >= 0
            source = (start + own).to(tl.int64)
            k_at = key_ptr + source * stride_k_token + head * stride_k_head
            v_at = value_ptr + source * stride_v_token + head * stride_v_head
            wanted = is_own & (own < queries)
            if HAS_EXACT:
                position = tl.where(i < num_sinks, i, window + i - num_sinks)
                block = tl.load(table + position // EXACT_BLOCK, mask=i < num_exact, other=0)
                at = block.to(tl.int64) * stride_block + head * stride_block_head
                at = exact_ptr + at + (position % EXACT_BLOCK) * stride_block_token
                k_at = tl.where(is_own, k_at, at)
                v_at = tl.where(is_own, v_at, at + D)
                wanted = wanted | (block > 0)
            here = wanted[:, None] & in_head[None, :]
            k = tl.load(k_at[:, None] + d[None, :], mask=here, other=0.0)
            v = tl.load(v_at[:, None] + d[None, :], mask=here, other=0.0)
            seen = (wanted & ~is_own)[None, :] | (wanted[None, :] & (own[None, :] <= in_chunk[:, None]))
            highest, norm, acc = _attend_tile(q, k, v, seen & valid[:, None], minus, highest, norm, acc, scale)
        row = token_row(start, in_chunk, head, j, KV_HEADS, GROUP)
        out = acc / tl.where(valid, norm, 1.0)[:, None]
        tl.store(out_ptr + row[:, None] * D + d[None, :], out, mask=valid[:, None] & in_head[None, :])
        tl.store(lse_ptr + row, highest + tl.log2(norm), mask=valid)


def attend_exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale_log2: float,
    key_frame: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Partial attention over exact positions of the context and, causally, over the chunk.

    Args: query [num_tokens, num_heads, head_size]; key, value [num_tokens, num_kv_heads, head_size]; out [num_tokens *
          num_heads, head_size] fp32; lse [num_tokens * num_heads] fp32 (log2 of the sum); query_start_loc [num_requests +
          1], seq_lens [num_requests] int32; scale_log2: softmax scale * log2(e); exact_table [num_requests, ...] int32
    """
    num_kv_heads, head_size = key.shape[1:]
    group = query.shape[1] // num_kv_heads
    rows = max_query_len * group
    m = min(64, max(16, triton.next_power_of_2(rows)))
    cache = exact.cache if exact else query
    block = exact.cache.stride() if exact else (0, 0, 0)
    _exact_kernel[(seq_lens.shape[0], num_kv_heads, triton.cdiv(rows, m))](
        query,
        key,
        value,
        cache,
        exact_table if exact else query_start_loc,
        query_start_loc,
        seq_lens,
        lse if key_frame is None else key_frame,
        out,
        lse,
        scale_log2,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        block[0],
        block[1],
        block[2],
        exact_table.stride(0) if exact else 0,
        exact.residual_tokens if exact else 0,
        exact.sink_tokens if exact else 0,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        D=head_size,
        PADDED=triton.next_power_of_2(head_size),
        EXACT_BLOCK=exact.cache.shape[2] if exact else 1,
        HAS_EXACT=exact is not None,
        HAS_FRAME=key_frame is not None,
        M=m,
        N=TOKENS if head_size <= 128 else TOKENS // 2,
        num_warps=WARPS,
        num_stages=STAGES,
    )
