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


def missing_tools() -> list[str]:
    """What the engine's build needs and this machine does not seem to have."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    missing = [] if any(shutil.which(name) for name in compilers) else ["C++ compiler"]
    missing += [] if shutil.which("cmake") else ["cmake"]
    headers = {"nlohmann-json": "nlohmann/json.hpp", "cpp-httplib": "httplib.h", "doctest": "doctest/doctest.h"}
    folders = [Path(folder) for folder in ("/usr/include", "/usr/local/include")]
    return missing + [name for name, header in headers.items() if not any((folder / header).is_file() for folder in folders)]


@pytest.fixture(scope="session")
def engine_build() -> Path:
    """Folder of the built engine. Skips only where what the build needs is missing, and never in CI."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (BUILD / "Makefile").exists() else []
    commands = (
        ["cmake", "-S", str(SOURCE), "-B", str(BUILD), *generator],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
    )
    for step, command in enumerate(commands):
        try:
            result = subprocess.run(command, capture_output=True, text=True)
            output = result.stdout[-4000:] + result.stderr[-4000:]
            failed = result.returncode != 0
        except FileNotFoundError as error:
            failed, output = True, str(error)
        if failed and step == 0 and (missing := missing_tools()) and not os.environ.get("CI"):
            pytest.skip(f"the engine cannot be built here without {', '.join(missing)}")
        assert not failed, f"{' '.join(command)}\n{output}"
    return BUILD


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
