"""How far a compressed cache moves a model's answers: teacher-forced decoding through a Transformers cache.

A prompt's keys and values are computed once, exactly, and given to every cache; the true tokens that follow are decoded in
chunks through it. Each position's distribution is compared with the one that the uncompressed cache gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .attention import reference
from .attention.rotation import rotate
from .codebooks.tables import Codebook
from .errors import PowerQuantConfigError
from .hf.cache import cache_name

# what is calibrated, tuned and reported on: texts/README.md
TEXTS = Path(__file__).parent / "texts"
# parts of a text that nothing is carried across: fractions of its tokens
SPLITS = {"calibrate": (0.0, 0.25), "tune": (0.25, 0.5), "report": (0.5, 1.0)}

Chunk = tuple[torch.Tensor, torch.Tensor]  # keys, values [1, num_kv_heads, n, head_size] of one layer


@dataclass(frozen=True)
class Metrics:
    """Means over the positions of one text, against the uncompressed cache on the same text."""

    kl: float  # KL(uncompressed || compressed), nats
    top1: float  # share of positions whose most likely token is the same
    tv: float  # total variation distance
    nll: float  # of the true next token, nats: exp of its mean over texts is the perplexity
    nll_exact: float  # the same with the uncompressed cache


@dataclass(frozen=True)
class Estimate:
    mean: float
    half_width: float  # of the 95 % confidence interval of the mean


@dataclass
class Segment:
    """One text of the benchmark: a prompt, the exact keys and values of it, and what the uncompressed cache says next."""

    name: str
    prompt: torch.Tensor  # int64, the tokens whose keys and values are in `exact`: all but the prompt's last
    continuation: torch.Tensor  # [positions + 1] int64, from the prompt's last token on: the last one is only predicted
    exact: list[Chunk]
    logprobs: torch.Tensor  # [positions, vocabulary] fp32

    @property
    def positions(self) -> int:
        return len(self.continuation) - 1


def cut(ids: Sequence[int], part: tuple[float, float], tokens: int, count: int, name: str = "this text") -> list[list[int]]:
    """`count` runs of `tokens` ids from a part of a text, spread evenly over it; they overlap only if they must.

    Args:   part: where it begins and ends, as fractions of the text: one of SPLITS
    Raises: PowerQuantConfigError if the part is too short for one run, or none is asked for.
    """
    if tokens < 1 or count < 1:
        raise PowerQuantConfigError(f"runs through a text must be 1 or more, of 1 token or more, got {count} of {tokens}")
    begin, end = (round(len(ids) * x) for x in part)
    room = end - begin - tokens
    if room < 0:
        raise PowerQuantConfigError(
            f"{name} has {end - begin} tokens for this, {tokens} are wanted; use a longer text or fewer tokens a run"
        )
    starts = [begin + (room * i // (count - 1) if count > 1 else 0) for i in range(count)]
    return [list(ids[start : start + tokens]) for start in starts]


@torch.inference_mode()
def make_segment(model: PreTrainedModel, name: str, ids: Sequence[int], prompt_tokens: int, chunk: int = 16) -> Segment:
    """Prefill the first prompt_tokens of ids and score the rest with the uncompressed cache."""
    prompt, rest = (torch.tensor(x, device=model.device) for x in (ids[:prompt_tokens], ids[prompt_tokens - 1 :]))
    cache = DynamicCache()
    # the prompt's last token is the first one decoded: its distribution is of the first continuation token
    model(prompt[None, :-1], **{cache_name(model): cache}, use_cache=True, logits_to_keep=1)
    exact = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    logprobs = score(model, cache, rest[:-1], chunk)
    return Segment(name, prompt[:-1], rest, exact, logprobs)


@torch.inference_mode()
def score(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Log-probabilities [n, vocabulary] fp32 of what follows each of n tokens, fed through the cache in chunks."""
    rows, held = [], {cache_name(model): cache}
    for start in range(0, len(tokens), chunk):
        logits = model(tokens[None, start : start + chunk], **held, use_cache=True).logits
        rows.append(logits[0].float().log_softmax(-1))
    return torch.cat(rows)


def filled(cache: Cache, exact: Iterable[Chunk]) -> Cache:
    """The cache, given every layer's exact keys and values of a prompt."""
    for layer, (keys, values) in enumerate(exact):
        cache.update(keys, values, layer)
    return cache


def measure(model: PreTrainedModel, segment: Segment, make_cache: Callable[[], Cache], chunk: int = 16) -> Metrics:
    """Decode a segment through a new cache that is given the prompt's exact keys and values."""
    cache = filled(make_cache(), segment.exact)
    return compare(segment.logprobs, score(model, cache, segment.continuation[:-1], chunk), segment.continuation[1:])


@dataclass(frozen=True)
class Distortion:
    """Relative mean square error |x - x^|^2 / |x|^2 of a codec, over all vectors, and how much of x is left in x^."""

    error: float
    gain: float  # <x, x^> / |x|^2: 1 for an unbiased scale


