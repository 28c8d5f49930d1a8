"""`powerquant info`: what is installed here and what of this package can run. Imports neither torch nor vLLM."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from . import __version__
from .errors import PowerQuantError
from .model import DEFAULT_MODEL, checkpoint_folder, find_gguf
from .paths import cache_dir
from .plugin import NAME
from .serve import VLLM_DISTRIBUTIONS, installed_vllm
from .sparse.build import ENGINE_ENV, SOURCE_DIR, built_engine, find_tools

PACKAGES = ("torch", *VLLM_DISTRIBUTIONS, "triton", "transformers", "gguf", "jinja2", "bitsandbytes")
ENTRY_POINTS = "vllm.general_plugins"
# The levels that the engine looks for: name, flags of /proc/cpuinfo. The best one first.
INSTRUCTION_SETS = (
    ("avx512", {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"}),
    ("avx2", {"avx2", "fma", "f16c"}),
)


def collect() -> dict[str, Any]:
    """JSON-able facts by name."""
    return {
        "vllm_powerquant": __version__,
        "python": collect_python(),
        "packages": {name: version(name) for name in PACKAGES},
        "gpus": gpus(),
        "cpu": {"cores": len(os.sched_getaffinity(0)), "instruction_set": cpu_instruction_set()},
        "plugin": has_entry_point(),
        "engine": engine(),
        "model": embedded_model(),
        "backend": default_backend(),
        "cache": str(cache_dir()),
    }


def instruction_set(flags: set[str]) -> str:
    """What the engine takes on a CPU with these flags: avx512, avx2 or plain."""
    return next((name for name, needed in INSTRUCTION_SETS if needed <= flags), "plain")


def cpu_instruction_set() -> str:
    """Of this machine."""
    return instruction_set(_cpu_flags())


def collect_python() -> str:
    return platform.python_version()


def embedded_model() -> dict[str, str | None]:
    """The GGUF that the default model is made of, and the checkpoint's folder where that was made already."""
    try:
        gguf = find_gguf(DEFAULT_MODEL)
    except PowerQuantError:
        return {"gguf": None, "checkpoint": None}
    checkpoint = checkpoint_folder(gguf)
    return {"gguf": str(gguf), "checkpoint": str(checkpoint) if (checkpoint / "config.json").is_file() else None}


def default_backend() -> str:
    """Of the Engine for a checkpoint."""
    return "vllm" if installed_vllm() == "vllm" and gpus() else "transformers"


def text(facts: dict[str, Any]) -> str:
    """The facts for people, a line each."""
    sparse, plugin = facts["engine"], facts["plugin"]
    if sparse["server"]:
        state = sparse["server"]
    elif sparse["problem"]:
        state = f"cannot be built: {sparse['problem']}"
    else:
        state = f"not built yet; {sparse['compiler']} and cmake {sparse['cmake']} build it when it is first used"
    vllm = any(facts["packages"][name] for name in VLLM_DISTRIBUTIONS)
    registered = (
        "registered" if plugin else "not registered (install the package, a source tree on PYTHONPATH is not enough)"
    )
    versions = {name: found for name, found in facts["packages"].items() if found or name not in VLLM_DISTRIBUTIONS}
    packages = [f"{name} {found}" if found else f"no {name}" for name, found in versions.items()]
    packages += [] if vllm else ["no vllm"]
    rows = {
        "vllm-powerquant": facts["vllm_powerquant"],
        "python": facts["python"],
        "packages": ", ".join(packages),
        "GPU": ", ".join(facts["gpus"]) or "none seen",
        "CPU": f"{facts['cpu']['cores']} cores, {facts['cpu']['instruction_set']}",
        f"backend {NAME}": registered if vllm else f"{registered}; vLLM is not installed",
        "sparse engine": state,
        "embedded model": facts["model"]["checkpoint"] or facts["model"]["gguf"] or "not installed",
        "Engine for checkpoints": facts["backend"],
        "cache": facts["cache"],
    }
    return "\n".join(f"{name + ':':<25}{value}" for name, value in rows.items())


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.strip() for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [line.partition(" (UUID")[0] for line in lines] if listed.returncode == 0 else []


def has_entry_point() -> bool:
    """Whether vLLM will find the entry point."""
    return any(entry.name == "powerquant" for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def engine() -> dict[str, Any]:
    """The sparse engine: its program, or what building it takes."""
    tools = find_tools()
    problem = tools.advice if tools.missing else ""
    if not (SOURCE_DIR / "CMakeLists.txt").is_file():
        problem = f"its sources are not installed; name a powerinfer-server in {ENGINE_ENV}"
    server = None
    try:
        server = built_engine()
    except PowerQuantError as error:
        problem = str(error)
    return {
        "server": str(server) if server else None,
        "compiler": tools.compiler_version or None,
        "cmake": tools.cmake or None,
        "missing": [name for name, _ in tools.missing],
        "problem": "" if server else problem,
    }
