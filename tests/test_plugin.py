"""The entry point vLLM calls: registration, the enum member in other processes, errors on the last line of a real start."""

import json
import os
import pickle
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from vllm_powerquant import plugin
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError

pytestmark = pytest.mark.vllm

GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attn_logit_softcapping": 50.0,
    "torch_dtype": "bfloat16",
}


def test_register_is_idempotent():
    from vllm.platforms.cpu import CpuPlatform

    plugin.register()
    member, hook = plugin.backend_member(), CpuPlatform.get_attn_backend_cls.__func__
    plugin.register()
    assert plugin.backend_member() is member
    assert CpuPlatform.get_attn_backend_cls.__func__ is hook


def test_member_names_the_backend_class():
    from vllm_powerquant.attention.vllm_backend import PowerQuantBackend

    assert plugin.backend_member().get_class() is PowerQuantBackend
    assert PowerQuantBackend.get_name() == plugin.NAME


def test_member_unpickles_where_no_plugin_is_loaded():
    data = pickle.dumps(plugin.backend_member())
    code = (
        f"import pickle; member = pickle.loads({data!r});"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "print(member is E.POWERQUANT, member.get_path())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"True {plugin.BACKEND}"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("POWERQUANT_KEY_BITS", "banana", "POWERQUANT_KEY_BITS must be 2, 3, 4 or 8, got 'banana'"),
        ("POWERQUANT_KEYBITS", "4", r"POWERQUANT_KEYBITS \(did you mean POWERQUANT_KEY_BITS\?\)"),
    ],
    ids=["value", "name"],
)
def test_register_refuses_a_bad_environment(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(PowerQuantConfigError, match=words):
        plugin.register()


def select(backend, head_size: int) -> str:
    """What the CPU platform answers for a layer of this head size."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plugin.register()
    layer = AttentionSelectorConfig(head_size=head_size, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128)
    return CpuPlatform.get_attn_backend_cls(backend, layer)


def test_cpu_platform_selects_the_backend():
    assert select(plugin.backend_member(), 64) == plugin.BACKEND


def test_cpu_platform_keeps_its_other_backend():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert select(AttentionBackendEnum.CPU_ATTN, 48) == AttentionBackendEnum.CPU_ATTN.get_path()
    assert select(None, 64) == AttentionBackendEnum.CPU_ATTN.get_path()


def test_cpu_platform_refuses_a_layer():
    with pytest.raises(PowerQuantUnsupportedError, match="head_size 48 is not one of 64, "):
        select(plugin.backend_member(), 48)


LLAMA = GEMMA2 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attn_logit_softcapping": None}


def serve(tmp_path, *arguments: str, config: dict = GEMMA2, **environ: str) -> tuple[int, str, list[str]]:
    """Exit status and last line of the API server, and the command lines of the processes it started."""
    import psutil

    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path), "--skip-tokenizer-init"]
    command += ["--host", "127.0.0.1", "--port", "0"]  # whatever else runs on this machine
    log = tmp_path / "server.log"
    started = {}
    with open(log, "w") as out:
        process = psutil.Popen(
            [*command, "--load-format", "dummy", "--enforce-eager", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
        )
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    for child in process.children(recursive=True):
                        started[child.pid] = " ".join(child.cmdline())
                except psutil.Error:
                    pass
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return process.returncode, lines[-1], list(started.values())


def engines(commands: list[str]) -> list[str]:
    """Those processes that vLLM spawned; its inspection of a model's class is a plain command."""
    return [command for command in commands if "spawn_main" in command or "forkserver" in command]


@pytest.mark.slow
def test_server_stops_on_an_unsupported_model(tmp_path):
    status, last_line, commands = serve(tmp_path, "--attention-backend", "POWERQUANT")
    assert status == 1
    assert last_line.endswith(
        f"PowerQuantUnsupportedError: POWERQUANT has no soft cap of attention logits, which {tmp_path} uses "
        "(attn_logit_softcapping 50.0); leave out --attention-backend to serve it with vLLM's default backend"
    )
    assert engines(commands) == []


@pytest.mark.slow
def test_server_stops_on_sources_that_disagree(tmp_path):
    options = '{"powerquant": {"key_bits": 3}}'
    status, last_line, commands = serve(
        tmp_path, "--attention-backend", "powerquant", "--additional-config", options, POWERQUANT_KEY_BITS="2"
    )
    assert status == 1
    assert "PowerQuantConfigError: POWERQUANT_KEY_BITS is 2 but key_bits in --additional-config" in last_line
    assert last_line.endswith("is 3; give one of them")
    assert engines(commands) == []


@pytest.mark.slow
def test_server_stops_on_another_models_calibration(tmp_path):
    import torch

    from vllm_powerquant.calibration import Calibration, KeyStatistics, ModelShape

    path = tmp_path / "other.safetensors"
    shape = ModelShape("llama", 2, 2, 128, 4, 256, 512, '{"rope_theta": 10000.0, "rope_type": "default"}')
    Calibration(KeyStatistics(torch.zeros(2, 2, 128), torch.ones(2, 2, 128)), shape, "the-other-one", 1).save(path)
    status, last_line, commands = serve(
        tmp_path, "--attention-backend", "POWERQUANT", config=LLAMA, POWERQUANT_CALIBRATION=str(path)
    )
    assert status == 1
    assert f"PowerQuantConfigError: {path} was calibrated on the-other-one, another model: " in last_line
    assert "head_size 128, the model's 64; make one for this model" in last_line
    assert engines(commands) == []
