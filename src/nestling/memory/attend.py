"""Softmax attention over the last few gradients: a momentum without parameters."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import Direction, Gates, Gradient, State, _wrapper, gradient_descent


class AttendState(NamedTuple):
    past: Tensor  # the last updates of `of`, newest last [..., window, out, in]
    steps: Tensor  # taken, int64 [...]
    of: State


@dataclass(frozen=True, repr=False)
class attend(_wrapper):
    """update = sum_i softmax_i(cos(a_i, a_t) / temperature) a_i over the last `window` updates a_i of `of`, its own
    among them.

    The memory of equation 63 (all past pairs in a window, solved without parameters) fed gradients, as keys by their
    direction and as values as they are: where the paper's momentum forgets by age, this one forgets by likeness.
    Costs `window` copies of the weight. A hot one (large temperature) is the plain mean over the window. Oracle:
    F.scaled_dot_product_attention (tests/test_attend.py).
    """

    of: Direction = gradient_descent()
    window: int = 8
    temperature: float = 0.1
    elementwise = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"attend: window must be >= 1 step, got {self.window}")
        if not self.temperature > 0:
            raise ValueError(f"attend: temperature must be > 0, got {self.temperature}")

    def init(self, weight: Tensor) -> State:
        *leading, rows, columns = weight.shape
        past = weight.new_zeros(*leading, self.window, rows, columns)
        steps = torch.zeros(leading, dtype=torch.int64, device=weight.device)
        return AttendState(past, steps, self.of.init(weight))

    def anchor(self, state: State) -> State:
        return state._replace(of=self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, inner = self.of.update(weight, gradient, state.of, gates)
        now = added.expand(state.past.shape[:-3] + added.shape[-2:])
        past = torch.cat([state.past[..., 1:, :, :], now.unsqueeze(-3)], -3)
        flat = past.flatten(-2)
        keys = flat / flat.square().sum(-1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny).sqrt()
        alike = (keys @ keys[..., -1, :, None]).squeeze(-1) / self.temperature  # [..., window]
        age = torch.arange(self.window - 1, -1, -1, device=flat.device)
        alike = alike.masked_fill(age > state.steps[..., None], -math.inf)
        update = (alike.softmax(-1)[..., None] * flat).sum(-2).unflatten(-1, added.shape[-2:])
        return update, AttendState(past, state.steps + 1, inner)
