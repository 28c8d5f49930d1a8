"""A decode step's attention on a GPU as one CUDA graph a layer, so that Python does not launch each kernel.

A graph reads and writes fixed addresses. What changes from step to step is copied there: the step's tables once a step for
all layers, queries, keys and values of each layer. When a layer's pages move (they grow, rows are chosen) its graph is void
and the next steps run without, until two have found the same pages: then it pays to record another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .sequences import MAX_ROW_QUERIES, Step

if TYPE_CHECKING:
    from .layer import PackedLayer


class LayerGraph:
    """What one layer has recorded. A copy of a layer has other pages, so it begins with nothing."""

    def __init__(self) -> None:
        self.seen: tuple | None = None  # of the last step: what a graph would have read
        self.recorded: tuple | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __deepcopy__(self, memo) -> LayerGraph:
        return LayerGraph()


class DecodeGraphs:
    """What the layers of a cache on one device share: where a step's tables and a layer's tensors are for graphs to read."""

    def __init__(self) -> None:
        self._tables: dict[str, torch.Tensor] = {}
        self._step: Step | None = None  # whose tables these are
        self._rows: dict[tuple, list[torch.Tensor]] = {}
        self._pool = None

    def __deepcopy__(self, memo) -> DecodeGraphs:
        return DecodeGraphs()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in [*self._tables.values(), *(x for rows in self._rows.values() for x in rows)])

    def attend(
        self, layer: PackedLayer, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """PackedLayer.attend's kernels of a step of one token a row: attention, then the token is stored.

        Args:    query [batch, num_heads, head_size]; key, value [batch, num_kv_heads, head_size]
        Returns: [batch, num_heads, head_size]; None where it pays to launch the kernels one by one, and nothing was done
        """
        exact = layer.exact
        where = (layer.packed.data_ptr(), layer.packed.shape, 0 if exact is None else exact.data_ptr(), query.shape, scale)
        state = layer.graph
        if state.recorded != where and state.seen != where:
            state.seen, state.recorded, state.graph = where, None, None
            return None
        self._load(step, layer.device)
        given = (query, key, value)
        rows = self._rows.get((query.shape, key.shape, query.dtype))
        if rows is None:
            rows = self._rows[query.shape, key.shape, query.dtype] = [torch.empty_like(x) for x in (*given, query)]
        torch._foreach_copy_(rows[:3], given)
        if state.recorded != where:
            state.graph = self._record(layer, step, rows, scale)
            state.recorded = where
        state.graph.replay()
        return rows[3].clone()

    def _load(self, step: Step, device: torch.device) -> None:
        if self._step is step:
            return
        host = step.host
        if any(name not in self._tables or self._tables[name].shape != x.shape for name, x in host.items()):
            # graphs that read the old ones are void as well: other shapes come of other pages
            self._tables = {name: x.to(device) for name, x in host.items()}
        else:
            for name, x in host.items():
                self._tables[name].copy_(x, non_blocking=True)
        self._step = step

    def _record(self, layer: PackedLayer, step: Step, rows: list[torch.Tensor], scale: float) -> torch.cuda.CUDAGraph:
        from ..attention.kernels.step import StepPlan

        query, key, value, out = rows
        tables, batch = self._tables, step.before.batch
        exact = layer.exact_blocks()
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
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
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            launch()
        return graph
