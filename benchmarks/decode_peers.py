"""The peers of bench_decode.py, called as vLLM 0.32 calls them inside full CUDA graphs, at its default block size.

What vLLM does once a step for all layers (FlashAttention 3's schedule) is made before. Queries of fp8 caches come quantized:
vLLM does that outside of attention.
"""

from __future__ import annotations

import torch
from decode_case import DEVICE, Attention, Case, Options, Unsupported, int32, paged, query_and_output, query_starts

BLOCK = 16
FA3_MAX_SPLITS = 32  # flash_attn_max_num_splits_for_cuda_graph
TURBOQUANT_SPLITS = 32  # tq_max_kv_splits_for_cuda_graph


def fa3(case: Case, options: Options, dtype=torch.bfloat16, num_splits: int = FA3_MAX_SPLITS) -> Attention:
    """FlashAttention 3 on vLLM's pages (LBNHC: a token's heads together, keys before values)."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

    requests, d = len(case.seq_lens), case.head_size
    table, num_blocks = paged(case, BLOCK)
    query, out = query_and_output(case)
    shape = (num_blocks, BLOCK, case.num_kv_heads, 2 * d)
    caches = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).to(dtype) for _ in range(options.layers)]
    starts, seq_lens, longest = query_starts(case), int32(case.seq_lens), max(case.seq_lens)
    descales = {}
    if dtype != torch.bfloat16:
        query = query.to(dtype)
        one = torch.ones(1, device=DEVICE).expand(requests, case.num_kv_heads)
        descales = {"q_descale": one, "k_descale": one, "v_descale": one}
    schedule = get_scheduler_metadata(
        batch_size=requests,
        max_seqlen_q=case.num_queries,
        max_seqlen_k=longest,
        num_heads_q=case.num_heads,
        num_heads_kv=case.num_kv_heads,
        headdim=d,
        cache_seqlens=seq_lens,
        qkv_dtype=dtype,
        cu_seqlens_q=starts,
        page_size=BLOCK,
        causal=True,
        num_splits=num_splits,
    )

    def attend(cache: torch.Tensor) -> None:
        key, value = cache.split(d, dim=-1)
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=case.num_queries,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=seq_lens,
            block_table=table,
            causal=True,
            softmax_scale=d**-0.5,
            out=out,
            fa_version=3,
            scheduler_metadata=schedule,
            num_splits=num_splits,
            **descales,
        )

    moved = sum(case.seq_lens) * case.num_kv_heads * 2 * d * dtype.itemsize + case.query_and_output_bytes
    name = "bf16" if dtype == torch.bfloat16 else "fp8"
    return Attention([lambda cache=cache: attend(cache) for cache in caches], name, moved, out)


def fa3_fp8(case: Case, options: Options) -> Attention:
    return fa3(case, options, torch.float8_e4m3fn)


def fa3_auto(case: Case, options: Options) -> Attention:
    """FlashAttention 3 with splits of its own choice, which vLLM cannot capture in a graph."""
    return fa3(case, options, num_splits=0)


def turboquant(case: Case, options: Options) -> Attention:
    """vLLM's TURBOQUANT, 4bit_nc: 4-bit keys with a norm, 4-bit values with scale and zero."""
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    if case.num_queries > 1:
        raise Unsupported("TURBOQUANT sends more than one query token to its prefill path")
    requests, heads, d = len(case.seq_lens), case.num_heads, case.head_size
    key_bytes, slot = d // 2 + 2, d + 6
    table, num_blocks = paged(case, BLOCK)
    caches = []
    for _ in range(options.layers):
        cache = torch.randint(0, 256, (num_blocks, BLOCK, case.num_kv_heads, slot), dtype=torch.uint8, device=DEVICE)
        cache[..., key_bytes - 2 : key_bytes] = torch.tensor([d**0.5], dtype=torch.float16).view(torch.uint8).to(DEVICE)
        scale_and_zero = torch.tensor([0.23, -1.7], dtype=torch.float16)
        cache[..., -4:] = scale_and_zero.view(torch.uint8).to(DEVICE)
        caches.append(cache)
    query, out = query_and_output(case)
    seq_lens, rotation = int32(case.seq_lens), torch.eye(d, device=DEVICE)
    centroids = torch.linspace(-2.4, 2.4, 16, device=DEVICE) * d**-0.5
    parts = torch.empty(requests, heads, TURBOQUANT_SPLITS, d + 1, device=DEVICE)
    lse = torch.empty(requests, heads, device=DEVICE)

    def attend(cache: torch.Tensor) -> None:
        triton_turboquant_decode_attention(
            query=query,
            kv_cache=cache,
            block_table=table,
            seq_lens=seq_lens,
            Pi=rotation,
            centroids=centroids,
            scale=d**-0.5,
            mse_bits=4,
            key_packed_size=key_bytes,
            value_quant_bits=4,
            norm_correction=True,
            PiT=rotation,
            mid_o_buf=parts,
            output_buf=out,
            lse_buf=lse,
            max_num_kv_splits=TURBOQUANT_SPLITS,
        )

    moved = sum(case.seq_lens) * case.num_kv_heads * slot + case.query_and_output_bytes
    return Attention([lambda cache=cache: attend(cache) for cache in caches], "4bit_nc", moved, out)


def int4_per_token_head(case: Case, options: Options) -> Attention:
    """vLLM's TRITON_ATTN with kv_cache_dtype int4_per_token_head: each half of a slot is nibbles and a 32-bit scale."""
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    heads, d, segments = case.num_heads, case.head_size, 16
    half, most_segmented = d // 2 + 4, max(1, 128 // case.num_kv_heads)
    table, num_blocks = paged(case, BLOCK)
    # four low bits of a scale are the zero point
    scale_bits = torch.tensor(0.33 * d**0.5).view(torch.int32).item() & -16 | 8
    views = []
    for _ in range(options.layers):
        cache = torch.randint(0, 256, (num_blocks, BLOCK, case.num_kv_heads, 2 * half), dtype=torch.uint8, device=DEVICE)
        scales = cache.view(torch.float32).view(*cache.shape[:3], 2, half // 4)[..., -1]
        scales.view(torch.int32).fill_(scale_bits)
        views.append((*cache.split(half, dim=-1), scales[..., 0], scales[..., 1]))
    query, out = query_and_output(case)
    starts, seq_lens = query_starts(case), int32(case.seq_lens)
    parts = torch.empty(most_segmented, heads, segments, 1 << (d - 1).bit_length(), device=DEVICE)
    highest, sums = torch.empty(2, most_segmented, heads, segments, device=DEVICE)

    def attend(key_cache, value_cache, key_scales, value_scales) -> None:
        unified_attention_int4(
            query,
            key_cache,
            value_cache,
            out,
            cu_seqlens_q=starts,
            max_seqlen_q=case.num_queries,
            seqused_k=seq_lens,
            max_seqlen_k=max(case.seq_lens),
            softmax_scale=d**-0.5,
            window_size=(-1, -1),
            block_table=table,
            softcap=0,
            sinks=None,
            alibi_slopes=None,
            use_alibi_sqrt=False,
            qq_bias=None,
            output_scale=None,
            mm_prefix_range=None,
            k_scale_cache=key_scales,
            v_scale_cache=value_scales,
            seq_threshold_3D=most_segmented,
            num_par_softmax_segments=segments,
            softmax_segm_output=parts,
            softmax_segm_max=highest,
            softmax_segm_expsum=sums,
        )

    moved = sum(case.seq_lens) * case.num_kv_heads * 2 * half + case.query_and_output_bytes
    return Attention([lambda view=view: attend(*view) for view in views], "int4", moved, out)
