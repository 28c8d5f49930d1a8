"""PowerQuantCache beside Transformers' DynamicCache: decoding speed, bytes held, and how far answers move.

    python benchmarks/bench_cache.py speed --out FILE.csv      # the embedded model after 2,048 tokens, on a CPU
    python benchmarks/bench_cache.py speed --shape qwen3-8b --layers 8 --tokens 1024 32768      # random weights, on a GPU
    python benchmarks/bench_cache.py quality --out FILE.csv    # KL, fed one at a time, in chunks of 50, in a padded batch
    python benchmarks/bench_cache.py memory --tokens 8192      # bytes held, and of a DynamicCache

Speeds are of whole steps of the model (one token a row); the caches take turns, and a ratio is of one round. Quality is that
of bench_quality.py: the prompt's keys and values exact, 128 true tokens after it, KL to the uncompressed cache; `reference`
is the cache in plain PyTorch that bench_quality.py measures, with its four rotations the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import harness
import torch
import transformers
from quality_models import LoadedModel, load
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from vllm_powerquant import PowerQuantCache, quality
from vllm_powerquant.attention.reference_cache import ReferenceCache

SHAPES = {
    "qwen3-8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
}
# name -> (attn_implementation, which cache)
PATHS = {
    "DynamicCache": ("sdpa", DynamicCache),
    "fused": ("powerquant", PowerQuantCache),
    "dequantized": ("sdpa", PowerQuantCache),
}


@dataclass(frozen=True)
class Row:
    """One cache in one setting. value: tokens/s, bytes or nats; ratio: to DynamicCache's of the same round or of itself"""

    bench: str
    model: str
    tokens: int  # held before
    batch: int
    cache: str
    value: float
    low: float
    high: float
    unit: str
    ratio: float
    ratio_low: float
    ratio_high: float
    device: str
    threads: int
    torch: str
    transformers: str
    commit: str
    date: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=("speed", "quality", "memory"))
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma, or a Hugging Face checkpoint")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in bf16 instead of --model")
    parser.add_argument("--layers", type=int, default=8, help="of --shape")
    parser.add_argument("--tokens", type=int, nargs="*", help="context lengths (default: 2048; quality 1024, memory 8192)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--same-lengths",
        action="store_true",
        help="take each round's tokens back, so that lengths come again: cuDNN's attention, which SDPA takes on a GPU, "
        "plans anew for each new one",
    )
    parser.add_argument("--no-cudnn", action="store_true", help="SDPA without cuDNN's attention: PyTorch's FlashAttention 2")
    parser.add_argument("--paths", nargs="*", choices=PATHS, default=list(PATHS))
    parser.add_argument("--bits", type=int, nargs=2, default=(4, 2), metavar=("KEY", "VALUE"))
    harness.add_arguments(parser)
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> tuple[str, PreTrainedModel, LoadedModel | None]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.shape:
        loaded = load(args.model)
        return loaded.name, loaded.model.to(device), loaded
    config = transformers.Qwen3Config(**SHAPES[args.shape], num_hidden_layers=args.layers)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    torch.set_default_dtype(torch.float32)
    return f"{args.shape}, {args.layers} layers", model, None


def new_cache(path: str, model: PreTrainedModel, args: argparse.Namespace) -> Cache:
    implementation, kind = PATHS[path]
    model.set_attn_implementation(implementation)
    if kind is DynamicCache:
        return DynamicCache(config=model.config)
    return PowerQuantCache(model, key_bits=args.bits[0], value_bits=args.bits[1])


def prefilled(path: str, model: PreTrainedModel, prompt: torch.Tensor, args: argparse.Namespace) -> Cache:
    cache = new_cache(path, model, args)
    for chunk in prompt.split(2048, 1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode(model: PreTrainedModel, cache: Cache, steps: int) -> float:
    """Tokens/s of one row: greedy steps of the whole model."""
    token = torch.ones(cache.batch_size if hasattr(cache.layers[0], "batch_size") else _batch(cache), 1, dtype=torch.int64)
    token = token.to(model.device)
    _synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    _synchronize()
    return steps / (time.perf_counter() - start)


def _batch(cache: Cache) -> int:
    return cache.layers[0].keys.shape[0]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speed(args: argparse.Namespace) -> list[Row]:
    name, model, _ = make_model(args)
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn)
    rows = []
    for tokens in args.tokens or [2048]:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(2, 40000, (args.batch, tokens), generator=generator).to(model.device)
        caches = {path: prefilled(path, model, prompt, args) for path in args.paths}
        rates = {path: [] for path in args.paths}
        for _ in tqdm(range(args.rounds + 1), desc=f"{tokens} tokens", disable=None):
            for path, cache in caches.items():
                model.set_attn_implementation(PATHS[path][0])
                rates[path].append(decode(model, cache, args.steps))
                if args.same_lengths:
                    cache.crop(-args.steps)
        for path, rate in rates.items():
            rate = rate[1:]  # the first compiles and warms up
            ratios = [x / y for x, y in zip(rate, rates.get("DynamicCache", rate)[-len(rate) :], strict=True)]
            bench = "speed" + ", no cuDNN" * args.no_cudnn + ", lengths come again" * args.same_lengths
            rows.append(row(args, bench, name, tokens, path, rate, "tokens/s", ratios))
        del caches
    return rows


