"""`powerquant compare`: one prompt answered with an uncompressed and with a compressed cache, side by side.

Both answers are greedy, from the same weights in the same process. The divergence is of the compressed cache while it is
given the uncompressed answer, one token at a time as in generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import quality
from .engine import GenerationResult, Sampling
from .engine.choose import Settings, find_source
from .engine.transformers_backend import TransformersBackend, drained
from .errors import PowerQuantConfigError
from .sparse.protocols import Prompt

_WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Difference:
    """Where the answers part."""

    token: int  # of the answer, from 0
    text: str  # what both say before it
    exact: str  # the token's text; "" where the answer had ended
    compressed: str


@dataclass(frozen=True)
class Comparison:
    exact: GenerationResult
    compressed: GenerationResult
    kl: float  # mean over the exact answer's tokens, nats
    top1: float  # share of them that are the compressed cache's most likely token too
    kl_max: float
    first_difference: Difference | None

    @property
    def speed(self) -> float | None:
        """Compressed tokens/s over exact ones."""
        mine, other = self.compressed.tokens_per_second, self.exact.tokens_per_second
        return mine / other if mine and other else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "exact": self.exact.to_dict(),
            "compressed": self.compressed.to_dict(),
            "kl": self.kl,
            "kl_max": self.kl_max,
            "top1": self.top1,
            "speed": self.speed,
            "first_difference": None if self.first_difference is None else asdict(self.first_difference),
        }


def compare(
    model: str | None = None,
    prompt: str | None = None,
    *,
    max_tokens: int = 64,
    prompt_tokens: int = 512,
    chat: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Comparison:
    """Args:
        prompt: text; None: prompt_tokens of a built-in one
        chat: the prompt is what a user says
        progress: is told what is being done
        options: of the compressed cache

    Raises: PowerQuantConfigError, PowerQuantUnsupportedError as Engine.from_pretrained and Engine.generate
    """
    source = find_source(model, "transformers")
    common = {"load_in_4bit": False, "load_in_8bit": False, "dtype": dtype, "device": device}
    compressed = Settings.of(source, compress=True, options=options, **common)
    progress("loading the model")
    backend = TransformersBackend(Settings.of(source, compress=False, options={}, **common))
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    given = _prompt(backend, prompt, prompt_tokens, chat)
    warm_up = replace(sampling, max_tokens=_WARM_UP_TOKENS)

    progress("answering with the uncompressed cache")
    drained(backend.stream(given, warm_up))
    rows: list[torch.Tensor] = []
    exact = drained(backend.stream(given, sampling, rows.append))
    logprobs = torch.stack(rows).log_softmax(-1)
    tokens = logprobs.argmax(-1)

    progress("answering with the compressed cache")
    backend.use(compressed)
    drained(backend.stream(given, warm_up))
    own: list[torch.Tensor] = []
    answer = drained(backend.stream(given, sampling, lambda logits: own.append(logits.argmax())))

    progress("comparing the distributions")
    got = _forced(backend, backend.encode(given), tokens).log_softmax(-1)
    metrics = quality.compare(logprobs, got, tokens)
    by_token = (logprobs.exp() * (logprobs - got)).sum(-1)
    return Comparison(
        exact=exact,
        compressed=answer,
        kl=metrics.kl,
        kl_max=float(by_token.max()),
        top1=metrics.top1,
        first_difference=_first_difference(backend, tokens.tolist(), torch.stack(own).tolist()),
    )


def _prompt(backend: TransformersBackend, prompt: str | None, count: int, chat: bool) -> Prompt:
    if prompt is not None:
        text = Prompt.of(prompt)
        return Prompt(messages=[{"role": "user", "content": prompt}]) if chat else text
    if chat:
        raise PowerQuantConfigError("--chat needs a prompt; the built-in text is no message")
    text = quality.read_texts()["prose"]
    # what nothing was calibrated or tuned on
    text = text[round(len(text) * quality.SPLITS["report"][0]) :]
    tokenizer = backend.tokenizer
    limit, tokenizer.model_max_length = tokenizer.model_max_length, 10**9
    try:
        ids = tokenizer(text)["input_ids"]
    finally:
        tokenizer.model_max_length = limit
    if not 1 <= count <= len(ids):
        raise PowerQuantConfigError(f"the built-in prompt has 1 to {len(ids)} tokens, got --prompt-tokens {count}")
    return Prompt(token_ids=ids[:count])


def _forced(backend: TransformersBackend, ids: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] fp32 of each of n tokens that the model is made to say after a prompt."""
    cache = backend.new_cache()
    rows = [backend.logits(torch.tensor(ids, device=backend.device), cache)[-1]]
    rows += [backend.logits(token[None], cache)[-1] for token in tokens[:-1]]
    return torch.stack(rows)


def _first_difference(backend: TransformersBackend, exact: list[int], got: list[int]) -> Difference | None:
    same = next((i for i, (a, b) in enumerate(zip(exact, got, strict=False)) if a != b), min(len(exact), len(got)))
    if same == len(exact) == len(got):
        return None

    def text(ids: list[int]) -> str:
        return backend.tokenizer.decode(ids, skip_special_tokens=False)

    return Difference(same, text(exact[:same]), text(exact[same : same + 1]), text(got[same : same + 1]))
