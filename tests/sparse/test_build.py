"""Finding and building the engine, with a CMake project in its place that is made in a blink."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantEngineError
from vllm_powerquant.sparse import build as module
from vllm_powerquant.sparse.build import SERVER, SOURCE_DIR, build, built_engine, find_engine, find_tools

needs_tools = pytest.mark.skipif(
    bool(find_tools().missing) and not os.environ.get("CI"), reason="what the engine is compiled with is missing"
)

# Each configuration of it leaves a line in the file `count` beside the sources.
PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(stub LANGUAGES NONE)
file(APPEND ${CMAKE_SOURCE_DIR}/../count "built\\n")
set(made ${CMAKE_BINARY_DIR}/powerinfer-server)
add_custom_target(server ALL COMMAND sleep 0.3 COMMAND cp ${CMAKE_SOURCE_DIR}/src/server.sh ${made})
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A stand-in for the engine's sources; built engines go to a folder of the test's."""
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("POWERQUANT_ENGINE", raising=False)
    folder = tmp_path / "source"
    (folder / "src").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(PROJECT)
    server = folder / "src" / "server.sh"
    server.write_text("#!/bin/sh\necho powerinfer-server stub\n")
    server.chmod(0o755)
    return folder


def builds(source: Path) -> int:
    return len((source.parent / "count").read_text().splitlines())


@needs_tools
def test_engine_is_built_once(source, monkeypatch):
    said = []
    server = build(source, said.append)
    assert subprocess.run([server], capture_output=True, text=True).stdout == "powerinfer-server stub\n"
    assert server.parent.parent == source.parent / "cache" and said[-1] == "building the engine: 1/1"
    assert build(source) == server and builds(source) == 1
    monkeypatch.setattr(module, "SOURCE_DIR", source)
    assert built_engine() == find_engine() == server and builds(source) == 1
    left = sorted(path.name for path in server.parent.parent.iterdir())
    assert left == [server.parent.name, f"{server.parent.name}.lock", f"{server.parent.name}.log"]


@needs_tools
def test_other_sources_are_another_engine(source):
    first = build(source)
    (source / "src" / "server.sh").write_text("#!/bin/sh\necho changed\n")
    second = build(source)
    assert first.parent != second.parent and first.is_file() and builds(source) == 2


@needs_tools
def test_engine_that_no_longer_runs_is_built_again(source):
    server = build(source)
    server.write_text("damaged")
    assert build(source) == server and builds(source) == 2
    assert subprocess.run([server], capture_output=True).returncode == 0


@needs_tools
def test_processes_do_not_build_at_once(source):
    code = (
        "import pathlib, sys; from vllm_powerquant.sparse.build import build; print(build(pathlib.Path(sys.argv[1]), print))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, source], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert len({output.splitlines()[-1] for output in outputs}) == 1 and builds(source) == 1
    assert any("waiting for another process" in output for output in outputs)


@needs_tools
def test_killed_build_is_no_obstacle(source):
    (source / "CMakeLists.txt").write_text(PROJECT.replace("sleep 0.3", "sleep 30"))
    code = f"from pathlib import Path; from vllm_powerquant.sparse.build import build; build(Path({str(source)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    end = time.monotonic() + 20
    while not list((source.parent / "cache").glob(".engine-*/build/build.ninja")) and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, 9)
    process.wait()
    (stale,) = (source.parent / "cache").glob(".engine-*")
    (source / "CMakeLists.txt").write_text(PROJECT)
    server = build(source)
    # as if those very sources' build had been killed
    stale.rename(stale.with_name(f".{server.parent.name}-abc"))
    server.unlink()
    assert build(source) == server and not list(server.parent.parent.glob(".engine-*"))


@needs_tools
def test_failed_build_shows_the_last_lines_of_its_log(source):
    (source / "CMakeLists.txt").write_text('project(stub LANGUAGES NONE)\nmessage(FATAL_ERROR "the reason")\n')
    with pytest.raises(PowerQuantEngineError, match="building the engine failed with status 1") as caught:
        build(source)
    assert "the reason" in str(caught.value)
    (log,) = (source.parent / "cache").glob("*.log")
    assert str(log) in str(caught.value) and "the reason" in log.read_text()
    assert not list((source.parent / "cache").glob(".engine-*"))


@needs_tools
def test_build_without_a_server_is_an_error(source):
    (source / "src" / "server.sh").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(PowerQuantEngineError, match=f"the build made no {SERVER} that can be run"):
        build(source)


@needs_tools
def test_folder_that_cannot_be_written(source, monkeypatch):
    monkeypatch.setenv("POWERQUANT_CACHE_DIR", "/proc/nothing")
    with pytest.raises(PowerQuantEngineError, match="set POWERQUANT_CACHE_DIR to a folder that can be written"):
        build(source)


def test_missing_tools_are_one_line(source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source))
    with pytest.raises(PowerQuantEngineError) as caught:
        build(source)
    assert str(caught.value) == (
        "the engine is compiled once, and tools are missing: a C++ compiler (CXX, g++ or clang++), cmake, ninja or make, "
        "pkg-config; run: sudo apt-get install -y g++ cmake ninja-build pkg-config (or name a powerinfer-server in "
        "POWERQUANT_ENGINE)"
    )
    monkeypatch.setattr(module, "SOURCE_DIR", source)
    assert built_engine() is None


@needs_tools
def test_missing_header_names_its_package(source, monkeypatch):
    monkeypatch.setattr(module, "HEADERS", {**module.HEADERS, "no/such/header.h": "no-such-dev"})
    with pytest.raises(PowerQuantEngineError, match=r"missing: no/such/header.h; run: sudo apt-get install -y no-such-dev"):
        build(source)
    (source / "include" / "no" / "such").mkdir(parents=True)
    (source / "include" / "no" / "such" / "header.h").touch()
    monkeypatch.setenv("CMAKE_PREFIX_PATH", str(source))
    assert find_tools().missing == ()


def test_named_engine_is_used_as_it_is(source, monkeypatch):
    server = source / "src" / "server.sh"
    monkeypatch.setenv("POWERQUANT_ENGINE", str(server))
    assert find_engine() == built_engine() == server
    server.chmod(0o644)
    for bad in (server, source, source / "nothing"):
        monkeypatch.setenv("POWERQUANT_ENGINE", str(bad))
        with pytest.raises(PowerQuantConfigError, match="POWERQUANT_ENGINE must name a powerinfer-server"):
            find_engine()


def test_sources_that_are_not_there_say_where_they_come_from(source, monkeypatch):
    monkeypatch.setattr(module, "SOURCE_DIR", source / "nothing")
    with pytest.raises(PowerQuantEngineError, match="install vllm-powerquant from its wheel or a whole checkout"):
        find_engine()


def test_package_links_to_the_engine_s_sources():
    checkout = Path(__file__).resolve().parents[2] / "third_party" / "PowerInfer"
    assert SOURCE_DIR.resolve() == checkout and (SOURCE_DIR / "CMakeLists.txt").is_file()


def test_cxx_must_be_a_command(source, monkeypatch):
    monkeypatch.setenv("CXX", "'")
    with pytest.raises(PowerQuantConfigError, match="CXX must be a command"):
        build(source)
