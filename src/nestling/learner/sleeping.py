"""A sleep as one event of a life: what is journaled of it is enough to sleep it again, bit for bit."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from nestling.levels import Accept, Growing, LevelledModel, ReadingState
from nestling.models.data import from_data, to_data
from nestling.sleep import Pair, Schedule, SleepConfig, SleepReport, affordable, sleep, used
from nestling.sleep.dreaming import mean_nats
from nestling.sleep.night import Probe, Tell
from nestling.sleep.schedule import Moment

from .event import Event
from .machine import flushing

SOURCE = "sleep"
"""The source of sleeps: to forget it is to have stayed awake."""
PROBED = 2048
"""Tokens of a probe that are looked at."""


class Night(NamedTuple):
    """What a sleep was: its configuration, what its draws are keyed by, and the seeding steps of each pair that a clock
    cut short (None: it ended by itself, and does so again; older nights have the steps of every pair). guarded: whether
    what was open was learned under the life's guards (older nights: not). only: the pairs, where it was some of them.
    """

    config: SleepConfig
    key: str
    steps: tuple[int | None, ...]
    guarded: bool = True
    only: tuple[Pair, ...] | None = None

    def write(self) -> bytes:
        data = {"config": to_data(self.config), "key": self.key, "steps": list(self.steps), "guarded": self.guarded}
        if self.only is not None:
            data["only"] = [[to_data(period) for period in pair] for pair in self.only]
        return json.dumps(data, sort_keys=True).encode()

    @staticmethod
    def read(content: bytes) -> "Night":
        data = json.loads(content)
        config = from_data(SleepConfig, data["config"], path="sleep")
        only = tuple(Pair(float(fast), float(slow)) for fast, slow in data["only"]) if "only" in data else None
        return Night(config, data["key"], tuple(data["steps"]), data.get("guarded", False), only)


def night_key(seed: int, number: int) -> str:
    """What the draws of the `number`-th sleep of a life are keyed by: its seed, and no other event."""
    return hashlib.sha256(f"sleep {seed} {number}".encode()).hexdigest()[:32]


def growing(model: LevelledModel) -> Growing:
    """The model as one that can sleep. Raises ValueError where a life was begun without slots."""
    if not isinstance(model, Growing):
        raise ValueError("this life has no slots to sleep into: begin one with them (nestling new --slots 5)")
    return model


def fall_asleep(
    model: Growing,
    reading: ReadingState,
    config: SleepConfig,
    key: str,
    seconds: float | None,
    probes: Mapping[str, Probe],
    tell: Tell | None,
    accept: Accept | None,
    only: Sequence[Pair] | None,
) -> tuple[ReadingState, SleepReport, Night]:
    """The state after a sleep, its report, and what is to be journaled of it."""
    told = {"clock": time.monotonic, "seconds": math.inf if seconds is None else seconds, "accept": accept}
    with flushing():
        reading, report = sleep(model, reading, config, key, only=only, probes=probes, tell=tell, **told)  # type: ignore[arg-type]
    chosen = None if only is None else tuple(only)
    done = config if report.dreamt else replace(config, dreaming=None)
    return reading, report, Night(done, key, report.steps, only=chosen)


Day = Sequence[tuple[Event, Mapping[str, Any]]]
"""What was learned since the last sleep: events, and what each has done."""


def default_night(model: Growing, day: Day, config: SleepConfig) -> SleepConfig:
    """The sleep of a kind that a quarter of what was learned since the last one buys. Raises ValueError where that is
    too little for any."""
    found = affordable(model, learned(day), config)
    if found is None:
        raise ValueError(
            f"{learned(day):,} tokens were read since the last sleep, and a quarter of that buys no night; read more, "
            "or say what the night may cost (nestling sleep --steps, --dreams or --seconds)"
        )
    return found


def learned(day: Day) -> int:
    """Tokens."""
    return sum(_tokens(event, done) for event, done in day)


def _tokens(event: Event, done: Mapping[str, Any]) -> int:
    return int(done.get("tokens", event.tokens))


class Due(NamedTuple):
    """A sleep that a schedule asks for."""

    pairs: tuple[Pair, ...]
    config: SleepConfig


def due_night(
    model: Growing, schedule: Schedule, reading: ReadingState, day: Day, config: SleepConfig, share: float | None
) -> Due | None:
    """What a schedule asks for at this point of a life: the night of a kind that costs at most a share of the day, or
    (None) the one that was given. None where the life is to stay awake, or the day was too short for a night."""
    chosen = schedule.pairs(model.own, moment(model, schedule, reading, day))
    if not chosen:
        return None
    bought = config if share is None else affordable(model, learned(day), config, share=share, chosen=chosen)
    return None if bought is None else Due(chosen, bought)


def moment(model: Growing, schedule: Schedule, reading: ReadingState, day: Day) -> Moment:
    """What a schedule is told. The surprise is that of the tokens since it could last be asked, its best the least
    since the last sleep; both by whole events, which end where a schedule is asked once a life lives by it."""
    position, awake = int(reading.position), learned(day)
    at, means, nats, counted = position - awake, [math.inf, math.nan], 0.0, 0
    asked = schedule.next(model.own, at)
    for event, done in day:
        at += _tokens(event, done)
        nats, counted = nats + float(done.get("nats", 0.0)), counted + int(done.get("counted", 0))
        if at >= asked:
            means.append(nats / counted if counted else math.nan)
            nats, counted, asked = 0.0, 0, schedule.next(model.own, at)
    best = min(mean for mean in means[:-1] if not math.isnan(mean))
    shares = {period: count / model.slots for period, count in used(model, reading.levels.weights).items()}
    return Moment(position, awake, means[-1], best, shares)


def score(name: str, model: Growing, text: Tensor) -> Probe:
    """A score of a life's weights: nats a token of the beginning of a text."""
    if text.numel() < 2:
        raise ValueError(f"probe {name!r}: needs at least 2 tokens, got {text.numel()}")
    return lambda weights: mean_nats(model, weights, text[None, :PROBED].to(weights[0][0].device))


def again(
    model: LevelledModel, reading: ReadingState, content: bytes, accept: Accept | None
) -> tuple[ReadingState, SleepReport]:
    """The state after a sleep that was journaled."""
    night = Night.read(content)
    told = {"steps": night.steps, "only": night.only, "accept": accept if night.guarded else None}
    return sleep(growing(model), reading, night.config, night.key, **told)  # type: ignore[arg-type]
