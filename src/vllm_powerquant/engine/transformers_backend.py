"""Answers from a Transformers model in this process, one token at a time, through a compressed cache."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration import first_line
from ..errors import PowerQuantConfigError, PowerQuantError
from ..sparse.protocols import Prompt
from ..sparse.text import choose_device
from .chat import render
from .choose import Settings
from .result import GenerationResult, Stopwatch
from .sampling import Sampling
from .text import Detokenizer, StopTexts

try:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache

    from ..hf import MemoryReport, PowerQuantCache, patch, unpatch
    from ..hf.cache import cache_name
except ImportError as error:
    raise PowerQuantError(f"backend transformers: {error}; run: pip install 'vllm-powerquant[hf,model]'") from None

_REMEDY = "give a checkpoint's folder or name"


@dataclass
class _Fed:
    """A cache and the tokens that it was fed."""

    ids: list[int]
    cache: Cache


class TransformersBackend:
    """A model, its tokenizer, and a new cache for each answer, but for one that goes on with the last conversation."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = choose_device(settings.device)
        self.tokenizer = _load(AutoTokenizer, settings, {})
        self.model = self._load_model()
        self._patched = False
        self._conversation: _Fed | None = None
        self.use(settings)
        config = self.model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {token for token in (*ends, self.tokenizer.eos_token_id) if token is not None}
        # prefill makes one row of logits where the model can, not one a prompt token
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if takes else {}
        self._cache_name = cache_name(self.model)

    def _load_model(self) -> PreTrainedModel:
        settings = self.settings
        options: dict[str, Any] = {"dtype": settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)}
        if settings.load_in_4bit or settings.load_in_8bit:
            from transformers import BitsAndBytesConfig

            compute = {"bnb_4bit_compute_dtype": torch.bfloat16} if settings.load_in_4bit else {}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=settings.load_in_4bit, load_in_8bit=settings.load_in_8bit, **compute
            )
            options["device_map"] = {"": self.device}
            return _load(AutoModelForCausalLM, settings, options).eval()
        return _load(AutoModelForCausalLM, settings, options).eval().to(self.device)

    def use(self, settings: Settings) -> None:
        """From now on answers have these settings' cache; the model stays.

        Raises: PowerQuantConfigError, PowerQuantUnsupportedError if it cannot be made for this model
        """
        if self._patched:
            unpatch(self.model)
            self._patched = False
        self._conversation = None
        self.settings = settings
        if settings.compress:
            options = cache_options(settings)
            PowerQuantCache(self.model, **options)
            # who names an attention implementation gets it; the cache then decodes for it
            if "attn_implementation" not in settings.options:
                patch(self.model, **options)
                self._patched = True

    def new_cache(self) -> Cache:
        """Of one answer."""
        if not self.settings.compress:
            return DynamicCache(config=self.model.config)
        return PowerQuantCache(self.model, **cache_options(self.settings))

    def stream(
        self, prompt: Prompt, sampling: Sampling, see: Callable[[torch.Tensor], None] | None = None
    ) -> Generator[str, None, GenerationResult]:
        """Args: see: is given the logits [vocabulary] fp32 of each token"""
        ids = self.encode(prompt)
        is_chat = prompt.messages is not None
        limit = sampling.max_tokens
        if self.context is not None:
            if len(ids) >= self.context:
                raise PowerQuantConfigError(
                    f"the prompt has {len(ids)} tokens and the model's context is {self.context}, answer included; "
                    "shorten the prompt"
                )
            limit = min(limit, self.context - len(ids))
        before = _gpu_memory(self.device, reset_peak=True)
        clock, fed = Stopwatch(), self._resumed(ids) if is_chat else _Fed([], self.new_cache())
        held = len(fed.ids)
        pieces, stops = self._detokenizer(), StopTexts(sampling.stop)
        text, count, reason = [], 0, "length"
        tokens = self._tokens(ids, sampling, fed, limit, see)
        try:
            for token in tokens:
                clock.token()
                count += 1
                if token in self.ends and not sampling.ignore_eos:
                    reason = "stop"
                    break
                piece = stops.add(pieces.add(token))
                if piece:
                    text.append(piece)
                    yield from clock.handing_over(piece)
                if stops.found:
                    reason = "stop"
                    break
        except GeneratorExit:  # who reads left; the conversation may go on
            self._keep(fed, is_chat)
            raise
        seconds = clock.seconds
        self._keep(fed, is_chat)
        if not stops.found:
            rest = stops.add(pieces.flush()) + stops.flush()
            if rest:
                text.append(rest)
                yield rest
            reason = "stop" if stops.found else reason
        memory = _gpu_memory(self.device)
        return GenerationResult(
            text="".join(text),
            backend="transformers",
            model=self.settings.source.name,
            finish_reason=reason,
            prompt_tokens=len(ids),
            cached_tokens=held,
            completion_tokens=count,
            seconds=seconds,
            seconds_to_first_token=clock.first or seconds,
            gpu_memory_before=before and before[0],
            gpu_memory_peak=memory and memory[1],
            gpu_memory_after=memory and memory[0],
            **cache_figures(fed.cache),
        )

    def batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GenerationResult]:
        return [drained(self.stream(prompt, sampling)) for prompt in prompts]

    def _resumed(self, ids: list[int]) -> _Fed:
        """The last conversation's cache where `ids` go on with it, else a new one. No other answer gets the same."""
        fed, self._conversation = self._conversation, None
        if fed is not None and len(fed.ids) < len(ids) and ids[: len(fed.ids)] == fed.ids:
            return fed
        return _Fed([], self.new_cache())

    def _keep(self, fed: _Fed, is_chat: bool) -> None:
        if is_chat and self.model is not None:
            self._conversation = fed

    def __del__(self) -> None:
        # a patched model holds itself, and would stay until Python looks for cycles
        if getattr(self, "_patched", False) and self.model is not None and not sys.is_finalizing():
            unpatch(self.model)

    def close(self) -> None:
        self.model = self.tokenizer = self._conversation = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids. Raises: PowerQuantConfigError for messages that the template refuses, an id that does not exist, no
        token at all"""
        if prompt.messages is not None:
            text = render(self.tokenizer, prompt.messages, prompt.add_generation_prompt, self.settings.source.name)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif prompt.token_ids is not None:
            ids, size = list(prompt.token_ids), self.model.get_input_embeddings().num_embeddings
            if wrong := [token for token in ids if not 0 <= token < size]:
                raise PowerQuantConfigError(f"token ids must be from 0 to {size - 1}, got {wrong[0]}")
        else:
            ids = self.tokenizer(prompt.text, add_special_tokens=prompt.special_tokens)["input_ids"]
        if not ids:
            raise PowerQuantConfigError("the prompt is empty; give at least one token")
        return ids

    def _detokenizer(self) -> Detokenizer:
        decode = self.tokenizer.decode
        return Detokenizer(lambda ids: decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokens(
        self,
        ids: list[int],
        sampling: Sampling,
        fed: _Fed,
        limit: int,
        see: Callable[[torch.Tensor], None] | None,
    ) -> Iterator[int]:
        generator = None
        if sampling.seed is not None:
            generator = torch.Generator(self.device).manual_seed(sampling.seed)
        seen = torch.tensor(ids, device=self.device)
        new = ids[len(fed.ids) :]
        feed = seen[len(fed.ids) :]
        for left in range(limit, 0, -1):
            logits = self.logits(feed, fed.cache)[-1]
            fed.ids += new
            if see is not None:
                see(logits)
            token = sample(logits, sampling, seen, generator)
            new, feed = [int(token)], token[None]
            yield new[0]
            if left > 1 and sampling.repetition_penalty != 1:
                seen = torch.cat((seen, token[None]))

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Feed tokens [n] int64 -> logits [1 or n, vocabulary] fp32 of what follows the last of them."""
        if self.model is None:
            raise PowerQuantError("this Engine was closed while it answered")
        out = self.model(tokens[None], use_cache=True, **{self._cache_name: cache}, **self._last_logits)
        return out.logits[0].float()


