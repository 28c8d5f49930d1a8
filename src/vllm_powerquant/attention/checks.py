"""Refuses what the backend cannot serve in the process that parses vLLM's arguments, before any other is started.

The checks wrap EngineArgs.create_engine_config, which every entry point calls first, and not the platform's own check:
that one runs inside pydantic, which hides the message of a ValueError above a line of its own.
"""

from __future__ import annotations

import difflib
import functools
import multiprocessing

from ..config import options
from ..errors import PowerQuantConfigError, PowerQuantUnsupportedError

_LEAVE_OUT = "leave out --attention-backend to serve it with vLLM's default backend"
DEFAULT_BLOCK_SIZE = 128
# Methods that draft without attention layers of their own.
_DRAFTERS = ("ngram", "suffix")


def install(name: str) -> None:
    """Check every engine configuration that asks for backend `name`. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config
    if getattr(stock, "powerquant", False):
        return

    @functools.wraps(stock)
    def create_engine_config(self, *args, **kwargs):
        asked = _asks_for(name, self.attention_backend, self.attention_config)
        check_additional_config(self.additional_config, asked)
        if asked:
            check_arguments(self)
            if self.block_size is None:
                # vLLM's own choice would be the smallest size that packed and exact blocks share
                self.block_size = DEFAULT_BLOCK_SIZE
        vllm_config = stock(self, *args, **kwargs)
        speculative = vllm_config.speculative_config
        drafter = speculative.attention_backend if speculative else None
        if _asks_for(name, drafter, vllm_config.attention_config):
            check_engine(vllm_config)
        return vllm_config

    create_engine_config.powerquant = True
    EngineArgs.create_engine_config = create_engine_config


def _asks_for(name: str, backend, attention_config) -> bool:
    given = [backend, attention_config.backend, *attention_config.backend_per_kind.values()]
    return name in [str(getattr(one, "name", one)).upper() for one in given]


def check_additional_config(additional, asked: bool) -> None:
    """Raises PowerQuantConfigError if an option in --additional-config would have no effect."""
    if not isinstance(additional, dict):
        return
    fields = [option.field for option in options()]
    for key in additional:
        if key in fields:
            raise PowerQuantConfigError(
                f'{key} in --additional-config must be inside "powerquant": --additional-config \'{{"powerquant": '
                f'{{"{key}": {additional[key]}}}}}\''
            )
        if key != "powerquant" and difflib.get_close_matches(str(key).lower(), ["powerquant"], cutoff=0.8):
            raise PowerQuantConfigError(f'unknown name in --additional-config: {key} (did you mean "powerquant"?)')
    if "powerquant" in additional and not asked:
        raise PowerQuantConfigError(
            '--additional-config has "powerquant" options, but another attention backend is asked for; '
            "add --attention-backend POWERQUANT or leave the options out"
        )


def check_arguments(engine_args) -> None:
    """What vLLM's own, longer-winded checks would otherwise answer first; raises as check_engine."""
    from .vllm_backend import config_of

    config_of(engine_args)
    for flag, size in (
        ("--decode-context-parallel-size", engine_args.decode_context_parallel_size),
        ("--prefill-context-parallel-size", engine_args.prefill_context_parallel_size),
    ):
        if size and size > 1:
            raise PowerQuantUnsupportedError(f"POWERQUANT has no context parallelism, got {flag} {size}; leave {flag} out")
    if engine_args.enable_sleep_mode:
        raise PowerQuantUnsupportedError(
            "POWERQUANT has no sleep mode, which drops its rotation tables with the weights, got --enable-sleep-mode; "
            "leave --enable-sleep-mode out"
        )
    # the layers of a step share buffers, which two half-batches in flight at once would overwrite
    if engine_args.enable_dbo or engine_args.ubatch_size > 1:
        flag = "--enable-dbo" if engine_args.enable_dbo else f"--ubatch-size {engine_args.ubatch_size}"
        raise PowerQuantUnsupportedError(f"POWERQUANT has no batches in two halves, got {flag}; leave {flag} out")


