"""From pre-training into life: an optimizer's momentum is a memory level too, and is handed on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.adaptive import AverageState, RmsState, adam, average, rmsprop
from nestling.memory.rule import Gates, MomentumState, Rule, Summed, _passing, momentum

from .continuum import level
from .writing import LevelsState


class Moments(NamedTuple):
    """What AdamW remembers of a weight: decaying averages, from zero, of the gradient of the mean loss and of its
    square, [out, in]; the steps it has taken, and the fraction of the mean kept at each."""

    mean: Tensor
    square: Tensor
    steps: int
    kept: float = 0.9


def hand_over(levels: Sequence[level], state: LevelsState, moments: Sequence[Sequence[Moments | None]]) -> LevelsState:
    """The levels of a life with what an outer optimizer remembered of them, one `Moments` for each linear map.

    A period's gradient is a sum, so the moments are taken times the period. Parts that keep the same averages
    (average, rmsprop, adam) take them over as they are, with the steps; momentum, whose fraction is the level's own,
    is filled as if the mean had been its gradient ever since. What a part does not keep is let go, and so are moments
    of rules that need inputs. Oracle: training that simply goes on (tests/test_handover.py).
    """
    rules = list(state.rules)
    for i, (lvl, maps, known) in enumerate(zip(levels, state.weights, moments, strict=True)):
        if lvl.period == float("inf") or lvl.rule.needs_inputs:
            continue
        gates = lvl.gates._replace(step_size=lvl.step_size / lvl.period)
        rules[i] = tuple(
            clock._replace(of=_filled(lvl.rule, clock.of, weight, _summed(moment, lvl), gates)) if moment else clock
            for clock, weight, moment in zip(rules[i], maps, known, strict=True)
        )
    return state._replace(rules=tuple(rules))


def _summed(moments: Moments, lvl: level) -> Moments:
    return moments._replace(mean=moments.mean * lvl.period, square=moments.square * lvl.period**2)


@torch.no_grad()
def _filled(rule: Rule, state: Any, weight: Tensor, known: Moments, gates: Gates) -> Any:
    """A rule's state, filled from the inside out."""
    if isinstance(rule, adam):
        return _filled(rule.moments, state, weight, known, gates)
    inner = getattr(rule, "of", None)
    if not isinstance(inner, Rule):
        return state
    if type(rule).init is _passing.init:  # its state is that of what it wraps
        return _filled(inner, state, weight, known, gates)
    state = state._replace(of=_filled(inner, state.of, weight, known, gates))
    if isinstance(rule, momentum) and isinstance(state, MomentumState) and float(gates.momentum) < 1:
        unbiased = known.mean / (1 - known.kept ** max(1, known.steps))
        return state._replace(buffer=_added(inner, weight, unbiased, gates) / (1 - float(gates.momentum)))
    if isinstance(rule, average) and isinstance(state, AverageState):
        return state._replace(mean=_added(inner, weight, known.mean, gates), steps=state.steps + known.steps)
    if isinstance(rule, rmsprop) and isinstance(state, RmsState):
        return state._replace(square=known.square.clone(), steps=state.steps + known.steps)
    return state


def _added(rule: Any, weight: Tensor, gradient: Tensor, gates: Gates) -> Tensor:
    """The update of a direction for one gradient, seen for the first time."""
    return rule.update(weight, Summed(gradient), rule.init(weight), gates)[0]


def moments_of(optimizer: torch.optim.Optimizer, weights: Sequence[Sequence[Tensor]]) -> list[list[Moments | None]]:
    """What a torch AdamW or Adam remembers of the weights of every level; None of those it has not stepped."""
    kept = {p: group["betas"][0] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    return [[_moments(optimizer.state.get(weight, {}), kept.get(weight)) for weight in maps] for maps in weights]


def _moments(state: dict[str, Any], kept: float | None) -> Moments | None:
    if kept is None or not {"exp_avg", "exp_avg_sq", "step"} <= set(state):
        return None
    return Moments(state["exp_avg"].detach().clone(), state["exp_avg_sq"].detach().clone(), int(state["step"]), kept)
