"""Writing: every level takes a step of its own clocked rule on the gradient of what was read."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory.rule import EveryState, Gradient, Summed
from nestling.memory.state import map_tensors
from nestling.memory.structure import Weights

from .continuum import Tap, level
from .transfer import reptile

Rules = tuple[EveryState, ...]


class Start(NamedTuple):
    """What a level starts again from: weights that the next slower level holds for it, with that level's clock."""

    weights: Weights
    rules: Rules


class LevelsState(NamedTuple):
    """All levels of a model in a life: per level (block by block, fast to slow) its weights and its rule's
    states, one for each linear map; and for one that starts again, from where."""

    weights: tuple[Weights, ...]
    rules: tuple[Rules, ...]
    starts: tuple[Start | None, ...] = ()


def begin(levels: tuple[level, ...], weights: tuple[Weights, ...]) -> LevelsState:
    """The levels at the start of a life, from the model's weights: clocks at zero, nothing accumulated."""
    own = tuple(tuple(w.detach() for w in maps) for maps in weights)
    rules = tuple(_fresh(lvl, maps) for lvl, maps in zip(levels, own, strict=True))
    starts = tuple(
        Start(maps, _fresh(levels[i + 1], maps)) if lvl.restarts else None
        for i, (lvl, maps) in enumerate(zip(levels, own, strict=True))
    )
    return LevelsState(own, rules, starts)


def _fresh(lvl: level, maps: Weights) -> Rules:
    """Clocks at zero. Nothing accumulated takes no room: a single zero stands for all."""
    fresh = [lvl.clocked.init(weight) for weight in maps]
    return tuple(
        rule._replace(gradient=weight.new_zeros(()).expand_as(weight)) for rule, weight in zip(fresh, maps, strict=True)
    )


def write(
    levels: tuple[level, ...], state: LevelsState, loss: Tensor, taps: Sequence[Tap], *, own: bool = False
) -> LevelsState:
    """Every level takes one step of its own clocked rule on the gradient of `loss`, a sum over tokens.

    One backward pass serves all levels; what comes out of it are errors at the outputs of linear maps, so that
    the delta rules have the pairs that they need; groups of neurons share those of their block. Off its clock a level
    only accumulates. own: nobody else holds `state`, and what it accumulated is added to where it lies.
    """
    gradients = backward(levels, loss, taps)
    with torch.no_grad():
        return advance(levels, state, gradients, own=own)


def backward(levels: tuple[level, ...], loss: Tensor, taps: Sequence[Tap]) -> list[Sequence[Gradient]]:
    """The gradient of `loss` for every map of each level that learns, from one backward pass."""
    outputs = tapped(levels, taps)
    found = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True) if outputs else ()
    return gradients_of(levels, errors_of(outputs, found), taps)


def tapped(levels: tuple[level, ...], taps: Sequence[Tap]) -> list[Tensor]:
    """The outputs at which errors of the task are needed: each once, of the levels that learn."""
    awake = (tap for tap, lvl in zip(taps, levels, strict=True) if lvl.period != math.inf)
    return list({id(output): output for tap in awake for output in tap.asks}.values())


def errors_of(outputs: Sequence[Tensor], errors: Sequence[Tensor]) -> dict[int, Tensor]:
    """The errors by the outputs that they are of."""
    return {id(output): error for output, error in zip(outputs, errors, strict=True)}


def step(
    levels: tuple[level, ...],
    state: LevelsState,
    errors: Mapping[int, Tensor],
    taps: Sequence[Tap],
    *,
    rows: bool = False,
    own: bool = False,
) -> LevelsState:
    """The levels after one step of every clocked rule; `rows`: weights [b, out, in], a row of the batch each; `own` as
    in `write`."""
    return advance(levels, state, gradients_of(levels, errors, taps, rows), own=own)


def gradients_of(
    levels: tuple[level, ...], errors: Mapping[int, Tensor], taps: Sequence[Tap], rows: bool = False
) -> list[Sequence[Gradient]]:
    """Of each level that learns, the gradient of every map; nothing of the others."""
    return [
        () if lvl.period == math.inf else tap.pairs([errors[id(output)] for output in tap.asks], rows)
        for lvl, tap in zip(levels, taps, strict=True)
    ]


def advance(
    levels: tuple[level, ...],
    state: LevelsState,
    gradients: Sequence[Sequence[Gradient]],
    *,
    own: bool = False,
) -> LevelsState:
    """The levels after one step of every clocked rule on these gradients; `own` as in `write`."""
    weights, rules, starts = list(state.weights), list(state.rules), list(state.starts)
    for i, (lvl, found) in enumerate(zip(levels, gradients, strict=True)):
        if lvl.period == math.inf:
            continue
        start = starts[i] if starts else None
        if start is None:
            weights[i], rules[i] = _stepped(lvl, weights[i], found, rules[i], own)
        else:
            weights[i], rules[i], starts[i] = step_and_restart(
                lvl, levels[i + 1], weights[i], rules[i], start, found, own
            )
    return LevelsState(tuple(weights), tuple(rules), tuple(starts))


def step_and_restart(
    fast: level, slow: level, maps: Weights, rules: Rules, start: Start, found: Sequence[Gradient], own: bool = False
) -> tuple[Weights, Rules, Start]:
    """A level that starts again, after its own step; and, where the clock of the next slower one ticks, from where
    that has learned to start."""
    maps, rules = _stepped(fast, maps, found, rules, own)
    start, ticked = _learn_start(fast, slow, start, maps, found)
    if not ticked:
        return maps, rules, start
    fresh = zip(_fresh(fast, start.weights), rules, strict=True)
    return start.weights, tuple(new._replace(elapsed=old.elapsed) for new, old in fresh), start


def nothing(levels: tuple[level, ...], state: LevelsState, tokens: int) -> list[Sequence[Gradient]]:
    """The gradient of a segment that teaches nothing: clocks go on, and a tick steps on what came before it."""
    found: list[Sequence[Gradient]] = []
    for lvl, rules in zip(levels, state.rules, strict=True):
        zeros = [map_tensors(torch.zeros_like, (rule.gradient, rule.inputs)) for rule in rules]
        found.append(() if lvl.period == math.inf else [Summed(total, gram, tokens) for total, gram in zeros])
    return found


def _stepped(
    lvl: level,
    maps: Weights,
    gradients: Sequence[Gradient],
    rules: Rules,
    own: bool = False,
) -> tuple[Weights, Rules]:
    after = [
        lvl.clocked.step(weight, gradient, rule, lvl.gates, own)
        for weight, gradient, rule in zip(maps, gradients, rules, strict=True)
    ]
    return tuple(weight for weight, _ in after), tuple(rule for _, rule in after)


def _learn_start(
    fast: level, slow: level, start: Start, learned: Weights, pairs: Sequence[Gradient]
) -> tuple[Start, bool]:
    """One step of the slower level on what the fast one starts from, and whether its clock ticked: on the gradients
    at the fast weights, or (Reptile) toward where they have come."""
    ticked = bool((start.rules[0].elapsed + pairs[0].tokens >= slow.period).any())
    if isinstance(fast.transfer, reptile):
        share = slow.period if ticked else 0.0  # the clock divides by it
        pairs = [
            Summed((old - new) * share, pair.gram() if slow.rule.needs_inputs else None, pair.tokens)
            for old, new, pair in zip(start.weights, learned, pairs, strict=True)
        ]
    weights, rules = _stepped(slow, start.weights, pairs, start.rules)
    return Start(weights, rules), ticked
