"""A life on disk that sleeps on a schedule: it reads up to where the schedule is to be asked, and sleeps if told to."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nestling.sleep import Schedule, SleepConfig, SleepReport
from nestling.sleep.night import Tell as SleepTell

from .fold import Done, Tell
from .intake import Given, as_tokens, with_last
from .sleeping import due_night, growing, learned

if TYPE_CHECKING:
    from .learner import Learner


def live(
    life: "Learner",
    given: Given | Iterable[Given],
    source: str,
    schedule: Schedule,
    config: SleepConfig,
    share: float | None,
    *,
    ends: bool,
    derived: int | None,
    tell: Tell | None,
    tell_sleep: SleepTell | None,
) -> tuple[list[Done], list[SleepReport]]:
    """What `Learner.live` did, event by event and night by night."""
    model = growing(life.model)
    done: list[Done] = []
    nights: list[SleepReport] = []

    def ask() -> None:
        day = life.journal.day(life.at)
        night = due_night(model, schedule, life.state.reading, day, config, share) if learned(day) else None
        nights.extend([life.sleep(night.config, only=night.pairs, tell=tell_sleep)] if night else [])

    life.catch_up(tell)
    if schedule.next(model.own, _position(life) - 1) == _position(life):
        ask()  # again, and to the same answer, unless it was cut short there
    for piece, last in with_last(given):
        tokens = as_tokens(piece, life.tokens)
        while True:
            asked = schedule.next(model.own, _position(life))
            size = asked - _position(life)
            part, tokens = tokens[:size], tokens[size:]
            life.accept(part, source, ends=ends and last and not tokens.numel(), derived=derived)
            done += life.catch_up(tell)
            if _position(life) == asked:  # else a source in quarantine was passed over
                ask()
            if not tokens.numel():
                break
    return done, nights


def _position(life: "Learner") -> int:
    return int(life.state.reading.position)
