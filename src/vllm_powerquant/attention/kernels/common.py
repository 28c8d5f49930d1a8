"""Jit helpers that several kernels share."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)

# Triton's interpreter multiplies bf16 as the integers that hold it; read when the kernels are first imported
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))

# three TF32 products make one of fp32 operands, exact to 2^-21; AMD's GPUs multiply fp32 as it is
_FP32: tl.constexpr = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def dot(a, b):
    """a [M, K] times b [K, N], products exact for fp16 and bf16 operands, to 2^-21 for fp32 ones; sums in fp32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=_FP32)


@triton.jit
def token_row(start, in_chunk, head, j, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Row of [num_tokens * num_heads] of query j of a kv head's group: token start + in_chunk, head j % GROUP of it."""
    return ((start + in_chunk).to(tl.int64) * KV_HEADS + head) * GROUP + j % GROUP
