"""When a life sleeps, and which levels then consolidate into which."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from nestling.levels import level
from nestling.memory.part import Part

CONTEXT = 0.0
"""The period that stands for what a model holds of the sequence it is in: faster than any level."""


class Pair(NamedTuple):
    """Two neighbours among a model's periods (tokens): what the levels of period `fast` hold goes to those of `slow`.
    A model has as many levels of each as it has blocks."""

    fast: float
    slow: float


def pairs(levels: Sequence[level], *, context: bool = False) -> tuple[Pair, ...]:
    """The pairs of a model's levels, the slow pair first: it is emptied before the fast one writes into it.
    context: the sequence state consolidates too, into the fastest level."""
    periods = sorted({lvl.period for lvl in levels})
    ladder = [CONTEXT, *periods] if context else periods
    return tuple(Pair(fast, slow) for fast, slow in pairwise(ladder))[::-1]


def due(levels: Sequence[level], position: int) -> tuple[Pair, ...]:
    """The pairs that consolidate after `position` tokens, slow pair first: those whose fast level steps there.

    For every l with i = 0 (mod C_{l-1}), block l - 1 into block l (Language Models Need Sleep, section 3.1).
    """
    return tuple(pair for pair in pairs(levels) if position > 0 and position % pair.fast == 0)


class Moment(NamedTuple):
    """What a schedule is told of a life: tokens read, tokens read since the last sleep, nats a token of late and at the
    best of times since the last sleep, and the share of slots in use beside the levels of each period."""

    position: int
    awake: int
    surprise: float = math.nan
    best: float = math.nan
    used: Mapping[float, float] = MappingProxyType({})


class Schedule(Part, family=True):
    """When a life sleeps."""

    @abstractmethod
    def pairs(self, levels: Sequence[level], moment: Moment) -> tuple[Pair, ...]:
        """What consolidates at this moment: nothing, where the life stays awake."""

    @abstractmethod
    def next(self, levels: Sequence[level], position: int) -> int:
        """The next position at which to ask, in tokens: a function of nothing but the position."""


@dataclass(frozen=True, repr=False)
class at_ticks(Schedule):
    """At every multiple of a level's period: the published schedule. at_least: periods below are passed over, since a
    sleep costs more than a few tokens are worth."""

    at_least: int = 1  # tokens

    def pairs(self, levels: Sequence[level], moment: Moment) -> tuple[Pair, ...]:
        return tuple(pair for pair in due(levels, moment.position) if pair.fast >= self.at_least)

    def next(self, levels: Sequence[level], position: int) -> int:
        steps = [int(p.fast) for p in pairs(levels) if self.at_least <= p.fast < math.inf]
        return min((position // step * step + step for step in steps), default=position + 2**40)


@dataclass(frozen=True, repr=False)
class after(Schedule):
    """Once so many tokens were read since the last sleep, every pair."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"after: tokens must be >= 1, got {self.tokens}")

    def pairs(self, levels: Sequence[level], moment: Moment) -> tuple[Pair, ...]:
        return pairs(levels) if moment.awake >= self.tokens else ()

    def next(self, levels: Sequence[level], position: int) -> int:
        return (position // self.tokens + 1) * self.tokens


@dataclass(frozen=True, repr=False)
class when_surprised(Schedule):
    """Once the mean surprise of the last `over` tokens is `nats` above the best since the last sleep: what was held is
    being lost, or the text has changed. Not before `at_least` tokens."""

    nats: float
    at_least: int
    over: int = 256

    def __post_init__(self) -> None:
        if self.over < 1:
            raise ValueError(f"when_surprised: over must be >= 1 token, got {self.over}")

    def next(self, levels: Sequence[level], position: int) -> int:
        return (position // self.over + 1) * self.over

    def pairs(self, levels: Sequence[level], moment: Moment) -> tuple[Pair, ...]:
        surprised = moment.surprise - moment.best >= self.nats
        return pairs(levels) if surprised and moment.awake >= self.at_least else ()


@dataclass(frozen=True, repr=False)
class when_slots_fill(Schedule):
    """Once a level uses this share of its slots, it gives them up to the next slower one. Asked every `each` tokens."""

    share: float = 1.0
    each: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.each < 1:
            raise ValueError(f"when_slots_fill: share must be in (0, 1] and each >= 1, got {self.share}, {self.each}")

    def next(self, levels: Sequence[level], position: int) -> int:
        return (position // self.each + 1) * self.each

    def pairs(self, levels: Sequence[level], moment: Moment) -> tuple[Pair, ...]:
        return tuple(pair for pair in pairs(levels) if moment.used.get(pair.fast, 0.0) >= self.share)


@dataclass(frozen=True, repr=False)
class by_hand(Schedule):
    """Only when it is told to."""

    def pairs(self, levels: Sequence[level], moment: Moment) -> tuple[Pair, ...]:
        return ()

    def next(self, levels: Sequence[level], position: int) -> int:
        return position + 2**40


def nights(levels: Sequence[level], schedule: Schedule, tokens: int) -> Iterator[tuple[int, tuple[Pair, ...]]]:
    """Every sleep within so many tokens, of a schedule that asks for nothing but positions: where, and which pairs."""
    position = slept = 0
    while (position := schedule.next(levels, position)) <= tokens:
        chosen = schedule.pairs(levels, Moment(position, position - slept))
        if chosen:
            slept = position
            yield position, chosen
