"""Exact rows against their packed copies in a real engine under pressure: a small pool, chunked prefill, prefix-cache hits,
n-gram speculative decoding and many preemptions at once.

    python benchmarks/stress_exact.py [--rows 2000000] [--preemptions 100]

At every step, in three layers, each residual and sink row that attention reads exactly is quantized again and compared with
the bytes of its packed copy. Prints one JSON line; exit code 1 if a row differs or a block is lost.

One difference is allowed for and counted apart: rows of a request's first block. A prefix-cache hit takes the packed block
and the exact one by hash, and where several requests computed the same tokens, in other batches and so with other rounding,
the two may come from two of them. There at most 5 % of the codes may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time

import torch

WORDS = (
    "Alice has a red ball and Bob has a blue ball . The quick brown fox jumps over the lazy dog near Carol ' s house".split()
)


class Checker:
    """Compares exact rows with packed copies inside CpuKernels.attend."""

    def __init__(self, layers: int = 3) -> None:
        self.layers = layers
        self._seen: dict[int, int] = {}  # id of a layer's kernels -> its number
        self.rows = self.mismatches = self.null_positions = 0
        self.first_block_rows = self.other_computation_rows = 0
        self.codes_differing = 0.0  # of a request's first block, at most

    def install(self) -> None:
        from vllm_powerquant.attention.kernels.cpu_kernels import CpuKernels

        attend = CpuKernels.attend

        def checked(kernels, *args):
            attend(kernels, *args)
            self.check(kernels, *args)

        CpuKernels.attend = checked

    def check(self, kernels, query, key, value, out, cache, plan, table, scale, frame=None, exact=None, exact_table=None):
        from vllm_powerquant.attention import reference

        number = self._seen.setdefault(id(kernels), len(self._seen))
        if exact is None or number % 10 >= 1 or number >= 10 * self.layers:
            return
        size, block_size, d = exact.cache.shape[2], cache.shape[2], kernels.format.head_size
        slots, exact_slots, in_first_block = [], [], []
        _, _, query_lens, seq_lens = plan.every
        for r, context in enumerate((seq_lens - query_lens).tolist()):
            positions = reference.exact_positions(context, exact.residual_tokens, exact.sink_tokens, exact_table[r], size)
            wanted = min(context, exact.sink_tokens) + min(max(context - exact.sink_tokens, 0), exact.residual_tokens - 1)
            self.null_positions += wanted - len(positions)
            in_first_block.append(positions < size)
            slots.append(table[r].long()[positions // block_size] * block_size + positions % block_size)
            exact_slots.append(exact_table[r].long()[positions // size] * size + positions % size)
        slots, exact_slots = torch.cat(slots), torch.cat(exact_slots)
        rows = exact.cache[exact_slots // size, :, exact_slots % size].contiguous()
        n = len(rows)
        again = torch.empty(-(-n // 64), cache.shape[1], 64, cache.shape[3], dtype=torch.uint8)
        where = torch.arange(n)
        kernels.store(again, rows[..., :d], rows[..., d:], where, frame)
        layout = kernels.format.layout
        packed = reference._storage_bytes(cache)[layout.slot_addresses(slots, cache)]
        fresh = reference._storage_bytes(again)[layout.slot_addresses(where, again)]
        differs, first = (packed != fresh).any(-1).any(-1), torch.cat(in_first_block)
        self.mismatches += int((differs & ~first).sum())
        self.rows += int((~first).sum())
        self.first_block_rows += int(first.sum())
        other = differs & first
        if other.any():
            self.other_computation_rows += int(other.sum())
            (key, _, value, _), (key_again, _, value_again, _) = (layout.unpack_slots(x[other]) for x in (packed, fresh))
            for a, b in ((key, key_again), (value, value_again)):
                self.codes_differing = max(self.codes_differing, (a != b).float().mean().item())


def run(model: str, rows: int, preemptions: int, seconds: float = 1200) -> dict:
    """Serve waves of requests until both counts are reached or time is up; counts, and free blocks before and after."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    checker = Checker()
    checker.install()
    llm = LLM(
        model,
        attention_backend="POWERQUANT",
        max_model_len=512,
        kv_cache_memory_bytes=20 << 20,
        enforce_eager=True,
        max_num_batched_tokens=128,
        max_num_seqs=20,
        block_size=64,
        disable_log_stats=False,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
    )
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    free_before, start = manager.block_pool.get_num_free_blocks(), time.monotonic()
    rng = random.Random(0)
    prefixes = [" ".join(rng.choices(WORDS, k=n)) for n in (75, 90, 140)]
    waves = 0
    while time.monotonic() - start < seconds:
        prompts = [prefixes[i % 3] + " " + " ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for i in range(40)]
        limits = [SamplingParams(temperature=0, max_tokens=rng.randint(40, 200), ignore_eos=True) for _ in prompts]
        llm.generate(prompts, limits, use_tqdm=False)
        waves += 1
        metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        if checker.rows >= rows and metrics["vllm:num_preemptions"] >= preemptions:
            break
    return {
        "rows": checker.rows,
        "mismatches": checker.mismatches,
        "first_block_rows": checker.first_block_rows,
        "of_another_computation": checker.other_computation_rows,
        "their_codes_differing": round(checker.codes_differing, 4),
        "positions_read_packed": checker.null_positions,
        "preemptions": metrics["vllm:num_preemptions"],
        "prefix_hit_tokens": metrics["vllm:prefix_cache_hits"],
        "drafts_accepted": metrics["vllm:spec_decode_num_accepted_tokens"],
        "drafts": metrics["vllm:spec_decode_num_draft_tokens"],
        "requests": 40 * waves,
        "pool_blocks": manager.block_pool.num_gpu_blocks,
        "free_before": free_before,
        "free_after": manager.block_pool.get_num_free_blocks(),
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face checkpoint (default: the embedded SmolLM2)")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--preemptions", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1200)
    args = parser.parse_args()
    from vllm_powerquant.model import prepare_model

    report = run(args.model or str(prepare_model()), args.rows, args.preemptions, args.seconds)
    print(json.dumps(report), flush=True)
    bad = report["mismatches"] or report["their_codes_differing"] > 0.05 or report["free_before"] != report["free_after"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
