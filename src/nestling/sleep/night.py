"""A sleep: what the fast levels hold goes to slower ones, into slots that were just added, and is freed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from nestling.levels import Accept, Growing, LevelsState, Reader, ReadingState
from nestling.memory.state import detach, stack
from nestling.memory.structure import Weights

from .bound import Bound, OutOfTime
from .dreaming import DreamConfig, DreamReport, dream_of, own_task
from .dreams import Dreams, Source, any_token, dream
from .grow import activate, draws, first_free, levels_of, masked, used
from .prune import Made, WhenFull, refuse
from .report import KEPT, PairReport, Scores, SleepReport
from .reservoir import Reservoir, no_reservoir
from .schedule import CONTEXT, Pair, pairs
from .seed import Place, Rehearsal, SeedConfig, Seeded, States, Views, distance, seed
from .student import Student, paper, reset
from .warm_start import warm_start

S = TypeVar("S", LevelsState, ReadingState)
Probe = Callable[[tuple[Weights, ...]], float]
"""A score of a life's weights, such as the surprise on text that is held out."""
Tell = Callable[[Pair, int, int], None]
"""(pair, steps done, steps in all): called as a sleep goes on."""
FINISHED = ("done", "stopped")
NOT_BEGUN = -1
"""Steps of a pair for which no time was left."""


