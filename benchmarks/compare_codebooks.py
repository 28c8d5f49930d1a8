"""Every codebook solver (codebooks/solvers.py) on one table, on the embedded SmolLM2.

    python benchmarks/compare_codebooks.py --out benchmarks/results/quality/codebooks.csv

Solvers that look at samples are fitted on queries and keys of the texts' "calibrate" part; the errors of captured keys and
scores are of the "report" part, KL through the Transformers cache is of the "tune" part, with 8-bit values, the sinks exact
and nothing else, over texts and rotations. --calibrated does all of it on keys centred and scaled as `powerquant calibrate`
does, with the "calibrate" part's statistics.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import dataclass

import harness
import numpy as np
import quality_models
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_powerquant import quality
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.reference import in_frame
from vllm_powerquant.attention.reference_cache import ReferenceCache
from vllm_powerquant.attention.rotation import rotate
from vllm_powerquant.calibration import ModelShape, key_statistics, watched_attention
from vllm_powerquant.codebooks.attention_aware import AttentionSamples, attention_kl
from vllm_powerquant.codebooks.fuzzy import Points
from vllm_powerquant.codebooks.solvers import solve
from vllm_powerquant.codebooks.tables import Codebook, load_codebook

SINKS = 4
# name: solver, objective, whether it is given samples
CASES = {
    "lloyd_max": ("lloyd_max", "mse", False),
    "fuzzy_c_means": ("fuzzy_c_means", "mse", False),
    "cma_es": ("cma_es", "mse", False),
    "lloyd_max, captured keys": ("lloyd_max", "mse", True),
    "fuzzy_c_means, captured keys": ("fuzzy_c_means", "mse", True),
    "cma_es, attention": ("cma_es", "attention", True),
    "attention_aware": ("attention_aware", "attention", True),
}
SHIPPED = "lloyd_max, shipped (8-bit levels)"
BASELINE = "lloyd_max"


class CodebookFormat(CacheFormat):
    """A format whose keys use another codebook than the shipped one of their width."""

    def __init__(self, codebook: Codebook, value_bits: int) -> None:
        super().__init__(codebook.head_size, codebook.bits, value_bits)
        self.__dict__["key_codebook"] = codebook  # before the cached property looks for it


@dataclass(frozen=True)
class Row:
    """One codebook: its errors, and the divergence from the uncompressed cache on one text and rotation."""

    model: str
    keys: str  # "plain" or "calibrated"
    bits: int
    codebook: str
    seconds: float  # to solve
    mse: float  # exact, of a coordinate of a random unit vector
    captured_mse: float  # of captured keys' coordinates, held out
    attention_kl: float  # of attention weights on captured queries and keys, held out, nats
    text: str
    prompt_tokens: int
    positions: int
    seed: int
    kl: float
    torch: str
    transformers: str
    commit: str
    date: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--tokens", type=int, default=512, help="of each captured run and each prompt")
    parser.add_argument("--positions", type=int, default=128, help="tokens decoded after the prompt")
    parser.add_argument("--segments", type=int, default=1, help="of each text")
    parser.add_argument("--seeds", type=int, default=2, help="rotations of the KL; codebooks are fitted under the first")
    parser.add_argument("--calibrated", action="store_true", help="keys centred and scaled")
    parser.add_argument("--threads", type=int, default=1)
    harness.add_arguments(parser)
    return parser.parse_args()


@torch.inference_mode()
def capture(
    model, runs: list[list[int]], layer_step: int, frames: torch.Tensor | None, stride: int = 16
) -> AttentionSamples:
    """Rotated queries of every `stride`-th position behind the first quarter, and all keys, of every layer_step-th layer.

    Args: frames [layers, num_kv_heads, 3, head_size] fp32: see reference.in_frame
    """
    tokens = len(runs[0])
    positions = torch.arange(tokens // 4, tokens, stride)
    queries, keys = [], []

    def see(layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        if layer % layer_step == 0:
            # [kv heads, group, positions, head_size]: heads that share keys as more queries of them
            query = query[0, :, positions].float().unflatten(0, (key.shape[1], -1))
            key = key[0].float()
            if frames is not None:
                key = in_frame(key.transpose(0, 1), frames[layer]).transpose(0, 1)
                query = query * frames[layer][:, None, 2, None]
            queries.append(rotate(query).flatten(1, 2))
            keys.append(rotate(key))

    with watched_attention(model, see):
        for ids in tqdm(runs, "capturing", leave=False):
            model(torch.tensor(ids)[None], use_cache=False, logits_to_keep=1)
    group = queries[0].shape[1] // len(positions)
    return AttentionSamples(
        torch.cat(queries).numpy(),
        torch.cat(keys).numpy(),
        np.tile(positions.numpy(), group),
        scaling=keys[0].shape[-1] ** -0.5,
        sink_tokens=SINKS,
    )


def cache_with(model, codebook: Codebook, frames: torch.Tensor | None, seed: int) -> ReferenceCache:
    shape = ModelShape.of(model.config.get_text_config())
    options = {"residual_tokens": 0, "sink_tokens": SINKS, "key_frames": frames, "seed": seed}
    cache = ReferenceCache(shape.layers, shape.head_size, key_bits=codebook.bits, value_bits=8, **options)
    for layer in cache.layers:
        layer.format = CodebookFormat(codebook, 8)
    return cache


@dataclass(frozen=True)
class Setting:
    """What is the same for every codebook."""

    model: PreTrainedModel
    head_size: int
    frames: torch.Tensor | None
    fitted_on: AttentionSamples
    held_out: AttentionSamples
    segments: list[quality.Segment]
    seeds: int
    tokens: int
    where: dict[str, str]

    @functools.cached_property
    def held_out_points(self) -> Points:
        return Points.of_coordinates(self.held_out.coordinates)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    setting = prepare(args)
    print(f"smollm2, head size {setting.head_size}, {'calibrated' if args.calibrated else 'plain'} keys, {setting.where}")
    print(
        f"KL: {len(setting.segments)} texts x {args.seeds} rotations x {args.positions} tokens after {args.tokens}; "
        f"difference from {BASELINE}'s with its 95 % interval"
    )
    for bits in args.bits:
        columns = (
            ("exact MSE", 11),
            ("captured", 10),
            ("weights KL", 12),
            ("seconds", 9),
            ("KL, nats", 10),
            ("difference", 21),
        )
        print("\n" + f"K{bits}/V8".ljust(36) + "".join(title.rjust(width) for title, width in columns))
        baseline = None
        for name in (*CASES, SHIPPED):
            rows = measure(setting, bits, name)
            harness.append_rows(args.out, [row for of_text in rows for row in of_text])
            if name == BASELINE:
                baseline = rows
            print_line(name, rows, baseline)


def prepare(args: argparse.Namespace) -> Setting:
    import transformers

    loaded = quality_models.load("smollm2")
    model = loaded.model
    ids = {name: loaded.ids(text) for name, text in quality.read_texts().items()}
    where = harness.environment(args.commit)
    where = {"torch": where["torch"], "transformers": transformers.__version__} | {k: where[k] for k in ("commit", "date")}

    def runs(split: str, tokens: int, count: int) -> list[list[int]]:
        return [run for x in ids.values() for run in quality.cut(x, quality.SPLITS[split], tokens, count)]

    frames = None
    if args.calibrated:
        frames = key_statistics(model, tqdm(runs("calibrate", 1024, 2), "calibrating", leave=False)).frames()
    # fitting may evaluate its samples hundreds of times: a third of the layers
    fitted_on = capture(model, runs("calibrate", args.tokens, args.segments), 3, frames)
    held_out = capture(model, runs("report", args.tokens, args.segments), 1, frames)
    names = [f"{name} {i}" for name in ids for i in range(args.segments)]
    tune = zip(names, runs("tune", args.tokens + args.positions, args.segments), strict=True)
    segments = [
        quality.make_segment(model, name, run, args.tokens) for name, run in tqdm(list(tune), "uncompressed", leave=False)
    ]
    head_size = ModelShape.of(model.config.get_text_config()).head_size
    return Setting(model, head_size, frames, fitted_on, held_out, segments, args.seeds, args.tokens, where)


def measure(setting: Setting, bits: int, name: str) -> list[list[Row]]:
    """Rows [texts][seeds] of a codebook."""
    progress = tqdm(total=1 + len(setting.segments) * setting.seeds, desc=f"{bits} bits, {name}", leave=False)
    begin = time.perf_counter()
    if name == SHIPPED:
        codebook = load_codebook(setting.head_size, bits)
    else:
        solver, objective, sampled = CASES[name]
        samples = setting.fitted_on if sampled else None
        codebook = solve(solver, setting.head_size, bits, objective=objective, samples=samples).codebook()
    seconds = time.perf_counter() - begin
    progress.update()
    positive = codebook.centroids[2 ** (bits - 1) :].astype(np.float64)
    errors = (codebook.mse, setting.held_out_points.mse(positive), attention_kl(setting.held_out, positive))
    keys = "plain" if setting.frames is None else "calibrated"
    rows = []
    for segment in setting.segments:
        rows.append([])
        for seed in range(setting.seeds):
            cache = cache_with(setting.model, codebook, setting.frames, seed)
            kl = quality.measure(setting.model, segment, lambda cache=cache: cache).kl
            case = (segment.name, setting.tokens, segment.positions, seed, kl)
            rows[-1].append(Row("smollm2", keys, bits, name, seconds, *errors, *case, **setting.where))
            progress.update()
    progress.close()
    return rows


def print_line(name: str, rows: list[list[Row]], baseline: list[list[Row]]) -> None:
    first = rows[0][0]
    mean = quality.estimate([[row.kl for row in of_text] for of_text in rows]).mean
    # the same texts and rotations in pairs
    pairs = [zip(a, b, strict=True) for a, b in zip(rows, baseline, strict=True)]
    change = quality.estimate([[a.kl - b.kl for a, b in of_text] for of_text in pairs])
    print(
        f"{name:36}{first.mse:11.6f}{first.captured_mse:10.6f}{first.attention_kl:12.6f}{first.seconds:9.2f}{mean:10.5f}"
        + ("" if name == BASELINE else f"{change.mean:+.5f} +- {change.half_width:.5f}".rjust(21)),
        flush=True,
    )


if __name__ == "__main__":
    main()
