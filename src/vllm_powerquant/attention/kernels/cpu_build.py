"""Compiles the CPU kernels for this machine, once, into the cache folder.

The sources (cpu/*.cpp) ship with the package and need a C++17 compiler: CXX, or g++, or clang++. The library's name holds a
hash of the sources, the flags and the processor's features, so another machine or release makes its own; a file beside it
holds the hash of its bytes, so a damaged one is made again.
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
        try:
            words = shlex.split(candidate)
        except ValueError as error:
            raise KernelBuildError(f"CXX must be a command, got {candidate!r}: {error}") from None
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


def library_path() -> Path:
    """Where this machine's library is or will be."""
    digest = hashlib.sha256(repr((_processor(), _FLAGS, _SOURCES)).encode())
    for source in sorted(SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return cache_dir() / "kernels" / f"cpu-{digest.hexdigest()[:20]}.so"


def _is_whole(library: Path) -> bool:
    """Loading a cut-off library would kill the process without a word."""
    try:
        return library.with_suffix(".sha256").read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return False


@functools.cache
def build() -> Path:
    """Path of the compiled library, made if it is not there yet (a few seconds). Raises KernelBuildError."""
    library = library_path()
    if _is_whole(library):
        return library
    compiler = find_compiler()
    flags = _flags(compiler)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            objects = []
            for name, extra in _SOURCES.items():
                objects.append(Path(work) / f"{name}.o")
                _run([*compiler, *flags, *extra, "-c", SOURCE_DIR / name, "-o", objects[-1]], objects[-1])
            made = Path(work) / library.name
            _run([*compiler, "-shared", "-fopenmp", *objects, "-o", made], made)
            made.with_suffix(".sha256").write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            os.replace(made, library)
            os.replace(made.with_suffix(".sha256"), library.with_suffix(".sha256"))
    except OSError as error:
        raise KernelBuildError(
            f"POWERQUANT could not write its compiled CPU kernels to {library.parent}: {error}; "
            f"set POWERQUANT_CACHE_DIR to a folder that can be written"
        ) from None
    return library


def _run(command: list, made: Path) -> None:
    command = [str(word) for word in command]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not made.exists():
        log = "\n".join(result.stderr.splitlines()[-20:])
        raise KernelBuildError(
            f"{shlex.join(command)}\n{log}\ncompiling POWERQUANT's CPU kernels failed (command and log above); "
            f"a C++17 compiler that knows _Float16 is needed, e.g. g++ 12 or newer; set CXX to choose one"
        )
