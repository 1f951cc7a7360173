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
from .dreams import Dreams, few_by_few
from .grow import bank, put_slot, replace_bank
from .seed import Place, Rehearsal, States, Views

RIDGE = 0.1  # of the mean eigenvalue of the inputs' Gram matrix; at 3e-6 of it the slots of long lives explode


class Fit(NamedTuple):
    """Maps of rank r, W = up down, and the share of the target's squares that they leave."""

    down: Tensor  # [r, d]
    up: Tensor  # [v, r]
    left: float


class Rows(NamedTuple):
    """Some rows of a regression: inputs [n, d], targets [n, v]."""

    inputs: Tensor
    targets: Tensor


def reduced_rank(rows: Sequence[Rows], rank: int, ridge: float = 0.0) -> Fit:
    """The W of rank r that minimises sum ||y - W h||^2 over all rows h, y (plus ||W||^2 of the full-rank solution,
    times ridge times the mean eigenvalue of h^T h): the full-rank solution, projected on the top r right singular
    directions of what it predicts. Rows are summed some at a time, in float64.

    Oracle: gradient descent on both maps does not get below it (tests/test_sleep_parts.py).
    """
    width = rows[0].inputs.shape[1]
    gram = rows[0].inputs.new_zeros(width, width, dtype=torch.float64)
    cross = gram.new_zeros(width, rows[0].targets.shape[1])
    for part in rows:
        h = part.inputs.double()
        gram, cross = gram + h.mT @ h, cross + h.mT @ part.targets.double()
    bent = gram + ridge * gram.trace() / width * torch.eye(width).to(gram)
    full = torch.linalg.lstsq(gram, cross).solution if ridge == 0 else torch.linalg.solve(bent, cross)
    down, up = lowered(gram, full, rank)
    squares, left = 0.0, 0.0
    for part in rows:
        y = part.targets.double()
        squares += float(y.square().sum())
        left += float((y - part.inputs.double() @ down.mT @ up.mT).square().sum())
    like = rows[0].inputs
    return Fit(down.to(like), up.to(like), left / max(squares, 1e-300))


def lowered(gram: Tensor, full: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A map [d, v] as down [r, d] and up [v, r], which keep the top directions of what it answers to inputs of a Gram
    matrix [d, d]."""
    predicted = full.mT @ gram @ full
    directions = torch.linalg.eigh((predicted + predicted.mT) / 2).eigenvectors.flip(1)[:, :rank].mT  # [r, v]
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
    ask: before every few dreams.
    """
    slot = place.slot
    assert slot is not None
    student, left = views.student, []
    for host in place.hosts:
        levels = range(max((i for i in fast if i <= host), default=host), host + 1)
        told = _Told(model, student, views.student_state, levels, ask)
        rows = told.rows(views.teacher, views.teacher_state, dreams)
        taught = len(rows)
        rows += told.rows(rehearsal.weights, views.student_state, rehearsal.dreams) if rehearsal else []
        found = bank(model, student, host)
        gate = found.gate[slot]
        if len(rows) > taught:
            gate = discriminant([r.inputs for r in rows[:taught]], [r.inputs for r in rows[taught:]])
        for index, (h, y) in enumerate(rows):
            rows[index] = Rows(h * torch.sigmoid(h @ gate[:-1] + gate[-1])[:, None], y)
        fit = reduced_rank(rows, rank, RIDGE)
        left.append(fit.left)
        new = (fit.down, fit.up, gate)
        student = replace_bank(model, student, host, put_slot(found, slot, new, 1.0))
    return student, tuple(left)


def discriminant(these: Sequence[Tensor], others: Sequence[Tensor], ridge: float = 0.1) -> Tensor:
    """A gate [d + 1] that opens to rows of the first kind and not of the second, given some rows [n, d] at a time:
    Fisher's linear discriminant, sigmoid(w h + c) being the chance of the first under normal distributions of one
    covariance.

    ridge: of the covariance, as a share of its mean variance: with few rows in many dims, the kinds seem further apart
    than they are.
    """
    (count_a, mean_a), (count_b, mean_b) = _mean(these), _mean(others)
    scatter = mean_a.new_zeros(len(mean_a), len(mean_a))
    for kind, mean in ((these, mean_a), (others, mean_b)):
        for h in kind:
            apart = h.double() - mean
            scatter = scatter + apart.mT @ apart
    covariance = scatter / (count_a + count_b)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(mean_a)).to(covariance)
    w = torch.linalg.solve(covariance, mean_a - mean_b)
    c = -(mean_a + mean_b) @ w / 2 + math.log(count_a / count_b)
    return torch.cat([w, c[None]]).to(these[0])


def _mean(some: Sequence[Tensor]) -> tuple[int, Tensor]:
    count = sum(len(h) for h in some)
    return count, torch.stack([h.double().sum(0) for h in some]).sum(0) / count


class _Told(NamedTuple):
    """What a student's slot beside the last of some levels is fitted to, few dreams at a time. ask: before each."""

    model: Growing
    student: tuple[Weights, ...]
    states: States | None
    levels: range
    ask: Ask

    def rows(self, teacher: tuple[Weights, ...], states: States | None, dreams: Sequence[Dreams]) -> list[Rows]:
        """What the last level receives in the student, and what the levels answer less than the teacher's."""
        found = []
        for texts in few_by_few(dreams):
            self.ask()
            wanted, _ = self._heard(teacher, states, texts)
            answered, received = self._heard(self.student, self.states, texts)
            found.append(Rows(received, wanted - answered))
        return found

    def _heard(self, weights: tuple[Weights, ...], states: States | None, texts: Dreams) -> tuple[Tensor, Tensor]:
        """What the levels and their slots add to the stream [n, v], and what the last of them receives [n, d]."""
        taps: list[Taps] = []
        self.model(texts.tokens, None if states is None else states(len(texts.tokens)), weights=weights, taps=taps)
        blocks = {id(taps[i].outputs[-1]): taps[i].outputs[-1] for i in self.levels}  # groups of neurons share theirs
        beside = [read_slots(bank(self.model, weights, i), taps[i].inputs[0]) for i in self.levels]
        added = torch.stack([*blocks.values(), *beside]).sum(0).flatten(0, -2)
        return added, taps[self.levels[-1]].inputs[0].flatten(0, -2)