def check_engine(vllm_config) -> None:
    """Raises PowerQuantConfigError or PowerQuantUnsupportedError naming what was asked for and what to do instead."""
    from vllm.platforms import current_platform

    from .rotation import check_head_size
    from .vllm_backend import config_of

    config = config_of(vllm_config)
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        raise PowerQuantUnsupportedError(
            f"POWERQUANT runs on NVIDIA and AMD GPUs and on CPUs, this is {current_platform.device_name}; {_LEAVE_OUT}"
        )
    _check_backends(vllm_config)
    _check_model(vllm_config.model_config)
    check_head_size(vllm_config.model_config.get_head_size())
    _check_cache(vllm_config, config)
    if config.calibration:
        from ..calibration import load_calibration

        load_calibration(config.calibration).check(vllm_config.model_config.hf_text_config, config.calibration)
    if current_platform.is_cpu():
        from .kernels.cpu_build import build

        build()
    # processes that vLLM starts may make the configuration once more
    if multiprocessing.parent_process() is None:
        _log_cache(vllm_config.model_config, config)


def _check_backends(vllm_config) -> None:
    import vllm.envs as envs

    attention, speculative = vllm_config.attention_config, vllm_config.speculative_config
    if attention.backend_per_kind:
        kinds = ", ".join(f"{kind}: {backend.name}" for kind, backend in attention.backend_per_kind.items())
        raise PowerQuantUnsupportedError(
            f"POWERQUANT serves every layer of a model or none, as other backends lay out the cache's memory differently, "
            f"got backend_per_kind {kinds}; leave out backend_per_kind and use --attention-backend POWERQUANT"
        )
    if speculative is not None and speculative.method not in _DRAFTERS:
        raise PowerQuantUnsupportedError(
            f"with POWERQUANT the method of --speculative-config must be {' or '.join(_DRAFTERS)}, which need no attention "
            f"layers of their own, got {speculative.method}; change the method or leave out --speculative-config"
        )
    if speculative is not None and speculative.attention_backend is not None:
        raise PowerQuantUnsupportedError(
            f"attention_backend in --speculative-config has no layers to serve with method {speculative.method}, got "
            f"{speculative.attention_backend.name}; leave it out"
        )
    if attention.use_non_causal:
        raise PowerQuantUnsupportedError("POWERQUANT has causal attention only, got use_non_causal; leave it out")
    if envs.VLLM_BATCH_INVARIANT:
        raise PowerQuantUnsupportedError("POWERQUANT has no batch-invariant mode, got VLLM_BATCH_INVARIANT; unset it")
    if (envs.VLLM_KV_CACHE_LAYOUT or "BLHNC") != "BLHNC":
        raise PowerQuantUnsupportedError(
            f"VLLM_KV_CACHE_LAYOUT must be BLHNC with POWERQUANT, got {envs.VLLM_KV_CACHE_LAYOUT}; unset it"
        )


def _check_model(model) -> None:
    for feature, got in _unsupported_features(model):
        if got:
            raise PowerQuantUnsupportedError(f"POWERQUANT has no {feature}, which {model.model} uses ({got}); {_LEAVE_OUT}")
    window = _sliding_window(model.hf_text_config)
    if window:
        raise PowerQuantUnsupportedError(
            f"POWERQUANT has no sliding window, which {model.model} uses ({window} tokens); {_LEAVE_OUT}, or add "
            "--disable-sliding-window, which limits the context to the window"
        )


def _unsupported_features(model):
    """(feature, how the model shows it or a false value if it does not) of what a layer may ask of a backend."""
    text = model.hf_text_config
    kind = f"model_type {text.model_type}"
    yield "multi-head latent attention (MLA)", model.use_mla and kind
    yield "encoder or cross-attention", model.attn_type in ("encoder_only", "encoder_decoder") and model.attn_type
    yield "recurrent layers (Mamba, linear attention)", (model.is_hybrid or model.has_inner_state) and kind
    yield "diffusion models", model.is_diffusion and kind
    yield "bidirectional attention over images", model.is_mm_prefix_lm and f"model_type {model.hf_config.model_type}"
    yield "bidirectional attention over prompts", text.model_type == "hrm_text" and kind
    yield "dual chunk attention", getattr(model.hf_config, "dual_chunk_attention_config", None) and kind
    yield "ALiBi", model.uses_alibi and kind
    yield "attention sinks (learned sink logits)", _has_sinks(text) and kind
    soft_cap = getattr(text, "attn_logit_softcapping", None)
    yield "soft cap of attention logits", soft_cap and f"attn_logit_softcapping {soft_cap}"
    shared = getattr(text, "num_kv_shared_layers", None)
    yield "KV sharing between layers", shared and f"num_kv_shared_layers {shared}"
    chunk = model.attention_chunk_size or model.rswa_window
    yield "chunked local attention", chunk and f"{chunk} tokens"


