"""Random sequences of everything that can be done to a cache: after each, a PowerQuantCache answers as DynamicCache does.

The window is longer than the text, so nothing but DynamicCache's own logits is right. Masks have padding on the left, on the
right, in between, and in whole rows; attention changes between fused and dequantized on the way.
"""

import copy
import random

import pytest
import torch
from transformers import DynamicCache

from hf.tiny_models import VOCABULARY, tiny_model
from vllm_powerquant import PowerQuantCache

OPTIONS = {
    "exact": {"residual_tokens": 4096},
    # what 8 bits cost, which is far less than what a token in a wrong place makes
    "packed": {"key_bits": 8, "value_bits": 8, "residual_tokens": 17, "sink_tokens": 9},
}
LIMIT = {"exact": 2e-4, "packed": 0.3}
MAX_POSITIONS = 400


class Twins:
    """A PowerQuantCache and a DynamicCache that go through the same operations, and the mask of what they hold."""

    def __init__(self, model, seed: int, setting: str, attentions: tuple[str, ...]) -> None:
        self.model, self.setting, self.attentions = model, setting, attentions
        self.random, self.torch_random = random.Random(seed), torch.Generator().manual_seed(seed)
        self.cache, self.want = PowerQuantCache(model, **OPTIONS[setting]), DynamicCache(config=model.config)
        self.mask = torch.ones(self.random.randint(1, 4), 0, dtype=torch.long)
        self.done: list[str] = []

    def both(self, what: str, operation) -> None:
        self.done.append(what)
        for cache in (self.cache, self.want):
            operation(cache)

    def chunk_mask(self, n: int) -> torch.Tensor:
        """[batch, n]: tokens everywhere, or padding in one of its places."""
        batch, kind = len(self.mask), self.random.choice(("none", "none", "left", "right", "holes", "row"))
        mask = torch.ones(batch, n, dtype=torch.long)
        for row in range(batch):
            at = self.random.randint(0, n)
            if kind == "left":
                mask[row, :at] = 0
            elif kind == "right":
                mask[row, at:] = 0
            elif kind == "holes":
                mask[row] = torch.randint(0, 2, (n,), generator=self.torch_random)
            elif kind == "row" and self.random.random() < 0.5:
                mask[row] = 0
        return mask

    def forward(self) -> None:
        n = self.random.choice((1, 1, 1, 2, 7, 8, 9, 31, 64, 65, 100))
        new = self.chunk_mask(n)
        mask = torch.cat((self.mask, new), 1)
        attention = self.random.choice(self.attentions)
        self.done.append(f"{attention} forward of {new.sum(1).tolist()} tokens in {n} positions")
        ids = torch.randint(2, VOCABULARY, new.shape, generator=self.torch_random)
        arguments = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -n:], "attention_mask": mask}
        # the mask may be left out where it says nothing
        if bool(mask.all()) and self.random.random() < 0.5:
            arguments["attention_mask"] = None
        with torch.no_grad():
            self.model.set_attn_implementation(attention)
            got = self.model(ids, past_key_values=self.cache, use_cache=True, **arguments).logits
            self.model.set_attn_implementation("sdpa")
            want = self.model(ids, past_key_values=self.want, use_cache=True, **arguments).logits
        self.mask = mask
        if new.any():
            error = (got - want)[new.bool()].abs().max()
            assert error < LIMIT[self.setting], (float(error), self.done)

    def crop(self) -> None:
        length = self.mask.shape[1]
        n = self.random.choice((0, 1, self.random.randint(0, length), length))
        if n < length:
            self.both(f"crop {n}", lambda cache: cache.crop(-n))
            self.mask = self.mask[:, : length - n]

    def reorder(self) -> None:
        rows = torch.randint(0, len(self.mask), (len(self.mask),), generator=self.torch_random)
        self.both(f"reorder {rows.tolist()}", lambda cache: cache.reorder_cache(rows))
        self.mask = self.mask[rows]

    def select(self) -> None:
        chosen = torch.randint(0, 2, (len(self.mask),), generator=self.torch_random).bool()
        chosen[self.random.randrange(len(self.mask))] = True
        rows = chosen if self.random.random() < 0.5 else chosen.nonzero().flatten()
        self.both(f"select {rows.tolist()}", lambda cache: cache.batch_select_indices(rows))
        self.mask = self.mask[rows]

    def repeat(self) -> None:
        if len(self.mask) <= 3:
            self.both("repeat 2", lambda cache: cache.batch_repeat_interleave(2))
            self.mask = self.mask.repeat_interleave(2, 0)

    def copy(self) -> None:
        """The copy goes on; what is done to it must not be seen by what it was made of."""
        self.done.append("copy")
        self.cache, self.want = copy.deepcopy(self.cache), copy.deepcopy(self.want)

    def reset(self) -> None:
        self.both("reset", lambda cache: cache.reset())
        self.mask = torch.ones(self.random.randint(1, 4), 0, dtype=torch.long)

    def step(self) -> None:
        operations = (self.crop, self.reorder, self.select, self.repeat, self.copy)
        if self.mask.shape[1] > MAX_POSITIONS or self.random.random() < 0.02:
            self.reset()
        elif self.mask.shape[1] and self.random.random() < 0.4:
            self.random.choice(operations)()
        else:
            self.forward()
        self.check()

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.want.get_seq_length() == self.mask.shape[1], self.done
        report = self.cache.memory_report()
        if not self.mask.shape[1]:
            return
        lens = tuple(self.mask.sum(1).tolist())
        for layer in self.cache.layers:
            assert layer.rows.lens == lens, self.done
        assert report.tokens == sum(lens) and report.tokens_exact + report.tokens_packed == 4 * sum(lens), self.done
        if self.setting == "exact":
            for got, want in zip(self.cache.layers, self.want.layers, strict=True):
                at = self.mask.bool()[:, None, :, None]
                for x, y in ((got.keys, want.keys), (got.values, want.values)):
                    assert ((x - y) * at).abs().max() < 1e-4, self.done


@pytest.fixture
def llama():
    model = tiny_model("llama")
    yield model
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("setting", OPTIONS)
@pytest.mark.parametrize("attentions", [("powerquant",), ("sdpa",), ("powerquant", "sdpa")], ids="-".join)
def test_whatever_is_done_to_it_it_answers_as_dynamic_cache(llama, attentions, setting, seed):
    twins = Twins(llama, seed, setting, attentions)
    for _ in range(40):
        twins.step()
