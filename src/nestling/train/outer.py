"""Levels in somebody else's training loop: an optimizer that moves each MLP on a clock of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from nestling.levels.layouts import find_feedforwards

from .loop import LevelClock


class OnClocks(torch.optim.Optimizer):
    """Any optimizer, with the maps of layer j's MLP held back to the ticks of level j mod K.

    periods: in tokens, fast to slow; tokens: of one step, all rows together. Off its clock a level's gradients are
    kept, and at its tick the optimizer is given their mean; a period of at most one step's tokens means every step, as
    inf does (such a level stands still in life, not in training). All other parameters, biases too, move at every step.
    Groups are those of the optimizer, so that schedulers work; state_dict holds the clocks. MLPs are found by structure
    (`find_feedforwards`).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, periods: Sequence[float], *, tokens: int
    ) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be >= 1, got {tokens}")
        if not periods or any(not period >= 1 for period in periods) or list(periods) != sorted(periods):
            raise ValueError(f"periods must be >= 1 token, fast to slow, got {list(periods)}")
        self.optimizer, self.tokens = optimizer, tokens
        self.clocks = []
        for index, feedforward in enumerate(find_feedforwards(model)):
            weights = [model.get_parameter(f"{each.path}.weight") for each in feedforward.maps]
            self.clocks.append(LevelClock(periods[index % len(periods)], weights))
        super().__init__([{"params": group["params"]} for group in optimizer.param_groups], {})
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for clock in self.clocks:
            clock.advance(self.tokens)
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        clocks = [{"elapsed": c.elapsed, "steps": c.steps, "gradients": c.gradients} for c in self.clocks]
        return {"optimizer": self.optimizer.state_dict(), "clocks": clocks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("clocks", [])
        if len(saved) != len(self.clocks):
            raise ValueError(f"the state is of {len(saved)} clocks, needed {len(self.clocks)}")
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        for clock, was in zip(self.clocks, saved, strict=True):
            clock.elapsed, clock.steps, clock.gradients = was["elapsed"], was["steps"], list(was["gradients"])
