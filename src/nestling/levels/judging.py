"""Writing where the levels lie, and asking before it: what a reader does with the gradient of a segment."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nestling.memory.rule import Change, EveryState, Gradient
from nestling.memory.structure import Weights

from .continuum import level
from .writing import LevelsState, Rules, Start, nothing, step_and_restart


@runtime_checkable
class Accept(Protocol):
    """Judges every write before it is made."""

    def takes(self, before: LevelsState, gradients: Sequence[Sequence[Gradient]], loss: Tensor, tokens: int) -> bool:
        """Is a segment learned from? gradients: of each level, what it would add for every map (nothing where the
        period is inf); loss: of the segment, in nats. What is refused teaches nothing: clocks go on."""
        ...

    def moves(self, index: int, square: float) -> bool:
        """Is a tick of a level made? index: of the level; square: by how much its weights would move, squared and
        summed. One that is not made leaves the weights, and what the rule remembers, as they are; the clock goes on.
        Asked of every level whose weights would change, in their order."""
        ...


Moves = Callable[[float], bool]
"""`Accept.moves` of one level."""


class Own:
    """What a call may write over: all but what is in the state that it was given, which the caller holds."""

    def __init__(self, given: LevelsState) -> None:
        self.held = {id(weight): weight for maps in given.weights for weight in maps}
        self.accumulators = False

    def make(self, weight: Tensor, change: Change) -> Tensor:
        """The weight after a change, where it lies if nobody else holds it."""
        return change.made() if id(weight) in self.held else change.made_in_place()


def learn(
    levels: tuple[level, ...],
    before: LevelsState,
    gradients: Sequence[Sequence[Gradient]],
    loss: Tensor,
    tokens: int,
    own: Own,
    accept: Accept | None,
) -> tuple[LevelsState, list[float]]:
    """The levels after a segment of a summed loss, and by how much each moved, squared and summed. The steps are those
    of `advance`, bit for bit, but that `accept` is asked, and that what the call owns is written over."""
    if accept is not None and not accept.takes(before, gradients, loss, tokens):
        gradients = nothing(levels, before, tokens)
    weights, rules, starts = list(before.weights), list(before.rules), list(before.starts)
    squares = [0.0] * len(levels)
    for i, (lvl, found) in enumerate(zip(levels, gradients, strict=True)):
        if lvl.period == math.inf:
            continue
        moves = None if accept is None else partial(accept.moves, i)
        start = starts[i] if starts else None
        if start is None:
            weights[i], rules[i], squares[i] = _step(lvl, weights[i], found, rules[i], own, moves)
        else:
            given = (weights[i], rules[i], start)
            weights[i], rules[i], starts[i], squares[i] = _restart(levels[i : i + 2], given, found, own, moves)
    own.accumulators = True
    return LevelsState(tuple(weights), tuple(rules), tuple(starts)), squares


def _step(
    lvl: level, maps: Weights, found: Sequence[Gradient], rules: Rules, own: Own, moves: Moves | None
) -> tuple[Weights, Rules, float]:
    """One level after a step of its clocked rule, and by how much it moved, squared. Judged before it moves."""
    clock = lvl.clocked
    summed = tuple(clock.accumulate(g, rule, own.accumulators) for g, rule in zip(found, rules, strict=True))
    if not bool(clock.due(summed[0])):
        return maps, summed, 0.0
    changes = [clock.change(weight, rule, lvl.gates) for weight, rule in zip(maps, summed, strict=True)]
    size = _size if moves is None else _distance
    square = sum(size(weight, change) for weight, change in zip(maps, changes, strict=True))
    if moves is None or moves(square):
        made = tuple(own.make(weight, change) for weight, change in zip(maps, changes, strict=True))
        return made, _rested(lvl, summed, changes, own), square
    kept = [Change(weight, 0.0, None, rule.of) for weight, rule in zip(maps, rules, strict=True)]
    return maps, _rested(lvl, summed, kept, own), 0.0


def _rested(lvl: level, summed: Sequence[EveryState], changes: Sequence[Change], own: Own) -> Rules:
    pairs = zip(summed, changes, strict=True)
    return tuple(lvl.clocked.rest(rule, change, own.accumulators) for rule, change in pairs)


def _restart(
    levels: tuple[level, ...],
    given: tuple[Weights, Rules, Start],
    found: Sequence[Gradient],
    own: Own,
    moves: Moves | None,
) -> tuple[Weights, Rules, Start, float]:
    """A level that starts again, and the one that learns its start: after a step of both clocks."""
    (fast, slow), (maps, rules, _) = levels, given
    made, after, start = step_and_restart(fast, slow, *given, found, own.accumulators)
    if all(new is old for new, old in zip(made, maps, strict=True)):
        return made, after, start, 0.0
    square = sum(_distance(old, Change(new, 0.0, None, ())) for old, new in zip(maps, made, strict=True))
    if moves is None or moves(square):
        return made, after, start, square
    kept = tuple(new._replace(of=old.of) for new, old in zip(after, rules, strict=True))
    return maps, kept, start, 0.0


_CACHED = 1 << 17  # numbers that a processor's cache holds beside others


def _size(weight: Tensor, change: Change) -> float:
    """The square of what is added, which is all but for rounding what the weight moves by."""
    if change.added is None:
        return _distance(weight, change)
    return (float(torch.linalg.vector_norm(change.added)) * change.times) ** 2


def _distance(weight: Tensor, change: Change) -> float:
    """The square of what the weight moves by. Some rows at a time, so that no difference as large as a map, and no new
    weight that may not stand, is ever written down."""
    rows = max(1, _CACHED // max(1, weight.shape[-1]))
    olds = weight.split(rows, -2)
    if change.added is None:
        news = change.weight.split(rows, -2)
    else:
        news = (
            torch.add(old, added, alpha=change.times)
            for old, added in zip(olds, change.added.split(rows, -2), strict=True)
        )
    norms = torch.stack([torch.linalg.vector_norm(new - old) for old, new in zip(olds, news, strict=True)])
    return float(norms.double().square().sum())
