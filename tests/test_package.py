"""The package as installed: what importing it loads, its version, its public names."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import vllm_powerquant

ROOT = Path(__file__).resolve().parent.parent


def run_fresh(code: str) -> str:
    """stdout of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "vllm_powerquant",
        "vllm_powerquant.cli",
        "vllm_powerquant.config",
        "vllm_powerquant.info",
        "vllm_powerquant.model",
        "vllm_powerquant.serve",
        "vllm_powerquant.sparse.convert",
        "vllm_powerquant.sparse.executor",
    ],
)
def test_import_loads_no_heavy_library(module):
    heavy = ("torch", "vllm", "transformers", "numpy", "gguf", "jinja2")
    loaded = run_fresh(f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])")
    assert loaded == ""


def test_public_names_are_lazy():
    code = (
        "import sys, vllm_powerquant as p; before = 'vllm_powerquant.config' in sys.modules;"
        "print(before, p.PowerQuantConfig.__module__, issubclass(p.PowerQuantError, Exception))"
    )
    assert run_fresh(code) == "False vllm_powerquant.config True"


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vllm_powerquant.nothing


def test_dir_lists_lazy_names():
    assert {"PowerQuantConfig", "PowerQuantError", "__version__"} <= set(dir(vllm_powerquant))


def test_version_is_that_of_pyproject():
    try:
        metadata.version("vllm-powerquant")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert vllm_powerquant.__version__ == project["version"]


def test_vllm_is_no_hard_dependency():
    """vLLM's CPU build is another distribution, so a dependency on either name would break the other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith("vllm")]
    assert project["entry-points"]["vllm.general_plugins"] == {"powerquant": "vllm_powerquant.plugin:register"}
