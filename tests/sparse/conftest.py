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
    """What the engine's build needs and this machine lacks."""
    missing = (
        [] if any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")) else ["a C++ compiler"]
    )
    missing += [] if shutil.which("cmake") else ["cmake"]
    headers = {"nlohmann-json": "nlohmann/json.hpp", "cpp-httplib": "httplib.h", "doctest": "doctest/doctest.h"}
    folders = [Path(folder) for folder in ("/usr/include", "/usr/local/include", "/opt/homebrew/include")]
    folders += [Path(part) / "include" for part in os.environ.get("CMAKE_PREFIX_PATH", "").split(os.pathsep) if part]
    missing += [name for name, header in headers.items() if not any((folder / header).is_file() for folder in folders)]
    return missing


@pytest.fixture(scope="session")
def engine_build() -> Path:
    """Folder of the built engine. Skips only where tools for the build are missing, and never in CI."""
    missing = missing_tools()
    if missing and not os.environ.get("CI"):
        pytest.skip(f"the engine cannot be built here: no {', '.join(missing)}")
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (BUILD / "Makefile").exists() else []
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(BUILD), *generator],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return BUILD