def memory(args: argparse.Namespace) -> list[Row]:
    name, model, _ = make_model(args)
    rows = []
    for tokens in args.tokens or [8192]:
        prompt = torch.randint(2, 40000, (args.batch, tokens), generator=torch.Generator().manual_seed(0))
        for path in args.paths[1:]:
            report = prefilled(path, model, prompt.to(model.device), args).memory_report()
            print(report)
            rows.append(row(args, "memory", name, tokens, path, [report.total_bytes], "bytes", [report.ratio]))
    return rows


def fed(model: PreTrainedModel, segment: quality.Segment, cache: Cache, path: str, chunk: int) -> quality.Metrics:
    """KL of a segment's continuation after its exact prompt, fed `chunk` tokens at a time."""
    model.set_attn_implementation("sdpa")
    quality.filled(cache, segment.exact)
    model.set_attn_implementation(PATHS[path][0])
    logprobs = quality.score(model, cache, segment.continuation[:-1], chunk)
    model.set_attn_implementation("sdpa")
    return quality.compare(segment.logprobs, logprobs, segment.continuation[1:])


@torch.inference_mode()
def padded(model: PreTrainedModel, segments: list[quality.Segment], path: str, args: argparse.Namespace) -> list[float]:
    """KL of each segment, all in one batch: each prompt lacks another number of first tokens, and is padded to the longest.

    So the uncompressed answer is asked for again, of the shortened prompt. Prompts run through the model as they are.
    """
    cut = [prompt.prompt[64 * i :] for i, prompt in enumerate(segments)]
    longest = max(map(len, cut))
    ids = torch.stack([torch.nn.functional.pad(x, (longest - len(x), 0)) for x in cut])
    mask = torch.stack([torch.arange(longest) >= longest - len(x) for x in cut]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = new_cache(path, model, args)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    got = []
    for i in range(segments[0].positions):
        token = torch.stack([s.continuation[i] for s in segments])[:, None]
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        position = positions[:, -1:] + 1 + i
        out = model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        got.append(out.logits[:, -1].float().log_softmax(-1))
    kl = []
    for row_, (segment, prompt) in enumerate(zip(segments, cut, strict=True)):
        exact = DynamicCache(config=model.config)
        model.set_attn_implementation("sdpa")
        model(prompt[None], past_key_values=exact, use_cache=True, logits_to_keep=1)
        want = quality.score(model, exact, segment.continuation[:-1], 16)
        kl.append(quality.compare(want, torch.stack([x[row_] for x in got]), segment.continuation[1:]).kl)
    return kl


def quality_rows(args: argparse.Namespace) -> list[Row]:
    name, model, loaded = make_model(args)
    rows, options = [], {"key_bits": args.bits[0], "value_bits": args.bits[1]}
    config = model.config.get_text_config(decoder=True)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for tokens in args.tokens or [1024]:
        segments = []
        for text, content in quality.read_texts().items():
            runs = quality.cut(loaded.ids(content), quality.SPLITS["report"], tokens + 128, 2, text)
            segments += [quality.make_segment(model, text, [*loaded.prefix, *run], tokens) for run in runs]
        cells = {f"reference, rotation {seed}, chunks of 16": ("DynamicCache", 16, seed) for seed in range(4)} | {
            f"{path}, {'one at a time' if chunk == 1 else f'chunks of {chunk}'}": (path, chunk, None)
            for path in ("fused", "dequantized")
            for chunk in (1, 16, 50)
        }
        found: dict[str, list[float]] = {}
        for cell, (path, chunk, seed) in tqdm(cells.items(), desc=f"{tokens} tokens", disable=None):
            found[cell] = []
            for segment in segments:
                cache = (
                    new_cache(path, model, args)
                    if seed is None
                    else ReferenceCache(config.num_hidden_layers, head_size, seed=seed, **options)
                )
                found[cell].append(fed(model, segment, cache, path, chunk).kl)
        for path in ("fused", "dequantized"):
            found[f"{path}, left-padded batch, one at a time"] = padded(model, segments, path, args)
        base = found["fused, chunks of 16"]
        for cell, kl in found.items():
            rows.append(row(args, "KL", name, tokens, cell, kl, "nats", [x / y for x, y in zip(kl, base, strict=True)]))
    return rows


def row(args, bench: str, model: str, tokens: int, cache: str, values: list[float], unit: str, ratios: list[float]) -> Row:
    """Medians with least and greatest; of KL the mean."""
    middle = statistics.mean if bench == "KL" else statistics.median
    made = Row(
        bench,
        model,
        tokens,
        args.batch,
        f"{cache}, K{args.bits[0]}/V{args.bits[1]}" if cache != "DynamicCache" else cache,
        middle(values),
        min(values),
        max(values),
        unit,
        middle(ratios),
        min(ratios),
        max(ratios),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        torch.get_num_threads(),
        torch.__version__,
        transformers.__version__,
        args.commit or harness.git_commit(),
        time.strftime("%Y-%m-%d"),
    )
    print(
        f"{tokens:6} tokens  {made.cache:58} {made.value:12.5g} {unit} ({made.low:.4g} to {made.high:.4g})  ratio "
        f"{made.ratio:.3f} ({made.ratio_low:.3f} to {made.ratio_high:.3f})",
        flush=True,
    )
    harness.append_rows(args.out, [made])
    return made


if __name__ == "__main__":
    arguments = parse()
    with torch.inference_mode():
        {"speed": speed, "quality": quality_rows, "memory": memory}[arguments.bench](arguments)
