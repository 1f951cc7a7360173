"""Who is taught in a sleep: the student's levels, of which the teacher knows more."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from nestling.levels import Growing, LevelsState
from nestling.levels.writing import begin
from nestling.memory.part import Part

from .grow import empty


class Student(Part, family=True):
    """What becomes of the fast levels of a pair, and so what the slot has to carry.

    Both read without the fast levels' slots: a sleep empties these once it is done, so that what they hold has to go
    into the slow level's new slot too. (The papers do not say so; without it, what a middle level had taken in from the
    faster one would be lost at the middle level's own consolidation.)
    """

    @abstractmethod
    def teacher(self, before: LevelsState, learned: LevelsState) -> LevelsState:
        """The levels that teach, given those before and after what was still open has been learned."""

    @abstractmethod
    def fast(self, model: Growing, learned: LevelsState, levels: Sequence[int]) -> LevelsState:
        """`learned`, with these levels as the student has them."""

    def of(self, model: Growing, current: LevelsState, learned: LevelsState, fast: Sequence[int]) -> LevelsState:
        """The student: `current`, but for the fast levels and their slots."""
        new = self.fast(model, learned, fast)
        weights, rules, starts = list(current.weights), list(current.rules), list(current.starts)
        for i in fast:
            weights[i], rules[i] = new.weights[i], new.rules[i]
            if starts:
                starts[i] = new.starts[i]
        return LevelsState(empty(model, tuple(weights), fast), tuple(rules), tuple(starts))


@dataclass(frozen=True, repr=False)
class reset(Student):
    """The fast levels back at the weights that they began life with (or start again from), their rules' states fresh;
    clocks go on. The teacher knows all that they have learned since they last were there, and the slot has to carry it.
    """

    def teacher(self, before: LevelsState, learned: LevelsState) -> LevelsState:
        return learned

    def fast(self, model: Growing, learned: LevelsState, levels: Sequence[int]) -> LevelsState:
        first = begin(model.levels, model.level_weights())
        weights, rules = list(learned.weights), list(learned.rules)
        for i in levels:
            start = learned.starts[i] if learned.starts else None
            weights[i] = first.weights[i] if start is None else start.weights
            rules[i] = tuple(
                new._replace(elapsed=old.elapsed) for new, old in zip(first.rules[i], learned.rules[i], strict=True)
            )
        return learned._replace(weights=tuple(weights), rules=tuple(rules))


@dataclass(frozen=True, repr=False)
class paper(Student):
    """The fast levels after one update (Eq. 2), the teacher before it, as published: the slot carries what that update
    overwrites, and what their slots held."""

    def teacher(self, before: LevelsState, learned: LevelsState) -> LevelsState:
        return before

    def fast(self, model: Growing, learned: LevelsState, levels: Sequence[int]) -> LevelsState:
        return learned
