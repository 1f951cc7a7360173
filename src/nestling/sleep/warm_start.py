"""A slot's first maps by reduced-rank regression: what rank r can carry of what the fast level gives up."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.levels import Growing, Taps
from nestling.levels.slots import read_slots
from nestling.memory.structure import Weights

from .dreams import Dreams
from .grow import bank, put_slot, replace_bank
from .seed import Place, Rehearsal, States, Views

RIDGE = 1e-4  # of the mean square of the inputs


class Fit(NamedTuple):
    """Maps of rank r, W = up down, and the share of the target's squares that they leave."""

    down: Tensor  # [r, d]
    up: Tensor  # [v, r]
    left: float


def reduced_rank(inputs: Tensor, targets: Tensor, rank: int, ridge: float = 0.0) -> Fit:
    """The W of rank r that minimises sum ||y - W h||^2 over rows h [n, d], y [n, v] (plus ridge ||W||^2 of the full
    solution): the full-rank solution, projected on the top r right singular directions of what it predicts.

    Oracle: gradient descent on both maps does not get below it (tests/test_warm_start.py).
    """
    h, y = inputs.double(), targets.double()
    gram = h.mT @ h + ridge * h.square().sum() / max(1, len(h)) * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    full = torch.linalg.lstsq(gram, h.mT @ y).solution if ridge == 0 else torch.linalg.solve(gram, h.mT @ y)
    directions = torch.linalg.svd(h @ full, full_matrices=False).Vh[:rank]  # [r, v]
    down, up = (full @ directions.mT).mT, directions.mT
    missing = rank - len(down)
    if missing > 0:
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], 1)
    left = float((y - h @ down.mT @ up.mT).square().sum() / y.square().sum().clamp_min(1e-300))
    return Fit(down.to(inputs), up.to(inputs), left)


@torch.no_grad()
def warm_start(
    model: Growing,
    views: Views,
    place: Place,
    fast: Sequence[int],
    dreams: Sequence[Dreams],
    rank: int,
    rehearsal: Rehearsal | None = None,
) -> tuple[tuple[Weights, ...], tuple[float, ...]]:
    """The student's weights with the new slots fitted to what the levels from the fast to the slow one together answer
    less than the teacher's, and the share that each fit leaves.

    Block by block, each fitted in the activations that the slots before it leave. A start, and a diagnostic: what
    differs in the stream for other reasons (attention, other blocks) is not in the targets.
    """
    slot = place.slot
    assert slot is not None
    student, left = views.student, []
    for host in place.hosts:
        first = max((i for i in fast if i <= host), default=host)
        inputs, targets = [], []
        lessons = [(views.teacher, views.teacher_state, part) for part in dreams]
        if rehearsal is not None:
            lessons += [(rehearsal.weights, views.student_state, part) for part in rehearsal.dreams]
        for teacher, states, part in lessons:
            theirs = _answered(model, teacher, part.tokens, states, range(first, host + 1))
            mine = _answered(model, student, part.tokens, views.student_state, range(first, host + 1))
            inputs.append(mine.inputs)
            targets.append(theirs.answers - mine.answers)
        fit = reduced_rank(torch.cat(inputs), torch.cat(targets), rank, RIDGE)
        left.append(fit.left)
        found = bank(model, student, host)
        opened = float(torch.sigmoid(found.gate[slot, -1]))
        new = (fit.down, fit.up / opened, found.gate[slot])
        student = replace_bank(model, student, host, put_slot(found, slot, new, 1.0))
    return student, tuple(left)


class _Answered(NamedTuple):
    inputs: Tensor  # [n, d] of the last of some levels
    answers: Tensor  # [n, v] of all of them together, with their slots


def _answered(
    model: Growing, weights: tuple[Weights, ...], tokens: Tensor, states: States | None, levels: range
) -> _Answered:
    """What some levels of one block and their slots add to the stream."""
    taps: list[Taps] = []
    model(tokens, None if states is None else states(len(tokens)), weights=weights, taps=taps)
    blocks = {id(taps[i].outputs[-1]): taps[i].outputs[-1] for i in levels}  # groups of neurons share theirs
    beside = [read_slots(bank(model, weights, i), taps[i].inputs[0]) for i in levels]
    total = torch.stack([*blocks.values(), *beside]).sum(0)
    return _Answered(taps[levels[-1]].inputs[0].flatten(0, -2), total.flatten(0, -2))
