"""Guards: which writes a life takes in. Each decision is a function of the path so far: a replay repeats it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.levels import LevelsState, level
from nestling.memory import Pairs
from nestling.memory.rule import EveryState, Gradient
from nestling.memory.state import flatten

RATE = 1 / 64  # of the running means, per segment
SHORT = 16  # tokens; of a segment that is shorter no jump is told: a few tokens say too little


@dataclass(frozen=True, kw_only=True)
class Guards:
    """When a write is refused. What is not finite always is."""

    surprise_jump: float = 2.5  # times the running mean of a segment's nats a token
    level_jump: float = 8.0  # times the running mean of what a segment adds to a level, or of what a tick moves it
    warm_segments: int = 16  # taken in before a jump can be told
    strikes: int = 6  # refused segments of a source, before it is quarantined
    share: float = 0.5  # of the source's segments that they must be

    def __post_init__(self) -> None:
        for name in ("surprise_jump", "level_jump"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be > 1 (inf: no bound), got {getattr(self, name)}")
        for name in ("warm_segments", "strikes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1 segment, got {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")


class Running(NamedTuple):
    """A running mean."""

    values: int = 0  # that were added
    mean: float = 0.0

    def add(self, value: float) -> "Running":
        return Running(self.values + 1, self.mean + (value - self.mean) * max(1 / (self.values + 1), RATE))

    def jumps(self, value: float, times: float, warm: int) -> bool:
        return self.values >= warm and value > times * self.mean > 0


class Record(NamedTuple):
    """A source in the guards' eyes."""

    segments: int = 0
    refused: int = 0
    quarantined: bool = False
    trusted: bool = False


class GuardState(NamedTuple):
    """What the guards have seen on the way here: plain numbers."""

    surprise: Running  # of segments, nats a token
    added: tuple[Running, ...]  # per level: norm of what a segment adds to its accumulated gradient
    moved: tuple[Running, ...]  # per level: norm of a tick's change of its weights
    sources: dict[str, Record]

    @classmethod
    def begin(cls, levels: int) -> "GuardState":
        return cls(Running(), (Running(),) * levels, (Running(),) * levels, {})

    def to_data(self) -> dict[str, Any]:
        return {**self._asdict(), "sources": {name: list(record) for name, record in self.sources.items()}}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> "GuardState":
        runs = {name: tuple(Running(*run) for run in data[name]) for name in ("added", "moved")}
        sources = {name: Record(*record) for name, record in data["sources"].items()}
        return cls(Running(*data["surprise"]), runs["added"], runs["moved"], sources)

    def record(self, source: str) -> Record:
        return self.sources.get(source, Record())

    def with_record(self, source: str, record: Record) -> "GuardState":
        return self._replace(sources={**self.sources, source: record})


class Guard:
    """Judges the writes of one event of one source; `Reader.accept`. Made for the event and thrown away after it:
    `state` is what the guards know at its end, `refused` and `held` what was not taken in."""

    def __init__(self, rules: Guards, levels: tuple[level, ...], state: GuardState, source: str) -> None:
        self.rules, self.levels, self.state, self.source = rules, levels, state, source
        self.refused: Counter[str] = Counter()
        self.held: Counter[int] = Counter()  # level -> ticks whose change was too large

    def takes(self, before: LevelsState, gradients: Sequence[Sequence[Gradient]], loss: Tensor, tokens: int) -> bool:
        """Judge a segment by its surprise and by what it would add, before any of it is added."""
        surprise = float(loss) / max(1, tokens)
        finite = math.isfinite(surprise) and all(_finite(gradient) for found in gradients for gradient in found)
        added = self._measure(before, gradients, tokens) if finite and tokens >= SHORT else {}
        reason = self._reason(surprise, added, finite, tokens)
        if tokens >= SHORT:
            self._count(reason)
        if reason:
            self.refused[reason] += 1
        elif tokens >= SHORT:
            runs = self.state.added
            for index, value in added.items():
                runs = _with(runs, index, runs[index].add(value))
            self.state = self.state._replace(surprise=self.state.surprise.add(surprise), added=runs)
        return reason is None

    def moves(self, index: int, square: float) -> bool:
        """Judge a tick by how far it would move its level, before it does."""
        value = math.sqrt(square) if math.isfinite(square) else math.inf
        run, trusted = self.state.moved[index], self.state.record(self.source).trusted
        jumps = run.jumps(value, self.rules.level_jump, self.rules.warm_segments)
        if not math.isfinite(value) or (jumps and not trusted):
            self.held[index] += 1
            return False
        self.state = self.state._replace(moved=_with(self.state.moved, index, run.add(value)))
        return True

    def _reason(self, surprise: float, added: dict[int, float], finite: bool, tokens: int) -> str | None:
        record, rules = self.state.record(self.source), self.rules
        if not finite:
            return "not finite"
        if record.quarantined:
            return "quarantined"
        if record.trusted or tokens < SHORT:
            return None
        if self.state.surprise.jumps(surprise, rules.surprise_jump, rules.warm_segments):
            return "surprise"
        for index, value in added.items():
            if self.state.added[index].jumps(value, rules.level_jump, rules.warm_segments):
                return "gradient"
        return None

    def _count(self, reason: str | None) -> None:
        record = self.state.record(self.source)
        refused, segments = record.refused + (reason is not None), record.segments + 1
        enough = not record.trusted and refused >= max(self.rules.strikes, self.rules.share * segments)
        record = record._replace(segments=segments, refused=refused, quarantined=record.quarantined or enough)
        self.state = self.state.with_record(self.source, record)

    def _measure(self, before: LevelsState, gradients: Sequence[Sequence[Gradient]], tokens: int) -> dict[int, float]:
        """Per level that is awake and stays off its tick: the norm of what is added to its gradient."""
        return {
            index: math.sqrt(sum(_square(gradient) for gradient in found))
            for index, (lvl, rules, found) in enumerate(zip(self.levels, before.rules, gradients, strict=True))
            if lvl.period != math.inf and _elapsed(rules) + tokens < lvl.period
        }


def _with(runs: tuple[Running, ...], index: int, run: Running) -> tuple[Running, ...]:
    return (*runs[:index], run, *runs[index + 1 :])


def _elapsed(rules: Sequence[EveryState]) -> int:
    return int(rules[0].elapsed.flatten()[0])


def _finite(gradient: Gradient) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in flatten(gradient).values())


def _square(gradient: Gradient) -> float:
    """The squares of a gradient's entries, summed: of few pairs, from their products with each other."""
    if isinstance(gradient, Pairs):
        (pairs, outputs), inputs = gradient.error.shape, gradient.input.shape[-1]
        if pairs * (outputs + inputs) < outputs * inputs:
            errors, keys = gradient.error.double(), gradient.input.double()
            return max(0.0, float(((errors @ errors.mT) * (keys @ keys.mT)).sum()))
    return float(torch.linalg.vector_norm(gradient.dense(), dtype=torch.float64)) ** 2
