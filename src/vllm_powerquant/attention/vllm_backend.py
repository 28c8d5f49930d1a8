"""The POWERQUANT attention backend of vLLM: backend classes, metadata builder and attention implementation.

Packed pages keep vLLM's logical shape [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; what the bytes of a page
mean is layout.py's. Three classes answer to the one registered name, one for each kind of cache tensor: packed pages, bf16
pages of protected layers, and the exact blocks of residual.py.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ..calibration import load_calibration
from ..config import PowerQuantConfig
from ..errors import PowerQuantUnsupportedError
from .cache_format import CacheFormat
from .kernels.cpu_kernels import BatchPlan, CpuKernels, ExactBlocks
from .layout import SUB_PAGE_TOKENS
from .residual import ExactCache
from .rotation import SUPPORTED_HEAD_SIZES, check_head_size

if TYPE_CHECKING:
    from .kernels.gpu_kernels import GpuKernels
    from .kernels.prefill import Workspace
    from .kernels.step import StepPlan

logger = init_logger(__name__)

EVERY_TOKEN = 2**31 - 1


def config_of(vllm_config: VllmConfig) -> PowerQuantConfig:
    """This engine's options, from the environment and vLLM's --additional-config. Raises PowerQuantConfigError."""
    additional = vllm_config.additional_config
    return PowerQuantConfig.from_sources(os.environ, additional.get("powerquant") if isinstance(additional, dict) else None)


class PowerQuantBackend(AttentionBackend):
    """What vLLM asks a backend for; the spec of a layer is decided by the subclasses below."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "POWERQUANT"

    @staticmethod
    def get_impl_cls() -> type[PowerQuantImpl]:
        return PowerQuantImpl

    @staticmethod
    def get_builder_cls() -> type[PowerQuantMetadataBuilder]:
        return PowerQuantMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(SUB_PAGE_TOKENS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple:
        # block outermost, so that packed pages need no padding to the size of exact ones beside them in the pool; heads
        # before tokens, so that a kv head's page is contiguous
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_combination(cls, head_size, *args, **kwargs) -> str | None:
        if head_size not in SUPPORTED_HEAD_SIZES:
            return f"head_size {head_size} is not one of {', '.join(map(str, SUPPORTED_HEAD_SIZES))}"
        return None

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


@functools.cache
def packed_backend(config: PowerQuantConfig) -> type[PowerQuantBackend]:
    """Backend class of layers whose pages are packed with these options."""

    class PackedBackend(PowerQuantBackend):
        @classmethod
        def customize_spec(cls, spec):
            # vLLM calls this hook temporary; everything that depends on it is here
            if spec.state_content_bytes is not None:
                return spec
            layout = CacheFormat.of(config, spec.head_size).layout
            return replace(spec, dtype=torch.uint8, state_content_bytes=layout.slot_bytes)

    return PackedBackend


class ProtectedBackend(PowerQuantBackend):
    """Layers kept in the model's own dtype."""

    @classmethod
    def customize_spec(cls, spec):
        return spec


class ExactBackend(PowerQuantBackend):
    """The exact blocks of a packed layer."""

    @staticmethod
    def get_builder_cls() -> type[ExactMetadataBuilder]:
        return ExactMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(1)]

    @classmethod
    def customize_spec(cls, spec):
        return spec


@dataclass
class PowerQuantMetadata(AttentionMetadata):
    """One step's batch; exact blocks have one of their own with their block table and no plan."""

    num_actual_tokens: int
    plan: BatchPlan | StepPlan | None
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32


