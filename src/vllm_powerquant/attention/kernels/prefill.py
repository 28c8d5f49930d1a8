"""Attention of long chunks (prefill, chunked prefill, prefix-cache hits) on a GPU.

A round of requests is attended in two launches: a Triton kernel writes their sequences into a workspace of ordinary pages
(context dequantized and rotated back, exact positions and the chunk itself copied), then FlashAttention runs over it
causally. Fresh prompts need no workspace. A sequence longer than the workspace is attended in segments that are joined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from ..cache_format import CacheFormat
from ..layout import SUB_PAGE_TOKENS
from ..rotation import rotation_matrix
from .cpu_kernels import ExactBlocks
from .flash import flash_attention, flash_attention_version
from .unpack import PackedFormat, load_key_levels, load_key_scales, load_value_levels, load_value_scales, token_at

TILE: tl.constexpr = tl.constexpr(SUB_PAGE_TOKENS)
# Tokens of a workspace page. FlashAttention 3 fetches pages of a multiple of its key tile (128 causal keys at head sizes 64
# and 128) by TMA, smaller ones row by row; either way it reads nothing outside a request's own pages.
PAGE: tl.constexpr = tl.constexpr(128)
PAGE_TOKENS = PAGE.value

DEFAULT_CAPACITY = 32_768
PROGRAMS_PER_SM = 2
ALIGNMENT = 4  # int32 elements: 16 bytes


class Workspace:
    """Where the sequences of a round lie in the model's dtype, and what attends to them; shared by all layers of a shape.

    2 * num_kv_heads * head_size elements a token: 128 MiB for 32,768 tokens of 8 heads of 128 in 16 bits. Make it before
    vLLM measures memory. What a segmented request needs besides (an output and log-sums) is less than the activations of an
    MLP for the same tokens, which are not live then.

    flash_version: FlashAttention's major version; None: the portable kernel of this file
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity_tokens: int = DEFAULT_CAPACITY,
    ) -> None:
        self.num_pages = triton.cdiv(capacity_tokens, PAGE_TOKENS)
        # zeros: what lies behind a sequence must be finite
        pages = torch.zeros(2, self.num_pages, num_kv_heads, PAGE_TOKENS, head_size, dtype=dtype, device=device)
        self.keys, self.values = pages.transpose(2, 3)  # [num_pages, PAGE_TOKENS, num_kv_heads, head_size]
        self.device = pages.device
        self.flash_version = flash_attention_version(head_size, dtype, self.device)

    @staticmethod
    @functools.cache
    def of(
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity_tokens: int = DEFAULT_CAPACITY,
    ) -> Workspace:
        """The one workspace of a shape, made on first use."""
        return Workspace(num_kv_heads, head_size, dtype, device, capacity_tokens)


@dataclass(frozen=True)
class Round:
    """Consecutive requests that are attended together; tensors are int32 on the device.

    No tiles: fresh prompts. One list of tiles: sequences to be gathered, a tile after the other from the workspace's start.
    `segmented`: one request whose context is gathered a list at a time.
    """

    requests: slice
    rows: slice  # of the chunks' tokens
    max_query_len: int
    max_seq_len: int
    query_start: torch.Tensor  # [requests + 1], from 0
    block_table: torch.Tensor  # [requests, ...] pages of the workspace
    tiles: tuple[torch.Tensor, ...]  # each [n, 2]: request, tile of its sequence
    segmented: bool


@dataclass(frozen=True)
class ChunkPlan:
    """How a step's chunks are attended; made once a step from what the host knows, without waiting for the device."""

    workspace: Workspace
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    rounds: tuple[Round, ...]

    @classmethod
    def of(cls, query_lens: Sequence[int], seq_lens_upper: Sequence[int], workspace: Workspace) -> ChunkPlan:
        """Args: query_lens: tokens of each chunk; seq_lens_upper: upper bounds of the sequence lengths, chunk included"""
        rounds, row = [], 0
        for requests, kind in _grouped(query_lens, seq_lens_upper, workspace.num_pages):
            round_ = _round(requests, kind, row, query_lens[requests], seq_lens_upper[requests], workspace)
            rounds.append(round_)
            row = round_.rows.stop
        return cls(
            workspace=workspace,
            num_tokens=row,
            max_query_len=max(query_lens, default=0),
            max_seq_len=max(seq_lens_upper, default=0),
            rounds=tuple(rounds),
        )


