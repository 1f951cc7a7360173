"""A slot's first maps by reduced-rank regression: what rank r can carry of what the fast level gives up."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.levels import Growing, Taps
from nestling.levels.slots import read_slots
from nestling.memory.structure import Weights

from .bound import Ask, unbounded
from .dreams import Dreams
from .grow import bank, put_slot, replace_bank
from .seed import Place, Rehearsal, States, Views

RIDGE = 0.1  # of the mean eigenvalue of the inputs' Gram matrix; at 3e-6 of it the slots of long lives explode


class Fit(NamedTuple):
    """Maps of rank r, W = up down, and the share of the target's squares that they leave."""

    down: Tensor  # [r, d]
    up: Tensor  # [v, r]
    left: float


def reduced_rank(inputs: Tensor, targets: Tensor, rank: int, ridge: float = 0.0) -> Fit:
    """The W of rank r that minimises sum ||y - W h||^2 over rows h [n, d], y [n, v] (plus ||W||^2 of the full-rank
    solution, times ridge times the mean eigenvalue of h^T h): the full-rank solution, projected on the top r right
    singular directions of what it predicts.

    Oracle: gradient descent on both maps does not get below it (tests/test_sleep_parts.py).
    """
    h, y = inputs.double(), targets.double()
    gram = h.mT @ h + ridge * h.square().sum() / h.shape[1] * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    full = torch.linalg.lstsq(gram, h.mT @ y).solution if ridge == 0 else torch.linalg.solve(gram, h.mT @ y)
    down, up = lowered(h, full, rank)
    left = float((y - h @ down.mT @ up.mT).square().sum() / y.square().sum().clamp_min(1e-300))
    return Fit(down.to(inputs), up.to(inputs), left)


def lowered(h: Tensor, full: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A map [d, v] as down [r, d] and up [v, r], which keep the top directions of what it answers to rows h."""
    directions = torch.linalg.svd(h @ full, full_matrices=False).Vh[:rank]  # [r, v]
    down, up = (full @ directions.mT).mT, directions.mT
    missing = rank - len(down)
    if missing > 0:
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], 1)
    return down, up


@torch.no_grad()
def warm_start(
    model: Growing,
    views: Views,
    place: Place,
    fast: Sequence[int],
    dreams: Sequence[Dreams],
    rank: int,
    rehearsal: Rehearsal | None = None,
    ask: Ask = unbounded,
) -> tuple[tuple[Weights, ...], tuple[float, ...]]:
    """The student's weights with the new slots fitted to what the levels from the fast to the slow one together answer
    less than the teacher's, and the share that each fit leaves.

    Block by block, each fitted in the activations that the slots before it leave. A start, and a diagnostic: what
    differs in the stream for other reasons (attention, other blocks) is not in the targets. With a rehearsal, the gate
    opens where a linear discriminant tells the teacher's dreams from the student's own, where the target is zero.
    ask: before every block.
    """
    slot = place.slot
    assert slot is not None
    student, left = views.student, []
    lessons = [_lesson(model, views.teacher, views.teacher_state, part) for part in dreams]
    own = (
        [_lesson(model, rehearsal.weights, views.student_state, part) for part in rehearsal.dreams] if rehearsal else []
    )
    for host in place.hosts:
        ask()
        levels = range(max((i for i in fast if i <= host), default=host), host + 1)
        h, y = _targets(model, student, lessons, levels, views.student_state)
        found = bank(model, student, host)
        gate = found.gate[slot]
        if own:
            old, none = _targets(model, student, own, levels, views.student_state)
            gate = discriminant(h, old)
            h, y = torch.cat([h, old]), torch.cat([y, none])
        opened = torch.sigmoid(h @ gate[:-1] + gate[-1])
        fit = reduced_rank(h * opened[:, None], y, rank, RIDGE)
        left.append(fit.left)
        new = (fit.down, fit.up, gate)
        student = replace_bank(model, student, host, put_slot(found, slot, new, 1.0))
    return student, tuple(left)


def discriminant(these: Tensor, others: Tensor, ridge: float = 0.1) -> Tensor:
    """A gate [d + 1] that opens to rows of the first kind and not of the second [n, d]: Fisher's linear discriminant,
    sigmoid(w h + c) being the chance of the first under normal distributions of one covariance.

    ridge: of the covariance, as a share of its mean variance: with few rows in many dims, the kinds seem further apart
    than they are.
    """
    a, b = these.double(), others.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    apart = torch.cat([a - mean_a, b - mean_b])
    covariance = apart.mT @ apart / len(apart)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    w = torch.linalg.solve(covariance, mean_a - mean_b)
    c = -(mean_a + mean_b) @ w / 2 + math.log(len(a) / len(b))
    return torch.cat([w, c[None]]).to(these)


class _Lesson(NamedTuple):
    """Texts, and what a teacher's levels received and gave in them."""

    texts: Dreams
    weights: tuple[Weights, ...]
    taps: list[Taps]


def _lesson(model: Growing, weights: tuple[Weights, ...], states: States | None, texts: Dreams) -> _Lesson:
    return _Lesson(texts, weights, _heard(model, weights, texts, states))


def _heard(model: Growing, weights: tuple[Weights, ...], texts: Dreams, states: States | None) -> list[Taps]:
    taps: list[Taps] = []
    state = None if states is None else states(len(texts.tokens))
    model(texts.tokens, state, weights=weights, taps=taps)
    return taps


def _targets(
    model: Growing,
    student: tuple[Weights, ...],
    lessons: Sequence[_Lesson],
    levels: range,
    states: States | None,
) -> tuple[Tensor, Tensor]:
    """What the last of some levels receives in the student [n, d], and what these levels answer less than a teacher's
    [n, v], over the dreams of all lessons."""
    inputs, targets = [], []
    for lesson in lessons:
        mine = _heard(model, student, lesson.texts, states)
        inputs.append(mine[levels[-1]].inputs[0].flatten(0, -2))
        targets.append(_answers(model, lesson.weights, lesson.taps, levels) - _answers(model, student, mine, levels))
    return torch.cat(inputs), torch.cat(targets)


def _answers(model: Growing, weights: tuple[Weights, ...], taps: list[Taps], levels: range) -> Tensor:
    """What some levels and their slots add to the stream [n, v]."""
    blocks = {id(taps[i].outputs[-1]): taps[i].outputs[-1] for i in levels}  # groups of neurons share theirs
    beside = [read_slots(bank(model, weights, i), taps[i].inputs[0]) for i in levels]
    return torch.stack([*blocks.values(), *beside]).sum(0).flatten(0, -2)
