"""A sleep as one event of a life: what is journaled of it is enough to sleep it again, bit for bit."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from nestling.levels import Accept, Growing, LevelledModel, ReadingState
from nestling.models.data import from_data, to_data
from nestling.sleep import SleepConfig, SleepReport, affordable, sleep
from nestling.sleep.dreaming import mean_nats
from nestling.sleep.night import Probe, Tell

from .event import Event
from .machine import flushing

SOURCE = "sleep"
"""The source of sleeps: to forget it is to have stayed awake."""
PROBED = 2048
"""Tokens of a probe that are looked at."""


class Night(NamedTuple):
    """What a sleep was: its configuration, what its draws are keyed by, and the seeding steps of each pair that a clock
    cut short (None: it ended by itself, and does so again; older nights have the steps of every pair). guarded: whether
    what was open was learned under the life's guards (older nights: not)."""

    config: SleepConfig
    key: str
    steps: tuple[int | None, ...]
    guarded: bool = True

    def write(self) -> bytes:
        data = {"config": to_data(self.config), "key": self.key, "steps": list(self.steps), "guarded": self.guarded}
        return json.dumps(data, sort_keys=True).encode()

    @staticmethod
    def read(content: bytes) -> "Night":
        data = json.loads(content)
        config = from_data(SleepConfig, data["config"], path="sleep")
        return Night(config, data["key"], tuple(data["steps"]), data.get("guarded", False))


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
) -> tuple[ReadingState, SleepReport, Night]:
    """The state after a sleep, its report, and what is to be journaled of it."""
    told = {"clock": time.monotonic, "seconds": math.inf if seconds is None else seconds, "accept": accept}
    with flushing():
        reading, report = sleep(model, reading, config, key, probes=probes, tell=tell, **told)  # type: ignore[arg-type]
    return reading, report, Night(config if report.dreamt else replace(config, dreaming=None), key, report.steps)


def default_night(model: Growing, path: Sequence[Event], config: SleepConfig) -> SleepConfig:
    """The sleep of a kind that a quarter of what was learned since the last one buys, given the events of a life.
    Raises ValueError where that is too little for any."""
    awake = 0
    for event in reversed(path):
        if event.kind == "sleep":
            break
        awake += event.tokens
    found = affordable(model, awake, config)
    if found is None:
        raise ValueError(
            f"{awake:,} tokens were read since the last sleep, and a quarter of that buys no night; read more, or say "
            "what the night may cost (nestling sleep --steps, --dreams or --seconds)"
        )
    return found


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
    return sleep(
        growing(model), reading, night.config, night.key, steps=night.steps, accept=accept if night.guarded else None
    )
