"""A decode step's batch as bench_decode.py measures it, and the tensors that every provider needs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

DEVICE = "cuda:0"


@dataclass(frozen=True)
class Case:
    """One step's batch. seq_lens count the step's own query tokens, num_queries for each request."""

    seq_lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    key_bits: int = 4
    value_bits: int = 2
    value_codec: str = "scalar"
    num_queries: int = 1

    @property
    def shape(self) -> str:
        """What peers see of it, e.g. 32x32768 32/8 d128."""
        runs: list[list[int]] = []
        for n in self.seq_lens:
            if runs and runs[-1][1] == n:
                runs[-1][0] += 1
            else:
                runs.append([1, n])
        batch = "+".join(f"{count}x{n}" for count, n in runs)
        queries = f" q{self.num_queries}" if self.num_queries > 1 else ""
        return f"{batch} {self.num_heads}/{self.num_kv_heads} d{self.head_size}{queries}"

    @property
    def num_tokens(self) -> int:
        return len(self.seq_lens) * self.num_queries

    @property
    def query_and_output_bytes(self) -> int:
        return 4 * self.num_tokens * self.num_heads * self.head_size


@dataclass(frozen=True)
class Options:
    layers: int = 1  # caches that the calls of one graph go through
    pool_layers: int = 1  # our pages of one layer lie this many pages apart, as in the pool of such a model
    block_size: int = 128  # ours
    residual_tokens: int = 128
    sink_tokens: int = 4
    calibrated: bool = False  # ours: keys in a frame


@dataclass
class Attention:
    calls: list[Callable[[], object]]  # one for each layer
    format: str
    bytes: int  # that one call has to move
    out: torch.Tensor | None = None


class Unsupported(Exception):
    pass


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def query_starts(case: Case) -> torch.Tensor:
    return int32([r * case.num_queries for r in range(len(case.seq_lens) + 1)])


def query_and_output(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    query = torch.randn(case.num_tokens, case.num_heads, case.head_size, dtype=torch.bfloat16, device=DEVICE)
    return query, torch.full_like(query, torch.nan)


def scattered(wanted: list[list[int]], width: int) -> tuple[torch.Tensor, int]:
    """(block table [requests, width] int32, number of blocks): the wanted entries of each row get blocks in random order.

    Block 0 is nobody's; it is what the other entries hold.
    """
    blocks = np.random.default_rng(0).permutation(sum(map(len, wanted))) + 1
    table, start = np.zeros((len(wanted), width), np.int32), 0
    for row, entries in zip(table, wanted, strict=True):
        row[entries] = blocks[start : start + len(entries)]
        start += len(entries)
    return torch.from_numpy(table).to(DEVICE), len(blocks) + 1


def paged(case: Case, block_size: int) -> tuple[torch.Tensor, int]:
    counts = [-(-n // block_size) for n in case.seq_lens]
    return scattered([list(range(count)) for count in counts], max(counts))
