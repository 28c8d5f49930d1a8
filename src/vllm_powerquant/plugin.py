"""What vLLM's plugin entry point calls, in every process: makes `--attention-backend POWERQUANT` known."""

from __future__ import annotations

import os

from .config import PowerQuantConfig

NAME = "POWERQUANT"
BACKEND = "vllm_powerquant.attention.vllm_backend.PowerQuantBackend"


def register() -> None:
    """Check the environment, register the backend, install the CPU platform's hook and the checks. Idempotent.

    Raises: PowerQuantConfigError for a bad POWERQUANT_ variable, first in the process that parses vLLM's arguments, before
            it starts another; whichever backend is asked for
    """
    PowerQuantConfig.from_sources(os.environ)
    backend_member()

    from vllm.platforms import current_platform

    from .attention import checks, cpu_platform

    if current_platform.is_cpu():
        cpu_platform.install(NAME)
    checks.install(NAME)


def backend_member():
    """The registered member of vLLM's AttentionBackendEnum."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND)
        # Members pickle by value, and a spawned process unpickles its configuration before it loads plugins, so the value
        # is unknown there. Pickled as a call of this function, the member registers itself.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (backend_member, ())
    return AttentionBackendEnum[NAME]
