"""Lets vLLM's CPU platform select the backend: stock, it takes CPU_ATTN whatever was asked for."""

from __future__ import annotations

import functools

from ..errors import PowerQuantUnsupportedError


def install(name: str) -> None:
    """Wrap CpuPlatform.get_attn_backend_cls so that the backend registered as `name` is honoured. Idempotent."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    stock = CpuPlatform.__dict__["get_attn_backend_cls"].__func__
    if getattr(stock, "powerquant", False):
        return

    @functools.wraps(stock)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
        if getattr(selected_backend, "name", None) != name:
            return stock(cls, selected_backend, attn_selector_config, *args, **kwargs)
        # the CPU platform validates nothing by itself; checks.py refuses the known cases earlier
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=DeviceCapability(0, 0), **attn_selector_config._asdict()
        )
        if reasons:
            raise PowerQuantUnsupportedError(
                f"{name} cannot serve a layer of this model: {'; '.join(reasons)}; leave out --attention-backend"
            )
        return selected_backend.get_path()

    get_attn_backend_cls.powerquant = True
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
