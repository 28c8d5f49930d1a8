"""exact.py's attention with one warp a program (Gluon), so that programs start where decode_hopper.py's end.

Sixteen query rows of a kv head are the rows of every product. Tokens (sinks, window, chunk, as one list) arrive sixteen at a
time in shared memory by asynchronous copies, whichever of the three places they lie in.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .cpu_kernels import ExactBlocks

TOKENS = 16
STAGES = 3
MAX_SPLITS = 4
# no spills; no more than a program of the packed kernel frees when it ends (H200, 2026-11-24)
MAX_REGISTERS = {64: 128, 128: 168, 256: 255}

_MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))


@gluon.jit
def _copy_tokens(
    smem_k, smem_v, first, num_sinks, num_exact, window, end, queries, start, head, table,
    key_ptr, value_ptr, exact_ptr,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_block, stride_block_head, stride_block_token,
    D: gl.constexpr, N: gl.constexpr, EXACT_BLOCK: gl.constexpr, HAS_EXACT: gl.constexpr, LC: gl.constexpr,
):  # fmt: skip
    """Start the copy of tokens first .. first + N of the list; what is not to be read keeps what was there."""
    i = first + gl.arange(0, N, layout=gl.SliceLayout(1, LC))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LC))
    own = i - num_exact
    is_own = own >= 0
    source = (start + own).to(gl.int64)
    k_at = key_ptr + source * stride_k_token + head * stride_k_head
    v_at = value_ptr + source * stride_v_token + head * stride_v_head
    wanted = is_own & (own < queries) & (i < end)
    if HAS_EXACT:
        position = gl.where(i < num_sinks, i, window + i - num_sinks)
        block = gl.load(table + position // EXACT_BLOCK, mask=(i < num_exact) & (i < end), other=0)
        at = exact_ptr + block.to(gl.int64) * stride_block + head * stride_block_head
        at = at + (position % EXACT_BLOCK) * stride_block_token
        k_at = gl.where(is_own, k_at, at)
        v_at = gl.where(is_own, v_at, at + D)
        wanted = wanted | (block > 0)
    async_copy.async_copy_global_to_shared(smem_k, k_at[:, None] + d[None, :], mask=wanted[:, None] & (d >= 0)[None, :])
    async_copy.async_copy_global_to_shared(smem_v, v_at[:, None] + d[None, :], mask=wanted[:, None] & (d >= 0)[None, :])
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["stride_table", "residual", "sinks", "num_rows", "num_splits"])
def _exact_kernel(
    query_ptr,        # [num_tokens, num_heads, D]
    key_ptr,          # [num_tokens, KV_HEADS, D]
    value_ptr,
    exact_ptr,        # [num_blocks, KV_HEADS, EXACT_BLOCK, 2 * D]
    table_ptr,        # [num_requests, ...] int32, 0 = null block
    query_start_ptr,  # [num_requests + 1] int32
    seq_lens_ptr,     # [num_requests] int32
    centre_ptr,       # [KV_HEADS, D] fp32
    out_ptr,          # [num_splits, num_rows, D] fp32
    lse_ptr,          # [num_splits, num_rows] fp32, in bits
    scale,
    stride_q_token: gl.int64, stride_q_head: gl.int64, stride_k_token: gl.int64, stride_k_head: gl.int64,
    stride_v_token: gl.int64, stride_v_head: gl.int64,
    stride_block: gl.int64, stride_block_head: gl.int64, stride_block_token: gl.int64, stride_table,
    residual, sinks, num_rows, num_splits,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, EXACT_BLOCK: gl.constexpr,
    HAS_EXACT: gl.constexpr, HAS_CENTRE: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    LQ: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    LROW: gl.constexpr = gl.SliceLayout(1, MMA)
    LCOL: gl.constexpr = gl.SliceLayout(0, MMA)
    # 16 bytes a lane
    LC: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0]) if D <= 256 else None
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty
    gdc_launch_dependents()
    b, head = gl.program_id(0), gl.program_id(1)
    part, split = gl.program_id(2) // num_splits, gl.program_id(2) % num_splits
    start = gl.load(query_start_ptr + b)
    queries = gl.load(query_start_ptr + b + 1) - start
    if part * 16 < queries * GROUP:
        context = gl.load(seq_lens_ptr + b) - queries
        num_sinks = 0
        num_exact = 0
        window = context
        if HAS_EXACT:
            num_sinks = gl.minimum(sinks, context)
            window = gl.where(residual > 0, gl.maximum(context - residual + 1, num_sinks), context)
            num_exact = num_sinks + context - window
        last = num_exact + gl.minimum(((part + 1) * 16 + GROUP - 1) // GROUP, queries)
        share = ((last + N - 1) // N + num_splits - 1) // num_splits * N
        begin = split * share
        end = gl.minimum(last, begin + share)
        table = table_ptr + b.to(gl.int64) * stride_table
        k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], SWIZZLE)
        v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, N, D], SWIZZLE)
        for stage in gl.static_range(STAGES):
            # tokens that are not read have no weight, but 0 * NaN would count
            v_smem.index(stage).store(gl.zeros([N, D], DTYPE, layout=LC))
        for stage in gl.static_range(STAGES - 1):
            _copy_tokens(
                k_smem.index(stage), v_smem.index(stage), begin + stage * N, num_sinks, num_exact, window, end, queries,
                start, head, table, key_ptr, value_ptr, exact_ptr, stride_k_token, stride_k_head, stride_v_token,
                stride_v_head, stride_block, stride_block_head, stride_block_token, D, N, EXACT_BLOCK, HAS_EXACT, LC,
            )  # fmt: skip
        LQROW: gl.constexpr = gl.SliceLayout(1, LQ)
        j = part * 16 + gl.arange(0, 16, layout=LQROW)
        d = gl.arange(0, D, layout=gl.SliceLayout(0, LQ))
        at = query_ptr + (start + j // GROUP).to(gl.int64) * stride_q_token + (head * GROUP + j % GROUP) * stride_q_head
        q = gl.load(at[:, None] + d[None, :], mask=(j // GROUP < queries)[:, None] & (d >= 0)[None, :], other=0.0)
        minus = gl.zeros([16], gl.float32, layout=LROW)
        if HAS_CENTRE:
            centre = gl.load(centre_ptr + head * D + d)
            minus = gl.convert_layout(gl.sum(q.to(gl.float32) * centre[None, :], 1), LROW) * scale
        j = part * 16 + gl.arange(0, 16, layout=LROW)
        in_chunk = j // GROUP
        highest = gl.full([16], float("-inf"), gl.float32, layout=LROW)
        norm = gl.zeros([16], gl.float32, layout=LROW)
        acc = gl.zeros([16, D], gl.float32, layout=MMA)
        at_stage = 0
        into = STAGES - 1
        for first in range(begin, end, N):
            async_copy.wait_group(STAGES - 2)
            _copy_tokens(
                k_smem.index(into), v_smem.index(into), first + (STAGES - 1) * N, num_sinks, num_exact, window, end, queries,
                start, head, table, key_ptr, value_ptr, exact_ptr, stride_k_token, stride_k_head, stride_v_token,
                stride_v_head, stride_block, stride_block_head, stride_block_token, D, N, EXACT_BLOCK, HAS_EXACT, LC,
            )  # fmt: skip
            k = k_smem.index(at_stage).permute([1, 0]).load(LB)
            s = mma_v2(q, k, gl.zeros([16, N], gl.float32, layout=MMA)) * scale - minus[:, None]
            i = first + gl.arange(0, N, layout=LCOL)
            own = i - num_exact
            real = i < end
            if HAS_EXACT:
                position = gl.where(i < num_sinks, i, window + i - num_sinks)
                block = gl.load(table + position // EXACT_BLOCK, mask=i < num_exact, other=1)
                real = real & (block > 0)
            seen = real[None, :] & (own[None, :] <= in_chunk[:, None]) & (in_chunk < queries)[:, None]
            s = gl.where(seen, s, float("-inf"))
            above = gl.maximum(highest, gl.max(s, 1))
            base = gl.where(above == float("-inf"), 0.0, above)
            p = gl.exp2(s - base[:, None])
            factor = gl.exp2(highest - base)
            norm = norm * factor + gl.sum(p, 1)
            highest = above
            acc = acc * factor[:, None]
            v = v_smem.index(at_stage).load(LB)
            high = p.to(DTYPE)
            acc = mma_v2(gl.convert_layout(high, LQ), v, acc)
            if DTYPE == gl.bfloat16:
                # p as two numbers, so that its rounding does not count
                low = (p - high.to(gl.float32)).to(DTYPE)
                acc = mma_v2(gl.convert_layout(low, LQ), v, acc)
            at_stage = gl.where(at_stage == STAGES - 1, 0, at_stage + 1)
            into = gl.where(into == STAGES - 1, 0, into + 1)
        async_copy.wait_group(0)
        valid = in_chunk < queries
        row = ((start + in_chunk).to(gl.int64) * KV_HEADS + head) * GROUP + j % GROUP + split * num_rows
        any_seen = norm > 0.0
        out = acc / gl.where(any_seen, norm, 1.0)[:, None]
        col = gl.arange(0, D, layout=LCOL)
        gl.store(out_ptr + row[:, None] * D + col[None, :], out, mask=valid[:, None])
        gl.store(lse_ptr + row, gl.where(any_seen, highest + gl.log2(norm), float("-inf")), mask=valid)
    # nothing here needs the kernel before, but who waits for this one waits for that one too
    gdc_wait()


def num_splits(num_programs: int, device: torch.device) -> int:
    """Parts of the list of tokens, so that a few (request, kv head) pairs do not leave the device idle."""
    wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count // num_programs
    # a power of two: merge_hopper.py's kernel is compiled for each number
    return 1 << max(0, min(MAX_SPLITS, wanted).bit_length() - 1)


def supports(head_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel has this head size and dtype."""
    return head_size in MAX_REGISTERS and dtype in (torch.float16, torch.bfloat16)


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
    key_centre: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_table: torch.Tensor | None = None,
) -> None:
    """As exact.attend_exact, for what `supports` names; the list of tokens is cut into as many parts as `out` has.

    Args: out [num_splits, num_rows, head_size], lse [num_splits, num_rows] fp32 (-inf where a query sees nothing of a part)
    """
    num_kv_heads, head_size = key.shape[1:]
    group = query.shape[1] // num_kv_heads
    block = exact.cache.stride() if exact else (0, 0, 0)
    _exact_kernel[(seq_lens.shape[0], num_kv_heads, triton.cdiv(max_query_len * group, 16) * out.shape[0])](
        query,
        key,
        value,
        exact.cache if exact else query,
        exact_table if exact else query_start_loc,
        query_start_loc,
        seq_lens,
        lse if key_centre is None else key_centre,
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
        out.shape[1],
        out.shape[0],
        KV_HEADS=num_kv_heads,
        GROUP=group,
        D=head_size,
        EXACT_BLOCK=exact.cache.shape[2] if exact else 1,
        HAS_EXACT=exact is not None,
        HAS_CENTRE=key_centre is not None,
        N=TOKENS,
        STAGES=STAGES,
        MMA=_MMA,
        num_warps=1,
        maxnreg=MAX_REGISTERS[head_size],
        launch_pdl=True,
    )
