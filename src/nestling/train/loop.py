"""Pre-training: next-token loss by AdamW, every level on its own clock, over contiguous streams."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.state import detach
from nestling.models import Decoder, ModelState

from .data import Batch, Stream


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is pre-trained."""

    steps: int = 300
    rows: int = 8  # of the text, read side by side
    length: int = 256  # tokens a row and step
    accumulate: int = 1  # parts that a step's rows are split into, one after the other, to save memory
    learning_rate: float = 2e-3  # at its peak
    final_rate: float = 0.1  # of the peak, at the end of the cosine
    warmup_steps: int = 20
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of the gradient
    reset_share: float = 0.1  # of rows that start afresh at a step's edge
    seed: int = 0
    compile: bool = False  # what mixers do with a chunk, by torch.compile: minutes at first, then less time a step

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.rows % self.accumulate:
            raise ValueError(f"accumulate must divide rows = {self.rows}, got {self.accumulate}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be > 0 and finite, got {self.learning_rate}")
        if not self.clip > 0:
            raise ValueError(f"clip must be > 0 (inf: no bound), got {self.clip}")
        for name in ("reset_share", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine to final_rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class StepReport(NamedTuple):
    """What one step measured. loss: nats a token, before the step; gradient_norm: before clipping."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float


class Trainer:
    """The state of a pre-training run, and its one step.

    The outer optimizer moves a level's weights once the level's period has passed, on the gradients averaged
    since; rows share the weights, so that the clock counts the tokens of all of them, and a period of no more
    than one step's tokens means every step. A level of period inf is fast weights that do not learn in life:
    here it is trained at every step like everything else.
    """

    def __init__(self, model: Decoder, config: TrainConfig) -> None:
        self.model, self.config = model, config
        if config.compile:
            model.compile()
        self.step = 0
        self.states: list[ModelState] = [
            model.init_state(config.rows // config.accumulate) for _ in range(config.accumulate)
        ]
        self.states = [detach(state) for state in self.states]
        self.optimizer = torch.optim.AdamW(
            _groups(model, config), lr=config.learning_rate, betas=(config.beta1, config.beta2)
        )
        weights = [list(maps.parameters()) for block in model.blocks for maps in block.continuum.weights]  # type: ignore[union-attr]
        self.clocks = [LevelClock(lvl.period, maps) for lvl, maps in zip(model.levels, weights, strict=True)]

    def run_step(self, stream: Stream) -> StepReport:
        """One step on the next batch. Raises FloatingPointError when loss or gradient are not finite, before any
        weight has moved."""
        batch = stream.batch(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        for clock in self.clocks:
            clock.advance(batch.tokens.numel())
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step}: loss {loss}, gradient norm {norm}: not finite; no weight was changed"
            )
        rate = self.config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return StepReport(self.step, loss, norm, rate)

    def _backward(self, batch: Batch) -> float:
        parts = [Batch(*part) for part in zip(*(tensor.chunk(self.config.accumulate) for tensor in batch), strict=True)]
        total, counted = 0.0, int(batch.counts.sum())
        for index, part in enumerate(parts):
            logits, state = self.model(part.tokens, self.states[index], reset=part.reset)
            losses = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none")
            loss = (losses * part.counts.flatten()).sum() / max(1, counted)
            loss.backward()
            self.states[index] = detach(state)
            total += float(loss.detach())
        return total

    def state(self) -> dict[str, Any]:
        """Everything but the model's weights that the next step depends on."""
        return {
            "step": self.step,
            "states": self.states,
            "optimizer": self.optimizer.state_dict(),
            "clocks": [(clock.elapsed, clock.steps, clock.gradients) for clock in self.clocks],
        }


class LevelClock:
    """Holds back a level's gradients until its period has passed."""

    def __init__(self, period: float, weights: list[nn.Parameter]) -> None:
        self.period, self.weights = period, weights
        self.elapsed = 0  # tokens since the last tick
        self.steps = 0
        self.gradients: list[Tensor] = []

    def advance(self, tokens: int) -> None:
        """Count a step's tokens. Off the tick the weights' gradients are taken away and kept; at the tick they
        become the mean of all that were kept."""
        if self.period == math.inf or (not self.elapsed and tokens >= self.period):
            return
        found = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in self.weights]
        self.gradients = [a + b for a, b in zip(self.gradients, found, strict=True)] if self.gradients else found
        self.elapsed, self.steps = self.elapsed + tokens, self.steps + 1
        due = self.elapsed >= self.period
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient / self.steps if due else None
        if due:
            self.elapsed, self.steps, self.gradients = int(self.elapsed % self.period), 0, []


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() >= 2 and "embedding" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def train(trainer: Trainer, stream: Stream, *, after: Callable[[StepReport], None] | None = None) -> None:
    """Run the trainer to its last step; `after` is called with each step's report."""
    while trainer.step < trainer.config.steps:
        report = trainer.run_step(stream)
        if after is not None:
            after(report)