@dataclass(frozen=True, kw_only=True)
class SleepConfig:
    """How a life sleeps. warm_start and rehearsal are not the paper's; without rehearsal, sleeping lives forgot more
    than sleepless ones that learned as much (studies/sleep/first)."""

    student: Student = reset()
    seeding: SeedConfig = SeedConfig()
    source: Source = any_token()
    dreams: int = 256
    held_out: int = 32  # more dreams, from which nothing is learned
    length: int = 64  # tokens of a dream, without its prompt
    temperature: float = 1.0  # of the teacher's writing
    warm_start: bool = True  # fit a new slot by reduced-rank regression before it is seeded
    context: bool = False  # consolidate what the sequence state holds, too, into the fastest level
    when_full: WhenFull = refuse()
    rehearsal: float = 1.0  # dreams of the student itself, before it is taught, as a share of `dreams`
    least_recovered: float = 0.0  # share of the divergence that seeding must take away for a pair to be kept
    dreaming: DreamConfig | None = None  # dream once all pairs are done, of writing as before the sleep

    def __post_init__(self) -> None:
        for name in ("dreams", "held_out", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be >= 2 tokens, got {self.length}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not self.rehearsal >= 0:
            raise ValueError(f"rehearsal must be >= 0, got {self.rehearsal}")
        if not self.least_recovered < 1:
            raise ValueError(f"least_recovered must be < 1, got {self.least_recovered}")


def sleep(
    model: Growing,
    state: S,
    config: SleepConfig = SleepConfig(),
    key: object = 0,
    *,
    only: Sequence[Pair] | None = None,
    steps: Sequence[int | None] | None = None,
    reservoir: Reservoir | None = None,
    probes: Mapping[str, Probe] | None = None,
    clock: Callable[[], float] | None = None,
    seconds: float = math.inf,
    tell: Tell | None = None,
    accept: Accept | None = None,
) -> tuple[S, SleepReport]:
    """The life after a sleep, and what happened in it. What was given is not changed, so that a sleep that breaks off
    has not been.

    Pair by pair, slow pair first: the next slot of the slow levels is activated, the student (see `Student`) is taught
    by the teacher on the teacher's dreams (Knowledge Seeding: nothing but the new slot moves), the fast levels become
    the student's, and their own slots are emptied. A pair is left without effect, and the report says why, where no
    slot is free, where something is not finite, where the loss breaks, or where the student is not nearer to the
    teacher than before, on dreams that are held out; where seeding took it further away than a warm start had brought
    it, the warm start stays.

    A `ReadingState` first learns what it holds open (`Reader.settle`, asking `accept`); its sequence state stays. key:
    what all draws are keyed by, such as (a life's seed, an event's key); the same state, config and key give the same
    bits. only: some of the pairs. steps: of each pair, as a report of the same sleep says (`SleepReport.steps`), to
    repeat one that a bound in `seconds` had cut short: None where a pair is to end by itself, which it does as it did.
    No clock is read unless `clock` is given; it is asked before all that takes long. A pair that runs out of it before
    seeding is left as it was, and so is dreaming; after it at most a step of seeding and the scores are yet to come.

    Language Models Need Sleep, sections 3.1 to 3.3.
    """
    bound = Bound(clock, seconds, 0.0 if clock is None else clock())
    reservoir = no_reservoir() if reservoir is None else reservoir
    night = _Night(model, config, key, bound, reservoir, tell)
    before, learned, context = _levels(model, state, accept)
    chosen = _chosen(model, config, only, context is not None)
    if steps is not None and len(steps) != len(chosen):
        raise ValueError(f"steps must have one number for each of {len(chosen)} pairs, got {len(steps)}")
    current = config.student.teacher(before, learned)
    reports: list[PairReport] = []
    moved: set[int] = set()
    for index, pair in enumerate(chosen):
        limit = None if steps is None else steps[index]
        current, report = night.consolidate(pair, current, learned, before, context, limit)
        reports.append(report)
        if report.kept:
            moved.update(levels_of(model, pair.fast), levels_of(model, pair.slow) if _own(config) else ())
    after, dreamt = night.dreaming(learned, _merged(model, current, learned, moved))
    scores = {
        name: Scores(probe(before.weights), probe(learned.weights), probe(after.weights))
        for name, probe in (probes or {}).items()
    }
    told = SleepReport(
        tuple(reports),
        scores,
        used(model, after.weights),
        model.slots,
        sum(report.tokens for report in reports),
        reservoir.bytes_stored,
        bound.now - bound.began,
        dreamt,
    )
    return _woken(state, after), told


def _own(config: SleepConfig) -> bool:
    return config.seeding.into == "weights"


def _levels(
    model: Growing, state: LevelsState | ReadingState, accept: Accept | None
) -> tuple[LevelsState, LevelsState, States | None]:
    """The levels, the levels after what was open is learned, and the sequence state for any number of rows."""
    if isinstance(state, LevelsState):
        _check(model, state)
        return state, state, None
    _check(model, state.levels)
    now = detach(state.now)
    return state.levels, Reader(model, accept=accept).settle(state).levels, lambda rows: stack([now] * rows)


def _check(model: Growing, levels: LevelsState) -> None:
    if len(levels.weights) != len(model.levels):
        raise ValueError(
            f"a life of {len(levels.weights)} levels has no slots to sleep into; {len(model.levels)} are needed: "
            "grow them first, by Growing.grown(levels)"
        )


def _chosen(model: Growing, config: SleepConfig, only: Sequence[Pair] | None, reads: bool) -> tuple[Pair, ...]:
    if config.context and not reads:
        raise ValueError("context=True consolidates a sequence state: give a ReadingState, not the levels alone")
    known = pairs(model.own, context=config.context)
    unknown = [pair for pair in only or () if pair not in known]
    if unknown:
        raise ValueError(f"{unknown[0]} is no pair of neighbours; they are: {', '.join(map(str, known))}")
    return known if only is None else tuple(pair for pair in known if pair in only)


def _merged(model: Growing, current: LevelsState, learned: LevelsState, moved: set[int]) -> LevelsState:
    """Levels that a pair has moved and all slots as they are now; every other level as it learned."""
    count = len(model.own)
    weights, rules, starts = list(current.weights), list(current.rules), list(current.starts)
    for i in range(count):
        if i not in moved:
            weights[i], rules[i] = learned.weights[i], learned.rules[i]
            if starts:
                starts[i] = learned.starts[i]
    return LevelsState(tuple(weights), tuple(rules), tuple(starts))


def _woken(state: S, levels: LevelsState) -> S:
    if isinstance(state, LevelsState):
        return levels
    return state._replace(levels=levels, segment=state.segment[:0], before=state.now)


class _Night(NamedTuple):
    """What every pair of one sleep is given."""

    model: Growing
    config: SleepConfig
    key: object
    bound: Bound
    reservoir: Reservoir
    tell: Tell | None

    def consolidate(
        self,
        pair: Pair,
        current: LevelsState,
        learned: LevelsState,
        before: LevelsState,
        context: States | None,
        limit: int | None,
    ) -> tuple[LevelsState, PairReport]:
        """The levels after one pair, and its report. Without effect they are `current` itself. limit: of its steps,
        where a clock has set one before."""
        if limit == NOT_BEGUN:
            return current, _nothing(pair, "out of time", NOT_BEGUN)
        teaching, who = context if pair.fast == CONTEXT else None, "teacher"
        try:
            self.bound.ask()
            dreams, held = self._dreams(pair, current, teaching)
            who = "student"
            return self._taught(pair, current, learned, before, teaching, dreams, held, limit)
        except OutOfTime:  # what was done is let go: a pair is begun or not
            return current, _nothing(pair, "out of time", NOT_BEGUN)
        except (FloatingPointError, torch.linalg.LinAlgError):
            return current, _nothing(pair, f"the {who} is not finite", 0)

    def _taught(
        self,
        pair: Pair,
        current: LevelsState,
        learned: LevelsState,
        before: LevelsState,
        teaching: States | None,
        dreams: list[Dreams],
        held: list[Dreams],
        limit: int | None,
    ) -> tuple[LevelsState, PairReport]:
        """The levels after the teacher has dreamt and the student has learned of it. Raises OutOfTime before seeding,
        and FloatingPointError or LinAlgError where the student is not finite."""
        model, config, began = self.model, self.config, self.bound.now
        fast, hosts = levels_of(model, pair.fast), levels_of(model, pair.slow)
        self.bound.ask()
        student = config.student.of(model, current, learned, fast)
        views = Views(current.weights, student.weights, teaching, None)
        students = self._students(views, current, learned, before, fast, held)
        start = students[type(config.student).__name__]
        if not math.isfinite(start):
            raise FloatingPointError("the student's divergence is not finite")
        if start == 0.0:
            return current, _nothing(pair, "nothing to move", 0)._replace(students=students, before=start)
        self.bound.ask()
        made = self._room(student.weights, hosts, dreams)
        if made.slot is None:
            return current, _nothing(pair, made.how, 0)._replace(students=students, before=start)
        rehearsal = self._rehearsal(pair, student)
        place, views = self._grown(pair, views._replace(student=made.weights), made, hosts)
        if config.warm_start and place.slot is not None:
            weights, _ = warm_start(model, views, place, fast, dreams, model.rank, rehearsal, self.bound.ask)
            views = views._replace(student=weights)
        self.bound.ask()
        started = distance(model, views, held)
        done = self._seed(pair, views, place, dreams, limit, rehearsal)
        cut = limit is not None or done.outcome == "stopped"
        after = distance(model, views._replace(student=done.weights), held)
        if done.outcome in FINISHED and started < after:  # what a warm start knew, and seeding has lost
            done, after = done._replace(weights=views.student), started
        bare = done.weights if place.slot is None else masked(model, done.weights, hosts, place.slot)
        outcome = self._judge(done, start, after)
        written = (*dreams, *held, *(rehearsal.dreams if rehearsal else ()))
        report = PairReport(
            pair.fast,
            pair.slow,
            place.slot,
            outcome,
            made.how,
            students,
            start,
            started,
            after,
            distance(model, views._replace(student=bare), held),
            done.steps,
            done.tokens + sum(part.tokens.numel() for part in written),
            done.divergences,
            done.rewards,
            self.bound.now - began,
            done.steps if cut else None,
        )
        return (student._replace(weights=done.weights) if outcome == KEPT else current), report

    def dreaming(self, teacher: LevelsState, rested: LevelsState) -> tuple[LevelsState, DreamReport | None]:
        """The second stage: what the life that went to sleep would write is what dreams are tried on."""
        config = self.config
        if config.dreaming is None or self.bound.passed():
            return rested, None
        key = (self.key, "dreaming")
        told = (config.source, config.held_out, config.length, key)
        try:
            task = own_task(self.model, teacher.weights, *told, reservoir=self.reservoir, ask=self.bound.ask)
            return dream_of(self.model, rested, task, config.dreaming, key, self.bound.ask)
        except OutOfTime:
            return rested, None
        except FloatingPointError:
            return rested, DreamReport("not finite", None, math.nan, math.nan, ())

    def _grown(self, pair: Pair, views: Views, made: Made, hosts: tuple[int, ...]) -> tuple[Place, Views]:
        """Where the student is to learn, and the student with a new slot there."""
        if _own(self.config) or made.slot is None:
            return Place(hosts, None), views
        generator = draws(self.key, pair, "slot")
        return Place(hosts, made.slot), views._replace(
            student=activate(self.model, views.student, hosts, made.slot, generator)
        )

    def _dreams(self, pair: Pair, teacher: LevelsState, states: States | None) -> tuple[list[Dreams], list[Dreams]]:
        """What is learned from, and what is held out."""
        config = self.config
        told = {
            "reservoir": self.reservoir,
            "temperature": config.temperature,
            "states": states,
            "ask": self.bound.ask,
        }

        def draw(count: int, name: str) -> list[Dreams]:
            generator = draws(self.key, pair, name)
            return dream(self.model, teacher.weights, config.source, count, config.length, generator, **told)  # type: ignore[arg-type]

        return draw(config.dreams, "dreams"), draw(config.held_out, "held out")

    def _students(
        self,
        views: Views,
        current: LevelsState,
        learned: LevelsState,
        before: LevelsState,
        fast: Sequence[int],
        held: list[Dreams],
    ) -> dict[str, float]:
        """KL(teacher || student) before seeding, for both kinds of student, on the same dreams."""
        found = {}
        for kind in (paper(), reset()):
            self.bound.ask()
            teacher = current if kind == self.config.student else kind.teacher(before, learned)
            student = kind.of(self.model, teacher, learned, fast)
            both = views._replace(teacher=teacher.weights, student=student.weights)
            found[type(kind).__name__] = distance(self.model, both, held)
        return found

    def _room(self, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: list[Dreams]) -> Made:
        """A free slot in every bank, made where there is none."""
        slot = first_free(self.model, weights, hosts)
        if slot is not None or _own(self.config):
            return Made(weights, slot or 0, "")
        return self.config.when_full.room(self.model, weights, hosts, dreams)

    def _rehearsal(self, pair: Pair, student: LevelsState) -> Rehearsal | None:
        """What the student is without what it is about to be taught."""
        config, count = self.config, round(self.config.rehearsal * self.config.dreams)
        if not count:
            return None
        generator = draws(self.key, pair, "rehearsal")
        told = {"reservoir": self.reservoir, "temperature": config.temperature, "ask": self.bound.ask}
        texts = dream(self.model, student.weights, config.source, count, config.length, generator, **told)  # type: ignore[arg-type]
        return Rehearsal(student.weights, tuple(texts))

    def _seed(
        self,
        pair: Pair,
        views: Views,
        place: Place,
        dreams: list[Dreams],
        limit: int | None,
        rehearsal: Rehearsal | None,
    ) -> Seeded:
        steps = self.config.seeding.steps if limit is None else limit

        def stop(step: int) -> bool:
            if self.tell is not None:
                self.tell(pair, step, steps)
            return self.bound.passed()

        config = replace(self.config.seeding, steps=steps)
        generator = draws(self.key, pair, "seeding")
        return seed(self.model, views, place, dreams, config, generator, stop, rehearsal)

    def _judge(self, done: Seeded, before: float, after: float) -> str:
        if done.outcome not in FINISHED:
            return done.outcome
        if not math.isfinite(after):
            return "not finite"
        if not after < before * (1 - self.config.least_recovered):
            return "no gain"
        return KEPT


def _nothing(pair: Pair, why: str, steps: int) -> PairReport:
    unknown = (math.nan, math.nan, math.nan, math.nan)
    cut = NOT_BEGUN if steps == NOT_BEGUN else None
    return PairReport(pair.fast, pair.slow, None, why, "", {}, *unknown, steps, 0, [], [], math.nan, cut)
