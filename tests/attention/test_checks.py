"""What the parent process refuses and accepts before it starts an engine, on models that are only a config.json."""

import json
import logging

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

pytestmark = pytest.mark.vllm

_DECODER = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}
_ENCODER_DECODER = {
    "vocab_size": 51866,
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "torch_dtype": "bfloat16",
}
_GEMMA = {"sliding_window": 128, "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh"}
_FULL = ["full_attention", "full_attention"]
_MIXED = ["sliding_attention", "full_attention"]
_KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def decoder(architecture: str, model_type: str, **config) -> dict:
    return {**_DECODER, "architectures": [architecture], "model_type": model_type, **config}


def other(architecture: str, model_type: str, **config) -> dict:
    """A model whose config has other names for its sizes."""
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **config}


LLAMA = decoder("LlamaForCausalLM", "llama")
MISTRAL_WINDOW = decoder("MistralForCausalLM", "mistral", sliding_window=128)
GEMMA3 = decoder("Gemma3ForCausalLM", "gemma3_text", **_GEMMA, layer_types=_MIXED)
FP8_CHECKPOINT = decoder(
    "LlamaForCausalLM",
    "llama",
    quantization_config={
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "kv_cache_scheme": _KV_CACHE_SCHEME,
        "config_groups": {},
        "ignore": [],
    },
)
PALIGEMMA = other(
    "PaliGemmaForConditionalGeneration",
    "paligemma",
    text_config={**_DECODER, "model_type": "gemma"},
    vision_config={"model_type": "siglip_vision_model", "hidden_size": 64, "image_size": 56, "patch_size": 14},
    projection_dim=256,
)
SIZES_OF_BERT = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}

ACCEPTED_MODELS = {
    "llama": LLAMA,
    "qwen2-window-off": decoder("Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=128),
    "qwen3": decoder("Qwen3ForCausalLM", "qwen3", head_dim=128),
    "phi3": decoder("Phi3ForCausalLM", "phi3", pad_token_id=0),
    "mistral": decoder("MistralForCausalLM", "mistral", sliding_window=None),
    "mixtral": decoder("MixtralForCausalLM", "mixtral", num_local_experts=4),
    "gemma": decoder("GemmaForCausalLM", "gemma", head_dim=256),
    "gemma3-full-layers": decoder("Gemma3ForCausalLM", "gemma3_text", **_GEMMA, layer_types=_FULL),
    "granite": decoder("GraniteForCausalLM", "granite"),
    "opt": other("OPTForCausalLM", "opt", **SIZES_OF_BERT, word_embed_proj_dim=256, ffn_dim=256),
    "multimodal": other(
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio",
        text_config={**_DECODER, "model_type": "qwen2"},
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 1},
    ),
    "gpt2": other("GPT2LMHeadModel", "gpt2", vocab_size=512, n_embd=256, n_layer=2, n_head=4),
}

