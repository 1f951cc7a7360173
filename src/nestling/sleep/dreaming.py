"""Dreaming: a model writes its own lessons, tries each on a copy of itself, and learns from those that helped."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.levels import Growing, LevelsState, Slots
from nestling.levels.reading import constant
from nestling.memory.structure import Weights

from .bound import Ask, unbounded
from .dreams import Source, dream, write_on
from .grow import activate, change_banks, draws, first_free, levels_of
from .reservoir import Reservoir
from .seed import Place, detached

_OPEN = 30.0  # sigmoid(30) is 1 in float32


class Task(NamedTuple):
    """What is dreamt of. context: tokens [t] that dreams go on from. reference: texts [n, t] whose gradients say which
    dreams matter (none: their size says it). tuning: other texts [m, t] on which a trial has to be better. Neither
    should be what the life is later judged by."""

    context: Tensor
    reference: Tensor
    tuning: Tensor


def own_task(
    model: Growing,
    weights: tuple[Weights, ...],
    source: Source,
    texts: int,
    length: int,
    key: object,
    *,
    reservoir: Reservoir,
    ask: Ask = unbounded,
) -> Task:
    """A task for which no text is kept: to go on writing as these weights do. They write its reference and tuning
    texts, `texts` of each, from what `source` gives first; dreams begin with another of its prompts."""

    def written(name: str) -> Tensor:
        generator = draws(key, name)
        return dream(model, weights, source, texts, length, generator, reservoir=reservoir, ask=ask)[0].tokens

    (context, *_) = source.for_model(model).prompts(1, reservoir, draws(key, "context"))
    return Task(context[0].to(weights[0][0].device), written("reference"), written("tuning"))


@dataclass(frozen=True, kw_only=True)
class DreamConfig:
    """How a life dreams. The switches are those of the paper's ablations."""

    rounds: int = 1  # of ReST-EM: dream, try, keep what helped, learn it
    dreams: int = 8  # a round
    length: int = 64  # tokens
    best: int = 3  # dreams tried, by importance
    others: int = 1  # tried beside them, at random
    trial_steps: int = 5
    steps: int = 10  # on the dreams that helped
    learning_rate: float = 1e-2
    temperature: float = 1.0
    random_expert: bool = True  # open one random active slot of every bank while dreaming
    select_by_gradient: bool = True  # else all that are tried are random

    def __post_init__(self) -> None:
        for name in ("rounds", "dreams", "length", "trial_steps", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 1 <= self.best + self.others <= self.dreams:
            raise ValueError(f"best + others must be in [1, dreams = {self.dreams}], got {self.best} + {self.others}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


class Dreamt(NamedTuple):
    """One round: the importance of every dream, which were tried, and the reward of each."""

    importance: list[float]
    tried: list[int]
    rewards: list[int]


class DreamReport(NamedTuple):
    """What dreaming came to. outcome: "kept", or why nothing changed. before, after: nats a token on tuning texts."""

    outcome: str
    slot: int | None
    before: float
    after: float
    rounds: tuple[Dreamt, ...]

    def __str__(self) -> str:
        tried, helped = (sum(map(len, (r.tried for r in self.rounds))), sum(sum(r.rewards) for r in self.rounds))
        written = sum(len(r.importance) for r in self.rounds)
        return (
            f"dreaming: {self.outcome}; {written} dreams, {tried} tried, {helped} helped; "
            f"{self.before:.4f} -> {self.after:.4f} nats a token"
        )


def dream_of(
    model: Growing,
    levels: LevelsState,
    task: Task,
    config: DreamConfig = DreamConfig(),
    key: object = 0,
    ask: Ask = unbounded,
) -> tuple[LevelsState, DreamReport]:
    """The levels after dreaming of a task: one more slot of the slowest level has learned those of the model's own
    texts that, learned alone by an isolated copy, made it better on the tuning texts (reward 1, Eq. 5; ReST-EM).

    Without effect where no slot is free, where no dream helped, or where all that did together do not. Nothing but the
    new slot moves. ask: before every token that is written and every trial. Language Models Need Sleep, section 3.4.
    """
    weights = levels.weights
    hosts = levels_of(model, max(lvl.period for lvl in model.own))
    start = mean_nats(model, weights, task.tuning)
    slot = first_free(model, weights, hosts)
    if slot is None:
        return levels, DreamReport("full: nothing was dreamt", None, start, start, ())
    place = Place(hosts, slot)
    current = activate(model, weights, hosts, slot, draws(key, "dream slot"))
    rounds = []
    for number in range(config.rounds):
        current, dreamt = _round(model, current, place, task, config, (key, "dreams", number), ask)
        rounds.append(dreamt)
    after = mean_nats(model, current, task.tuning)
    if not after < start:
        why = "no dream helped" if not any(any(r.rewards) for r in rounds) else "no gain"
        return levels, DreamReport(why, None, start, start, tuple(rounds))
    return levels._replace(weights=current), DreamReport("kept", slot, start, after, tuple(rounds))


def _round(
    model: Growing, weights: tuple[Weights, ...], place: Place, task: Task, config: DreamConfig, key: object, ask: Ask
) -> tuple[tuple[Weights, ...], Dreamt]:
    prompt = task.context.numel()
    given = task.context.expand(config.dreams, -1)
    writer = with_random_experts(model, weights, draws(key, "experts")) if config.random_expert else weights
    told = {"temperature": config.temperature, "ask": ask}
    texts = write_on(model, writer, given, config.length, draws(key, "writing"), **told)  # type: ignore[arg-type]
    found = importance(model, weights, place, texts, prompt, task.reference)
    tried = _choose(found, config, draws(key, "chosen"))
    before = mean_nats(model, weights, task.tuning)
    rewards = []
    for index in tried:
        ask()
        trial = learn(model, weights, place, texts[index][None], prompt, config.trial_steps, config.learning_rate)
        rewards.append(int(mean_nats(model, trial, task.tuning) < before))
    helped = [index for index, reward in zip(tried, rewards, strict=True) if reward]
    ask()
    if helped:
        weights = learn(model, weights, place, texts[helped], prompt, config.steps, config.learning_rate)
    return weights, Dreamt(found.tolist(), tried, rewards)


def _choose(found: Tensor, config: DreamConfig, generator: torch.Generator) -> list[int]:
    """The best by importance, and others at random from the rest."""
    best = config.best if config.select_by_gradient else 0
    chosen: list[int] = found.argsort(descending=True, stable=True)[:best].tolist()
    rest = [i for i in torch.randperm(len(found), generator=generator).tolist() if i not in chosen]
    return chosen + rest[: config.best + config.others - best]


def with_random_experts(
    model: Growing, weights: tuple[Weights, ...], generator: torch.Generator
) -> tuple[Weights, ...]:
    """The weights with one random active slot of every bank open to everything: gates are additive here, so that the
    paper's extra expert is one whose gate no longer looks at the token."""

    def opened(found: Slots) -> Slots:
        there = found.active.nonzero()[:, 0].tolist()
        if not there:
            return found
        slot = there[int(torch.randint(0, len(there), (1,), generator=generator))]
        gate = found.gate.clone()
        gate[slot] = 0.0
        gate[slot, -1] = _OPEN
        return found._replace(gate=gate)

    return change_banks(model, weights, range(len(model.own)), opened)


def importance(
    model: Growing, weights: tuple[Weights, ...], place: Place, texts: Tensor, prompt: int, reference: Tensor
) -> Tensor:
    """omega_i = cos(g_i, g_ref) of the gradients, in what `place` names, of the loss on each dream and of that on all
    reference texts; |g_i| where there are none. (The paper calls the gradient itself its score.)"""
    gradients = torch.stack([_gradient(model, weights, place, text[None], prompt) for text in texts])
    if not len(reference):
        return gradients.norm(dim=1)
    wanted = _gradient(model, weights, place, reference, 1)
    return F.cosine_similarity(gradients, wanted[None], dim=1, eps=1e-30)


def _gradient(model: Growing, weights: tuple[Weights, ...], place: Place, texts: Tensor, prompt: int) -> Tensor:
    leaves = place.leaves(model, weights)
    loss = _nats(model, place.put(model, weights, leaves), texts, prompt)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


def learn(
    model: Growing,
    weights: tuple[Weights, ...],
    place: Place,
    texts: Tensor,
    prompt: int,
    steps: int,
    learning_rate: float,
) -> tuple[Weights, ...]:
    """Fine-tuning on what texts [n, t] say after their prompt; only what `place` names moves, and what was given does
    not change. Where it breaks, the weights come back as they were."""
    leaves = place.leaves(model, weights)
    optimizer = torch.optim.Adam(leaves, lr=learning_rate)
    for _ in range(steps):
        loss = _nats(model, place.put(model, weights, leaves), texts, prompt)
        gradients = torch.autograd.grad(loss, leaves)
        if not all(bool(g.isfinite().all()) for g in gradients):
            return weights
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
    return place.put(model, weights, detached(leaves))


def _nats(model: Growing, weights: tuple[Weights, ...], texts: Tensor, prompt: int) -> Tensor:
    logits, _ = constant(model)(texts, weights=weights)
    return F.cross_entropy(logits[:, prompt - 1 : -1].flatten(0, 1), texts[:, prompt:].flatten())


@torch.no_grad()
def mean_nats(model: Growing, weights: tuple[Weights, ...], texts: Tensor) -> float:
    """Nats a token of texts [n, t], from their second token on."""
    value = float(_nats(model, weights, texts, 1))
    return value if math.isfinite(value) else math.inf
