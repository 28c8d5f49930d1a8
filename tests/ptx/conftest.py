"""Puts the emulator under the project's own launch code, as if the CPU were a small Hopper GPU."""

import types
from importlib.util import find_spec

import pytest
import torch


def _hindrance() -> str | None:
    import triton  # not on top: tests/conftest.py decides first whether it interprets

    ready = triton.__version__.startswith("3.6.") and find_spec("triton.backends.nvidia")
    if not ready or triton.knobs.runtime.interpret or torch.cuda.is_available():
        return "needs Triton 3.6 with its NVIDIA backend, no GPU in sight, and -m emulated"
    return None


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The emulated GPU; a test may change it before its first launch."""
    if reason := _hindrance():
        pytest.skip(reason)
    from ptx.emulator import Device, EmulatedKernel
    from vllm_powerquant.attention.kernels import decode_hopper, gpu_kernels, merge_hopper, plan, store, store_nvidia

    device = Device()
    outputs = ("out_ptr", "lse_ptr")
    monkeypatch.setattr(decode_hopper, "_decode_kernel", EmulatedKernel(decode_hopper._decode_kernel, device, outputs))
    monkeypatch.setattr(merge_hopper, "_merge_kernel", EmulatedKernel(merge_hopper._merge_kernel, device))
    monkeypatch.setattr(plan, "_plan_kernel", EmulatedKernel(plan._plan_kernel, device))
    monkeypatch.setattr(store_nvidia, "_store_kernel", EmulatedKernel(store_nvidia._store_kernel, device))
    monkeypatch.setattr(store, "_has_nvidia_kernel", lambda device: True)
    monkeypatch.setattr(gpu_kernels, "hopper_supports", lambda fmt, dtype, device: decode_hopper.supports(fmt))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: types.SimpleNamespace(multi_processor_count=device.multiprocessors),
    )
    decode_hopper.num_runs.cache_clear()
    yield device
    decode_hopper.num_runs.cache_clear()
