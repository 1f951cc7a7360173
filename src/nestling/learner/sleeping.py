"""A sleep as one event of a life: what is journaled of it is enough to sleep it again, bit for bit."""

import hashlib
import json
import time
from typing import NamedTuple

from nestling.levels import Growing, LevelledModel, ReadingState
from nestling.models.data import from_data, to_data
from nestling.sleep import SleepConfig, SleepReport, sleep
from nestling.sleep.night import Tell

from .machine import flushing

SOURCE = "sleep"
"""The source of sleeps: to forget it is to have stayed awake."""


class Night(NamedTuple):
    """What a sleep was: its configuration, what its draws are keyed by, and the seeding steps done for each pair."""

    config: SleepConfig
    key: str
    steps: tuple[int, ...]

    def write(self) -> bytes:
        data = {"config": to_data(self.config), "key": self.key, "steps": list(self.steps)}
        return json.dumps(data, sort_keys=True).encode()

    @staticmethod
    def read(content: bytes) -> "Night":
        data = json.loads(content)
        return Night(from_data(SleepConfig, data["config"], path="sleep"), data["key"], tuple(data["steps"]))


def night_key(seed: int, number: int) -> str:
    """What the draws of the `number`-th sleep of a life are keyed by: its seed, and no other event."""
    return hashlib.sha256(f"sleep {seed} {number}".encode()).hexdigest()[:32]


def growing(model: LevelledModel) -> Growing:
    """The model as one that can sleep. Raises ValueError where a life was begun without slots."""
    if not isinstance(model, Growing):
        raise ValueError("this life has no slots to sleep into: begin one with them (nestling new --slots 5)")
    return model


def fall_asleep(
    model: LevelledModel,
    reading: ReadingState,
    config: SleepConfig | None,
    key: str,
    seconds: float | None,
    tell: Tell | None,
) -> tuple[ReadingState, SleepReport, Night]:
    """The state after a sleep, its report, and what is to be journaled of it."""
    config, model = config or SleepConfig(), growing(model)
    bound = {} if seconds is None else {"clock": time.monotonic, "seconds": seconds}
    with flushing():
        reading, report = sleep(model, reading, config, key, tell=tell, **bound)  # type: ignore[arg-type]
    return reading, report, Night(config, key, report.steps)


def again(model: LevelledModel, reading: ReadingState, content: bytes) -> tuple[ReadingState, SleepReport]:
    """The state after a sleep that was journaled."""
    night = Night.read(content)
    return sleep(growing(model), reading, night.config, night.key, steps=night.steps)
