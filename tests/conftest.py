import os
import signal

# Before torch starts its threads: do not spin while waiting, other processes (engines under test) need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

# A shell that starts the tests in the background has SIGINT ignored, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config) -> None:
    # Before the kernels are imported: without a GPU they run in Triton's interpreter, unless only tests are asked for that
    # compile and emulate them.
    if not torch.cuda.is_available() and config.option.markexpr != "emulated":
        os.environ.setdefault("TRITON_INTERPRET", "1")
