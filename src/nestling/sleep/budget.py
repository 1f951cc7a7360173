"""What a night costs, counted in tokens and never in seconds, and the night that a share of the waking time buys."""

from collections.abc import Sequence
from dataclasses import replace

from nestling.levels import Growing

from .grow import levels_of
from .night import SleepConfig
from .prune import merge, refuse
from .schedule import Pair, pairs
from .seed import SeedConfig

LEARNED = 3
"""A token that is learned costs what three cost that are only predicted: a pass forward, and one back of twice that."""
SHORTEST, ENOUGH, FEWEST = 8, 16, 4  # tokens of a dream; dreams for which they are made shorter; dreams of any night
WORTH = 8  # seeding steps: fewer hardly move a slot


def night_tokens(model: Growing, config: SleepConfig, chosen: Sequence[Pair] | None = None) -> int:
    """At most so many tokens pass through the model in a sleep, where one that is learned from counts for `LEARNED`.

    For sources whose dreams begin with one token, and without dreaming (`SleepConfig.dreaming`). Oracle: a model that
    counts (tests/test_budget.py).
    """
    found = pairs(model.own, context=config.context) if chosen is None else chosen
    return sum(_of_a_pair(model, config, pair) for pair in found)


def affordable(
    model: Growing,
    awake: int,
    config: SleepConfig = SleepConfig(),
    *,
    share: float = 0.25,
    chosen: Sequence[Pair] | None = None,
) -> SleepConfig | None:
    """The night of this kind that costs at most a share of learning `awake` tokens; None: there is none so small.

    Every pair has the same. Dreams come first (a slot is fitted to them by regression), each shorter where there would
    be fewer than 16 of them. Steps of seeding have a quarter, where that is enough for 8; without a warm start a half.
    """
    if not share > 0:
        raise ValueError(f"share must be > 0, got {share}")
    found = pairs(model.own, context=config.context) if chosen is None else chosen
    if not found:
        return None
    each, widest = int(share * LEARNED * awake) // len(found), max(found, key=lambda p: len(levels_of(model, p.slow)))
    length = config.length
    while True:
        bought = _bought(model, replace(config, length=length), widest, each)
        fitted = config.warm_start or bought.seeding.steps > 0
        if length <= SHORTEST or (fitted and bought.dreams >= min(ENOUGH, config.dreams)):
            return bought if fitted and bought.dreams >= min(FEWEST, config.dreams) else None
        length = max(SHORTEST, length // 2)


def _bought(model: Growing, config: SleepConfig, pair: Pair, tokens: int) -> SleepConfig:
    """The night with as many steps and dreams as so many tokens pay for, of a pair."""
    step, parts, least = _step(config.seeding, config.length + 1), 4, WORTH
    if not config.warm_start:
        parts, least = 2, 1
    steps = min(config.seeding.steps, tokens // parts // step)
    steps = 0 if steps < min(least, config.seeding.steps) else steps
    dreams = _dreams(model, config, pair, tokens - steps * step)
    held_out = min(config.held_out, max(1, dreams // 4))
    return replace(config, dreams=max(1, dreams), held_out=held_out, seeding=replace(config.seeding, steps=steps))


def _dreams(model: Growing, config: SleepConfig, pair: Pair, tokens: int) -> int:
    """How many dreams so many tokens pay for, with those that are held out, one for every four."""
    none = replace(config, seeding=replace(config.seeding, steps=0))
    low, high = 0, config.dreams
    while low < high:
        middle = (low + high + 1) // 2
        told = replace(none, dreams=middle, held_out=min(config.held_out, max(1, middle // 4)))
        low, high = (middle, high) if _of_a_pair(model, told, pair) <= tokens else (low, middle - 1)
    return low


def _of_a_pair(model: Growing, config: SleepConfig, pair: Pair) -> int:
    """Dreams are written once, and read by teacher and student for every host in turn; what is held out is read by
    both, for each of two students, after the warm start, after seeding, and with the slot masked."""
    hosts, length = len(levels_of(model, pair.slow)), config.length + 1
    rehearsed = round(config.rehearsal * config.dreams)
    fitted = 2 * hosts * (config.dreams + rehearsed) if config.warm_start else 0
    ranked = {merge(): 2, refuse(): 0}.get(config.when_full, 1) * config.dreams  # to rank slots, and to merge them
    texts = config.dreams + rehearsed + fitted + ranked + 11 * config.held_out
    return texts * length + config.seeding.steps * _step(config.seeding, length) + 3


def _step(seeding: SeedConfig, length: int) -> int:
    """Completions are written, read by the teacher and learned; the dream itself is read to be compared with, or, where
    it is learned from, by the teacher too."""
    off = (1 + LEARNED) if seeding.on_policy < 1 else 0
    return seeding.prefixes * length * (seeding.completions * (2 + LEARNED) + 1 + off)
