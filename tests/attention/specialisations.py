"""Counts what Triton would compile, without a GPU: run by test_warm_up.py in a process of its own.

Every launch is bound by Triton's own specialisation for an NVIDIA Hopper target and counted instead of run. Prints two
numbers: variants that warm_up launches, and variants after steps of many batch sizes.
"""

import sys
import types

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

variants = set()
backend = make_backend(GPUTarget("cuda", 90, 32))


def bind(kernel, *args, grid, warmup, **kwargs):
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    # the real device adds these two
    _, specialization, options = binder(*args, **kwargs, debug=False, instrumentation_mode="")
    variants.add((kernel.__name__, str(specialization), str(options)))


JITFunction.run = GluonJITFunction.run = bind
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)

from vllm_powerquant.attention.cache_format import CacheFormat  # noqa: E402
from vllm_powerquant.attention.kernels import flash, rows_hopper, store  # noqa: E402
from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks  # noqa: E402
from vllm_powerquant.attention.kernels.gpu_kernels import GpuKernels  # noqa: E402
from vllm_powerquant.attention.kernels.prefill import Workspace  # noqa: E402
from vllm_powerquant.attention.kernels.step import StepPlan  # noqa: E402

store._has_nvidia_kernel = lambda device: True
flash.flash_attention = lambda *args, **kwargs: None  # of protected layers: vLLM's own
device, dtype = torch.device("cpu"), torch.bfloat16


def split(tokens: int, heads: int, kv_heads: int, d: int) -> list[torch.Tensor]:
    """Query, key and value as slices of one projection, as vLLM hands them over."""
    joined = torch.zeros(tokens, (heads + 2 * kv_heads) * d, dtype=dtype)
    parts = joined.split([heads * d, kv_heads * d, kv_heads * d], dim=1)
    return [part.view(tokens, -1, d) for part in parts]


def main(head_size: int, heads: int, kv_heads: int, max_requests: int, max_queries: int, exact: bool, framed: bool) -> None:
    fmt = CacheFormat(head_size)
    kernels = GpuKernels(fmt, heads, kv_heads, max_requests, device, dtype, max_queries)
    kernels.rows = rows_hopper.HopperRows(fmt, heads, kv_heads, max_requests, max_queries, device)
    workspace = Workspace(kv_heads, head_size, dtype, device, 2_048)
    frame = torch.ones(kv_heads, 3, head_size) if framed else None
    kernels.warm_up(workspace, 128, 16 if exact else None, (128, 4), frame)
    kernels.warm_up_protected(dtype, 128)
    warm = len(variants)
    # pages of three layers in one pool, tables of odd widths
    cache = torch.zeros(9, 3, kv_heads, 128, fmt.layout.slot_bytes, dtype=torch.uint8)[:, 1]
    blocks = ExactBlocks(torch.zeros(9, 3, kv_heads, 16, 2 * head_size, dtype=dtype)[:, 1], 128, 4) if exact else None
    pages = ExactBlocks(torch.zeros(9, 3, kv_heads, 128, 2 * head_size, dtype=dtype)[:, 1], 0, 2**31 - 1)

    def attend(queries: list[int], contexts: list[int]) -> None:
        lens = [q + c for q, c in zip(queries, contexts, strict=True)]
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        step = StepPlan.of(starts, torch.tensor(lens).int(), queries, lens, max_queries, workspace)
        query, key, value = split(sum(queries), heads, kv_heads, head_size)
        table, exact_table = torch.zeros(len(queries), 37).int(), torch.zeros(len(queries), 555).int()
        out = torch.empty_like(query)
        kernels.attend(query, key, value, out, cache, step, table, 0.1, frame, blocks, exact_table if exact else None)
        kernels.attend(query, key, value, out, None, step, table, 0.1, None, pages, table)

    for n in {*range(1, min(70, max_requests)), 96, 128, 200, max_requests}:
        if n <= max_requests:
            for queries in range(1, max_queries + 1):
                attend([queries] * n, [500] * n)
    for tokens in (1, 2, 3, 16, 100, 1000, 9000):
        _, key, value = split(tokens, heads, kv_heads, head_size)
        slots = torch.zeros(tokens, dtype=torch.int64)
        kernels.store(cache, key, value, slots, frame, blocks, slots if exact else None)
        kernels.store(None, key, value, None, None, pages, slots)
        if tokens > max_queries:
            for context in (0, 500, 3000):
                attend([1, tokens], [4, context])
    print(warm, len(variants))


if __name__ == "__main__":
    *numbers, exact, framed = map(int, sys.argv[1:])
    main(*numbers, bool(exact), bool(framed))
