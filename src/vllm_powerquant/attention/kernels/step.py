"""StepPlan: what the GPU kernels of every layer know of one step's batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .prefill import ChunkPlan, Workspace


@dataclass
class StepPlan:
    """A step's requests: first those of few queries ("rows"), then those of long chunks; made once a step for every layer.

    query_start_loc [num_requests + 1] and seq_lens [num_requests] int32 lie on the device and are what kernels read; the
    numbers are what the host knows. Row requests may have no query (padding).
    """

    num_rows: int  # requests
    num_row_tokens: int
    max_row_queries: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int  # may be an upper bound
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    chunks: ChunkPlan | None = None
    chunk_query_start_loc: torch.Tensor | None = None  # of the chunk requests alone, from 0
    # made by the first layer that needs it: (row sets, row blocks, exact block table) -> (tiles, cost, runs)
    runs: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def row_starts(self) -> torch.Tensor:
        """query_start_loc of the row requests: [num_rows + 1]."""
        return self.query_start_loc[: self.num_rows + 1]

    @property
    def row_seq_lens(self) -> torch.Tensor:
        return self.seq_lens[: self.num_rows]

    @classmethod
    def of(
        cls,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: Sequence[int],
        seq_lens_upper: Sequence[int],
        max_row_queries: int = 1,
        workspace: Workspace | None = None,
        max_seq_len: int = 0,
    ) -> StepPlan:
        """Args: query_start_loc [num_requests + 1], seq_lens [num_requests] int32 on the device; query_lens and
        seq_lens_upper: the same as the host knows them (sequence lengths may be upper bounds); max_row_queries: longer
        requests are chunks; max_seq_len: longest sequence of any step that replays a CUDA graph captured with this plan
        """
        rows = 0
        while rows < len(query_lens) and query_lens[rows] <= max_row_queries:
            rows += 1
        tokens = sum(query_lens[:rows])
        plan = cls(
            num_rows=rows,
            num_row_tokens=tokens,
            max_row_queries=max(query_lens[:rows], default=0),
            num_tokens=sum(query_lens),
            max_query_len=max(query_lens, default=0),
            max_seq_len=max(max_seq_len, max(seq_lens_upper, default=0)),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
        )
        if rows < len(query_lens):
            plan.chunks = ChunkPlan.of(query_lens[rows:], seq_lens_upper[rows:], workspace)
            plan.chunk_query_start_loc = query_start_loc[rows:] - tokens
        return plan


def warm_up_step(
    rows, num_requests: int, queries: int, dtype: torch.dtype, cache: torch.Tensor, exact, key_frame: torch.Tensor | None
) -> None:
    """One step of requests without context, so that nothing is read from the cache, through PortableRows or HopperRows."""
    device, d = rows.device, rows.format.head_size
    lens = torch.full((num_requests,), queries, dtype=torch.int32, device=device)
    starts = torch.arange(0, num_requests * queries + 1, queries, dtype=torch.int32, device=device)
    step = StepPlan.of(starts, lens, [queries] * num_requests, [queries] * num_requests, queries)
    query = torch.zeros(num_requests * queries, rows.num_heads, d, dtype=dtype, device=device)
    key = torch.zeros(num_requests * queries, rows.num_kv_heads, d, dtype=dtype, device=device)
    table = torch.zeros(num_requests, 1, dtype=torch.int32, device=device)
    rows.attend(query, key, key, torch.empty_like(query), cache, step, table, d**-0.5, key_frame, exact, table)
