"""Compiles the CPU kernels for this machine, once, into the cache folder.

The sources (cpu/*.cpp) ship with the package and need a C++17 compiler: CXX, or g++, or clang++. The library's name holds a
hash of the sources, the flags, the compiler and the processor's features, so another machine or release makes its own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...errors import PowerQuantError
from ...paths import cache_dir

SOURCE_DIR = Path(__file__).parent / "cpu"
# The store keeps each operation apart (no fused multiply-add): its bytes are the reference's, bit for bit.
_SOURCES = {
    "store.cpp": ["-ffp-contract=off"],
    "attend.cpp": ["-ffp-contract=fast"],
    "dequantize.cpp": ["-ffp-contract=fast"],
}
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]


class KernelBuildError(PowerQuantError):
    """The CPU kernels could not be compiled."""


def find_compiler() -> list[str]:
    """Command of the C++ compiler. Raises KernelBuildError if there is none."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return words
    what = f"CXX={named} was not found" if named else "no C++ compiler was found (looked for g++, clang++, c++)"
    raise KernelBuildError(
        f"POWERQUANT compiles its CPU kernels once and {what}; install one, e.g. apt-get install g++, or set CXX"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return line
    except OSError:
        pass
    return platform.processor()


def _flags(compiler: list[str]) -> list[str]:
    flags = list(_FLAGS)
    if "clang" not in Path(compiler[0]).name and platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    return flags


@functools.cache
def build() -> Path:
    """Path of the compiled library, made if it is not there yet (a few seconds). Raises KernelBuildError."""
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    flags = _flags(compiler)
    digest = hashlib.sha256()
    for part in (version, _processor(), repr((compiler, flags, _SOURCES))):
        digest.update(part.encode())
    for source in sorted(SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    folder = cache_dir() / "kernels"
    library = folder / f"cpu-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = []
        for name, extra in _SOURCES.items():
            objects.append(Path(work) / f"{name}.o")
            _run(
                [
                    *compiler,
                    *[f for f in flags if f != "-shared"],
                    *extra,
                    "-c",
                    str(SOURCE_DIR / name),
                    "-o",
                    objects[-1],
                ]
            )
        made = Path(work) / library.name
        _run([*compiler, "-shared", "-fopenmp", *objects, "-o", made])
        os.replace(made, library)
    return library


def _run(command: list) -> None:
    command = [str(word) for word in command]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        log = "\n".join(result.stderr.splitlines()[-20:])
        raise KernelBuildError(
            f"{shlex.join(command)}\n{log}\ncompiling POWERQUANT's CPU kernels failed (command and log above); "
            f"a C++17 compiler is needed, e.g. g++ 12 or newer; set CXX to choose one"
        )
