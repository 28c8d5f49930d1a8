"""`powerquant info`: what is installed here and what of this package can run. Imports neither torch nor vLLM."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from . import __version__
from .errors import PowerQuantError
from .paths import cache_dir
from .plugin import NAME
from .serve import VLLM_DISTRIBUTIONS
from .sparse.build import ENGINE_ENV, SOURCE_DIR, built_engine, find_tools

PACKAGES = ("torch", *VLLM_DISTRIBUTIONS, "triton", "transformers", "gguf", "jinja2")
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
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": _gpus(),
        "cpu": {"cores": len(os.sched_getaffinity(0)), "instruction_set": instruction_set(_cpu_flags())},
        "plugin": _plugin(),
        "engine": _engine(),
        "cache": str(cache_dir()),
    }


def instruction_set(flags: set[str]) -> str:
    """What the engine takes on a CPU with these flags: avx512, avx2 or plain."""
    return next((name for name, needed in INSTRUCTION_SETS if needed <= flags), "plain")


def text(facts: dict[str, Any]) -> str:
    """The facts for people, a line each."""
    engine, plugin = facts["engine"], facts["plugin"]
    if engine["server"]:
        state = engine["server"]
    elif engine["problem"]:
        state = f"cannot be built: {engine['problem']}"
    else:
        state = f"not built yet; {engine['compiler']} and cmake {engine['cmake']} build it when it is first used"
    vllm = any(facts["packages"][name] for name in VLLM_DISTRIBUTIONS)
    registered = (
        "registered" if plugin else "not registered (install the package, a source tree on PYTHONPATH is not enough)"
    )
    versions = {name: version for name, version in facts["packages"].items() if version or name not in VLLM_DISTRIBUTIONS}
    packages = [f"{name} {version}" if version else f"no {name}" for name, version in versions.items()]
    packages += [] if vllm else ["no vllm"]
    rows = {
        "vllm-powerquant": facts["vllm_powerquant"],
        "python": facts["python"],
        "packages": ", ".join(packages),
        "GPU": ", ".join(facts["gpus"]) or "none seen",
        "CPU": f"{facts['cpu']['cores']} cores, {facts['cpu']['instruction_set']}",
        f"backend {NAME}": registered if vllm else f"{registered}; vLLM is not installed",
        "sparse engine": state,
        "cache": facts["cache"],
    }
    return "\n".join(f"{name + ':':<21}{value}" for name, value in rows.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.strip() for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [line.partition(" (UUID")[0] for line in lines] if listed.returncode == 0 else []


def _plugin() -> bool:
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


def _engine() -> dict[str, Any]:
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