def _has_sinks(text) -> bool:
    if text.model_type in ("granite", "granitemoe"):
        return getattr(text, "attention_sinks", getattr(text, "layer_types", None) is not None)
    names = ("add_swa_attention_sink_bias", "swa_attention_sink_enabled", "param_sink_number")
    return text.model_type in ("gpt_oss", "openai_privacy_filter") or any(getattr(text, name, None) for name in names)


def _sliding_window(text) -> int | None:
    """Tokens of the model's narrowest sliding window, None without any."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types and not any("sliding" in str(layer_type) for layer_type in layer_types):
        return None
    windows = []
    for name in ("sliding_window", "sliding_window_size", "sliding_windows", "interleaved_sliding_window"):
        given = getattr(text, name, None)
        windows += given if isinstance(given, list | tuple) else [given]
    return min((window for window in windows if window and window > 0), default=None)


def _check_cache(vllm_config, config) -> None:
    from .layout import SUB_PAGE_TOKENS

    cache = vllm_config.cache_config
    allowed = ("auto", "float16", "bfloat16")
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    if cache.cache_dtype not in allowed or (scheme is not None and cache.cache_dtype == "auto"):
        asked = cache.cache_dtype if scheme is None else "fp8 (the checkpoint's kv_cache_scheme)"
        raise PowerQuantUnsupportedError(
            f"--kv-cache-dtype must be {', '.join(allowed[:-1])} or {allowed[-1]} with POWERQUANT, which packs the cache "
            f"itself, got {asked}; use --kv-cache-dtype bfloat16"
        )
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if config.protected_layers and cache.cache_dtype not in ("auto", model_dtype):
        raise PowerQuantConfigError(
            f"protected layers keep their cache in the model's own type, {model_dtype}, got --kv-cache-dtype "
            f"{cache.cache_dtype}; leave that out, or set POWERQUANT_PROTECTED_LAYERS=0"
        )
    if cache.kv_cache_dtype_skip_layers:
        raise PowerQuantUnsupportedError(
            f"POWERQUANT has no --kv-cache-dtype-skip-layers, got {' '.join(cache.kv_cache_dtype_skip_layers)}; "
            "use POWERQUANT_PROTECTED_LAYERS to leave the first and last layers uncompressed"
        )
    if cache.block_size % SUB_PAGE_TOKENS:
        raise PowerQuantConfigError(
            f"--block-size must be a multiple of {SUB_PAGE_TOKENS} with POWERQUANT, got {cache.block_size}; "
            "use 128 or leave it out"
        )
    exact = config.residual_tokens or config.sink_tokens
    if vllm_config.kv_transfer_config is not None:
        flag = "--kv-transfer-config" if cache.kv_offloading_size is None else "--kv-offloading-size"
        connector = vllm_config.kv_transfer_config.kv_connector
        raise PowerQuantUnsupportedError(f"POWERQUANT has no KV connectors, got {connector}; leave out {flag}")
    if exact and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise PowerQuantConfigError(
            f"the {config.residual_tokens} residual and {config.sink_tokens} sink tokens need the hybrid KV cache manager, "
            "got --disable-hybrid-kv-cache-manager; leave that out, or set POWERQUANT_RESIDUAL_TOKENS=0 and "
            "POWERQUANT_SINK_TOKENS=0"
        )


def _log_cache(model, config) -> None:
    """One line for each start: the options, and the size of a token against a bf16 cache, all layers and ranks."""
    from vllm.logger import init_logger

    from .cache_format import CacheFormat

    head_size, layers, heads = model.get_head_size(), model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()
    cache_format = CacheFormat.of(config, head_size)
    slot = cache_format.layout.slot_bytes
    protected = min(layers, 2 * config.protected_layers)
    packed = heads * ((layers - protected) * slot + protected * 2 * head_size * model.dtype.itemsize)
    bf16 = heads * layers * 2 * head_size * 2
    init_logger("vllm.powerquant").info(
        "POWERQUANT: keys %d bits, values %d bits (%s), last %d and first %d tokens of a request exact, "
        "%d protected layers, %s; %d bytes a token, %.2f times less than bf16 (%d)",
        config.key_bits,
        config.value_bits,
        cache_format.value_codec,
        config.residual_tokens,
        config.sink_tokens,
        protected,
        f"calibrated by {config.calibration}" if config.calibration else "not calibrated",
        packed,
        bf16 / packed,
        bf16,
    )
