"""Speed of llama.cpp on one model, as powerinfer-bench prints it: tokens a second of prompts and of decoding.

    python benchmarks/llama_cpp_speed.py --model FILE --threads 2 --prompt 512 --decode 32

Needs llama-cpp-python, which may live in an environment of its own. Used by bench_sparse.py.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import llama_cpp


class Timer:
    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def rate(self, count: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.wall
        return {
            "per_second": count / seconds,
            "per_cpu_second": count / (time.process_time() - self.cpu),
            "seconds": seconds,
        }


def decode(context, tokens: list[int], position: int, sequences: int, whole: bool) -> None:
    """One pass: `tokens` of sequence 0, or one token of each sequence."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = position + (i if whole else 0)
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0 if whole else i
        batch.logits[i] = i == len(tokens) - 1 if whole else True
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_synchronize(context)
    llama_cpp.llama_batch_free(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(args.prompt, 1) + args.decode + 8
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rng = random.Random(2)
    prompt = [rng.randrange(vocabulary) for _ in range(max(args.prompt, 1))]
    prompts, decodes = [], []
    for _ in range(args.repeat):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        timer = Timer()
        for at in range(0, len(prompt), 512):
            decode(context, prompt[at : at + 512], at, 1, whole=True)
        if args.prompt:
            prompts.append(timer.rate(len(prompt)))
        timer = Timer()
        for step in range(args.decode):
            decode(context, [rng.randrange(vocabulary)], len(prompt) + step, 1, whole=True)
        if args.decode:
            decodes.append(timer.rate(args.decode))
    print(json.dumps({"prompt": prompts, "decode": decodes, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
