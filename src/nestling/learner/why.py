"""Why a life says what it says: what an answer owes to each level, and to each source."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.levels import LevelledModel, LevelsState, begin, level
from nestling.memory import Summed
from nestling.memory.structure import Weights

from .event import BIRTH, Event
from .fold import Fold, LifeState, Tell
from .forgetting import plan_forgetting
from .intake import read_back
from .journal import Journal
from .kinds import Tokens
from .machine import flushing
from .recovery import newest_state


class Why(NamedTuple):
    """log_probability: of the answer after the prompt, in nats. levels: what it loses where a level is as at birth.
    sources: what it loses without a source, estimated; exact: the same by learning all else again, where that was
    asked for; agreement: Spearman's rank correlation of the two (nan for fewer than two sources)."""

    log_probability: float
    levels: list[float]
    sources: dict[str, float]
    exact: dict[str, float] | None
    agreement: float | None


@torch.no_grad()
def log_probability(model: LevelledModel, weights: tuple[Weights, ...], prompt: Tensor, answer: Tensor) -> float:
    """Nats of an answer [n] after a prompt [m], from a fresh sequence state. Raises ValueError where one is empty."""
    if not prompt.numel() or not answer.numel():
        raise ValueError("why: prompt and answer need at least one token each")
    tokens = torch.cat([prompt, answer])[None]
    with flushing():
        logits, _ = model(tokens, None, weights=weights)
    chances = logits[0, prompt.numel() - 1 : -1].double().log_softmax(-1)
    return float(chances.gather(-1, answer[:, None]).sum())


def loss_by_level(
    model: LevelledModel, now: tuple[Weights, ...], birth: tuple[Weights, ...], prompt: Tensor, answer: Tensor
) -> list[float]:
    """What the answer loses where one level at a time has the weights it was born with."""
    whole = log_probability(model, now, prompt, answer)
    reset = [(*now[:index], birth[index], *now[index + 1 :]) for index in range(len(now))]
    return [whole - log_probability(model, weights, prompt, answer) for weights in reset]


def moved_alone(
    fold: Fold, journal: Journal, tokens: Tokens, birth: LifeState, events: Sequence[Event], tell: Tell | None = None
) -> tuple[Weights, ...]:
    """How far a source moves the levels when it is all that a new life reads: the change of each weight, with what
    is left in the accumulators at the end stepped on too."""
    start = birth.reading.levels.weights
    fresh = birth.reading._replace(levels=begin(fold.model.levels, start))
    state = fold.begin(fresh)
    for event in events:
        state, _ = fold.step(state, event, read_back(journal.content(event), event, tokens), tell)
    after = _tick(fold.model.levels, state.reading.levels)
    return tuple(tuple(a - b for a, b in zip(new, old, strict=True)) for new, old in zip(after, start, strict=True))


def _tick(levels: tuple[level, ...], state: LevelsState) -> tuple[Weights, ...]:
    found = []
    for lvl, maps, states in zip(levels, state.weights, state.rules, strict=True):
        if not int(states[0].elapsed.flatten()[0]):
            found.append(maps)
            continue
        gates = lvl.gates._replace(step_size=lvl.step_size / lvl.period)
        gradients = [Summed(own.gradient, own.inputs, tokens=1) for own in states]
        found.append(
            tuple(
                lvl.rule.step(weight, gradient, lvl.rule.anchor(own.of), gates)[0]
                for weight, gradient, own in zip(maps, gradients, states, strict=True)
            )
        )
    return tuple(found)


def without(
    fold: Fold,
    journal: Journal,
    tokens: Tokens,
    start: LifeState,
    events: Sequence[Event],
    source: str,
    tell: Tell | None,
) -> LifeState:
    """The state of a life that never read a source: from a state that knows nothing of it, and the events after."""
    gone = plan_forgetting(journal, (source,)).gone
    state = start
    for event in events:
        if event.id not in gone:
            state, _ = fold.step(state, event, read_back(journal.content(event), event, tokens), tell)
    return state


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; nan where either is all equal."""
    ranks = torch.tensor([_ranks(one), _ranks(two)], dtype=torch.float64)
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if float(norms.min()) > 0 else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def by_source(path: Sequence[Event]) -> dict[str, list[Event]]:
    """The events that were learned, per source; a source whose text is pruned is left out."""
    found: dict[str, list[Event]] = {}
    for event in path:
        if event.kind == "learn":
            found.setdefault(event.source, []).append(event)
    return {source: events for source, events in found.items() if not any(event.pruned for event in events)}


def explain(
    life: Path,
    journal: Journal,
    fold: Fold,
    tokens: Tokens,
    place: tuple[LifeState, int],
    asked: tuple[Tensor, Tensor],
    *,
    exact: bool,
    tell: Tell | None,
) -> Why:
    """What an answer owes to each level and each source (see `Why`). place: a state, and the event that it is the
    state after: a reader's life may have gone on. asked: prompt and answer.

    The estimate takes away from the weights as they are what the source alone does to the weights of birth. Exactly:
    the whole life is learned again without it, which takes as long as it takes.
    """
    now, at = place
    like = now.reading
    birth = newest_state(life, journal, like, BIRTH).state
    weights = now.reading.levels.weights
    whole = log_probability(fold.model, weights, *asked)
    path = journal.path_events(at)
    estimated: dict[str, float] = {}
    checked: dict[str, float] = {}
    for source, events in by_source(path).items():
        moved = moved_alone(fold, journal, tokens, birth, events, tell)
        less = tuple(
            tuple(w - m for w, m in zip(maps, own, strict=True)) for maps, own in zip(weights, moved, strict=True)
        )
        estimated[source] = whole - log_probability(fold.model, less, *asked)
        if exact:
            found = newest_state(life, journal, like, plan_forgetting(journal, (source,)).base)
            rest = journal.path_events(at, found.snapshot.event)
            never = without(fold, journal, tokens, found.state, rest, source, tell)
            checked[source] = whole - log_probability(fold.model, never.reading.levels.weights, *asked)
    return Why(
        whole,
        loss_by_level(fold.model, weights, birth.reading.levels.weights, *asked),
        estimated,
        checked if exact else None,
        rank_correlation(list(estimated.values()), list(checked.values())) if exact else None,
    )