def _grouped(query_lens: Sequence[int], seq_lens_upper: Sequence[int], num_pages: int) -> list[tuple[slice, str]]:
    """Runs of requests that make a round: "fresh", or "gathered" into num_pages pages, or one that is "segmented".

    A fresh prompt beside requests with a context is gathered with them where it fits: a copy is cheaper than a launch.
    """
    groups, first, pages, kind = [], 0, 0, ""
    for r, (queries, upper) in enumerate(zip(query_lens, seq_lens_upper, strict=True)):
        own_pages = triton.cdiv(upper, PAGE_TOKENS)
        own_kind = "fresh" if upper <= queries else "gathered" if own_pages <= num_pages else "segmented"
        joined = "fresh" if kind == own_kind == "fresh" else "gathered"
        fits = joined == "fresh" or pages + own_pages <= num_pages
        if kind and "segmented" not in (kind, own_kind) and fits:
            pages, kind = pages + own_pages, joined
            continue
        if kind:
            groups.append((slice(first, r), kind))
        first, pages, kind = r, own_pages, own_kind
    if kind:
        groups.append((slice(first, len(query_lens)), kind))
    return groups


def _round(
    requests: slice,
    kind: str,
    first_row: int,
    query_lens: Sequence[int],
    seq_lens_upper: Sequence[int],
    workspace: Workspace,
) -> Round:
    starts = np.concatenate(([0], np.cumsum(query_lens)))
    pages = -(-np.asarray(seq_lens_upper) // PAGE_TOKENS)
    tiles_per_page = PAGE_TOKENS // SUB_PAGE_TOKENS
    table, tiles = np.zeros((0, 0)), []
    if kind == "gathered":
        table = (np.cumsum(pages) - pages)[:, None] + np.arange(pages.max())
        # a row's pages end where the next row's begin; entries behind are never read, but must be pages
        table = np.minimum(table, workspace.num_pages - 1)
        tiles = [_tiles(np.arange(requests.start, requests.stop), pages * tiles_per_page)]
    elif kind == "segmented":
        table = np.arange(workspace.num_pages)[None]
        context_pages = triton.cdiv(seq_lens_upper[0] - query_lens[0], PAGE_TOKENS)
        every = _tiles(np.array([requests.start]), np.array([context_pages * tiles_per_page]))
        size = workspace.num_pages * tiles_per_page
        tiles = [every[i : i + size] for i in range(0, len(every), size)]
    query_start, block_table, *device_tiles = _upload([starts, table, *tiles], workspace.device)
    return Round(
        requests=requests,
        rows=slice(first_row, first_row + int(starts[-1])),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens_upper),
        query_start=query_start,
        block_table=block_table,
        tiles=tuple(device_tiles),
        segmented=kind == "segmented",
    )


