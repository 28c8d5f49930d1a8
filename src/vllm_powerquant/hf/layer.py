"""One packed layer of a Transformers cache: pages and exact blocks as in vLLM's, for the same kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..attention import reference
from ..attention.cache_format import CacheFormat
from ..attention.cache_layer import UpdatedLayer
from ..attention.kernels.cpu_kernels import SEGMENT_TOKENS, BatchPlan, CpuKernels, ExactBlocks
from ..attention.layout import SUB_PAGE_TOKENS
from ..attention.rotation import rotation_matrix, unrotate
from ..errors import PowerQuantUnsupportedError
from .common import Common
from .graphs import LayerGraph
from .sequences import EXACT_BLOCK, MAX_ROW_QUERIES, Rows, Step, Window

if TYPE_CHECKING:
    from ..attention.kernels.gpu_kernels import GpuKernels

_BUFFER_GROWTH = 256  # tokens by which the buffers of decoded tokens grow, at least

cpu_kernels = functools.cache(CpuKernels)


class PackedLayer(UpdatedLayer):
    """Packed keys and values of a layer.

    packed [batch, pages, num_kv_heads, 64, slot_bytes] uint8 (attention/layout.py); exact [1 + batch * row_blocks,
    num_kv_heads, EXACT_BLOCK, 2 * head_size] of the model's dtype: block 0 is the null block.

    With fused attention (attention.py) nothing else is held. Otherwise `update` returns buffers [batch, num_kv_heads,
    positions, head_size] of the model's dtype, in which a token is exact until it leaves the window and then what its packed
    slot decodes to; so they take more memory than an uncompressed cache, and give the same answers.

    Args: common: of the cache's layers; cache_format: None where the head size is not known before the first chunk;
          key_frame [num_kv_heads, 3, head_size] fp32: see reference.in_frame
    """

    def __init__(
        self,
        common: Common,
        cache_format: CacheFormat | None,
        window: Window,
        key_frame: torch.Tensor | None = None,
    ) -> None:
        self.common, self.format, self.window, self.key_frame = common, cache_format, window, key_frame
        self._forget()
        super().__init__()

    def _forget(self) -> None:
        self.is_initialized = False
        self.rows = Rows.none(self.window, 0)
        self.packed = self.exact = self._keys = self._values = None
        self._decoded_until: list[int] = []  # of each row: tokens before it lie decoded in the buffers, but for the sinks
        self.graph = LayerGraph()
        self.is_offered = False  # a chunk was given to fused attention, which has not come for it yet

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_size = key_states.shape
        self.format = self.format or self.common.format_of(head_size)
        if value_states.shape != key_states.shape or head_size != self.format.head_size:
            raise PowerQuantUnsupportedError(
                f"a compressed layer takes keys and values of head size {self.format.head_size}, got keys "
                f"{list(key_states.shape)} and values {list(value_states.shape)}; use a DynamicCache for this model"
            )
        self.dtype, self.device, self.num_kv_heads = key_states.dtype, key_states.device, heads
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise PowerQuantUnsupportedError(
                f"keys and values must be float32, bfloat16 or float16, got {self.dtype}; load the model in one of them"
            )
        if self.key_frame is not None:
            self.key_frame = self.key_frame.to(self.device)
        # one object for all layers: what the first works out for a step, the others find
        self.rows = self.common.shared(None, (self.window, batch), lambda: Rows.none(self.window, batch))
        slot_bytes = self.format.layout.slot_bytes
        self.packed = torch.zeros(batch, 0, heads, SUB_PAGE_TOKENS, slot_bytes, dtype=torch.uint8, device=self.device)
        if self.window.row_blocks:
            blocks = 1 + batch * self.window.row_blocks
            self.exact = key_states.new_zeros(blocks, heads, EXACT_BLOCK, 2 * head_size)
        self.is_initialized = True

    # --- what Transformers calls -------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a chunk [batch, num_kv_heads, n, head_size].

        Returns: keys, values [batch, num_kv_heads, positions, head_size] of the whole sequence; with fused attention the
                 chunk itself, marked for it
        """
        # every microsecond of Python in a decode step counts on a GPU, and these two context managers are several
        if torch.compiler.is_compiling() or not self.is_initialized or not self.common.is_fused_for(self):
            return self._update(key_states, value_states)
        return self._offer(key_states, value_states)

    @torch.compiler.disable
    @torch.inference_mode(False)  # what is held may be written to outside of it later
    @torch.no_grad()
    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.common.is_fused_for(self):
            return self._offer(key_states, value_states)
        self._check(key_states)
        key_states, value_states = key_states.detach(), value_states.detach()
        step = self.rows.step(key_states.shape[2], self.common.padding_mask)
        if self._keys is None:
            self._rebuild()
        elif self._keys.is_inference():  # as rows that were chosen under inference_mode are
            self._keys, self._values = self._keys.clone(), self._values.clone()
        self._leave_window()
        self._reserve(step.after.pages)
        self._write(step, *(_tokens(x, step) for x in (key_states, value_states)))
        self._extend_buffers(step, key_states, value_states)
        self.rows = step.after
        return self.read()

    def _offer(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk itself, for fused attention to come for."""
        self._check(key_states)
        self.common.offer(self)
        marked = key_states.detach()
        marked.powerquant_layer = self
        self._keys = self._values = None
        return marked, value_states

    def _check(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != self.rows.batch:
            raise PowerQuantUnsupportedError(
                f"this cache holds a batch of {self.rows.batch}, got keys of {key_states.shape[0]}; make a new cache, or "
                "batch_repeat_interleave or batch_select_indices this one"
            )
        if key_states.dtype != self.dtype or key_states.device != self.device:
            raise PowerQuantUnsupportedError(
                f"this layer holds {self.dtype} on {self.device}, got {key_states.dtype} on {key_states.device}; make a new "
                "cache after moving or casting a model"
            )

    def get_seq_length(self) -> int:
        return self.rows.length

    def reset(self) -> None:
        self._forget()
        self.common.forget_shared()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove positions; a positive number is the length to keep, as Transformers has it.

        What had left the window before stays packed.
        """
        if not self.is_initialized:
            return
        length = self.rows.length
        remove = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        self.rows = self.common.shared(self.rows, ("crop", remove), lambda: self.rows.crop(remove))
        self._decoded_until = [min(x, n) for x, n in zip(self._decoded_until, self.rows.lens, strict=False)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Rows of the batch by index, or by a mask [batch] bool."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        chosen = indices.tolist()
        indices = indices.to(self.device)
        self.packed = self.packed[indices]
        if self.exact is not None:
            rows = self.exact[1:].unflatten(0, (self.rows.batch, self.window.row_blocks))[indices]
            self.exact = torch.cat((self.exact[:1], rows.flatten(0, 1)))
        if self._keys is not None:
            self._keys, self._values = self._keys[indices], self._values[indices]
            self._decoded_until = [self._decoded_until[i] for i in chosen]
        self.rows = self.common.shared(self.rows, ("select", tuple(chosen)), lambda: self.rows.select(chosen))

    @property
    def batch_size(self) -> int:
        return self.rows.batch

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded on demand where no buffers are held."""
        held = self._decode_all() if self._keys is None else (self._keys, self._values)
        return tuple(x[..., : self.rows.length, :] for x in held)

    # --- fused attention ---------------------------------------------------------------------------------------------

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of a chunk over itself, raw and causally, and over what is held; then the chunk is stored.

        Args:    query [batch, num_heads, n, head_size]; key, value [batch, num_kv_heads, n, head_size]; mask as for
                 Rows.step
        Returns: [batch, n, num_heads, head_size]; zeros where there is padding
        """
        if not self.is_offered:
            raise PowerQuantUnsupportedError(
                "a layer's attention ran twice over one chunk, which packed attention would have stored twice; use another "
                "attn_implementation for this model"
            )
        self.is_offered = False  # whatever comes of it
        step = self.rows.step(query.shape[2], mask)
        if step.after.pages > self.packed.shape[1]:
            self._reserve(step.after.pages)
        out = None
        if step.n == 1 and step.tokens is None and self.device.type == "cuda":
            out = self._attend_by_graph(step, query, key, value, scale)
        if out is None:
            out = self._attend(step, query, key, value, scale)
        self.rows = step.after
        return out

    def _attend_by_graph(
        self, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """None: not by a graph, and nothing was done."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._attend_by_graph(step, query, key, value, scale)
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._attend_by_graph(step, query, key, value, scale)
        return self.common.graphs_on(self.device).attend(self, step, query, key, value, scale)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _attend(self, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        batch, num_heads, n, head_size = query.shape
        on = step.on(self.device)
        rows = [_tokens(x.detach(), step) for x in (query, key, value)]
        out = torch.zeros if step.tokens is not None else torch.empty
        out = out(batch, n, num_heads, head_size, dtype=query.dtype, device=query.device)
        flat = out.view(batch * n, num_heads, head_size)
        part = flat if step.tokens is None else flat.new_empty(rows[0].shape)
        if part.shape[0]:
            kernels, plan = self._kernels(num_heads, step)
            pages, exact = self.pages(), self.exact_blocks()
            tables = (on["block_table"], scale, self.key_frame, exact, on["exact_table"] if exact else None)
            kernels.attend(*rows, part, pages, plan, *tables)
            self._write(step, *rows[1:])
        if step.tokens is not None:
            flat[on["tokens"]] = part
        return out

    def _kernels(self, num_heads: int, step: Step):
        """Kernels, and the step's plan for them."""
        # layers of other shapes or formats share the step, not what kernels make of it
        on, shape = step.on(self.device), (self.device, self.dtype, self.format, num_heads, self.num_kv_heads)
        plan = step.plans.get(shape)
        if self.device.type == "cpu":
            kernels = cpu_kernels(self.format)
            if plan is None:
                plan = BatchPlan.of(on["query_start"], on["seq_lens"], max(step.query_lens))
        else:
            from ..attention.kernels.prefill import Workspace
            from ..attention.kernels.step import StepPlan

            kernels = self.gpu_kernels(num_heads, step.before.batch)
            if plan is None:
                workspace = None
                if max(step.query_lens) > MAX_ROW_QUERIES:
                    workspace = Workspace.of(self.num_kv_heads, self.format.head_size, self.dtype, self.device)
                lens = [step.after.lens[row] for row in step.order]
                plan = StepPlan.of(on["query_start"], on["seq_lens"], step.query_lens, lens, MAX_ROW_QUERIES, workspace)
        step.plans[shape] = plan
        return kernels, plan

    def gpu_kernels(self, num_heads: int, batch: int) -> GpuKernels:
        from ..attention.kernels.gpu_kernels import GpuKernels

        shape = (self.format, num_heads, self.num_kv_heads, batch, self.device, self.dtype)
        return GpuKernels.of(*shape, MAX_ROW_QUERIES)

    # --- storage -----------------------------------------------------------------------------------------------------

    def pages(self) -> torch.Tensor:
        """[batch * pages, num_kv_heads, 64, slot_bytes]"""
        return self.packed.flatten(0, 1)

    def exact_blocks(self) -> ExactBlocks | None:
        if self.exact is None:
            return None
        return ExactBlocks(self.exact, self.window.residual_tokens, self.window.sink_tokens)

    @torch.inference_mode(False)
    def _reserve(self, pages: int) -> None:
        more = pages - self.packed.shape[1]
        if more > 0:
            batch, _, *page = self.packed.shape
            self.packed = torch.cat((self.packed, self.packed.new_zeros(batch, more, *page)), 1)
            self.graph.pages_grew()

    def _write(self, step: Step, key: torch.Tensor, value: torch.Tensor) -> None:
        """Args: key, value [tokens, num_kv_heads, head_size] in the step's order"""
        on = step.on(self.device)
        if self.device.type == "cpu":
            store = cpu_kernels(self.format).store
        else:
            from ..attention.kernels.store import store as gpu_store

            store = functools.partial(gpu_store, self.format)
        exact = self.exact_blocks()
        store(self.pages(), key, value, on["slots"], self.key_frame, exact, on["exact_slots"] if exact else None)

    # --- without fused attention -------------------------------------------------------------------------------------

    def _decode(self, row: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens first .. end of a row as their packed slots have them: [num_kv_heads, n, head_size] of the model's
        dtype."""
        pages, rows = self.pages(), self.packed.shape[1]
        if self.device.type == "cpu":
            kernels, table = cpu_kernels(self.format), torch.arange(row * rows, (row + 1) * rows, dtype=torch.int32)
            parts = []
            start = first // SUB_PAGE_TOKENS * SUB_PAGE_TOKENS
            for at in range(start, end, SEGMENT_TOKENS):
                n = min(SEGMENT_TOKENS, end - at)
                rotated = kernels.dequantize(pages, table, end, at, n, torch.float32)
                parts.append([x @ rotation_matrix(self.format.head_size) for x in rotated])
            keys, values = (torch.cat(x, 1)[:, first - start :] for x in zip(*parts, strict=True))
        else:
            slots = torch.arange(first, end, device=self.device) + row * rows * SUB_PAGE_TOKENS
            keys, values = (unrotate(x).float().transpose(0, 1) for x in reference.gather(self.format, pages, slots))
        if self.key_frame is not None:
            centre, _, inverse = (x[:, None] for x in self.key_frame.unbind(1))
            keys = keys * inverse + centre
        return keys.to(self.dtype), values.to(self.dtype)

    def _decode_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every position, [batch, num_kv_heads, positions, head_size]: exact ones from their blocks."""
        rows, head_size = self.rows, self.format.head_size
        shape = (rows.batch, self.num_kv_heads, rows.length, head_size)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
        for row, length in enumerate(rows.lens):
            if not length:
                continue
            decoded = self._decode(row, 0, length)
            if self.exact is not None:
                position = rows.exact_positions(row)
                block = position // EXACT_BLOCK
                data = self.exact[self.window.block_ids(torch.tensor(row), block).to(self.device), :, position % EXACT_BLOCK]
                for x, exact in zip(decoded, data.split(head_size, -1), strict=True):
                    x[:, position] = exact.transpose(0, 1)
            at = rows.positions(row)
            keys[row][:, at], values[row][:, at] = decoded
        return keys, values

    def _rebuild(self) -> None:
        """Buffers of what is held so far."""
        self._keys, self._values = self._decode_all()
        self._decoded_until = [max(0, n - self.window.kept) for n in self.rows.lens]

    def _leave_window(self) -> None:
        """From now on tokens before the window are read as packed, but for the sinks."""
        for row, length in enumerate(self.rows.lens):
            start = length - self.window.kept
            first = max(self._decoded_until[row], self.window.sink_tokens)
            if start > first:
                at = self.rows.positions(row)
                at = slice(first, start) if isinstance(at, slice) else at[first:start]
                self._keys[row][:, at], self._values[row][:, at] = self._decode(row, first, start)
            self._decoded_until[row] = max(self._decoded_until[row], start)

    def _extend_buffers(self, step: Step, key: torch.Tensor, value: torch.Tensor) -> None:
        begin, end = step.before.length, step.after.length
        have = self._keys.shape[2]
        if end > have:
            # an eighth more than what is there: what is held stays near what is used, and the history is copied a number of
            # times that grows with its logarithm
            room = (*self._keys.shape[:2], max(end - have, have // 8, _BUFFER_GROWTH), self._keys.shape[3])
            self._keys, self._values = (torch.cat((x, x.new_zeros(room)), 2) for x in (self._keys, self._values))
        self._keys[:, :, begin:end], self._values[:, :, begin:end] = key, value

    # --- report ------------------------------------------------------------------------------------------------------

    @property
    def buffer_bytes(self) -> int:
        return 0 if self._keys is None else self._keys.nbytes + self._values.nbytes


def _tokens(x: torch.Tensor, step: Step) -> torch.Tensor:
    """[batch, heads, n, head_size] -> [tokens, heads, head_size] in the step's order."""
    batch, heads, n, head_size = x.shape
    x = x.transpose(1, 2).reshape(batch * n, heads, head_size)
    return x if step.tokens is None else x[step.on(x.device)["tokens"]]