def _load(kind: type, settings: Settings, options: dict[str, Any]) -> Any:
    """Raises: PowerQuantConfigError if the checkpoint, or what it needs, is not there"""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options = {**settings.options, **options}
    if kind is AutoTokenizer:
        options.pop("attn_implementation", None)
    try:
        return kind.from_pretrained(settings.source.path, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise PowerQuantConfigError(f"cannot load {settings.source.path}: {first_line(error)}; {_REMEDY}") from None


def cache_options(settings: Settings) -> dict[str, Any]:
    """Of PowerQuantCache."""
    cache = settings.cache
    names = ("key_bits", "value_bits", "value_codec", "residual_tokens", "sink_tokens")
    # a list of layers is no option of the environment's, so it stands among those given alone
    protected = settings.given.get("protected_layers", cache.protected_layers)
    return {name: getattr(cache, name) for name in names} | {
        "protected_layers": protected,
        "calibration": cache.calibration or None,
    }


def cache_figures(cache: Cache) -> dict[str, Any]:
    """GenerationResult's fields of the cache."""
    if isinstance(cache, PowerQuantCache):
        report = cache.memory_report()
        if report.tokens and not any(layer.kind == "packed" for layer in report.layers):  # all are protected
            return {
                "kv_bytes": report.total_bytes,
                "uncompressed_kv_bytes": report.uncompressed_bytes,
                "tokens_compressed": 0,
                "tokens_exact": cache.get_seq_length(),
                "attention": "exact",
            }
        return {
            "kv_bytes": report.total_bytes,
            "uncompressed_kv_bytes": report.uncompressed_bytes,
            "tokens_compressed": report.tokens_packed // _packed_layers(report),
            "tokens_exact": report.tokens_exact // _packed_layers(report),
            "attention": report.path,
        }
    tensors = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if any(keys is None or values is None for keys, values in tensors):
        # states of another kind than keys and values
        return {"attention": "exact"}
    held = sum(keys.nbytes + values.nbytes for keys, values in tensors)
    return {
        "kv_bytes": held,
        "uncompressed_kv_bytes": held,
        "tokens_compressed": 0,
        "tokens_exact": cache.get_seq_length(),
        "attention": "exact",
    }


def _packed_layers(report: MemoryReport) -> int:
    return sum(layer.kind == "packed" for layer in report.layers) or 1


def sample(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One token id [] int64 of logits [vocabulary] fp32.

    Args: seen: ids of the prompt and the answer so far, for the repetition penalty
    """
    if sampling.repetition_penalty != 1:
        old = logits[seen]
        logits = logits.clone()
        changed = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        most = torch.finfo(logits.dtype).max
        logits[seen] = changed.clamp(-most, most)
    if sampling.greedy:
        return logits.argmax()
    # the greatest is 0, so that however small the temperature nothing becomes infinite but what is never taken
    logits = (logits - logits.max()) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), float("-inf"))
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p < 1:
        probabilities, order = logits.softmax(-1).sort(descending=True)
        # a token is kept while those before it have less than top_p together
        is_dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        is_dropped[0] = False  # also where top_p is 0 in float32
        dropped = order[is_dropped]
        logits = logits.index_fill(0, dropped, float("-inf"))
    return logits.softmax(-1).multinomial(1, generator=generator)[0]


def drained(pieces: Generator[str, None, GenerationResult]) -> GenerationResult:
    """What a stream returns."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _gpu_memory(device: torch.device, reset_peak: bool = False) -> tuple[int, int] | None:
    """(bytes that PyTorch holds, their most so far); None without a GPU."""
    if device.type != "cuda":
        return None
    if reset_peak:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
