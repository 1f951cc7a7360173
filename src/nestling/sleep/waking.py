"""A life that sleeps on a schedule: awake it reads and learns, and where the schedule says so, it sleeps."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.levels import Growing, Reader, ReadingState

from .budget import affordable
from .grow import used
from .night import Probe, SleepConfig, sleep
from .report import SleepReport
from .reservoir import Reservoir, keep, no_reservoir
from .schedule import Moment, Schedule


class Lived(NamedTuple):
    """A life between two calls. slept: the position of the last sleep; best: the least surprise since, in nats a token;
    recent: the surprise of every token since the schedule was last asked."""

    reading: ReadingState
    slept: int
    best: float
    recent: Tensor
    reservoir: Reservoir


def begin(model: Growing, reservoir: Reservoir | None = None) -> Lived:
    """A life before its first token; by default it keeps no text."""
    none = torch.zeros(0, dtype=torch.float64)
    return Lived(Reader(model).begin(), 0, math.inf, none, no_reservoir() if reservoir is None else reservoir)


class Night(NamedTuple):
    """A sleep, after so many tokens."""

    position: int
    report: SleepReport


def live(
    model: Growing,
    life: Lived,
    tokens: Tensor,
    schedule: Schedule,
    config: SleepConfig | None = None,
    key: object = 0,
    *,
    probes: Mapping[str, Probe] | None = None,
) -> tuple[Lived, Tensor, list[Night]]:
    """Read tokens [n], sleeping where the schedule says so: the life after them, the nats of every token, the sleeps.

    config: None for nights that cost at most a quarter of the waking time before them (`affordable`); where that is too
    little for a night, the life stays awake. A sleep's draws are keyed by `key` and its position, so that one pass =
    split passes, as in `Reader.read`.
    """
    reader, nats, slept = Reader(model), [], []
    while tokens.numel():
        position = int(life.reading.position)
        size = min(schedule.next(model.own, position) - position, tokens.numel())
        part, tokens = tokens[:size], tokens[size:]
        reading, out = reader.read(life.reading, part)
        nats.append(out.nll)
        recent = torch.cat([life.recent, out.nll.double().cpu()])
        life = life._replace(reading=reading, recent=recent, reservoir=keep(life.reservoir, part, key))
        if schedule.next(model.own, position) == position + size:
            life, night = _asked(model, life, schedule, config, key, probes)
            slept += night
    losses = torch.cat(nats) if nats else life.recent.new_zeros(0)
    return life, losses, slept


def _asked(
    model: Growing,
    life: Lived,
    schedule: Schedule,
    config: SleepConfig | None,
    key: object,
    probes: Mapping[str, Probe] | None,
) -> tuple[Lived, list[Night]]:
    position = int(life.reading.position)
    surprise = float(life.recent[life.recent.isfinite()].mean())
    shares = {period: count / model.slots for period, count in used(model, life.reading.levels.weights).items()}
    moment = Moment(position, position - life.slept, surprise, life.best, shares)
    chosen = schedule.pairs(model.own, moment)
    life = life._replace(recent=life.recent[:0], best=min(life.best, surprise))
    told = config or affordable(model, moment.awake, chosen=chosen)
    if not chosen or told is None:
        return life, []
    reading, report = sleep(
        model, life.reading, told, (key, position), only=chosen, reservoir=life.reservoir, probes=probes
    )
    return life._replace(reading=reading, slept=position, best=math.inf), [Night(position, report)]
