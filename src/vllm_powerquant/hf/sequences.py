"""Which tokens the rows of a Transformers cache hold, and where their packed and exact copies lie.

Transformers counts positions, padding included, alike for every row of a batch; here padding is not stored, so a row's
tokens are counted apart. All layers of a cache go through the same steps: a `Rows` is never changed, and the step from one
to the next is worked out by the first layer and found by the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..attention.layout import SUB_PAGE_TOKENS
from ..errors import PowerQuantUnsupportedError

EXACT_BLOCK = 8  # tokens of an exact block
# Pages are added two at a time (a GPU's graphs are recorded anew each time) up to 256, and then one in 128: from 8,192
# tokens on what is held is never 1.6 % more than what is used, and a token is copied at most 128 times however long the
# sequence grows.
PAGES_PER_GROWTH = 128
MIN_GROWTH = 2
# longer chunks are attended by matrix products on a GPU, shorter ones straight from packed pages
MAX_ROW_QUERIES = 8


@dataclass(frozen=True)
class Window:
    """The newest and the first tokens of a row, which stay exact beside their packed copies.

    A row has exact blocks of its own: `sink_blocks` for its first tokens, then a ring of `ring_blocks` for its newest.
    """

    residual_tokens: int
    sink_tokens: int

    @property
    def sink_blocks(self) -> int:
        return -(-self.sink_tokens // EXACT_BLOCK)

    @property
    def kept(self) -> int:
        """Newest tokens that are exact before a chunk: its first one is the window's last."""
        return max(self.residual_tokens - 1, 0)

    @property
    def ring_blocks(self) -> int:
        """Blocks that so many tokens touch, wherever they begin in one."""
        return -(-(self.kept + EXACT_BLOCK - 1) // EXACT_BLOCK) if self.kept else 0

    @property
    def row_blocks(self) -> int:
        return self.sink_blocks + self.ring_blocks

    def block_ids(self, rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Exact block of each row's block, both int64 of shapes that broadcast; 0 is the null block."""
        in_ring = self.sink_blocks + blocks % max(self.ring_blocks, 1)
        return 1 + rows * self.row_blocks + torch.where(blocks < self.sink_blocks, blocks, in_ring)

    def exact_blocks(self, length: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Blocks that are read exactly before a chunk that comes next: below the first number, and from the second to before
        the third. Of each row.

        Args: length: tokens of a row; held: its ring has tokens from here on; both [rows] int64, as what is returned
        """
        blocks = _blocks(length)
        sinks = blocks.clamp(max=self.sink_blocks)
        if not self.ring_blocks:
            return sinks, blocks, blocks
        begin = (length - self.kept).clamp(min=0)
        # a block that is only partly held may be named if the window begins behind what it lacks
        first = torch.where(begin >= held, held // EXACT_BLOCK, _blocks(held))
        ring = torch.maximum(torch.maximum(sinks, first), begin // EXACT_BLOCK)
        return sinks, torch.minimum(ring, blocks), blocks

    def tables(
        self,
        pages: int,
        rows: torch.Tensor,
        have: torch.Tensor,
        length: torch.Tensor,
        held: torch.Tensor,
        of: torch.Tensor,
        position: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """What kernels read of a step: Step.on without query_start.

        Args: pages: of every row; rows: their indices in the kernels' order; have, length: tokens before and after; held: as
              for exact_blocks, before; all [rows] int64; of, position [tokens] int64: of each token, which of `rows` it
              belongs to, and where in it
        """
        block = position // EXACT_BLOCK
        exact = self.block_ids(rows[of], block) * EXACT_BLOCK + position % EXACT_BLOCK
        # of each row, the ring takes new tokens from here on
        first = torch.maximum(have, length - self.kept)
        wanted = (block < self.sink_blocks) | (position >= first[of])
        sinks, ring, end = (x[:, None] for x in self.exact_blocks(have, held))
        blocks = torch.arange(max(1, pages * SUB_PAGE_TOKENS // EXACT_BLOCK), device=have.device)
        is_exact = (blocks < sinks) | (blocks >= ring) & (blocks < end)
        return {
            "slots": position + rows[of] * (pages * SUB_PAGE_TOKENS),
            "exact_slots": torch.where(wanted, exact, -1),
            "exact_table": torch.where(is_exact, self.block_ids(rows[:, None], blocks), 0).int(),
            "block_table": (rows[:, None] * pages + torch.arange(max(1, pages), device=have.device)).int(),
            "seq_lens": length.int(),
        }


def _blocks(tokens):
    """Exact blocks that so many tokens touch; a number or a tensor."""
    return -(-tokens // EXACT_BLOCK)


@dataclass(frozen=True, eq=False)
class Rows:
    """What the rows of a batch hold.

    length: positions, padding included; kept [batch, length] bool: where they are tokens, None: everywhere; lens: tokens of
    each row; exact_from: of each row, the tokens from here on have exact copies in the ring; pages: a row has room for
    """

    window: Window
    length: int
    kept: torch.Tensor | None
    lens: tuple[int, ...]
    exact_from: tuple[int, ...]
    pages: int
    _steps: list[tuple] = field(default_factory=list, repr=False)  # the last one asked for

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        # nothing else is ever changed; a copy's masks may be other ones in the same memory
        other = memo[id(self)] = replace(self, _steps=[])
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_steps": []}

    @classmethod
    def none(cls, window: Window, batch: int) -> Rows:
        return cls(window, 0, None, (0,) * batch, (0,) * batch, 0)

    @property
    def batch(self) -> int:
        return len(self.lens)

    def step(self, n: int, mask: torch.Tensor | None) -> Step:
        """The next n positions of every row.

        Args:   mask [batch, length + n] bool or int of all positions, 0 where there is padding; None: tokens everywhere
        Raises: PowerQuantUnsupportedError if the mask says something else of the positions that are held than it did
        """
        for asked_n, asked_mask, step in self._steps:
            if asked_n == n and asked_mask is mask:
                return step
        step = Step.of(self, n, self._new_columns(n, mask))
        self._steps[:] = [(n, mask, step)]
        return step

    def _new_columns(self, n: int, mask: torch.Tensor | None) -> torch.Tensor | None:
        """[batch, n] bool on the mask's device, None: tokens everywhere."""
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[0] != self.batch or mask.shape[1] < self.length + n:
            raise PowerQuantUnsupportedError(
                f"a compressed cache takes an attention_mask of [batch, positions], here [{self.batch}, "
                f"{self.length + n}], got {list(mask.shape)}; masks of other shapes need attn_implementation='sdpa' and a "
                "DynamicCache"
            )
        mask = mask.bool()
        before, new = mask[:, : self.length], mask[:, self.length : self.length + n]
        same = before.all() if self.kept is None else (before == self.kept.to(mask.device)).all()
        same, whole = torch.stack((same, new.all())).tolist()
        if not same:
            raise PowerQuantUnsupportedError(
                "attention_mask hides or shows positions that a compressed cache holds otherwise: padding is not stored, "
                "and what is stored is attended; give the mask that these positions were given with, or use a DynamicCache"
            )
        return None if whole else new

    def crop(self, positions: int) -> Rows:
        """Without the last `positions`; what had left the window stays packed."""
        if positions <= 0:
            return self
        length = max(0, self.length - positions)
        if self.kept is None:
            return replace(self, length=length, lens=(length,) * self.batch, _steps=[])
        kept = self.kept[:, :length]
        lens = tuple(kept.sum(1).tolist())
        return replace(self, length=length, kept=None if bool(kept.all()) else kept, lens=lens, _steps=[])

    def select(self, indices: Sequence[int]) -> Rows:
        """Rows by index, some perhaps several times or not at all."""
        kept = None if self.kept is None else self.kept[list(indices)]
        lens, exact_from = (tuple(x[i] for i in indices) for x in (self.lens, self.exact_from))
        if kept is not None and bool(kept.all()):
            kept = None
        return replace(self, kept=kept, lens=lens, exact_from=exact_from, _steps=[])

    def positions(self, row: int) -> torch.Tensor | slice:
        """Where a row's tokens are among its positions."""
        return slice(0, self.length) if self.kept is None else self.kept[row].nonzero().flatten()

    def exact_positions(self, row: int) -> torch.Tensor:
        """Of a row's tokens, those that are read exactly before a chunk that comes next: [n] int64, ascending."""
        window, length = self.window, self.lens[row]
        sinks, ring, _ = window.exact_blocks(torch.tensor(length), torch.tensor(self.exact_from[row]))
        token = torch.arange(length)
        block = token // EXACT_BLOCK
        in_window = (token > length - window.residual_tokens) & ((block < sinks) | (block >= ring))
        return token[(token < window.sink_tokens) | in_window]


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens that come next: n positions of every row.

    tokens: which of the batch * n positions are stored, in the order that kernels see them, None: all; order: rows in that
    order; query_lens: of each of those rows
    """

    before: Rows
    after: Rows
    n: int
    tokens: torch.Tensor | None
    order: tuple[int, ...]
    query_lens: tuple[int, ...]
    plans: dict[tuple, Any] = field(default_factory=dict, repr=False)  # what kernels of a shape and device made of it

    @classmethod
    def of(cls, before: Rows, n: int, new: torch.Tensor | None) -> Step:
        """Args: new [batch, n] bool: which positions are tokens, None: all"""
        window, batch = before.window, before.batch
        rows = tuple(range(batch))
        if new is None:
            counts, tokens = (n,) * batch, None
        else:
            new = new.cpu()
            counts = tuple(new.sum(1).tolist())
            # kernels want requests of few queries before longer ones
            rows = tuple(sorted(rows, key=lambda row: counts[row] > MAX_ROW_QUERIES))
            tokens = torch.cat([row * n + new[row].nonzero().flatten() for row in rows])
        kept = before.kept
        if kept is not None or new is not None:
            kept = torch.ones(batch, before.length, dtype=torch.bool) if kept is None else kept
            kept = torch.cat((kept, torch.ones(batch, n, dtype=torch.bool) if new is None else new), 1)
        lens = tuple(have + more for have, more in zip(before.lens, counts, strict=True))
        exact_from = []
        for have, length, held in zip(before.lens, lens, before.exact_from, strict=True):
            first = max(have, length - window.kept)
            # what the ring held goes on only if nothing is left out between it and the new tokens
            held = first if first > have else min(held, have)
            exact_from.append(max(held, (_blocks(length) - window.ring_blocks) * EXACT_BLOCK))
        pages, needed = before.pages, -(-max(lens, default=0) // SUB_PAGE_TOKENS)
        if needed > pages:
            # a prompt's own pages, exactly; more room only for what grows
            pages = max(needed, pages + max(MIN_GROWTH, pages // PAGES_PER_GROWTH)) if pages else needed
        after = Rows(window, before.length + n, kept, lens, tuple(exact_from), pages)
        # `before` holds on to the step, so the step must not hold on to it: tensors would wait for Python to look for cycles
        return cls(replace(before, _steps=[]), after, n, tokens, rows, tuple(counts[row] for row in rows))

    @functools.cached_property
    def host(self) -> dict[str, torch.Tensor]:
        """What kernels read, still on the CPU; rows in `order`."""
        rows = torch.tensor(self.order)
        of_rows = (self.before.lens, self.after.lens, self.before.exact_from)
        have, length, held = (torch.tensor([x[row] for row in self.order]) for x in of_rows)
        lens = length - have
        starts = torch.cat((lens.new_zeros(1), lens.cumsum(0)))
        of = torch.arange(len(rows)).repeat_interleave(lens)
        position = torch.arange(int(starts[-1])) - starts[of] + have[of]
        host = self.before.window.tables(self.after.pages, rows, have, length, held, of, position)
        host["query_start"] = starts.int()
        if self.tokens is not None:
            host["tokens"] = self.tokens
        return host

    @functools.cached_property
    def _devices(self) -> dict[torch.device, dict[str, torch.Tensor]]:
        return {}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """slots, exact_slots [tokens] int64 (-1: none); block_table, exact_table [rows, ...], query_start [rows + 1],
        seq_lens [rows] int32; tokens [tokens] int64 where there is padding."""
        if device not in self._devices:
            self._devices[device] = {name: x.to(device, non_blocking=True) for name, x in self.host.items()}
        return self._devices[device]
