import os

# Before torch starts its threads: do not spin while waiting, other processes (engines under test) need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402


def pytest_configure(config) -> None:
    # Before the kernels are imported: without a GPU they run in Triton's interpreter, unless only tests are asked for that
    # compile and emulate them.
    if not torch.cuda.is_available() and config.option.markexpr != "emulated":
        os.environ.setdefault("TRITON_INTERPRET", "1")
