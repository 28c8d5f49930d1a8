"""Refuses what the backend cannot serve in the process that parses vLLM's arguments, before any worker starts."""

from __future__ import annotations

import functools

from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError

_LEAVE_OUT = "leave out --attention-backend to serve it with vLLM's default backend"


def install(name: str) -> None:
    """Run check_engine after the platform's own check of every VllmConfig that asks for backend `name`. Idempotent."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    stock = platform.check_and_update_config.__func__
    if getattr(stock, "powerquant", False):
        return

    @functools.wraps(stock)
    def check_and_update_config(cls, vllm_config):
        stock(cls, vllm_config)
        if getattr(vllm_config.attention_config.backend, "name", None) == name:
            check_engine(vllm_config)

    check_and_update_config.powerquant = True
    platform.check_and_update_config = classmethod(check_and_update_config)


def check_engine(vllm_config) -> None:
    """Raises PowerQuantConfigError or PowerQuantUnsupportedError naming what was asked for and what to do instead."""
    from vllm.platforms import current_platform

    from .kernels.cpu_build import build
    from .layout import SUB_PAGE_TOKENS
    from .rotation import check_head_size
    from .vllm_backend import config_of

    config = config_of(vllm_config)
    if not current_platform.is_cpu():
        raise PowerQuantUnsupportedError(
            f"POWERQUANT runs on vLLM's CPU build only, this is {current_platform.device_name}; {_LEAVE_OUT}"
        )
    cache = vllm_config.cache_config
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        raise PowerQuantUnsupportedError(
            f"--kv-cache-dtype must be auto, float16 or bfloat16 with POWERQUANT, which packs the cache itself, "
            f"got {cache.cache_dtype}"
        )
    if cache.block_size is not None and cache.block_size % SUB_PAGE_TOKENS:
        raise PowerQuantConfigError(
            f"--block-size must be a multiple of {SUB_PAGE_TOKENS} with POWERQUANT, got {cache.block_size}"
        )
    exact = config.residual_tokens or config.sink_tokens
    switch_off = "set POWERQUANT_RESIDUAL_TOKENS=0 and POWERQUANT_SINK_TOKENS=0"
    if exact and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise PowerQuantConfigError(
            f"residual and sink tokens need the hybrid KV cache manager; leave out --disable-hybrid-kv-cache-manager, "
            f"or {switch_off}"
        )
    if vllm_config.kv_transfer_config is not None:
        raise PowerQuantUnsupportedError(f"POWERQUANT has no KV connectors; leave out --kv-transfer-config or {_LEAVE_OUT}")
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise PowerQuantUnsupportedError("POWERQUANT has no context parallelism; leave out -dcp and -pcp")
    model = vllm_config.model_config
    if model is not None:
        _check_model(model)
        check_head_size(model.get_head_size())
        _log_cache(vllm_config, config)
    build()


def _check_model(model) -> None:
    text = model.hf_text_config
    if model.use_mla:
        raise PowerQuantUnsupportedError(
            f"POWERQUANT has no multi-head latent attention (MLA), which {model.model} uses; {_LEAVE_OUT}"
        )
    window = model.get_sliding_window()
    layer_types = getattr(text, "layer_types", None) or ()
    if window is not None and (not layer_types or "sliding_attention" in layer_types):
        raise PowerQuantUnsupportedError(
            f"POWERQUANT has no sliding window, {model.model} has one of {window} tokens; {_LEAVE_OUT}"
        )
    soft_cap = getattr(text, "attn_logit_softcapping", None)
    if soft_cap:
        raise PowerQuantUnsupportedError(f"POWERQUANT has no logits soft cap, {model.model} has {soft_cap}; {_LEAVE_OUT}")
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        raise PowerQuantUnsupportedError(f"POWERQUANT has no ALiBi, which {model.model} uses; {_LEAVE_OUT}")
    if text.model_type == "gpt_oss":
        raise PowerQuantUnsupportedError(
            f"POWERQUANT has no attention sinks (learned sink logits), which {model.model} uses; {_LEAVE_OUT}"
        )


def _log_cache(vllm_config, config) -> None:
    from vllm.logger import init_logger

    from .cache_format import CacheFormat

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    head_size, layers = model.get_head_size(), model.get_num_layers(parallel)
    heads = model.get_num_kv_heads(parallel)
    slot = CacheFormat(head_size, config.key_bits, config.value_bits).layout.slot_bytes
    plain = 2 * head_size * model.dtype.itemsize
    protected = min(layers, 2 * config.protected_layers)
    packed = heads * ((layers - protected) * slot + protected * plain)
    init_logger("vllm.powerquant").info_once(
        "POWERQUANT: keys %d bits, values %d bits, last %d and first %d tokens of a request exact, %d protected layers; "
        "%d bytes a token, %.2f times less than %s",
        config.key_bits,
        config.value_bits,
        config.residual_tokens,
        config.sink_tokens,
        protected,
        packed,
        heads * layers * plain / packed,
        str(model.dtype).removeprefix("torch."),
    )
