"""Knowledge Seeding: a student learns in a few new weights what its teacher knows and it does not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.levels import Growing
from nestling.levels.reading import constant
from nestling.memory.structure import Weights

from .divergence import divergence
from .dreams import Dreams, few_by_few, number, write_on
from .grow import bank, put_slot, replace_bank
from .imitation import Heard, Reward, advantages, imitation

States = Callable[[int], Any]
"""(rows) -> the sequence state that a model starts in, for so many rows."""
EXPLODED, SLACK = 10.0, 0.1  # a divergence of more than 10 times the first one, and 0.1 nats


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """How a student is taught.

    loss = divergence_share * [(1 - on_policy) off-policy + on_policy on-policy divergence] - (1 - divergence_share) *
    reward (the paper's alpha and lambda; it has on_policy = 1). One set of the student's completions serves the
    divergence and the reward.
    """

    steps: int = 100
    prefixes: int = 4  # of dreams, a step
    completions: int = 4  # of each prefix
    learning_rate: float = 1e-2
    clip: float = 1.0  # largest norm of the gradient
    beta: float = 0.5  # of the divergence: 0 forward KL, 1 reverse KL
    on_policy: float = 1.0
    divergence_share: float = 0.7
    reward: Reward = imitation()
    temperature: float = 1.0  # of the student's writing
    into: Literal["slot", "weights"] = "slot"  # "weights": the slow level's own; the ablation without expansion

    def __post_init__(self) -> None:
        for name in ("prefixes", "completions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        for name in ("learning_rate", "clip", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("beta", "on_policy", "divergence_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.divergence_share < 1 and self.completions < 2:
            raise ValueError("a reward needs at least 2 completions of a prefix to compare; or divergence_share=1")
        if self.into not in ("slot", "weights"):
            raise ValueError(f"into must be 'slot' or 'weights', got {self.into!r}")


class Place(NamedTuple):
    """Where the student learns: in slot `slot` of the banks beside `hosts`, or (None) in the hosts' own weights."""

    hosts: tuple[int, ...]
    slot: int | None

    def leaves(self, model: Growing, weights: tuple[Weights, ...]) -> list[Tensor]:
        """What learns, as new leaves of a graph."""
        found = [
            part
            for host in self.hosts
            for part in (weights[host] if self.slot is None else [p[self.slot] for p in bank(model, weights, host)[:3]])
        ]
        return [part.detach().clone().requires_grad_() for part in found]

    def put(self, model: Growing, weights: tuple[Weights, ...], leaves: Sequence[Tensor]) -> tuple[Weights, ...]:
        """The weights with what learns in its place."""
        each = len(leaves) // len(self.hosts)
        for index, host in enumerate(self.hosts):
            mine = tuple(leaves[index * each : (index + 1) * each])
            if self.slot is None:
                weights = (*weights[:host], mine, *weights[host + 1 :])
            else:
                down, up, gate = mine
                changed = put_slot(bank(model, weights, host), self.slot, (down, up, gate), 1.0)
                weights = replace_bank(model, weights, host, changed)
        return weights


class Views(NamedTuple):
    """Teacher and student: the same model with other weights, and each with the sequence state it starts in."""

    teacher: tuple[Weights, ...]
    student: tuple[Weights, ...]
    teacher_state: States | None = None
    student_state: States | None = None


class Rehearsal(NamedTuple):
    """What the student already was, so that the new weights are silent there: its weights before it is taught, and
    texts that it wrote with them."""

    weights: tuple[Weights, ...]
    dreams: tuple[Dreams, ...]


class Seeded(NamedTuple):
    """What seeding came to. outcome: "done", "stopped" (out of time), or what went wrong."""

    weights: tuple[Weights, ...]
    outcome: str
    steps: int
    tokens: int  # that passed through the model, forward or while it wrote
    divergences: list[float]  # of every step on the teacher's dreams, nats a token
    rewards: list[float]


def seed(
    model: Growing,
    views: Views,
    place: Place,
    dreams: Sequence[Dreams],
    config: SeedConfig,
    generator: torch.Generator,
    stop: Callable[[int], bool] = lambda step: False,
    rehearsal: Rehearsal | None = None,
) -> Seeded:
    """The student after it was taught on the teacher's dreams; only what `place` names moves. rehearsal: its own dreams
    from before, on which it is its own teacher; as many steps as they are of all dreams.

    A loss that is not finite, or a divergence ten times what it was at first, ends it: the student's weights come back
    as they were given. stop: asked before every step with its number. Oracle: a step by plain autograd
    (tests/test_sleep.py).
    """
    leaves = place.leaves(model, views.student)
    optimizer = torch.optim.Adam(leaves, lr=config.learning_rate)
    called = constant(model)
    track: list[float] = []
    rewards: list[float] = []
    tokens = steps = 0
    for step in range(config.steps):
        if stop(step):
            return Seeded(place.put(model, views.student, detached(leaves)), "stopped", steps, tokens, track, rewards)
        student = place.put(model, views.student, leaves)
        taught, texts = _lesson(views, dreams, rehearsal, generator)
        try:
            batch = draw(model, taught, detached_weights(student), texts, config, generator)
        except FloatingPointError:
            return Seeded(views.student, "not finite", steps, tokens, track, rewards)
        loss, apart, reward = objective(called, taught, student, batch, config)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        value, norm = float(loss.detach()), float(torch.stack([g.norm() for g in gradients]).norm())
        if taught is views:
            track.append(apart)
        rewards.append(reward)
        tokens += batch.passed
        if not (math.isfinite(value) and math.isfinite(norm)):
            return Seeded(views.student, "not finite", steps, tokens, track, rewards)
        if track and apart > EXPLODED * track[0] + SLACK:
            return Seeded(views.student, "exploded", steps, tokens, track, rewards)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient * min(1.0, config.clip / max(norm, 1e-12))
        optimizer.step()
        steps += 1
    return Seeded(place.put(model, views.student, detached(leaves)), "done", steps, tokens, track, rewards)


def _lesson(
    views: Views, dreams: Sequence[Dreams], rehearsal: Rehearsal | None, generator: torch.Generator
) -> tuple[Views, Sequence[Dreams]]:
    """Who teaches a step, and on what."""
    if rehearsal is None or not rehearsal.dreams:
        return views, dreams
    old = number(rehearsal.dreams)
    if int(torch.randint(0, old + number(dreams), (1,), generator=generator)) >= old:
        return views, dreams
    return views._replace(teacher=rehearsal.weights, teacher_state=views.student_state), rehearsal.dreams


class SeedBatch(NamedTuple):
    """What one step learns from. dreamt: dreams cut after some prefix [p, t]; written: the student's completions of
    those prefixes [p * g, t], one prefix after the other; prefix: tokens that were given; passed: tokens of all
    passes."""

    dreamt: Tensor
    written: Tensor
    prefix: int
    passed: int


def draw(
    model: Growing,
    views: Views,
    student: tuple[Weights, ...],
    dreams: Sequence[Dreams],
    config: SeedConfig,
    generator: torch.Generator,
) -> SeedBatch:
    """Random prefixes of random dreams, of one length, and what the student makes of them."""
    which = int(torch.randint(0, number(dreams), (1,), generator=generator))
    chosen = next(part for part in dreams if (which := which - len(part.tokens)) < 0)
    rows = torch.randint(0, len(chosen.tokens), (config.prefixes,), generator=generator)
    dreamt = chosen.tokens[rows.to(chosen.tokens.device)]
    length = dreamt.shape[1]
    prefix = int(torch.randint(chosen.prompt, max(chosen.prompt + 1, length * 3 // 4), (1,), generator=generator))
    if config.on_policy == 0 and config.divergence_share == 1:
        return SeedBatch(dreamt, dreamt, prefix, 2 * dreamt.numel())
    given = dreamt[:, :prefix].repeat_interleave(config.completions, 0)
    state = None if views.student_state is None else views.student_state(len(given))
    written = write_on(model, student, given, length - prefix, generator, temperature=config.temperature, state=state)
    off = dreamt.numel() if config.on_policy < 1 else 0
    heard = dreamt.numel() if config.divergence_share < 1 and not off else 0
    return SeedBatch(dreamt, written, prefix, 3 * written.numel() + 2 * off + heard)


def objective(
    called: Callable[..., tuple[Tensor, Any]],
    views: Views,
    student: tuple[Weights, ...],
    batch: SeedBatch,
    config: SeedConfig,
) -> tuple[Tensor, float, float]:
    """The loss of a step, with its graph; the divergence in it, in nats a token; and the mean reward (0 and nan where
    they are not asked for). Given the tokens of the batch: nothing of how they were drawn is in the graph."""
    apart, reward = torch.zeros((), device=batch.dreamt.device), math.nan
    loss = apart
    weight, first = config.divergence_share, batch.prefix - 1
    if config.on_policy > 0 or weight < 1:
        mine = answers(called, student, batch.written, views.student_state)[:, first:-1]
        with torch.no_grad():
            theirs = answers(called, views.teacher, batch.written, views.teacher_state)[:, first:-1]
        if weight and config.on_policy:
            apart = apart + config.on_policy * divergence(theirs, mine, config.beta).mean()
        if weight < 1:
            written = batch.written[:, batch.prefix :]
            said = F.cross_entropy(mine.transpose(1, 2), written, reduction="none").mean(1)  # [p * g]
            rewards = _rewards(called, views, batch, theirs, config.reward)
            reward = float(rewards.mean())
            groups = advantages(rewards.view(config.prefixes, config.completions)).flatten()
            loss = loss + (1 - weight) * (groups.to(said) * said).mean()
    if weight and config.on_policy < 1:
        mine = answers(called, student, batch.dreamt, views.student_state)[:, first:-1]
        with torch.no_grad():
            theirs = answers(called, views.teacher, batch.dreamt, views.teacher_state)[:, first:-1]
        apart = apart + (1 - config.on_policy) * divergence(theirs, mine, config.beta).mean()
    return loss + weight * apart, float(apart.detach()), reward


@torch.no_grad()
def _rewards(
    called: Callable[..., tuple[Tensor, Any]], views: Views, batch: SeedBatch, theirs: Tensor, reward: Reward
) -> Tensor:
    """Of every completion, against the dream that its prefix is of [p * g]."""
    group = len(batch.written) // len(batch.dreamt)
    written, dreamt = batch.written[:, batch.prefix :], batch.dreamt[:, batch.prefix :]
    own = answers(called, views.teacher, batch.dreamt, views.teacher_state)[:, batch.prefix - 1 : -1]
    surprise = F.cross_entropy(theirs.transpose(1, 2), written, reduction="none").mean(1)
    surprise_own = F.cross_entropy(own.transpose(1, 2), dreamt, reduction="none").mean(1)
    heard = Heard(written, dreamt.repeat_interleave(group, 0), surprise, surprise_own.repeat_interleave(group, 0))
    return reward.of(heard)


def answers(
    called: Callable[..., tuple[Tensor, Any]], weights: tuple[Weights, ...], tokens: Tensor, states: States | None
) -> Tensor:
    """The logits [b, t, V] of a model with these weights."""
    return called(tokens, None if states is None else states(len(tokens)), weights=weights)[0]


@torch.no_grad()
def distance(model: Growing, views: Views, dreams: Sequence[Dreams], *, beta: float = 0.0) -> float:
    """The mean divergence of the student from the teacher over dreams, in nats a token; KL(T || S) by default."""
    total, count = 0.0, 0
    for tokens, prompt in few_by_few(dreams):
        theirs = answers(model, views.teacher, tokens, views.teacher_state)[:, prompt - 1 : -1]
        mine = answers(model, views.student, tokens, views.student_state)[:, prompt - 1 : -1]
        found = divergence(theirs.double(), mine.double(), beta)
        total, count = total + float(found.sum()), count + found.numel()
    return total / count if count else math.nan


def detached(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in leaves]


def detached_weights(weights: tuple[Weights, ...]) -> tuple[Weights, ...]:
    return tuple(tuple(w.detach() for w in maps) for maps in weights)
