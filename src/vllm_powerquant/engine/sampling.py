"""How text is sampled, under the same names on every backend (they are vLLM's)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from ..config import refuse_unknown
from ..errors import PowerQuantConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Of one answer.

    Args:
        max_tokens: most tokens of the answer; cut to what the model's context leaves
        temperature: 0: the most likely token each time
        top_p, top_k, min_p: sample among the likeliest tokens that make up this probability (1: all), so many (0: all),
            those at least this probable beside the likeliest (0: all)
        repetition_penalty: above 1, tokens that the prompt or the answer holds become less likely
        seed: the same seed gives the same answer, on the same backend and machine; None: another one each time
        stop: texts at which the answer ends, without them
        ignore_eos: go on where the model would end

    Raises: PowerQuantConfigError, naming what is allowed
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check("max_tokens", int, "1 or more", lambda x: x >= 1)
        self._check("temperature", float, "0 or more", lambda x: x >= 0)
        self._check("top_p", float, "more than 0, at most 1", lambda x: 0 < x <= 1)
        self._check("top_k", int, "0 (all) or more", lambda x: x >= 0)
        self._check("min_p", float, "from 0 to 1", lambda x: 0 <= x <= 1)
        self._check("repetition_penalty", float, "more than 0", lambda x: x > 0)
        if self.seed is not None:
            self._check("seed", int, "from 0 to 2**63 - 1, or None", lambda x: 0 <= x < 1 << 63)
        if not isinstance(self.ignore_eos, bool):
            raise PowerQuantConfigError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise PowerQuantConfigError(f"stop must be a text or a list of texts, none of them empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))

    def _check(self, name: str, kind: type, allowed: str, accepts: Any) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (kind is int and not isinstance(value, int)) or not accepts(value):
            what = "an integer" if kind is int else "a number"
            raise PowerQuantConfigError(f"{name} must be {what}, {allowed}, got {value!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Raises: PowerQuantConfigError also for an unknown name"""
        refuse_unknown(options, [field.name for field in fields(cls)], "sampling option")
        return cls(**options)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def as_vllm(self) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams, and of this package's for the sparse engine."""
        return asdict(self) | {"stop": list(self.stop)}
