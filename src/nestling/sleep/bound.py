"""Until when a sleep goes on."""

import math
from collections.abc import Callable
from typing import NamedTuple

Ask = Callable[[], None]
"""Called between two pieces of work; raises `OutOfTime` where there is no time for the next."""


class OutOfTime(Exception):
    """The work that was begun is let go."""


class Bound(NamedTuple):
    """`seconds` by `clock` (any function that counts seconds), counted from `began`; no clock is no bound."""

    clock: Callable[[], float] | None
    seconds: float
    began: float

    @property
    def now(self) -> float:
        return math.nan if self.clock is None else self.clock()

    def passed(self) -> bool:
        return self.clock is not None and self.clock() - self.began >= self.seconds

    def ask(self) -> None:
        if self.passed():
            raise OutOfTime


def unbounded() -> None:
    """An `Ask` that always has time."""
