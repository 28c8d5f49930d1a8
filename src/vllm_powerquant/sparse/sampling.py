"""Text that a model itself samples, to train its ReLU twin on where there is no corpus.

Rows start in turns from: the document start (BOS and the like); the same followed by one uniformly random token, which
spreads the subjects (as in Z. Liu et al., "LLM-QAT", 2023, arXiv:2305.17888); and the chat template's open user turn.
Sampling is at temperature 1 throughout. Where the model ends a document the next one starts; where it ends a turn of a chat
the template's tokens up to the other side's turn follow, so that it talks to itself, both sides as it was trained to see
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .families import Model
from .llama import Decoder, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# in a script: one uniformly random token; behind its end
RANDOM, END = -2, -1
# what GPT-2's tokenizer and its heirs put between documents
DOCUMENT_START = "<|endoftext|>"
# said by a user where the template's user turns do not end in a token that the model could sample
SIMPLE_TURN = "Tell me about something that you know well."
# how much of the cache a step reads is rounded up to this
REACH = 128


@dataclass(frozen=True)
class Script:
    """What a row is made to say: at its start, and after each end that the model samples, in turns."""

    start: list[int]
    after: tuple[list[int], list[int]]


def scripts(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> list[Script]:
    """Args: eos: ids that end a document or turn"""
    found = []
    named = [tokenizer.bos_token_id, tokenizer.get_vocab().get(DOCUMENT_START)]
    documents = list(dict.fromkeys(token for token in named if token is not None)) or list(eos[:1])
    for token in documents:
        found.append(Script([token], ([token], [token])))
        found.append(Script([token, RANDOM], ([token, RANDOM], [token, RANDOM])))
    chat = _chat(tokenizer, set(eos))
    # as many chats as documents
    return found + [chat] * len(found) if chat else found


def _chat(tokenizer: PreTrainedTokenizerBase, eos: set[int]) -> Script | None:
    """From the template as it is rendered around marks; None without a template."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    marks = ("MARKUSERONE", "MARKASSISTANT", "MARKUSERTWO")
    try:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        # templates trim what users say, and an opening must not depend on what follows it
        opening, rest = text.split(marks[0])
        to_assistant, rest = rest.split(marks[1])
        to_user, _ = rest.split(marks[2])
    except (TemplateError, ValueError, TypeError):
        return None
    start, answer, question = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (opening, to_assistant, to_user)
    )
    ends = [next((i for i, token in enumerate(bridge) if token in eos), None) for bridge in (answer, question)]
    if None not in ends:
        return Script(start, (answer[ends[0] + 1 :], question[ends[1] + 1 :]))
    simple = tokenizer.apply_chat_template(
        [{"role": "user", "content": SIMPLE_TURN}], tokenize=False, add_generation_prompt=True
    )
    start = tokenizer(simple, add_special_tokens=False)["input_ids"]
    return Script(start, (start, start))


def end_ids(tokenizer: PreTrainedTokenizerBase, config: dict) -> list[int]:
    """Ids that end a text: config.json's, the tokenizer's, and the document start."""
    listed = config.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    more = [tokenizer.eos_token_id, tokenizer.get_vocab().get(DOCUMENT_START)]
    return sorted({token for token in (*listed, *more) if isinstance(token, int)})


class Sampler:
    """Rounds of `rows` texts of `length` tokens."""

    def __init__(
        self, weights: Weights, model: Model, scripts: Sequence[Script], eos: Sequence[int], rows: int, length: int
    ) -> None:
        self.decoder = Decoder(weights, model, rows, length)
        self.rows, self.length, self.vocab_size = rows, length, model.vocab_size
        self.device = device = weights.embedding.device
        self.scripts = scripts
        self.eos = torch.tensor(list(eos) or [-1], device=device)
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.part, self.at, self.turn = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        # one more than the longest part: a row that has said all of it finds an END there
        longest = max(len(part) for script in scripts for part in (script.start, *script.after)) + 1
        self.forced = torch.full((rows, 3, longest), END, dtype=torch.int64, device=device)
        self.row = torch.arange(rows, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def round(self, seed: int, tick: Callable[[int], None] = lambda tokens: None) -> torch.Tensor:
        """[rows, length] int32 on the CPU; the same for the same seed, rows, length and device.

        Args: tick: told of tokens sampled, now and then
        """
        cuda = self.device.type == "cuda"
        if cuda and not self.graphs:
            self._capture()
        with torch.random.fork_rng([self.device] if cuda else []):
            torch.manual_seed(seed)
            self._start(seed)
            told = 0
            for position in range(self.length - 1):
                reach = self._reach(position)
                self.graphs[reach].replay() if cuda else self._advance(reach)
                if position % 32 == 31 or position == self.length - 2:
                    if cuda:
                        # replays are only queued
                        torch.cuda.synchronize(self.device)
                    tick((position + 2 - told) * self.rows)
                    told = position + 2
        return self.tokens.to(torch.int32).cpu()

    def _reach(self, position: int) -> int:
        return min((position // REACH + 1) * REACH, self.length)

    def _start(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        forced = torch.full(self.forced.shape, END)
        for row in range(self.rows):
            script = self.scripts[row % len(self.scripts)]
            for index, part in enumerate((script.start, *script.after)):
                forced[row, index, : len(part)] = torch.tensor(part, dtype=torch.int64)
        drawn = torch.randint(self.vocab_size, forced.shape, generator=generator)
        self.forced.copy_(torch.where(forced == RANDOM, drawn, forced))
        self.tokens.zero_()
        self.tokens[:, 0] = self.forced[:, 0, 0]
        self.position.zero_()
        self.part.zero_()
        self.turn.zero_()
        self.at.fill_(1)

    def _advance(self, reach: int) -> None:
        """One token of each row."""
        now = self.tokens.index_select(1, self.position)[:, 0]
        logits = self.decoder.logits(now, self.position, reach).float()
        # the largest of logits plus Gumbel noise is a sample of their softmax
        noise = torch.empty_like(logits).exponential_().clamp_(min=1e-30).log_()
        sampled = logits.sub_(noise).argmax(-1)
        wanted = self.forced[self.row, self.part, self.at]
        free = wanted < 0
        token = torch.where(free, sampled, wanted)
        ended = free & (token[:, None] == self.eos).any(1)
        self.at.copy_(torch.where(ended, 0, torch.where(free, self.at, self.at + 1)))
        self.part.copy_(torch.where(ended, 1 + self.turn % 2, self.part))
        self.turn.add_(ended)
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, token[:, None])

    def _capture(self) -> None:
        """A graph for each reach; what capturing and its rehearsal write is written anew by _start."""
        stream = torch.cuda.Stream(self.device)
        reaches = sorted({self._reach(position) for position in range(self.length - 1)})
        self._start(0)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for reach in reaches:
                self.position.zero_()
                self._advance(reach)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        for reach in reaches:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._advance(reach)
            self.graphs[reach] = graph


def rows_that_fit(weights: Weights, model: Model, length: int, wanted: int) -> int:
    """How many texts to sample at once: at most half of what a GPU has free goes into the cache and the logits."""
    device = weights.embedding.device
    most = 64
    if device.type == "cuda":
        row_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_size * length * weights.embedding.element_size()
        row_bytes += 3 * 4 * model.vocab_size
        most = min(2048, max(1, int(torch.cuda.mem_get_info(device)[0] / 2 / row_bytes)))
    rounds = -(-wanted // most)
    return -(-wanted // rounds)
