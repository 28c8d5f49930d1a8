"""Who can be asked to decode in bench_decode.py: this package's kernels, and the peers of decode_peers.py.

A provider makes its cache, tables and buffers for a case and returns the calls to time.
"""

from __future__ import annotations

from collections.abc import Callable

import decode_peers
import numpy as np
import torch
from decode_case import DEVICE, Attention, Case, Options, int32, paged, query_and_output, query_starts, scattered

EXACT_BLOCK = 16  # the default residual_block_size


def packed_pages(cache_format, num_blocks: int, num_kv_heads: int, options: Options) -> list[torch.Tensor]:
    """Each layer's pages [num_blocks, num_kv_heads, block_size, slot_bytes]: random codes, scales that make variance 1."""
    layout, size = cache_format.layout, options.block_size
    shape = (num_blocks, num_kv_heads, size, layout.slot_bytes)
    pool = torch.empty(num_blocks, max(options.layers, options.pool_layers), *shape[1:], dtype=torch.uint8, device=DEVICE)
    books = (cache_format.key_codebook, cache_format.value_codebook)
    spread = [float(np.sqrt((book.centroids**2).mean())) for book in books]
    unit = 1 / torch.tensor(spread, device=DEVICE)[:, None]
    for i in range(options.layers):
        pool[:, i] = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
        sub_pages = pool[:, i].view(num_blocks, num_kv_heads, size // 64, layout.sub_page_bytes)
        scales = (torch.rand(*sub_pages.shape[:3], 2, 64, device=DEVICE) * 0.4 + 0.8) * unit
        sub_pages[..., layout.key_scale_offset :] = scales.half().view(torch.uint8).flatten(-2)
    return [pool[:, i] for i in range(options.layers)]


def exact_entries(case: Case, options: Options) -> tuple[list[list[int]], int, int]:
    """(blocks of each request that vLLM would allocate, exact positions, packed positions)."""
    wanted, exact, packed = [], 0, 0
    for n in case.seq_lens:
        context = n - case.num_queries
        start = max(0, context - options.residual_tokens + 1) if options.residual_tokens else context
        sinks = min(options.sink_tokens, start)
        window = range(start // EXACT_BLOCK, -(-n // EXACT_BLOCK)) if options.residual_tokens else range(0)
        wanted.append(sorted({*window, *([0] if options.sink_tokens else [])}))
        exact += sinks + context - start
        packed += start - sinks
    return wanted, exact, packed


def powerquant(case: Case, options: Options, hopper: bool = True) -> Attention:
    """The whole call of this package: query rotation, packed pages, exact blocks, merge, output rotation."""
    from vllm_powerquant.attention.cache_format import CacheFormat
    from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks
    from vllm_powerquant.attention.kernels.gpu_kernels import GpuKernels
    from vllm_powerquant.attention.kernels.step import StepPlan

    cache_format = CacheFormat(case.head_size, case.key_bits, case.value_bits, case.value_codec)
    requests, d, heads = len(case.seq_lens), case.head_size, case.num_kv_heads
    table, num_blocks = paged(case, options.block_size)
    caches = packed_pages(cache_format, num_blocks, heads, options)
    wanted, num_exact, num_packed = exact_entries(case, options)
    exact = [None] * options.layers
    exact_table = None
    if options.residual_tokens or options.sink_tokens:
        exact_table, exact_blocks = scattered(wanted, -(-max(case.seq_lens) // EXACT_BLOCK))
        rows = (exact_blocks, heads, EXACT_BLOCK, 2 * d)
        blocks = [torch.randn(rows, dtype=torch.bfloat16, device=DEVICE) for _ in range(options.layers)]
        exact = [ExactBlocks(block, options.residual_tokens, options.sink_tokens) for block in blocks]
    query, out = query_and_output(case)
    key, value = torch.randn(2, case.num_tokens, heads, d, dtype=torch.bfloat16, device=DEVICE)
    kernels = GpuKernels(
        cache_format,
        num_heads=case.num_heads,
        num_kv_heads=heads,
        max_requests=requests,
        device=query.device,
        dtype=query.dtype,
        max_row_queries=case.num_queries,
        hopper=hopper,
    )
    plan = StepPlan.of(
        query_start_loc=query_starts(case),
        seq_lens=int32(case.seq_lens),
        query_lens=[case.num_queries] * requests,
        seq_lens_upper=list(case.seq_lens),
        max_row_queries=case.num_queries,
    )

    frame = torch.ones(heads, 3, d, device=DEVICE) if options.calibrated else None

    def attend(i: int) -> None:
        kernels.attend(query, key, value, out, caches[i], plan, table, d**-0.5, frame, exact[i], exact_table)

    moved = heads * (num_packed * cache_format.layout.slot_bytes + num_exact * 4 * d)
    moved += case.query_and_output_bytes + 4 * case.num_tokens * heads * d
    name = f"K{case.key_bits}/V{case.value_bits}" + (" trellis" if cache_format.is_trellis else "")
    return Attention([lambda i=i: attend(i) for i in range(options.layers)], name, moved, out)


def powerquant_portable(case: Case, options: Options) -> Attention:
    """The kernels that every GPU other than Hopper gets."""
    return powerquant(case, options, hopper=False)


PROVIDERS: dict[str, Callable[[Case, Options], Attention]] = {
    "fa3": decode_peers.fa3,
    "fa3_fp8": decode_peers.fa3_fp8,
    "fa3_auto": decode_peers.fa3_auto,
    "turboquant": decode_peers.turboquant,
    "int4_per_token_head": decode_peers.int4_per_token_head,
    "powerquant": powerquant,
    "powerquant_portable": powerquant_portable,
}