# name: (config, words of the message besides the feature's)
REFUSED_MODELS = {
    "head-size": (decoder("LlamaForCausalLM", "llama", head_dim=48), "head_size must be one of 64, .* got 48"),
    "sliding-window": (MISTRAL_WINDOW, "no sliding window, .*128 tokens"),
    "sliding-window-some-layers": (GEMMA3, "no sliding window, .*128 tokens"),
    "sliding-window-qwen2": (
        decoder("Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=1),
        "no sliding window, .*128 tokens",
    ),
    "soft-cap": (
        decoder("Gemma2ForCausalLM", "gemma2", **_GEMMA, attn_logit_softcapping=50.0, layer_types=_MIXED),
        "no soft cap of attention logits, .*50.0",
    ),
    "alibi-bloom": (other("BloomForCausalLM", "bloom", vocab_size=512, hidden_size=256, n_layer=2, n_head=4), "no ALiBi"),
    "alibi-falcon": (other("FalconForCausalLM", "falcon", **SIZES_OF_BERT, alibi=True), "no ALiBi"),
    "sinks": (
        decoder("GptOssForCausalLM", "gpt_oss", layer_types=_FULL, num_local_experts=4, num_experts_per_tok=2),
        r"no attention sinks \(learned sink logits\)",
    ),
    "sinks-granite": (decoder("GraniteForCausalLM", "granite", layer_types=_FULL), "no attention sinks"),
    "mla": (
        decoder(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            kv_lora_rank=64,
            q_lora_rank=None,
            qk_rope_head_dim=32,
            qk_nope_head_dim=64,
            v_head_dim=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
        ),
        r"no multi-head latent attention \(MLA\)",
    ),
    "kv-sharing": (
        decoder(
            "Gemma3nForCausalLM",
            "gemma3n_text",
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=[*_FULL, *_FULL],
            activation_sparsity_pattern=[0.0] * 4,
        ),
        "no KV sharing between layers, .*num_kv_shared_layers 2",
    ),
    "chunked-local": (
        decoder("Llama4ForCausalLM", "llama4_text", attention_chunk_size=128, num_local_experts=2),
        "no chunked local attention, .*128 tokens",
    ),
    "whisper": (other("WhisperForConditionalGeneration", "whisper", **_ENCODER_DECODER), "no encoder or cross-attention"),
    "bart": (
        other("BartForConditionalGeneration", "bart", **_ENCODER_DECODER, is_encoder_decoder=True),
        "no encoder or cross-attention, .*encoder_decoder",
    ),
    "bert": (other("BertModel", "bert", **SIZES_OF_BERT), "no encoder or cross-attention, .*encoder_only"),
    "mamba-hybrid": (
        decoder("JambaForCausalLM", "jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2),
        "no recurrent layers",
    ),
    "linear-attention-hybrid": (
        decoder("Qwen3NextForCausalLM", "qwen3_next", layer_types=["linear_attention", "full_attention"]),
        "no recurrent layers",
    ),
    "mamba": (other("MambaForCausalLM", "mamba", vocab_size=512, hidden_size=256), "no recurrent layers"),
    "bidirectional-images": (PALIGEMMA, "no bidirectional attention over images, .*paligemma"),
    "fp8-checkpoint": (FP8_CHECKPOINT, "--kv-cache-dtype must be auto, .* kv_cache_scheme.*; use --kv-cache-dtype bfloat16"),
}

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}

# name: (model, arguments)
ACCEPTED_ARGUMENTS = {
    "block-64": (LLAMA, {"block_size": 64}),
    "block-192": (LLAMA, {"block_size": 192}),
    "cache-bfloat16": (LLAMA, {"kv_cache_dtype": "bfloat16"}),
    "fp8-checkpoint-cache-bfloat16": (FP8_CHECKPOINT, {"kv_cache_dtype": "bfloat16"}),
    "float32": (LLAMA, {"dtype": "float32"}),
    "float16": (LLAMA, {"dtype": "float16"}),
    "options": (LLAMA, {"additional_config": {"powerquant": {"key_bits": 3, "residual_tokens": 0}}}),
    "options-of-another-plugin": (LLAMA, {"additional_config": {"another": {"key": 1}}}),
    "no-hybrid-manager-all-packed": (
        LLAMA,
        {
            "disable_hybrid_kv_cache_manager": True,
            "additional_config": {"powerquant": {"residual_tokens": 0, "sink_tokens": 0}},
        },
    ),
    "ngram": (LLAMA, {"speculative_config": NGRAM}),
    "attention-config": (LLAMA, {"attention_backend": None, "attention_config": {"backend": "POWERQUANT"}}),
    "window-off": (MISTRAL_WINDOW, {"disable_sliding_window": True}),
    "window-off-some-layers": (GEMMA3, {"disable_sliding_window": True}),
    "pooling": (LLAMA, {"runner": "pooling"}),
    "bidirectional-images-off": (PALIGEMMA, {"language_model_only": True}),
    "tensor-parallel": (LLAMA, {"tensor_parallel_size": 2}),
    "pipeline-parallel": (LLAMA, {"pipeline_parallel_size": 2}),
    "data-parallel": (LLAMA, {"data_parallel_size": 2}),
    "lora": (LLAMA, {"enable_lora": True}),
}

ONLY_FULL = {"backend_per_kind": {"full_attention": "POWERQUANT"}}

# name: (model, arguments, kind of error, words of the message)
REFUSED_ARGUMENTS = {
    "option-value": (
        LLAMA,
        {"additional_config": {"powerquant": {"value_bits": 5}}},
        PowerQuantConfigError,
        r"value_bits in .* must be 2, 3, 4 or 8, got 5",
    ),
    "option-name": (
        LLAMA,
        {"additional_config": {"powerquant": {"keybits": 3}}},
        PowerQuantConfigError,
        r"keybits \(did you mean key_bits\?\); known: ",
    ),
    "option-outside": (
        LLAMA,
        {"additional_config": {"key_bits": 3}},
        PowerQuantConfigError,
        r"must be inside \"powerquant\": --additional-config '\{\"powerquant\": \{\"key_bits\": 3\}\}'",
    ),
    "options-misnamed": (
        LLAMA,
        {"additional_config": {"power_quant": {"key_bits": 3}}},
        PowerQuantConfigError,
        r"power_quant \(did you mean \"powerquant\"\?\)",
    ),
    "options-without-backend": (
        LLAMA,
        {"attention_backend": None, "additional_config": {"powerquant": {"key_bits": 3}}},
        PowerQuantConfigError,
        "add --attention-backend POWERQUANT or leave the options out",
    ),
    "cache-fp8": (LLAMA, {"kv_cache_dtype": "fp8"}, PowerQuantUnsupportedError, "auto, float16 or bfloat16 .* got fp8"),
    "cache-skip-layers": (
        LLAMA,
        {"kv_cache_dtype_skip_layers": ["0"]},
        PowerQuantUnsupportedError,
        "got 0; use POWERQUANT_PROTECTED_LAYERS",
    ),
    "protected-cache-dtype": (
        LLAMA,
        {"kv_cache_dtype": "float16", "additional_config": {"powerquant": {"protected_layers": 1}}},
        PowerQuantConfigError,
        "the model's own type, bfloat16, got --kv-cache-dtype float16",
    ),
    "block-16": (LLAMA, {"block_size": 16}, PowerQuantConfigError, "--block-size must be a multiple of 64 .* got 16"),
    "block-96": (LLAMA, {"block_size": 96}, PowerQuantConfigError, "--block-size must be a multiple of 64 .* got 96"),
    "no-hybrid-manager": (
        LLAMA,
        {"disable_hybrid_kv_cache_manager": True},
        PowerQuantConfigError,
        "128 residual and 4 sink tokens need the hybrid KV cache manager.*POWERQUANT_RESIDUAL_TOKENS=0",
    ),
    "kv-connector": (
        LLAMA,
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        PowerQuantUnsupportedError,
        "no KV connectors, got ExampleConnector; leave out --kv-transfer-config",
    ),
    "kv-offloading": (
        LLAMA,
        {"kv_offloading_size": 1.0},
        PowerQuantUnsupportedError,
        "no KV connectors, .* leave out --kv-offloading-size",
    ),
    "decode-context-parallel": (
        LLAMA,
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        PowerQuantUnsupportedError,
        "no context parallelism, got --decode-context-parallel-size 2",
    ),
    "sleep-mode": (
        LLAMA,
        {"enable_sleep_mode": True},
        PowerQuantUnsupportedError,
        "no sleep mode, .*got --enable-sleep-mode",
    ),
    "dual-batch-overlap": (
        LLAMA,
        {"enable_dbo": True},
        PowerQuantUnsupportedError,
        "no batches in two halves, got --enable-dbo",
    ),
    "prefill-context-parallel": (
        LLAMA,
        {"prefill_context_parallel_size": 2},
        PowerQuantUnsupportedError,
        "no context parallelism, got --prefill-context-parallel-size 2",
    ),
    "backend-per-kind": (
        GEMMA3,
        {"attention_backend": None, "attention_config": ONLY_FULL},
        PowerQuantUnsupportedError,
        "every layer of a model or none, .* got backend_per_kind full_attention: POWERQUANT",
    ),
    "draft-backend": (
        LLAMA,
        {"attention_backend": None, "speculative_config": {**NGRAM, "attention_backend": "POWERQUANT"}},
        PowerQuantUnsupportedError,
        "attention_backend in --speculative-config .* got POWERQUANT; leave it out",
    ),
}


@pytest.fixture(autouse=True)
def no_other_process(monkeypatch):
    """Inspect models in this process, not in one started for each architecture, and leave no trace in the cache."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    monkeypatch.setattr(registry._LazyRegisteredModel, "_save_modelinfo_to_cache", lambda *args: None)
    monkeypatch.setattr(registry._LazyRegisteredModel, "_load_modelinfo_from_cache", lambda *args: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def create(tmp_path):
    """create(model, **arguments) -> VllmConfig, as LLM() and the API server make it."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    def create(model: dict, **arguments):
        (tmp_path / "config.json").write_text(json.dumps(model))
        if "kv_transfer_config" in arguments:
            arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
        arguments = {"attention_backend": "POWERQUANT", "skip_tokenizer_init": True, **arguments}
        return EngineArgs(model=str(tmp_path), **arguments).create_engine_config()

    return create


@pytest.fixture
def start_up_lines():
    """Messages of the start-up logger."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.powerquant")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def refusal(error: pytest.ExceptionInfo) -> str:
    """The message, which must be one line that says what to do."""
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model", ACCEPTED_MODELS.values(), ids=ACCEPTED_MODELS)
def test_model_is_accepted(create, model):
    assert create(model).attention_config.backend.name == "POWERQUANT"


@pytest.mark.parametrize(("model", "words"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_model_is_refused(create, model, words):
    with pytest.raises(PowerQuantUnsupportedError, match=words) as error:
        create(model)
    assert "vLLM's default backend" in refusal(error) or "use --kv-cache-dtype" in refusal(error)


@pytest.mark.parametrize(("model", "arguments"), ACCEPTED_ARGUMENTS.values(), ids=ACCEPTED_ARGUMENTS)
def test_argument_is_accepted(create, model, arguments):
    assert create(model, **arguments).attention_config.backend.name == "POWERQUANT"


@pytest.mark.parametrize(("model", "arguments", "kind", "words"), REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS)
def test_argument_is_refused(create, model, arguments, kind, words):
    with pytest.raises(kind, match=words) as error:
        create(model, **arguments)
    refusal(error)


def test_draft_model_is_refused(create, tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps(LLAMA))
    speculative = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": 3}
    with pytest.raises(PowerQuantUnsupportedError, match="must be ngram or suffix, .* got draft_model") as error:
        create(LLAMA, speculative_config=speculative)
    refusal(error)


def test_environment_against_additional_config_is_refused(create, monkeypatch):
    monkeypatch.setenv("POWERQUANT_KEY_BITS", "2")
    words = "POWERQUANT_KEY_BITS is 2 but key_bits in .* is 3; give one of them"
    with pytest.raises(PowerQuantConfigError, match=words) as error:
        create(LLAMA, additional_config={"powerquant": {"key_bits": 3}})
    refusal(error)


@pytest.mark.parametrize("name", ["VLLM_BATCH_INVARIANT", "VLLM_KV_CACHE_LAYOUT"])
def test_environment_of_vllm_is_refused(create, monkeypatch, name):
    monkeypatch.setenv(name, {"VLLM_BATCH_INVARIANT": "1", "VLLM_KV_CACHE_LAYOUT": "LBHNC"}[name])
    with pytest.raises(PowerQuantUnsupportedError, match=f"{name}.*; unset it") as error:
        create(LLAMA)
    refusal(error)


def test_other_backends_are_left_alone(create):
    assert create(MISTRAL_WINDOW, attention_backend="CPU_ATTN").attention_config.backend.name == "CPU_ATTN"


def test_window_switched_off_limits_the_context(create):
    assert create(MISTRAL_WINDOW, disable_sliding_window=True).model_config.max_model_len == 128


def test_start_up_line_says_options_and_size(create, start_up_lines):
    """Llama, 2 layers, 2 kv heads of 64: K4/V2 has 52 bytes a slot, bf16 256."""
    create(LLAMA)
    assert start_up_lines == [
        "POWERQUANT: keys 4 bits, values 2 bits (scalar), last 128 and first 4 tokens of a request exact, "
        "0 protected layers, not calibrated; 208 bytes a token, 4.92 times less than bf16 (1024)"
    ]


def test_start_up_line_compares_a_float32_model_with_bf16(create, start_up_lines):
    """First and last layer protected of two: the whole cache stays in float32."""
    create(LLAMA, dtype="float32", additional_config={"powerquant": {"protected_layers": 1}})
    assert start_up_lines == [
        "POWERQUANT: keys 4 bits, values 2 bits (scalar), last 128 and first 4 tokens of a request exact, "
        "2 protected layers, not calibrated; 2048 bytes a token, 0.50 times less than bf16 (1024)"
    ]


def test_start_up_line_comes_from_the_first_process_only(create, start_up_lines, monkeypatch):
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    create(LLAMA)
    assert start_up_lines == []


def test_checks_are_installed_once():
    from vllm.engine.arg_utils import EngineArgs

    from vllm_powerquant import plugin

    plugin.register()
    wrapped = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is wrapped
    assert not hasattr(wrapped.__wrapped__, "__wrapped__")
