"""Neurons as levels: one MLP whose hidden neurons learn at periods of their own, a spectrum of memories."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nestling.memory.rule import Rule, gradient_descent
from nestling.memory.structure import Structure, Weights, mlp

from .continuum import Level, Pass, Taps, level


class _divided(Level, abstract=True):
    """A block whose neurons are divided into runs, as even as can be, each a level.

    A neuron is a row of the maps that lead to the hidden layer and a column of the map that leads on. The block is
    computed as one product over all neurons; a level is written on its own clock with its part of the errors and
    inputs that all share. A rule that looks at a whole map (clip, normalize, delta_gradient_descent, newton_schulz)
    looks at its level's part of it; with any other, levels of one period are one level.
    """

    def split(self, weights: Weights) -> tuple[Weights, ...]:
        return tuple(tuple(w.clone() for w in maps) for maps in split_neurons(weights, len(self.levels)))

    def join(self, levels: Sequence[Weights]) -> Weights:
        return join_neurons(levels)

    def taps(self, levels: Sequence[Weights], seen: Pass) -> list[Taps]:
        return share_taps(levels, seen.inputs, seen.outputs)

    @property
    @abstractmethod
    def levels(self) -> tuple[level, ...]: ...


@dataclass(frozen=True, repr=False)
class neurons(_divided):
    """A block whose neurons are divided among the given levels, fast to slow, all of one structure."""

    of: tuple[level, ...]

    def __post_init__(self) -> None:
        periods = [lvl.period for lvl in self.of]
        if not periods or periods != sorted(periods):
            raise ValueError(f"neurons: needs at least one level, listed fast to slow, got periods {periods}")
        structures = sorted({repr(lvl.structure) for lvl in self.of})
        if len(structures) > 1:
            raise ValueError(f"neurons: all levels are of one structure, got {' and '.join(structures)}")
        _check(self, self.structure)

    @property
    def structure(self) -> Structure:  # type: ignore[override]
        return self.of[0].structure

    @property
    def levels(self) -> tuple[level, ...]:
        return self.of


@dataclass(frozen=True, repr=False)
class spectrum(_divided):
    """A block whose neurons have periods log-spaced between a fastest and a slowest, in clocks of powers of two.

    Of n = 1 + log2(slowest / fastest) clocks each has one nth of the neurons: neuron i of h, fast to slow, has the
    period fastest * 2^floor(n i / h). spectrum(p, p) is level(p). The other fields are those of every level.
    """

    fastest: float  # tokens
    slowest: float  # tokens
    structure: Structure = mlp(expansion=2.0, residual=False)
    rule: Rule = gradient_descent()
    step_size: float = 0.3
    momentum: float = 0.9
    retention: float = 1.0

    def __post_init__(self) -> None:
        for name in ("fastest", "slowest"):
            if not _is_power_of_two(getattr(self, name)):
                given = getattr(self, name)
                raise ValueError(f"spectrum: {name} must be a power of two (1, 2, 4 ... tokens), got {given}")
        if self.fastest > self.slowest:
            raise ValueError(f"spectrum: fastest must be <= slowest, got {self.fastest} and {self.slowest}")
        _check(self, self.structure)
        self.levels  # noqa: B018  what else a level refuses

    @property
    def levels(self) -> tuple[level, ...]:
        steps = round(math.log2(self.slowest / self.fastest))
        return tuple(
            level(self.fastest * 2**k, self.structure, self.rule, self.step_size, self.momentum, self.retention)
            for k in range(steps + 1)
        )


def split_neurons(weights: Weights, groups: int) -> tuple[Weights, ...]:
    """The maps of a block with one hidden layer as those of runs of its neurons: rows of the maps [h, k] that lead
    to it, columns of the map [v, h] that leads on; all of them views. Raises ValueError where there are fewer neurons
    than groups."""
    *first, last = weights
    hidden = last.shape[-1]
    if hidden < groups:
        raise ValueError(f"{hidden} neurons cannot be divided into {groups} groups; give the block more of them")
    edges = [-(-hidden * group // groups) for group in range(groups + 1)]
    runs = [slice(start, end) for start, end in pairwise(edges)]
    return tuple((*(weight[..., run, :] for weight in first), last[..., run]) for run in runs)


def join_neurons(groups: Sequence[Weights]) -> Weights:
    """The maps of the whole block, in the order of its neurons."""
    if len(groups) == 1:
        return groups[0]
    *first, last = zip(*groups, strict=True)
    return (*(torch.cat(rows, -2) for rows in first), torch.cat(last, -1))


def share_taps(groups: Sequence[Weights], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> list[Taps]:
    """For each group, what the whole block's maps received and gave, and which neurons are the group's."""
    found, start = [], 0
    for weights in groups:
        end = start + weights[-1].shape[-1]
        found.append(Taps(inputs, outputs, slice(start, end)))
        start = end
    return found


def _check(block: Level, structure: Structure) -> None:
    """Neurons can be told apart where every map but the last leads from the keys to one hidden layer."""
    *first, last = structure.shapes(8, 8)
    one_layer = len(first) == structure.meets_keys and {rows for rows, _ in first} == {last[1]}
    if not one_layer:
        raise ValueError(
            f"{type(block).__name__}: neurons are divided in a structure with one hidden layer and no biases, such "
            f"as mlp(residual=False) or gated_mlp(); got {structure}"
        )


def _is_power_of_two(period: float) -> bool:
    return math.isfinite(period) and period >= 1 and math.frexp(period)[0] == 0.5