class PowerQuantMetadataBuilder(AttentionMetadataBuilder[PowerQuantMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type != "cpu":
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
            self._workspace = _workspace(vllm_config, device, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER if current_platform.is_cpu() else AttentionCGSupport.UNIFORM_BATCH

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> PowerQuantMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise PowerQuantUnsupportedError(
                "POWERQUANT attends causally only; leave out --attention-backend for this model"
            )
        return PowerQuantMetadata(
            num_actual_tokens=common.num_actual_tokens, plan=self._plan(common), block_table=common.block_table_tensor
        )

    def _plan(self, common) -> BatchPlan | StepPlan | None:
        if self.device.type == "cpu":
            return BatchPlan.of(common.query_start_loc, common.seq_lens, common.max_query_len)
        from .kernels.step import StepPlan

        upper = common.seq_lens_cpu_upper_bound
        return StepPlan.of(
            common.query_start_loc,
            common.seq_lens,
            common.query_start_loc_cpu.diff().tolist(),
            [common.max_seq_len] * common.num_reqs if upper is None else upper.tolist(),
            self.reorder_batch_threshold,
            self._workspace,
            # while a graph is captured this is the model's longest, and the bound the dummy batch's
            common.max_seq_len,
        )


class ExactMetadataBuilder(PowerQuantMetadataBuilder):
    """Of exact blocks, whose layers are attended with their packed layer: the block table is all there is."""

    def _plan(self, common) -> None:
        return None


def _workspace(vllm_config: VllmConfig, device: torch.device, num_kv_heads: int, head_size: int) -> Workspace:
    """Where chunks of layers of a shape are attended on a GPU; made when weights are loaded, before vLLM measures memory."""
    from .kernels.prefill import Workspace

    return Workspace.of(num_kv_heads, head_size, vllm_config.model_config.dtype, device)


class PowerQuantImpl(AttentionImpl):
    """Attention of one layer. Decides in process_weights_after_loading, once the layer is known, how it keeps its cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **features,
    ) -> None:
        check_head_size(head_size)
        for name, value in (
            ("ALiBi", alibi_slopes),
            ("sliding window", sliding_window),
            ("logits soft cap", logits_soft_cap or None),
            ("attention sinks (learned sink logits)", sinks),
            ("KV sharing between layers", kv_sharing_target_layer_name),
            *features.items(),
        ):
            if value is not None:
                raise PowerQuantUnsupportedError(f"POWERQUANT has no {name}; leave out --attention-backend for this model")
        if attn_type != AttentionType.DECODER:
            raise PowerQuantUnsupportedError(
                f"POWERQUANT serves decoder attention, this layer is {attn_type}; leave out --attention-backend"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._vllm_config = get_current_vllm_config()
        self.config = config_of(self._vllm_config)
        self.exact_layer: ExactCache | None = None
        self.is_protected = False
        self._is_decided = False
        self.key_frame: torch.Tensor | None = None  # [num_kv_heads, 3, head_size] fp32
        self.kernels = self._make_kernels(CacheFormat.of(self.config, head_size))

    def _make_kernels(self, cache_format: CacheFormat) -> CpuKernels | GpuKernels:
        if current_platform.is_cpu():
            return CpuKernels(cache_format)
        from .kernels.gpu_kernels import GpuKernels

        speculative = self._vllm_config.speculative_config
        queries = 1 + (speculative.num_speculative_tokens if speculative else 0)
        device = torch.device(current_platform.device_type, torch.accelerator.current_device_index())
        # a CUDA graph's batch is padded to the size it was captured with
        most = self._vllm_config.scheduler_config.max_num_seqs
        most = max(most, self._vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        dtype = self._vllm_config.model_config.dtype
        return GpuKernels.of(cache_format, self.num_heads, self.num_kv_heads, most, device, dtype, queries)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called for every layer before vLLM asks for its cache's spec, and again when weights are reloaded."""
        if self._is_decided:
            return
        self._is_decided = True
        layers = self._vllm_config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        if layer.attn_backend is not PowerQuantBackend:
            # chunked-local, static-sink and prefix-LM layers wrap the backend in one of their own
            raise PowerQuantUnsupportedError(
                f"POWERQUANT serves plain causal attention, {name} is {type(layer).__name__}; leave out --attention-backend"
            )
        index = extract_layer_index(name)
        num_layers = self._vllm_config.model_config.get_total_num_hidden_layers()
        protect = self.config.protected_layers
        self.is_protected = index < protect or index >= num_layers - protect
        if self.is_protected:
            layer.attn_backend = ProtectedBackend
            if not current_platform.is_cpu():
                self.kernels.warm_up_protected(act_dtype, self._vllm_config.cache_config.block_size)
            return
        layer.attn_backend = packed_backend(self.config)
        if self.config.calibration:
            self.key_frame = self._frame_of(index)
        keeps_exact = bool(self.config.residual_tokens or self.config.sink_tokens)
        if current_platform.is_cpu():
            self.kernels.workspace(self.num_kv_heads, self._vllm_config.model_config.dtype)
        else:
            self.kernels.warm_up(
                _workspace(self._vllm_config, self.kernels.device, self.num_kv_heads, self.head_size),
                self._vllm_config.cache_config.block_size,
                self.config.residual_block_size if keeps_exact else None,
                (self.config.residual_tokens, self.config.sink_tokens),
                self.key_frame,
            )
        if keeps_exact:
            self.exact_layer = ExactCache(
                f"{name}.exact", ExactBackend, self.num_kv_heads, self.head_size, self.config, self._vllm_config
            )

    def _frame_of(self, index: int) -> torch.Tensor:
        """The frame of a layer's kv heads that this rank has."""
        every = load_calibration(self.config.calibration).keys.frames()[index]
        # vLLM gives each rank consecutive heads, or, where there are fewer heads than ranks, several ranks the same one
        ranks = self._vllm_config.parallel_config.tensor_parallel_size
        first = get_tensor_model_parallel_rank() * len(every) // ranks
        frame = every[first : first + self.num_kv_heads].to("cpu" if current_platform.is_cpu() else self.kernels.device)
        if len(frame) != self.num_kv_heads:
            raise PowerQuantUnsupportedError(
                f"this rank has {self.num_kv_heads} kv heads from {first} on, the calibration {len(every)}; leave it out"
            )
        return frame

    def _exact_blocks(self) -> ExactBlocks | None:
        if self.exact_layer is None or not self.exact_layer.kv_cache.numel():
            return None
        return ExactBlocks(self.exact_layer.kv_cache, self.config.residual_tokens, self.config.sink_tokens)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Write the step's tokens packed and, where they have an exact block, exactly.

        Args: key, value [num_tokens, num_kv_heads, head_size]; slot_mapping [num_actual_tokens] int64, -1 = padding
        """
        if not kv_cache.numel():
            return
        if self.is_protected:
            exact = ExactBlocks(kv_cache, 0, EVERY_TOKEN)
            self.kernels.store(None, key, value, None, exact=exact, exact_slot_mapping=slot_mapping)
            return
        exact = self._exact_blocks()
        exact_slots = get_forward_context().slot_mapping[self.exact_layer.name] if exact else None
        self.kernels.store(
            kv_cache,
            key,
            value,
            slot_mapping,
            self.key_frame,
            exact,
            exact_slots[: len(slot_mapping)] if exact else None,
        )

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PowerQuantMetadata | None,
        output: torch.Tensor | None = None,
        output_scale=None,
        output_block_scale=None,
    ) -> torch.Tensor:
        """Attention of a mixed batch.

        Args:    query [num_tokens, num_heads, head_size]; key, value [num_tokens, num_kv_heads, head_size]; kv_cache
                 [num_blocks, num_kv_heads, block_size, slot_bytes] uint8, protected layers [.., 2 * head_size] of the
                 model's dtype
        Returns: output [num_tokens, num_heads, head_size], written in place; zeros while memory is profiled
        """
        if output_scale is not None or output_block_scale is not None:
            raise PowerQuantUnsupportedError("POWERQUANT has no fused output quantization; switch that fusion off")
        if attn_metadata is None or not kv_cache.numel():
            return output.zero_()
        batch = attn_metadata
        shape = (-1, self.num_heads, self.head_size)
        if self.is_protected:
            cache, exact, exact_table = None, ExactBlocks(kv_cache, 0, EVERY_TOKEN), batch.block_table
        else:
            cache, exact, exact_table = kv_cache, self._exact_blocks(), None
            if exact:
                exact_table = get_forward_context().attn_metadata[self.exact_layer.name].block_table
        self.kernels.attend(
            query.view(shape),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            output.view(shape),
            cache,
            batch.plan,
            batch.block_table,
            self.scale,
            self.key_frame,
            exact,
            exact_table,
        )
        return output
