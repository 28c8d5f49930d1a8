"""Store: rotating, quantizing and packing new tokens into the cache, beside vLLM's copy of bf16 tokens into its pages.

    python benchmarks/bench_store.py [--tokens 1 32 256 8192 65536] [--providers powerquant ...] [--out ROWS.csv]

One layer of 8 kv heads of 128, K4/V2. Up to 256 tokens are one token of as many requests, each with an exact block; more are
one prompt, of which the window and the first block are also kept exactly, as in the backend. Floor: the bytes read and
written at the bandwidth of a kernel that only reads. A prefill step of 8,192 tokens in 36 layers spends 36 times that row.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import harness
import torch

DEVICE = "cuda:0"
KV_HEADS, HEAD_SIZE = 8, 128
BLOCK_SIZE, EXACT_BLOCK, WINDOW, SINKS = 128, 16, 128, 4
PEER_BLOCK = 16
DECODING = 256  # most tokens that are one token each of as many requests
GOAL = 60  # % of the floor at 65,536 tokens

Setup = tuple[Callable[[], object], str, int]  # call, cache format, bytes it moves


def key_and_value(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, tokens, KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=DEVICE).unbind()


def slots(tokens: int, block_size: int) -> tuple[torch.Tensor, int]:
    """(slot of each token [tokens] int64, number of blocks): blocks in random order, block 0 left out."""
    if tokens <= DECODING:
        blocks = torch.randperm(tokens) + 1
        offsets = torch.randint(0, block_size, (tokens,))
        return (blocks * block_size + offsets).to(DEVICE), tokens + 1
    count = -(-tokens // block_size)
    position = torch.arange(tokens)
    blocks = torch.randperm(count) + 1
    return (blocks[position // block_size] * block_size + position % block_size).to(DEVICE), count + 1


def powerquant(tokens: int, with_exact: bool = True, calibrated: bool = False, value_codec: str = "scalar") -> Setup:
    from vllm_powerquant.attention.cache_format import CacheFormat
    from vllm_powerquant.attention.kernels.cpu_kernels import ExactBlocks
    from vllm_powerquant.attention.kernels.gpu_kernels import GpuKernels

    cache_format = CacheFormat(HEAD_SIZE, 4, 2, value_codec)
    key, value = key_and_value(tokens)
    kernels = GpuKernels(
        cache_format,
        num_heads=KV_HEADS,
        num_kv_heads=KV_HEADS,
        max_requests=1,
        device=torch.device(DEVICE),
        dtype=key.dtype,
    )
    frame = torch.ones(KV_HEADS, 3, HEAD_SIZE, device=DEVICE) if calibrated else None
    slot_mapping, num_blocks = slots(tokens, BLOCK_SIZE)
    slot_bytes = cache_format.layout.slot_bytes
    cache = torch.zeros(num_blocks, KV_HEADS, BLOCK_SIZE, slot_bytes, dtype=torch.uint8, device=DEVICE)
    moved = tokens * (8 + KV_HEADS * (4 * HEAD_SIZE + slot_bytes))
    name = "K4/V2" + (" trellis" if cache_format.is_trellis else "")
    if not with_exact:
        return lambda: kernels.store(cache, key, value, slot_mapping, frame), name, moved
    exact_slots, exact_blocks = slots(tokens, EXACT_BLOCK)
    if tokens > DECODING:
        # block 0 is the null block: what lies between the first block and the window has no exact copy
        null = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
        null[:EXACT_BLOCK] = null[(tokens - WINDOW + 1) // EXACT_BLOCK * EXACT_BLOCK :] = False
        exact_slots[null] %= EXACT_BLOCK
    rows = torch.zeros(exact_blocks, KV_HEADS, EXACT_BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16, device=DEVICE)
    exact = ExactBlocks(rows, WINDOW, SINKS)
    moved += 8 * tokens + int((exact_slots >= EXACT_BLOCK).sum()) * KV_HEADS * 4 * HEAD_SIZE
    return lambda: kernels.store(cache, key, value, slot_mapping, frame, exact, exact_slots), name, moved


def powerquant_packed(tokens: int) -> Setup:
    """Without exact blocks."""
    return powerquant(tokens, with_exact=False)


def powerquant_trellis(tokens: int) -> Setup:
    """With values of the trellis codec."""
    return powerquant(tokens, value_codec="trellis")


def powerquant_calibrated(tokens: int) -> Setup:
    """With keys in a frame."""
    return powerquant(tokens, calibrated=True)


def reshape_and_cache(tokens: int) -> Setup:
    """vLLM's reshape_and_cache_flash, as FLASH_ATTN calls it."""
    from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

    key, value = key_and_value(tokens)
    slot_mapping, num_blocks = slots(tokens, PEER_BLOCK)
    cache = torch.zeros(num_blocks, PEER_BLOCK, KV_HEADS, 2 * HEAD_SIZE, dtype=torch.bfloat16, device=DEVICE)
    keys, values = cache.split(HEAD_SIZE, dim=-1)
    one = torch.ones((), device=DEVICE)
    moved = tokens * (8 + 2 * KV_HEADS * 4 * HEAD_SIZE)
    return lambda: reshape_and_cache_flash(key, value, keys, values, slot_mapping, "auto", one, one), "bf16", moved


PROVIDERS = {
    "powerquant": powerquant,
    "powerquant_packed": powerquant_packed,
    "powerquant_calibrated": powerquant_calibrated,
    "powerquant_trellis": powerquant_trellis,
    "reshape_and_cache": reshape_and_cache,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256, 8192, 65536])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    harness.add_arguments(parser)
    harness.add_timer_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    where = harness.environment(args.commit)
    print(where)
    print(f"read-only kernel: {harness.read_bandwidth() / 1e12:.3f} TB/s; {KV_HEADS} kv heads of {HEAD_SIZE}", flush=True)
    for tokens in args.tokens:
        for provider in args.providers:
            try:
                call, cache_format, moved = PROVIDERS[provider](tokens)
                ms = harness.replay_ms([call], args.replays, args.flush)
            except Exception as error:
                print(f"{tokens:7} tokens {provider:18} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
                torch.cuda.synchronize()
                continue
            case = f"{tokens} tokens, {KV_HEADS} heads d{HEAD_SIZE}"
            row = harness.timed_row("store", case, provider, cache_format, ms, moved, where)
            harness.append_rows(args.out, [row])
            goal = f"  goal {GOAL} %" if provider == "powerquant" and tokens >= 65536 else ""
            print(
                f"{tokens:7} tokens {provider:18} {ms[1]:8.4f} ms ({ms[0]:.4f} to {ms[2]:.4f}), "
                f"{row.read_percent:5.1f} % of floor{goal}",
                flush=True,
            )
            del call
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
