"""Finds the sparse engine's server, or compiles it once into the cache folder.

POWERQUANT_ENGINE names a powerinfer-server to use. Otherwise the sources that ship with this package (third_party/PowerInfer
in a checkout, of which `engine/` here is a link) are built with CMake; the folder's name holds a hash of the sources, the
compiler and the machine, so another release or compiler makes its own. Nothing is compiled for one CPU: the engine picks
its instruction set when it starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ..errors import PowerQuantConfigError, PowerQuantEngineError
from ..paths import cache_dir

# gets a line of progress now and then
Say = Callable[[str], None] | None

ENGINE_ENV = "POWERQUANT_ENGINE"
SERVER, BENCH = "powerinfer-server", "powerinfer-bench"
SOURCE_DIR = Path(__file__).parent / "engine"

# what a build needs beside a compiler: header -> Debian package
HEADERS = {"httplib.h": "libcpp-httplib-dev", "nlohmann/json.hpp": "nlohmann-json3-dev"}
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class Tools:
    """What a build of the engine would use here, and what it lacks."""

    compiler: tuple[str, ...]  # command; () where there is none
    compiler_version: str
    cmake: str  # its version; "" where there is none
    missing: tuple[tuple[str, str], ...]  # (what, the Debian package that brings it)

    @property
    def advice(self) -> str:
        """One line: what is missing and the command that brings it."""
        what = ", ".join(name for name, _ in self.missing)
        return f"missing: {what}; run: sudo apt-get install -y {' '.join(package for _, package in self.missing)}"


def find_tools() -> Tools:
    compiler = _find_compiler()
    version, missing = "", []
    if compiler:
        version = _first_line([*compiler, "--version"])
    else:
        missing.append(("a C++ compiler (CXX, g++ or clang++)", "g++"))
    cmake = shutil.which("cmake")
    if not cmake:
        missing.append(("cmake", "cmake"))
    if not any(shutil.which(name) for name in ("ninja", "make", "gmake")):
        missing.append(("ninja or make", "ninja-build"))
    if not any(shutil.which(name) for name in ("pkg-config", "pkgconf")):
        missing.append(("pkg-config", "pkg-config"))
    absent = _absent_headers(compiler) if compiler else []
    missing += [(header, package) for header, package in HEADERS.items() if header in absent]
    found = re.search(r"[\d.]+\d", _first_line([cmake, "--version"])) if cmake else None
    return Tools(compiler, version, found[0] if found else "", tuple(missing))


def built_engine() -> Path | None:
    """The server that would be used without building anything. Raises PowerQuantConfigError for a bad POWERQUANT_ENGINE."""
    named = os.environ.get(ENGINE_ENV)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file() or not os.access(path, os.X_OK):
            raise PowerQuantConfigError(f"{ENGINE_ENV} must name a {SERVER} that can be run, got {named}")
        return path
    if not (SOURCE_DIR / "CMakeLists.txt").is_file() or not (compiler := _find_compiler()):
        return None
    server = _folder(SOURCE_DIR, compiler) / SERVER
    return server if _runs(server) else None


def find_engine(say: Say = None) -> Path:
    """Path of the server; builds it the first time (a minute or two on two cores).

    Processes that build at the same time wait for the first one.

    Raises:  PowerQuantConfigError for a bad POWERQUANT_ENGINE; PowerQuantEngineError where a tool is missing (its text names
             the packages), the sources are, or the build fails (its text ends with the log's last lines)
    """
    return built_engine() or build(SOURCE_DIR, say=say)


def build(source: Path, say: Say = None) -> Path:
    """Build the CMake project `source`, unless that was done before; path of its server. Raises: see find_engine."""
    if not (source / "CMakeLists.txt").is_file():
        raise PowerQuantEngineError(
            f"the engine's sources are not in {source}: install vllm-powerquant from its wheel or a whole checkout "
            f"(third_party/PowerInfer), or name a {SERVER} in {ENGINE_ENV}"
        )
    tools = find_tools()
    if tools.missing:
        raise PowerQuantEngineError(
            f"the engine is compiled once, and tools are {tools.advice} (or name a {SERVER} in {ENGINE_ENV})"
        )
    folder = _folder(source, tools.compiler)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f"{folder.name}.lock"), say):
            if not _runs(folder / SERVER):
                _build_into(folder, source, tools, say)
    except OSError as error:
        raise PowerQuantEngineError(
            f"the engine could not be built in {folder.parent}: {error}; "
            "set POWERQUANT_CACHE_DIR to a folder that can be written"
        ) from error
    return folder / SERVER


def _build_into(folder: Path, source: Path, tools: Tools, say: Say) -> None:
    # what a build that was killed left behind
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    log_path = folder.with_name(f"{folder.name}.log")
    environment = {**os.environ, "CXX": shlex.join(tools.compiler)}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = str(len(os.sched_getaffinity(0)))
    try:
        with log_path.open("w", encoding="utf-8") as log:
            for command in (
                ["cmake", "-S", str(source.resolve()), "-B", str(work / "build"), *generator, "-DPOWERINFER_TESTS=OFF"],
                ["cmake", "--build", str(work / "build"), "--parallel", jobs],
            ):
                _run(command, environment, log, log_path, say)
        made = work / "made"
        made.mkdir()
        for name in (SERVER, BENCH):
            if (work / "build" / name).is_file():
                shutil.copy2(work / "build" / name, made / name)
        if not _runs(made / SERVER):
            raise PowerQuantEngineError(f"the build made no {SERVER} that can be run; its log: {log_path}")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str], environment: dict[str, str], log: TextIO, log_path: Path, say: Say) -> None:
    """Raises PowerQuantEngineError with the output's last lines where the command fails."""
    lines: deque[str] = deque(maxlen=LOG_LINES_SHOWN)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            step = re.match(r"\[\s*(\d+/\d+|\d+%)\]", line)
            if say and step:
                say(f"building the engine: {step[1]}")
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if status:
        shown = "\n".join(lines)
        raise PowerQuantEngineError(f"building the engine failed with status {status}; all of its log: {log_path}\n{shown}")


@contextlib.contextmanager
def _lock(path: Path, say: Say) -> Iterator[None]:
    """One build at a time."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say:
                say("waiting for another process that builds the engine")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder(source: Path, compiler: tuple[str, ...]) -> Path:
    """Where the build of these sources with this compiler is or will be."""
    digest = hashlib.sha256(repr((compiler, _first_line([*compiler, "--version"]), platform.machine())).encode())
    files = [source / "CMakeLists.txt", *(source / "src").rglob("*")]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(source)).encode() + b"\0" + path.read_bytes())
    return cache_dir() / f"engine-{digest.hexdigest()[:16]}"


def _runs(server: Path) -> bool:
    """Whether it starts: a library that it was linked with may be gone since."""
    try:
        return subprocess.run([server, "--version"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _find_compiler() -> tuple[str, ...]:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        try:
            words = shlex.split(candidate)
        except ValueError as error:
            raise PowerQuantConfigError(f"CXX must be a command, got {candidate!r}: {error}") from None
        if words and (path := shutil.which(words[0])):
            return (path, *words[1:])
    return ()


def _absent_headers(compiler: tuple[str, ...]) -> list[str]:
    """Those of HEADERS that the compiler does not find, nor CMake by CMAKE_PREFIX_PATH."""
    prefixes = [prefix for prefix in re.split("[:;]", os.environ.get("CMAKE_PREFIX_PATH", "")) if prefix]
    text = "".join(f"#if !__has_include(<{name}>)\nabsent {name}\n#endif\n" for name in HEADERS)
    command = [*compiler, "-E", "-P", "-x", "c++", *(f"-I{prefix}/include" for prefix in prefixes), "-"]
    try:
        seen = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [name for name in HEADERS if f"absent {name}" in seen]


def _first_line(command: list[str]) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return output.partition("\n")[0].strip()
