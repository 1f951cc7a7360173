"""What a sleep did, pair by pair."""

import math
from typing import NamedTuple

from .dreaming import DreamReport

KEPT = "kept"


class PairReport(NamedTuple):
    """One pair's consolidation. Divergences are KL(teacher || student) in nats a token, over dreams that were not
    learned from.

    outcome: "kept", or why the pair was left without effect. students: before seeding, for every kind of student.
    before: of the student of this sleep; started: after the warm start; after: of what stays; without: the same, with
    the new slot masked. seconds: nan where no clock was given. cut: the steps that a clock left it (-1: not even the
    first dreams); None where the pair ended by itself.
    """

    fast: float
    slow: float
    slot: int | None
    outcome: str
    room: str  # how a slot was found where there was none
    students: dict[str, float]
    before: float
    started: float
    after: float
    without: float
    steps: int
    tokens: int
    divergences: list[float]
    rewards: list[float]
    seconds: float
    cut: int | None = None

    @property
    def kept(self) -> bool:
        return self.outcome == KEPT

    @property
    def recovered(self) -> float:
        """The share of the divergence that seeding took away."""
        return 1 - self.after / self.before if self.before > 0 else 0.0

    def __str__(self) -> str:
        """What is known: a pair that was not begun has no numbers."""
        said = [f"{period_name(self.fast)} -> {period_name(self.slow)}: {self.outcome}"]
        if self.students:
            both = ", ".join(f"{name} {apart:.4f}" for name, apart in self.students.items())
            said.append(f"KL of a student before it is taught: {both}")
        if not math.isnan(self.after):
            masked = "" if math.isnan(self.without) else f" (slot masked {self.without:.4f})"
            said.append(f"KL {self.before:.4f} -> {self.after:.4f}{masked}, {self.steps} steps")
        return "; ".join([*said, self.room] if self.room and self.room != self.outcome else said)


class Scores(NamedTuple):
    """What a probe said: before the sleep; after what was still open has been learned, without a sleep; after it."""

    before: float
    awake: float
    after: float


class SleepReport(NamedTuple):
    """A whole sleep. slots: active ones beside the levels of each period, of `room` each. bytes_stored: of wake text.
    seconds: nan where no clock was given. dreamt: what dreaming came to, where it was asked for and begun."""

    pairs: tuple[PairReport, ...]
    probes: dict[str, Scores]
    slots: dict[float, int]
    room: int
    tokens: int
    bytes_stored: int
    seconds: float
    dreamt: DreamReport | None = None

    @property
    def steps(self) -> tuple[int | None, ...]:
        """Of each pair, what only a clock could know: given to `sleep` again, they make the same sleep without one. A
        pair that ended by itself, such as by an explosion, meets its end again (None)."""
        return tuple(pair.cut for pair in self.pairs)

    def __str__(self) -> str:
        lines = [str(pair) for pair in self.pairs]
        lines += [
            f"{name}: {s.before:.4f} before, {s.awake:.4f} awake, {s.after:.4f} after"
            for name, s in self.probes.items()
        ]
        lines += [str(self.dreamt)] if self.dreamt else []
        spent = "" if math.isnan(self.seconds) else f" in {self.seconds:.1f} seconds"
        held = ", ".join(f"{n} of {self.room} at {period_name(period)}" for period, n in self.slots.items())
        return "\n".join(
            [*lines, f"slots: {held}; {self.tokens:,} tokens{spent}; {self.bytes_stored} bytes of wake text stored"]
        )


def period_name(period: float) -> str:
    """As people read it: tokens, or the context."""
    return "context" if period == 0 else f"{period:,.0f}"
