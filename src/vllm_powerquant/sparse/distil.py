"""The training loop of `relufy`: a ReLU student learns its SiLU original's distribution of the next token.

The loss is KL(original || student) at temperature 1, mean over tokens, plus `pressure` times a smooth count of active
neurons. The pressure is controlled: it rises while more neurons are active than the schedule allows, which goes from what
plain ReLU leaves to `active_share`. For the first part of training the activation slides from SiLU to ReLU, as
x sigmoid(sharpness x) of growing sharpness, so that gradients reach neurons before they are cut off.

Everything but the deltas is frozen. A state holds all that a run needs to go on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import PowerQuantConfigError, PowerQuantError
from .deltas import Deltas
from .families import Model
from .llama import Rotary, Weights, block, hidden_states, relu, silu

# tokens whose logits exist at one time: 4096 x 49152 in fp32 are 0.8 GB
LOGIT_TOKENS = 4096
# of the smooth count, in units of the gate's root mean square: how near to zero a gate is pushed
SOFTNESS = 0.3
FIRST_PRESSURE = 1.0
# the part of training in which the scheduled share comes down to the wanted one
DESCENT = 0.5
# sharpness of the sliding activation at its end: nearly ReLU for gates of about 1
LAST_SHARPNESS = 30.0
# with a time limit: steps after which the speed is known, the first of which are slow
MEASURED_STEPS, SLOW_STEPS = 16, 4
WARM_UP = 50  # steps, or a tenth of fewer


@dataclass(frozen=True)
class Training:
    """What decides the result, beside the tokens."""

    rank: int = 32  # of changes to gate, up, down
    attention_rank: int = 32  # to q, k, v, o; 0: none
    length: int = 1024  # tokens of a window
    batch: int = 32  # windows of a step
    micro_batch: int = 32  # windows computed at once
    steps: int | None = None  # None: as many as fit into the minutes
    minutes: float | None = None
    lr: float = 8e-3  # falls to zero in a line
    active_share: float = 0.2  # of neurons, mean over layers and tokens; 1: no pressure
    slide: float = 0.15  # part of training in which SiLU becomes ReLU
    seed: int = 0
    bf16: bool = True  # matrices and products; norms, the residual and what is trained are fp32
    compiled: bool = False  # the layers, by torch.compile

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True)
class Progress:
    """Of one step, for whoever watches."""

    step: int
    steps: int | None  # None: not known yet
    kl: float  # nats per token
    active: float  # share of neurons, mean over layers
    pressure: float
    tokens_per_second: float


class Divergence(torch.autograd.Function):
    """Mean KL(teacher || student) of hidden states through one frozen output matrix, logits a few tokens at a time.

    forward(student [n, hidden_size], teacher [n, hidden_size], student's head, teacher's head, chunk's function) -> fp32
    scalar. The gradient of the student's states is computed on the way: logits would not fit for later.
    """

    @staticmethod
    def forward(ctx, student, teacher, head, teacher_head, chunk):
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for begin in range(0, len(student), LOGIT_TOKENS):
            part = slice(begin, begin + LOGIT_TOKENS)
            kl, gradient[part] = chunk(student[part], teacher[part], head, teacher_head, 1 / len(student))
            total += kl
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None, None


def divergence_of_chunk(student, teacher, head, teacher_head, scale):
    """(sum of KL times scale, its gradient by student): d KL / d logits = softmax(student) - softmax(teacher)."""
    wanted = F.linear(teacher, teacher_head).float().log_softmax(-1)
    got = F.linear(student, head).float().log_softmax(-1)
    p = wanted.exp()
    kl = (p * (wanted - got)).sum() * scale
    return kl, ((got.exp() - p) * scale).to(head.dtype) @ head


def relu_counted(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ReLU; tells the share of active neurons and its smooth form, which has a gradient."""
    return F.relu(gate) * up, _counts(gate)


def sliding(gate: torch.Tensor, up: torch.Tensor, sharpness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Between SiLU (sharpness 1) and ReLU (infinite)."""
    return gate * torch.sigmoid(sharpness * gate) * up, _counts(gate)


def _counts(gate: torch.Tensor) -> torch.Tensor:
    width = SOFTNESS * gate.detach().float().square().mean().sqrt()
    smooth = torch.sigmoid(gate / width.to(gate.dtype)).mean(dtype=torch.float32)
    return torch.stack(((gate > 0).float().mean(), smooth))


class Trainer:
    """Args: original: in its own type, on the device; windows [n, length] int32 on the CPU"""

    def __init__(self, original: Weights, model: Model, windows: torch.Tensor, settings: Training) -> None:
        self.original, self.model, self.windows, self.settings = original, model, windows, settings
        self.device = original.embedding.device
        self.teacher = original.to(settings.dtype)
        self.rotary = Rotary.of(model, settings.length, self.device)
        generator = torch.Generator().manual_seed(settings.seed)
        self.deltas = Deltas.initial(original, settings.rank, settings.attention_rank, generator)
        self.parameters = [tensor.requires_grad_() for tensor in self.deltas.tensors.values()]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.lr, betas=(0.9, 0.99), fused=fused)
        self.step, self.steps = 0, settings.steps
        self.seconds = 0.0  # of training, over all runs
        self.last_kl: float | None = None  # of a step that was watched, or the last
        self.log_pressure = torch.tensor(math.log(FIRST_PRESSURE), device=self.device)
        self.first_share: torch.Tensor | None = None
        self.last_share: torch.Tensor | None = None
        self._recent: list[float] = []
        self._run = torch.compile(block, dynamic=False) if settings.compiled else block
        self._chunk = torch.compile(divergence_of_chunk, dynamic=False) if settings.compiled else divergence_of_chunk

    @property
    def done(self) -> bool:
        return self.steps is not None and self.step >= self.steps

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.length

    def state(self) -> dict[str, Any]:
        """All that decides how this goes on; tensors are copies on the CPU."""
        copied = {name: tensor.detach().cpu().clone() for name, tensor in self.deltas.tensors.items()}
        return {
            "deltas": copied,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "last_kl": self.last_kl,
            "log_pressure": self.log_pressure.cpu(),
            "shares": None if self.first_share is None else (self.first_share.cpu(), self.last_share.cpu()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.deltas.tensors.items():
                tensor.copy_(state["deltas"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps, self.seconds = state["step"], state["steps"], state["seconds"]
        self.last_kl = state["last_kl"]
        self.log_pressure = state["log_pressure"].to(self.device)
        if state["shares"]:
            self.first_share, self.last_share = (share.to(self.device) for share in state["shares"])

    def advance(self, watch: Callable[[Progress], None] | None = None, seconds_left: float | None = None) -> None:
        """One step.

        Args:
            watch: is told of the step, which costs waiting for the device
            seconds_left: for training, where the settings name no number of steps

        Raises: PowerQuantError if what is watched is no number any more
        """
        begin = time.monotonic()
        settings = self.settings
        if self.steps is None and self.step == MEASURED_STEPS:
            self._set_steps(seconds_left)
        fraction = self.step / self.steps if self.steps else 0.0
        rows = self._rows()
        student = self.deltas.applied(self.original, settings.dtype)
        activation, operands = self._activation(fraction)
        kl, active = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        pressure = self._pressure(fraction)
        micro_batches = rows.split(settings.micro_batch)
        for index, micro_batch in enumerate(micro_batches):
            ids = micro_batch.to(self.device, non_blocking=True)
            loss, share = self._backward(
                student, ids, activation, operands, pressure, len(ids) / len(rows), index + 1 < len(micro_batches)
            )
            kl += loss
            active += share
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * self._rate(fraction)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._control(active, fraction)
        self.step += 1
        if self.steps is None or watch or self.done:
            # waits for the device
            told = float(kl), float(active), float(pressure)
            self.last_kl = told[0]
        spent = time.monotonic() - begin
        self.seconds += spent
        self._recent = [*self._recent[-19:], spent]
        if watch:
            if not all(map(math.isfinite, told)):
                raise PowerQuantError(f"training diverged at step {self.step}: the loss is no number; use a lower --lr")
            speed = self.tokens_per_step * len(self._recent) / sum(self._recent)
            watch(Progress(self.step, self.steps, *told, speed))

    def _backward(
        self,
        student: Weights,
        ids: torch.Tensor,
        activation: Callable,
        operands: tuple[torch.Tensor, ...],
        pressure: torch.Tensor,
        weight: float,
        more: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds gradients, times weight. Returns mean KL and active share, times weight."""
        with torch.no_grad():
            wanted, _ = hidden_states(self.teacher, ids, self.model, self.rotary, silu, run=self._run)
        got, shares = hidden_states(student, ids, self.model, self.rotary, activation, operands, self._run)
        kl = Divergence.apply(got.flatten(0, 1), wanted.flatten(0, 1), student.head, self.teacher.head, self._chunk)
        # the way from the deltas to the weights is the same for all micro-batches
        ((kl + pressure * shares[:, 1].mean()) * weight).backward(retain_graph=more)
        return kl.detach() * weight, shares[:, 0].detach().mean() * weight

    def _activation(self, fraction: float) -> tuple[Callable, tuple[torch.Tensor, ...]]:
        slide = self.settings.slide
        if fraction >= slide:
            return relu_counted, ()
        return sliding, (torch.tensor(LAST_SHARPNESS ** (fraction / slide), device=self.device),)

    def _rate(self, fraction: float) -> float:
        warm_up = min(WARM_UP, (self.steps or 10 * WARM_UP) // 10)
        return min(1.0, (self.step + 1) / (warm_up + 1)) * (1 - fraction)

    def _rows(self) -> torch.Tensor:
        """This step's windows: every epoch in an order of its own."""
        found, n = [], len(self.windows)
        first = self.step * self.settings.batch
        for epoch in range(first // n, (first + self.settings.batch - 1) // n + 1):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch))
            found.append(order[max(0, first - epoch * n) : first + self.settings.batch - epoch * n])
        return self.windows[torch.cat(found)]

    def _wanted_share(self, fraction: float) -> torch.Tensor:
        fall = min(1.0, fraction / DESCENT)
        return self.first_share + (self.settings.active_share - self.first_share).clamp(max=0) * fall

    def _pressure(self, fraction: float) -> torch.Tensor:
        """Proportional and integral control of its logarithm by the relative error of the last step's share."""
        if self.settings.active_share >= 1 or self.first_share is None:
            return torch.zeros((), device=self.device)
        return (self.log_pressure + 5 * self._error(self.last_share, fraction)).exp()

    def _error(self, share: torch.Tensor, fraction: float) -> torch.Tensor:
        return (share / self._wanted_share(fraction) - 1).clamp(-0.5, 0.5)

    def _control(self, active: torch.Tensor, fraction: float) -> None:
        if self.first_share is None:
            self.first_share = active
        self.last_share = active
        gain = min(0.3, max(0.01, 60 / (self.steps or 2000)))
        self.log_pressure = (self.log_pressure + gain * self._error(active, fraction)).clamp(-8, 5)

    def _set_steps(self, seconds_left: float | None) -> None:
        if seconds_left is None:
            raise PowerQuantConfigError("training needs a number of steps or a time limit")
        step_seconds = sum(self._recent[SLOW_STEPS:]) / len(self._recent[SLOW_STEPS:])
        self.steps = self.step + max(1, int(seconds_left / step_seconds))


@dataclass(frozen=True)
class Score:
    """On text."""

    nll: float  # of the next token, nats, mean
    active: list[float]  # share of positive gates by layer


@torch.no_grad()
def score(weights: Weights, model: Model, windows: torch.Tensor, activation: Callable = relu, rows: int = 4) -> Score:
    """Args: windows [n, length] int"""
    device = weights.embedding.device
    rotary = Rotary.of(model, windows.shape[1], device)
    total, shares = 0.0, torch.zeros(model.num_layers, device=device)
    for part in windows.split(rows):
        ids = part.to(device).long()
        hidden, told = hidden_states(weights, ids, model, rotary, activation)
        shares += told * len(ids)
        for row, targets in zip(hidden, ids, strict=True):
            logits = F.linear(row[:-1], weights.head).float()
            total += float(F.cross_entropy(logits, targets[1:], reduction="sum"))
    return Score(total / (len(windows) * (windows.shape[1] - 1)), (shares / len(windows)).tolist())