def _tiles(requests: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(request, 0), (request, 1), ... for each request: [sum(counts), 2]"""
    ends = np.cumsum(counts)
    return np.stack((np.repeat(requests, counts), np.arange(ends[-1]) - np.repeat(ends - counts, counts)), axis=1)


def _upload(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays as int32 tensors on the device, each aligned to 16 bytes, in one copy that the host does not wait for."""
    sizes = [triton.cdiv(array.size, ALIGNMENT) * ALIGNMENT for array in arrays]
    host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    for part, array in zip(np.split(host.numpy(), np.cumsum(sizes)[:-1]), arrays, strict=True):
        part[: array.size] = array.reshape(-1)
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def attend_chunks(
    cache_format: CacheFormat,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: ChunkPlan,
    scale: float,
    key_frame: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Attention of each request's chunk: raw keys and values inside it, packed pages and exact blocks before it.

    Args: query, out [n, num_heads, head_size]; key, value [n, num_kv_heads, head_size], n = plan.num_tokens; cache
          [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; block_table, exact_table [num_requests, ...],
          query_start_loc [num_requests + 1] (from 0), seq_lens [num_requests] int32; key_frame [num_kv_heads, 3, head_size]
          fp32
    """
    workspace = plan.workspace
    flash = functools.partial(flash_attention, workspace.flash_version, scale=scale)
    gather = functools.partial(
        gather_context,
        workspace,
        cache_format,
        key,
        value,
        cache,
        block_table,
        query_start_loc,
        seq_lens,
        key_frame=key_frame,
        exact=exact,
        exact_table=exact_table,
    )
    for part in plan.rounds:
        q, k, v, o = (x[part.rows] for x in (query, key, value, out))
        lens, start, longest = seq_lens[part.requests], part.query_start, part.max_query_len
        if part.segmented:
            _attend_segments(flash, gather, part, q, k, v, o, lens, workspace)
        elif not part.tiles:
            flash(q, k, v, o, start, longest, longest, causal=True, key_start=start)
        else:
            gather(part.tiles[0], with_chunk=True)
            pages = {"seq_lens": lens, "block_table": part.block_table}
            flash(q, workspace.keys, workspace.values, o, start, longest, part.max_seq_len, causal=True, **pages)


def _attend_segments(flash, gather, part: Round, query, key, value, out, seq_len, workspace: Workspace) -> None:
    """One request: its chunk by itself, then its context in pieces of the workspace's size."""
    n, capacity = part.max_query_len, workspace.num_pages * PAGE_TOKENS
    lse = flash(query, key, value, out, part.query_start, n, n, causal=True, key_start=part.query_start, with_lse=True)
    piece = torch.empty_like(out)
    for i, tiles in enumerate(part.tiles):
        gather(tiles, with_chunk=False)
        start = n + i * capacity
        piece_lse = flash(
            query,
            workspace.keys,
            workspace.values,
            piece,
            part.query_start,
            n,
            min(part.max_seq_len - start, capacity),
            causal=False,
            seq_lens=(seq_len - start).clamp_(0, capacity),
            block_table=part.block_table,
            with_lse=True,
        )
        lse = _join(workspace.flash_version, out, lse, piece, piece_lse)


def _join(version: int | None, out, lse, piece, piece_lse) -> torch.Tensor:
    """Two attentions over disjoint tokens as one: out is overwritten, the joint log-sums [num_heads, n] are returned."""
    if version is not None:
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        joint = torch.empty_like(lse)
        merge_attn_states(out, out, lse, piece, piece_lse, joint)
        return joint
    joint = torch.logaddexp(lse, piece_lse)
    weight, piece_weight = ((x - joint).exp().T[..., None] for x in (lse, piece_lse))
    out.copy_(out.float() * weight + piece.float() * piece_weight)
    return joint


@triton.jit
def _store_unrotated(
    levels, unit, matrix, matrix_ptr, frame_ptr, to, keep,
    D: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, KEEP_MATRIX: tl.constexpr, HAS_FRAME: tl.constexpr,
):  # fmt: skip
    """levels [TILE, PADDED] fp16 times unit [TILE], rotated back, out of the frame, to the rows `to` [TILE, 1] to keep."""
    k = tl.arange(0, PADDED)
    for start in tl.static_range(0, PADDED, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        if KEEP_MATRIX:
            x = tl.dot(levels, matrix)
        else:
            x = tl.dot(levels, tl.load(matrix_ptr + k[:, None] * PADDED + d[None, :]))
        x *= unit[:, None]
        if HAS_FRAME:
            centre = tl.load(frame_ptr + d, mask=d < D, other=0.0)
            x = x * tl.load(frame_ptr + 2 * D + d, mask=d < D, other=0.0)[None, :] + centre[None, :]
        tl.store(to + d[None, :], x.to(to.dtype.element_ty), mask=keep & (d < D)[None, :])


@triton.jit(
    do_not_specialize=["num_tiles", "residual", "sinks", "stride_table", "stride_exact_table"],
    do_not_specialize_on_alignment=["block_table_ptr", "exact_table_ptr", "query_start_ptr", "seq_lens_ptr"],
)
def _gather_kernel(
    cache_ptr,        # uint8, packed pages
    block_table_ptr,  # [num_requests, ...] int32
    key_ptr,          # [num_tokens, KV_HEADS, D]
    value_ptr,
    exact_ptr,        # [num_blocks, KV_HEADS, EXACT_BLOCK, 2 * D]
    exact_table_ptr,  # [num_requests, ...] int32, 0 = null block
    frame_ptr,        # [KV_HEADS, 3, D] fp32: centre, scale, 1 / scale
    matrix_ptr,       # [PADDED, PADDED] fp16, entries +-1, padding 0: rotated channel by channel
    tiles_ptr,        # [num_tiles, 2] int32: request, tile of its sequence
    query_start_ptr,  # [num_requests + 1] int32
    seq_lens_ptr,     # [num_requests] int32
    out_keys_ptr,     # [pages, KV_HEADS, PAGE, D]
    out_values_ptr,
    num_tiles, residual, sinks, inverse_root,
    stride_page: tl.int64, stride_page_head: tl.int64, stride_table,
    stride_k_token: tl.int64, stride_k_head: tl.int64, stride_v_token: tl.int64, stride_v_head: tl.int64,
    stride_block: tl.int64, stride_block_head: tl.int64, stride_block_token: tl.int64, stride_exact_table,
    KV_HEADS: tl.constexpr, FORMAT: tl.constexpr, PAGE_TILES: tl.constexpr, EXACT_BLOCK: tl.constexpr,
    HAS_EXACT: tl.constexpr, HAS_FRAME: tl.constexpr, WITH_CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, KEEP_MATRIX: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = FORMAT.head_size
    PADDED: tl.constexpr = FORMAT.padded_size
    OUT_TILES: tl.constexpr = PAGE // TILE
    pos = tl.arange(0, TILE)
    d = tl.arange(0, PADDED)
    in_head = (d < D)[None, :]
    matrix = 0
    if KEEP_MATRIX:
        matrix = tl.load(matrix_ptr + d[:, None] * PADDED + d[None, :])
    for i in range(0, tl.cdiv(num_tiles * KV_HEADS - tl.program_id(0), tl.num_programs(0))):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile, head = item // KV_HEADS, item % KV_HEADS
        b = tl.load(tiles_ptr + 2 * tile)
        t = tl.load(tiles_ptr + 2 * tile + 1)
        start = tl.load(query_start_ptr + b)
        seq_len = tl.load(seq_lens_ptr + b)
        context = seq_len - (tl.load(query_start_ptr + b + 1) - start)
        end = seq_len if WITH_CHUNK else context
        first = t * TILE
        # a page is written to its end, so that nothing another request left there is read
        if first < tl.cdiv(end, PAGE) * PAGE:
            token = token_at(pos)  # rows are in the order of positions
            position = first + token
            page_row = ((tile // OUT_TILES).to(tl.int64) * KV_HEADS + head) * PAGE + tile % OUT_TILES * TILE
            to = (page_row + token)[:, None] * D
            packed = position < context
            if HAS_EXACT:
                window = tl.where(residual > 0, context - residual + 1, context)
                if (first < sinks) | (first + TILE > window):
                    wanted = packed & ((position < sinks) | (position >= window))
                    at = exact_table_ptr + b.to(tl.int64) * stride_exact_table + position // EXACT_BLOCK
                    block = tl.load(at, mask=wanted, other=0)
                    wanted = wanted & (block > 0)
                    packed = packed & (block == 0)
                    at = block.to(tl.int64) * stride_block + position % EXACT_BLOCK * stride_block_token
                    source = exact_ptr + head * stride_block_head + at[:, None] + d[None, :]
                    here = wanted[:, None] & in_head
                    tl.store(out_keys_ptr + to + d[None, :], tl.load(source, mask=here, other=0.0), mask=here)
                    tl.store(out_values_ptr + to + d[None, :], tl.load(source + D, mask=here, other=0.0), mask=here)
            if first < context:
                page = tl.load(block_table_ptr + b.to(tl.int64) * stride_table + t // PAGE_TILES).to(tl.int64)
                sub_page = cache_ptr + page * stride_page + head * stride_page_head + t % PAGE_TILES * FORMAT.sub_page_bytes
                levels = load_key_levels(sub_page, pos, FORMAT, tl.float16)
                unit = load_key_scales(sub_page, pos, FORMAT) * inverse_root
                _store_unrotated(
                    levels, unit, matrix, matrix_ptr, frame_ptr + head * (3 * D), out_keys_ptr + to, packed[:, None],
                    D, PADDED, COLUMNS, KEEP_MATRIX, HAS_FRAME,
                )  # fmt: skip
                levels = load_value_levels(sub_page, pos, FORMAT, tl.float16)
                unit = load_value_scales(sub_page, pos, FORMAT) * inverse_root
                _store_unrotated(
                    levels, unit, matrix, matrix_ptr, frame_ptr, out_values_ptr + to, packed[:, None],
                    D, PADDED, COLUMNS, KEEP_MATRIX, False,
                )  # fmt: skip
            if first + TILE > context:
                row = (start + position - context).to(tl.int64)[:, None]
                behind = (position >= context)[:, None] & in_head
                here = behind & (position < end)[:, None]
                key_at = key_ptr + row * stride_k_token + head * stride_k_head + d[None, :]
                value_at = value_ptr + row * stride_v_token + head * stride_v_head + d[None, :]
                tl.store(out_keys_ptr + to + d[None, :], tl.load(key_at, mask=here, other=0.0), mask=behind)
                tl.store(out_values_ptr + to + d[None, :], tl.load(value_at, mask=here, other=0.0), mask=behind)


@functools.cache
def _gather_shape(padded_size: int, device: torch.device) -> tuple[int, int, bool]:
    """Programs that a device runs at once, columns of one product, and whether the matrix stays in shared memory.

    GPUs with warpgroup products read it there; others would keep it in registers (sm_80: 250 a thread, with spills).
    """
    if device.type != "cuda":
        programs, keep = 3, True
    else:
        properties = torch.cuda.get_device_properties(device)
        programs, keep = PROGRAMS_PER_SM * properties.multi_processor_count, properties.major in (9, 10)
    keep = keep and padded_size <= 128
    return programs, padded_size if keep else 64, keep


@functools.cache
def _matrix(head_size: int, device: torch.device) -> torch.Tensor:
    """sqrt(head_size) times the rotation, padded with zeros to powers of two: fp16, entries +-1."""
    padding = triton.next_power_of_2(head_size) - head_size
    matrix = (rotation_matrix(head_size) * math.sqrt(head_size)).round()
    return torch.nn.functional.pad(matrix, (0, padding, 0, padding)).to(torch.float16).to(device)


def gather_context(
    workspace: Workspace,
    cache_format: CacheFormat,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tiles: torch.Tensor,
    with_chunk: bool,
    key_frame: torch.Tensor | None = None,
    exact: ExactBlocks | None = None,
    exact_table: torch.Tensor | None = None,
) -> None:
    """Write tiles of sequences to the workspace, one after the other from its start, in raw space.

    Positions of the context come from packed pages or exact blocks, those of the chunk (with_chunk; else zeros are written)
    from key and value. Pages are filled up with zeros.

    Args: tiles [n, 2] int32, a whole number of workspace pages of each request; the rest as for attend_chunks
    """
    if workspace.keys.shape[2:] != key.shape[1:]:
        shapes = tuple(workspace.keys.shape[2:]), tuple(key.shape[1:])
        raise ValueError(f"the workspace is for {shapes[0]} kv heads and head size, got {shapes[1]}")
    num_kv_heads = key.shape[1]
    fmt = PackedFormat.of(cache_format)
    programs, columns, keep_matrix = _gather_shape(fmt.padded_size, key.device)
    block = exact.cache.stride() if exact else (0, 0, 0)
    _gather_kernel[(min(tiles.shape[0] * num_kv_heads, programs),)](
        cache,
        block_table,
        key,
        value,
        exact.cache if exact else key,
        exact_table if exact else block_table,
        tiles if key_frame is None else key_frame,
        _matrix(cache_format.head_size, key.device),
        tiles,
        query_start_loc,
        seq_lens,
        workspace.keys,
        workspace.values,
        tiles.shape[0],
        exact.residual_tokens if exact else 0,
        exact.sink_tokens if exact else 0,
        cache_format.head_size**-0.5,
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        block[0],
        block[1],
        block[2],
        exact_table.stride(0) if exact else 0,
        KV_HEADS=num_kv_heads,
        FORMAT=fmt,
        PAGE_TILES=cache.shape[2] // SUB_PAGE_TOKENS,
        EXACT_BLOCK=exact.cache.shape[2] if exact else 1,
        HAS_EXACT=exact is not None,
        HAS_FRAME=key_frame is not None,
        WITH_CHUNK=with_chunk,
        COLUMNS=columns,
        KEEP_MATRIX=keep_matrix,
        num_warps=8,
        num_stages=1,
    )