def distortion(x: torch.Tensor, codebook: Codebook, scale_factor: float) -> Distortion:
    """x [..., head_size] through reference.quantize and back."""
    h = rotate(x.double())
    got = reference.dequantize(*reference.quantize(x.float(), codebook, scale_factor), codebook)
    energy = h.square().sum()
    return Distortion(float((h - got).square().sum() / energy), float((h * got).sum() / energy))


@dataclass(frozen=True)
class Needle:
    """A fact hidden in a long text and asked for behind it; the answer is the last tokens of the segment."""

    depth: float  # of the fact in the text, 0 to 1
    segment: Segment
    answer_tokens: int


# who has which code, one pair for each depth
_CODES = (("Alice", 48271), ("Robert", 90315), ("Maria", 17642), ("Kenji", 63508), ("Olga", 25986))
NEEDLE_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def make_needles(
    model: PreTrainedModel,
    encode: Callable[[str], list[int]],
    filler: Sequence[int],
    tokens: int,
    prefix: Sequence[int] = (),
) -> list[Needle]:
    """One needle at each depth of `tokens` tokens of filler, the fact among them.

    Args:   encode: text to token ids, without a BOS; prefix: token ids before the text
    Raises: PowerQuantConfigError if there is too little filler.
    """
    needles = []
    for depth, (name, code) in zip(NEEDLE_DEPTHS, _CODES, strict=True):
        fact = encode(f"\n\nThe secret code of {name} is {code}.\n\n")
        question = encode(f"\n\nQuestion: What is the secret code of {name}?\nAnswer: The secret code of {name} is")
        answer = encode(f" {code}")
        room = tokens - len(prefix) - len(fact)
        if not 0 < room <= len(filler):
            raise PowerQuantConfigError(f"a needle in {tokens} tokens needs {room} tokens of filler, got {len(filler)}")
        at = round(room * depth)
        text = [*prefix, *filler[:at], *fact, *filler[at:room]]
        segment = make_segment(model, f"needle {depth}", text + question + answer, len(text))
        needles.append(Needle(depth, segment, len(answer)))
    return needles


def find_needle(model: PreTrainedModel, needle: Needle, cache: Cache | None) -> tuple[bool, float]:
    """(whether every token of the answer is the most likely one, mean negative log-likelihood of them in nats).

    Args: cache: a new one, or None for the uncompressed answer
    """
    segment, n = needle.segment, needle.answer_tokens
    logprobs = segment.logprobs
    if cache is not None:
        logprobs = score(model, filled(cache, segment.exact), segment.continuation[:-1], segment.positions)
    target, last = segment.continuation[-n:], logprobs[-n:]
    return bool((last.argmax(-1) == target).all()), float(-last.gather(1, target[:, None]).mean())


def compare(exact: torch.Tensor, got: torch.Tensor, targets: torch.Tensor) -> Metrics:
    """Args: exact, got [n, vocabulary] fp32 log-probabilities; targets [n] int64, the tokens that followed"""
    p = exact.exp()
    return Metrics(
        kl=float((p * (exact - got)).sum(-1).mean()),
        top1=float((exact.argmax(-1) == got.argmax(-1)).float().mean()),
        tv=float((p - got.exp()).abs().sum(-1).mean() / 2),
        nll=float(-got.gather(1, targets[:, None]).mean()),
        nll_exact=float(-exact.gather(1, targets[:, None]).mean()),
    )


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean of values [texts][seeds] and the interval that its scatter over texts and seeds leaves.

    Texts and seeds are crossed (each seed sees each text), so their parts of the variance are taken apart: for r texts and c
    seeds the variance of the mean is (MS_texts + MS_seeds - MS_rest) / (r c) (two-way random effects; H. Scheffé, "The
    Analysis of Variance", 1959, chapter 7). With one seed only texts vary. Student's t with min(r, c) - 1 degrees of
    freedom, or r - 1.
    """
    x = torch.tensor(values, dtype=torch.float64)
    texts, seeds = x.shape
    mean = float(x.mean())
    if texts < 2:
        return Estimate(mean, math.nan)
    rows, columns = x.mean(1), x.mean(0)
    ms_texts = seeds * float(((rows - mean) ** 2).sum()) / (texts - 1)
    if seeds < 2:
        return Estimate(mean, _student(texts - 1) * math.sqrt(ms_texts / texts))
    ms_seeds = texts * float(((columns - mean) ** 2).sum()) / (seeds - 1)
    rest = x - rows[:, None] - columns[None, :] + mean
    ms_rest = float((rest**2).sum()) / ((texts - 1) * (seeds - 1))
    variance = max(ms_texts + ms_seeds - ms_rest, ms_texts, ms_seeds) / (texts * seeds)
    return Estimate(mean, _student(min(texts, seeds) - 1) * math.sqrt(variance))


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def perplexity(metrics: Sequence[Metrics]) -> tuple[float, float]:
    """Perplexity over texts of equal length: compressed, uncompressed."""
    n = len(metrics)
    return tuple(math.exp(sum(getattr(m, name) for m in metrics) / n) for name in ("nll", "nll_exact"))


def metric_names() -> list[str]:
    return [field.name for field in fields(Metrics)]


def read_texts() -> dict[str, str]:
    """The built-in texts by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.txt"))}
