"""Builds the C++ engine once for the tests that run it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "third_party" / "PowerInfer"
BUILD = ROOT / "build" / "powerinfer"


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


PROGRAMS = ("powerinfer-server", "powerinfer-bench", "powerinfer-render", "powerinfer-tokenize", "engine-tests")


@pytest.fixture(scope="session")
def engine_build() -> Path:
    """Folder of the built engine: the one of POWERQUANT_ENGINE where all its programs lie beside it (a sanitizer's build).

    Skips only where there is no C++ compiler, and never in CI.
    """
    if named := os.environ.get("POWERQUANT_ENGINE"):
        folder = Path(named).absolute().parent
        if all((folder / name).is_file() for name in PROGRAMS):
            return folder
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (BUILD / "Makefile").exists() else []
    commands = (
        ["cmake", "-S", str(SOURCE), "-B", str(BUILD), *generator],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
    )
    for command in commands:
        try:
            result = subprocess.run(command, capture_output=True, text=True)
            output = result.stdout[-4000:] + result.stderr[-4000:]
            failed = result.returncode != 0
        except FileNotFoundError as error:
            failed, output = True, str(error)
        if failed and not has_compiler() and not os.environ.get("CI"):
            pytest.skip("the engine cannot be built here without a C++ compiler")
        assert not failed, f"{' '.join(command)}\n{output}"
    return BUILD


@pytest.fixture
def plain_memory(engine_build) -> None:
    """For tests of how much memory the engine takes: a sanitizer's build takes several times as much."""
    program = (engine_build / "powerinfer-server").read_bytes()
    if b"__asan_" in program or b"__tsan_" in program:
        pytest.skip("the engine was built with a sanitizer, which multiplies its memory")


@pytest.fixture(scope="session")
def engine_server(request) -> Path:
    """The server under test: the one that POWERQUANT_ENGINE names, else the one built here."""
    named = os.environ.get("POWERQUANT_ENGINE")
    return Path(named) if named else request.getfixturevalue("engine_build") / "powerinfer-server"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A sparse model of random weights with room for long answers: a PWRI file beside its checkpoint."""
    from dataclasses import replace

    from sparse.models import SHAPES, write_checkpoint
    from vllm_powerquant.sparse.convert import convert

    shape = replace(SHAPES["tiny"], context_length=8192)
    folder = write_checkpoint(shape, tmp_path_factory.mktemp("tiny") / "tiny")
    convert(folder, folder / "tiny.gguf", predictor=folder / "predictor", progress=False)
    return folder / "tiny.gguf"
