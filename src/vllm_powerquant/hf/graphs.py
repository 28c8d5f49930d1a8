"""A decode step's attention on a GPU as one CUDA graph a layer, so that Python does not launch each kernel.

A graph reads and writes fixed addresses. What changes from step to step is copied there: queries, keys and values of each
layer. The step's tables, which all layers read, follow from the last step's by a graph of their own. When a layer's pages
have moved its graph is void. If they grew, another is recorded at once; if rows were chosen, which may happen at every step,
the next steps run without a graph until two have found the same pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .sequences import EXACT_BLOCK, MAX_ROW_QUERIES, Step

if TYPE_CHECKING:
    from .layer import PackedLayer


class LayerGraph:
    """What one layer has recorded. A copy of a layer has other pages, so it begins with nothing."""

    def __init__(self) -> None:
        self.seen: tuple | None = None  # of the last step: what a graph would have read
        self.recorded: tuple | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_due = False  # another graph is to be recorded without a step before it

    def pages_grew(self) -> None:
        self.is_due = self.graph is not None

    def __reduce__(self) -> tuple[type, tuple]:
        return LayerGraph, ()


class DecodeGraphs:
    """What the layers of a cache on one device share: where a step's tables and a layer's tensors are for graphs to read."""

    def __init__(self) -> None:
        self._tables: dict[str, torch.Tensor] = {}
        self._held: torch.Tensor | None = None  # [rows] int64: Rows.exact_from, of the rows after the step
        self._step: Step | None = None  # whose tables these are
        self._advance: torch.cuda.CUDAGraph | None = None  # makes of them the tables of the step that follows
        self._rows: dict[tuple, list[torch.Tensor]] = {}
        self._pool: tuple[int, int] | None = None
        self._keeper: torch.cuda.CUDAGraph | None = None  # PyTorch refuses a pool whose graphs are all gone
        self._stream: torch.cuda.Stream | None = None  # the default one cannot be captured

    @property
    def nbytes(self) -> int:
        held = [] if self._held is None else [self._held]
        return sum(x.nbytes for x in [*self._tables.values(), *held, *(x for rows in self._rows.values() for x in rows)])

    def attend(
        self, layer: PackedLayer, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """PackedLayer.attend's kernels of a step of one token a row: attention, then the token is stored. Without gradients.

        Args:    query [batch, num_heads, 1, head_size]; key, value [batch, num_kv_heads, 1, head_size]
        Returns: [batch, 1, num_heads, head_size]; None where it pays to launch the kernels one by one, and nothing was done
        """
        exact = layer.exact
        where = (layer.packed.data_ptr(), layer.packed.shape, 0 if exact is None else exact.data_ptr(), query.shape, scale)
        state = layer.graph
        if state.recorded != where and state.seen != where and not state.is_due:
            state.seen, state.recorded, state.graph = where, None, None
            return None
        if self._step is not step:
            self._load(step, layer)
        given = (query, key, value)
        shapes = (query.shape, key.shape, query.dtype)
        rows = self._rows.get(shapes)
        if rows is None:
            rows = self._rows[shapes] = self._rows_like(*given)
        torch._foreach_copy_(rows[:3], given)
        if state.recorded != where:
            state.graph = None  # before another takes memory
            state.graph = self._record(layer, step, rows, scale)
            state.seen, state.recorded, state.is_due = where, where, False
        state.graph.replay()
        return rows[3].clone()

    # what is kept may be written to outside of inference mode later

    @torch.inference_mode(False)
    def _rows_like(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """What `given` is copied to, and where attention's result goes: [batch, 1, num_heads, head_size]."""
        query = given[0]
        rows = []
        for x in given:
            # kernels read contiguous rows; where these are, too, equal strides let all be copied by one launch
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            rows.append(like if like.squeeze(2).is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device))
        out = torch.empty(query.transpose(1, 2).shape, dtype=query.dtype, device=query.device)
        return [*rows, out]

    def _load(self, step: Step, layer: PackedLayer) -> None:
        """Tables and what follows from them, of a step that they are not of."""
        last, self._step = self._step, None  # until the tables are there
        # the next token of rows whose pages did not grow: nothing but numbers changes
        if self._advance and last and last.after is layer.rows and last.after.pages == step.after.pages:
            self._advance.replay()
        else:
            self._upload(step, layer.device)
        self._step = step

    @torch.inference_mode(False)
    def _upload(self, step: Step, device: torch.device) -> None:
        host, held = step.host, torch.tensor(step.after.exact_from)
        if any(name not in self._tables or self._tables[name].shape != x.shape for name, x in host.items()):
            # graphs that read the old ones are void as well: other shapes come of other pages
            self._tables = {name: x.to(device) for name, x in host.items()}
            self._held = held.to(device)
            self._advance = None
            return
        if self._advance is None:
            self._to_next(step)  # so that nothing is loaded or compiled for the first time while it is recorded
            self._advance = self._recorded(lambda: self._to_next(step))
        for name, x in host.items():
            self._tables[name].copy_(x, non_blocking=True)
        self._held.copy_(held, non_blocking=True)

    def _to_next(self, step: Step) -> None:
        """From a step's tables on the GPU, those of the one that follows with a token of every row, in their place."""
        window, tables, held = step.before.window, self._tables, self._held
        have = tables["seq_lens"].long()
        rows = torch.arange(len(have), device=have.device)
        for name, x in window.tables(step.after.pages, rows, have, have + 1, held, rows, have).items():
            tables[name].copy_(x)
        # Step.of's rule for one token, which the window takes in unless it is none
        held.copy_(torch.minimum(held, have) if window.kept else have + 1)
        torch.maximum(held, (-(-(have + 1) // EXACT_BLOCK) - window.ring_blocks) * EXACT_BLOCK, out=held)

    def _recorded(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._keeper = self._recorded(self._held.neg)
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would wait for the GPU and give all free memory back, each time
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        return graph

    @torch.inference_mode(False)
    def _record(self, layer: PackedLayer, step: Step, rows: list[torch.Tensor], scale: float) -> torch.cuda.CUDAGraph:
        from ..attention.kernels.step import StepPlan

        query, key, value = (x.squeeze(2) for x in rows[:3])
        out = rows[3].squeeze(1)
        tables, batch = self._tables, step.before.batch
        exact = layer.exact_blocks()
        kernels = layer.gpu_kernels(query.shape[1], batch)
        # lengths grow while the graph is replayed, up to what the pages hold
        longest = layer.packed.shape[1] * layer.packed.shape[3]

        def launch() -> None:
            plan = StepPlan.of(
                tables["query_start"], tables["seq_lens"], [1] * batch, [longest] * batch, MAX_ROW_QUERIES, None, longest
            )
            kernels.attend(
                query,
                key,
                value,
                out,
                layer.pages(),
                plan,
                tables["block_table"],
                scale,
                layer.key_frame,
                exact,
                tables["exact_table"] if exact else None,
            )
            kernels.store(
                layer.pages(),
                key,
                value,
                tables["slots"],
                layer.key_frame,
                exact,
                tables["exact_slots"] if exact else None,
            )

        launch()  # compiles what is not; the same again does no harm
        return self._recorded(launch)
