"""Attention over uncompressed keys and values: vLLM's FlashAttention, or a portable Triton kernel where there is none."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import dot

LN_2: tl.constexpr = tl.constexpr(math.log(2))


def flash_attention_version(head_size: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The FlashAttention that vLLM would choose; None where it has none for this device and dtype."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    except ImportError:
        return None
    return get_flash_attn_version(head_size=head_size)


def flash_attention(
    version: int | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    query_start: torch.Tensor,
    max_query_len: int,
    max_key_len: int,
    scale: float,
    causal: bool,
    key_start: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    with_lse: bool = False,
) -> torch.Tensor | None:
    """FlashAttention of vLLM, or where `version` is None the portable kernel.

    Args:    query, out [n, num_heads, head_size]; keys, values [m, num_kv_heads, head_size] with key_start [requests + 1],
             or [num_pages, page_size, num_kv_heads, head_size] with seq_lens [requests] and block_table [requests, ...];
             query_start [requests + 1], all int32; causal: the last query sees the last key
    Returns: log-sum-exp of the scaled scores [num_heads, n] fp32 if with_lse
    """
    if version is None:
        lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device) if with_lse else None
        _portable(query, keys, values, out, lse, query_start, max_query_len, scale, causal, key_start, seq_lens, block_table)
        return lse
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    result = flash_attn_varlen_func(
        q=query,
        # TMA wants multiples of 16 bytes even where a dimension has one entry
        k=canonicalize_singleton_dim_strides(keys),
        v=canonicalize_singleton_dim_strides(values),
        out=out,
        max_seqlen_q=max_query_len,
        cu_seqlens_q=query_start,
        max_seqlen_k=max_key_len,
        cu_seqlens_k=key_start,
        seqused_k=seq_lens,
        block_table=block_table,
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=with_lse,
        fa_version=version,
    )
    return result[1] if with_lse else None


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["table_ptr"])
def _clear_tail_kernel(
    value_ptr,     # [num_pages, PAGE_SIZE, kv heads, D]
    seq_lens_ptr,  # [num_requests] int32
    table_ptr,     # [num_requests, ...] int32
    stride_page: tl.int64, stride_token: tl.int64, stride_head: tl.int64, stride_table,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0), tl.program_id(1)
    end = tl.load(seq_lens_ptr + b)
    if end % PAGE_SIZE > 0:
        page = tl.load(table_ptr + b.to(tl.int64) * stride_table + end // PAGE_SIZE).to(tl.int64)
        d = tl.arange(0, PADDED)
        # the null page belongs to padding; who replays a graph for padding alone must find every page as it was
        last = tl.where(page > 0, PAGE_SIZE, 0)
        for first in range(end % PAGE_SIZE, last, ROWS):
            row = first + tl.arange(0, ROWS)
            to = value_ptr + page * stride_page + head * stride_head + row[:, None] * stride_token + d[None, :]
            zeros = tl.zeros([ROWS, PADDED], value_ptr.dtype.element_ty)
            tl.store(to, zeros, mask=(row < PAGE_SIZE)[:, None] & (d < D)[None, :])


def clear_tails(values: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor) -> None:
    """Zero what lies behind each request's last value in its page.

    FlashAttention 3 reads whole pages where these are multiples of its tiles, and a weight of 0 times NaN counts. The pool
    that pages come from is shared with layers whose bytes mean something else.

    Args: values [num_pages, page_size, num_kv_heads, head_size]; seq_lens [requests], block_table [requests, ...] int32
    """
    padded = triton.next_power_of_2(values.shape[3])
    _clear_tail_kernel[(seq_lens.shape[0], values.shape[2])](
        values,
        seq_lens,
        block_table,
        *values.stride()[:3],
        block_table.stride(0),
        PAGE_SIZE=values.shape[1],
        D=values.shape[3],
        PADDED=padded,
        ROWS=max(1, 2048 // padded),
        num_warps=4,
    )


def attend_pages(
    version: int | None,
    query: torch.Tensor,
    out: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    max_key_len: int,
    scale: float,
) -> None:
    """Causal attention of the last queries of each request over uncompressed pages, which hold the queries' own tokens too.

    Args: as for flash_attention; pages [num_pages, num_kv_heads, page_size, 2 * head_size], keys beside values
    """
    keys, values = pages.transpose(1, 2).split(query.shape[2], dim=-1)
    if max_query_len > 1:
        clear_tails(values, seq_lens, block_table)
    flash_attention(
        version,
        query,
        keys,
        values,
        out,
        query_start,
        max_query_len,
        max_key_len,
        scale,
        causal=True,
        seq_lens=seq_lens,
        block_table=block_table,
    )


@triton.jit(
    do_not_specialize=["stride_table", "stride_lse"],
    do_not_specialize_on_alignment=["query_start_ptr", "key_start_ptr", "table_ptr"],
)
def _flash_kernel(
    query_ptr,        # [num_tokens, num_heads, D]
    key_ptr,          # [num_pages, PAGE_SIZE, kv heads, D], not paged: [m, kv heads, D]
    value_ptr,
    out_ptr,          # [num_tokens, num_heads, D]
    lse_ptr,          # [num_heads, num_tokens] fp32
    query_start_ptr,  # [num_requests + 1] int32
    key_start_ptr,    # paged: [num_requests] int32, lengths; else [num_requests + 1]
    table_ptr,        # [num_requests, ...] int32
    scale,            # times log2(e)
    stride_q_token: tl.int64, stride_q_head: tl.int64,
    stride_k_page: tl.int64, stride_k_token: tl.int64, stride_k_head: tl.int64,
    stride_v_page: tl.int64, stride_v_token: tl.int64, stride_v_head: tl.int64,
    stride_o_token: tl.int64, stride_o_head: tl.int64,
    stride_lse: tl.int64, stride_table,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LSE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    part, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start_ptr + b)
    queries = tl.load(query_start_ptr + b + 1) - start
    if part * M < queries:
        first_key = tl.load(key_start_ptr + b)
        num_keys = first_key
        if PAGE_SIZE == 0:
            num_keys = tl.load(key_start_ptr + b + 1) - first_key
        in_chunk = part * M + tl.arange(0, M)
        valid = in_chunk < queries
        d = tl.arange(0, PADDED)
        in_head = (d < D)[None, :]
        keep = valid[:, None] & in_head
        token = (start + in_chunk).to(tl.int64)
        q_at = query_ptr + head * stride_q_head + token[:, None] * stride_q_token + d[None, :]
        q = tl.load(q_at, mask=keep, other=0.0)
        highest = tl.full([M], float("-inf"), tl.float32)
        norm = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, PADDED], tl.float32)
        seen_keys = num_keys
        if CAUSAL:
            last = num_keys - queries + in_chunk  # the last key that a query sees
            seen_keys = tl.minimum(num_keys, num_keys - queries + (part + 1) * M)
        keys = key_ptr + head // GROUP * stride_k_head
        values = value_ptr + head // GROUP * stride_v_head
        for first in range(0, seen_keys, N):
            n = first + tl.arange(0, N)
            real = n < num_keys
            if PAGE_SIZE > 0:
                page = tl.load(table_ptr + b.to(tl.int64) * stride_table + n // PAGE_SIZE, mask=real, other=0).to(tl.int64)
                k_row = page * stride_k_page + n % PAGE_SIZE * stride_k_token
                v_row = page * stride_v_page + n % PAGE_SIZE * stride_v_token
            else:
                k_row = (first_key + n) * stride_k_token
                v_row = (first_key + n) * stride_v_token
            here = real[:, None] & in_head
            k = tl.load(keys + k_row[:, None] + d[None, :], mask=here, other=0.0)
            s = dot(q, tl.trans(k)) * scale
            if CAUSAL:
                s = tl.where(n[None, :] <= last[:, None], s, float("-inf"))
            else:
                s = tl.where(real[None, :], s, float("-inf"))
            above = tl.maximum(highest, tl.max(s, 1))
            # rows that have seen nothing: keep exp2 away from inf - inf
            base = tl.where(above == float("-inf"), 0.0, above)
            p = tl.exp2(s - base[:, None])
            factor = tl.exp2(highest - base)
            highest = above
            norm = norm * factor + tl.sum(p, 1)
            v = tl.load(values + v_row[:, None] + d[None, :], mask=here, other=0.0)
            acc = acc * factor[:, None] + dot(p.to(v.dtype), v)
        norm = tl.where(norm > 0, norm, 1.0)
        out = acc / norm[:, None]
        to = out_ptr + head * stride_o_head + token[:, None] * stride_o_token + d[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=keep)
        if HAS_LSE:
            tl.store(lse_ptr + head * stride_lse + token, (highest + tl.log2(norm)) * LN_2, mask=valid)


def _portable(
    query, keys, values, out, lse, query_start, max_query_len, scale, causal, key_start, seq_lens, block_table
) -> None:
    num_heads, head_size = query.shape[1:]
    paged = block_table is not None
    padded = triton.next_power_of_2(head_size)
    # no spills on sm_80 and sm_90 (but fp32 of 256 channels), 96 KiB of shared memory at most
    if query.dtype == torch.float32:
        m, n, warps, stages = 32, 32, 4, 1
    elif padded > 128:
        m, n, warps, stages = 64, 32, 4, 2
    else:
        m, n, warps, stages = 128, 64, 8, 2
    _flash_kernel[(triton.cdiv(max_query_len, m), num_heads, query_start.shape[0] - 1)](
        query,
        keys,
        values,
        out,
        lse if lse is not None else out,
        query_start,
        seq_lens if paged else key_start,
        block_table if paged else query_start,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        keys.stride(0) if paged else 0,
        *keys.stride()[-3:-1],
        values.stride(0) if paged else 0,
        *values.stride()[-3:-1],
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        block_table.stride(0) if paged else 0,
        GROUP=num_heads // keys.shape[-2],
        D=head_size,
        PADDED=padded,
        PAGE_SIZE=keys.shape[1] if paged else 0,
        CAUSAL=causal,
        HAS_LSE=lse is not None,
        M=m,
        N=n,
        num_warps=warps,
        num_stages=stages,
    )
