"""The continuum memory system (CMS): a chain of MLP blocks that learn at their own periods."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.part import Part
from nestling.memory.rule import Gates, Gradient, Pairs, Rule, every, gradient_descent
from nestling.memory.structure import Structure, Weights, mlp, plain

from .slots import Slots, read_slots
from .transfer import Meta, Transfer, backpropagation, initialization, reptile


@runtime_checkable
class Tap(Protocol):
    """Where a level's gradient is read off: tensors of the forward pass at which it asks for the error of the task's
    loss, and what their errors say of every map of the level."""

    @property
    def asks(self) -> tuple[Tensor, ...]: ...

    def pairs(self, errors: Sequence[Tensor], rows: bool = False) -> Sequence[Gradient]: ...


class Taps(NamedTuple):
    """What a level's linear maps received and gave in one forward pass: where its gradient is read off.

    neurons: those of the hidden layer that are this level's, where a block has several levels. errors: those at the
    outputs, where they are known already, of an objective of the level's own.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    neurons: slice | None = None
    errors: tuple[Tensor, ...] | None = None

    @property
    def asks(self) -> tuple[Tensor, ...]:
        return self.outputs if self.errors is None else ()

    def pairs(self, errors: Sequence[Tensor], rows: bool = False) -> list[Pairs]:
        """The gradient of every map of the level, from the errors [b, t, out] that it asked for: of a group of neurons,
        the rows of the maps that lead to them and the columns of the map that leads on. rows: of each row b of a
        batch for itself, else of all of them together."""
        last, known = 1 if rows else 0, errors if self.errors is None else self.errors
        found = [Pairs(e.flatten(last, -2), x.flatten(last, -2)) for e, x in zip(known, self.inputs, strict=True)]
        if self.neurons is None:
            return found
        *first, onward = found
        mine = [pair._replace(error=pair.error[..., self.neurons]) for pair in first]
        return [*mine, onward._replace(input=onward.input[..., self.neurons])]


class Pass(NamedTuple):
    """One forward pass of a block: what it was asked and what it answered [b, t, d], and what each of its maps received
    and gave."""

    keys: Tensor
    read: Tensor
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Level(Part, family=True):
    """One block of the continuum: a memory, with a rule and a period for all of it, or for each of its parts."""

    structure: Structure

    @property
    @abstractmethod
    def levels(self) -> tuple["level", ...]:
        """What learns at a period of its own, fast to slow: the block itself, or groups of its neurons."""

    @abstractmethod
    def split(self, weights: Weights) -> tuple[Weights, ...]:
        """The weights of the block's maps as the weights of its levels."""

    @abstractmethod
    def join(self, levels: Sequence[Weights]) -> Weights:
        """The weights of the block's maps, from those of its levels."""

    @property
    def objective(self) -> str:
        """What its levels are written with, in words."""
        return "next-token loss"

    @abstractmethod
    def taps(self, levels: Sequence[Weights], seen: Pass) -> list[Taps]:
        """Where each level's gradient is read off, after one forward pass of the block."""


@dataclass(frozen=True, repr=False)
class level(Level):
    """A block of the continuum that learns once every `period` tokens.

    The rule is wrapped in a clock: at the tick it steps with step_size / period on the gradient of the
    next-token loss summed over the period (equation 71). period=inf: never, in life; pre-training moves it all
    the same. momentum and retention are the fractions that the rule's parts of that name use, if it has them;
    retention is per tick.

    transfer: how it is wired to the next slower level. backpropagation(): one gradient reaches both, and each goes on
    from where it is. initialization(order=1) or reptile(): the nested continuum (equation 72); the slower level holds
    what this one starts from and learns it at its own ticks, where this level starts again from there.
    """

    period: float  # tokens
    structure: Structure = mlp(expansion=2.0, residual=False)
    rule: Rule = gradient_descent()
    step_size: float = 0.3
    momentum: float = 0.9
    retention: float = 1.0
    transfer: Transfer = backpropagation()

    def __post_init__(self) -> None:
        if not self.period >= 1 or (self.period != math.inf and self.period != int(self.period)):
            raise ValueError(f"period must be >= 1 token (a whole number, or inf), got {self.period}")
        if isinstance(self.rule, every):
            raise ValueError(f"rule {self.rule!r}: a level has its own clock; give the rule without every()")
        if self.rule.exposes:
            raise ValueError(f"rule {self.rule!r} steps an accumulator; a level's weights are its own")
        if self.transfer not in (backpropagation(), initialization(order=1), reptile()):
            raise ValueError(
                f"transfer: a level learns by backpropagation(), and may start again by initialization(order=1) or "
                f"reptile(), got {self.transfer!r}; second order is a matter of pre-training (InContext)"
            )
        if not self.step_size >= 0:
            raise ValueError(f"step_size must be >= 0, got {self.step_size}")
        for name in ("momentum", "retention"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def levels(self) -> tuple["level", ...]:
        return (self,)

    def split(self, weights: Weights) -> tuple[Weights, ...]:
        return (weights,)

    def join(self, levels: Sequence[Weights]) -> Weights:
        (weights,) = levels
        return weights

    def taps(self, levels: Sequence[Weights], seen: Pass) -> list[Taps]:
        return [Taps(seen.inputs, seen.outputs)]

    @property
    def restarts(self) -> bool:
        """Does it start again from what the next slower level learned for it?"""
        return isinstance(self.transfer, Meta)

    @cached_property
    def clocked(self) -> every:
        """The whole rule, clock included."""
        return every(self.period, self.rule)

    @cached_property
    def gates(self) -> Gates:
        kept = math.log(self.retention) if self.retention > 0 else -math.inf
        return Gates(self.step_size, self.momentum, kept)


class Wiring(Part, family=True):
    """How the blocks of a continuum are joined."""


@dataclass(frozen=True, repr=False)
class chain(Wiring):
    """One after the other, fast to slow: x <- x + MLP(norm x) (equations 70 and 73)."""


@dataclass(frozen=True, repr=False)
class heads(Wiring):
    """Side by side, each with the same input: y = x + sum_k a_k MLP_k(norm_k x), a learned at the lowest frequency
    from 1 / blocks on (equation 74)."""


class Continuum(nn.Module):
    """Blocks that learn at their own periods, in a chain (Hope's) or side by side.

    x [b, t, d] -> y [b, t, d]. The weights can be given from outside, one tuple a level: those of a life; so can slots,
    one bank a level, whose answers are added to those of the level's block. Given a list, `taps` collects what is
    needed to compute every level's gradient as pairs.
    """

    def __init__(
        self,
        dim: int,
        blocks: tuple[Level, ...],
        generator: torch.Generator | None = None,
        wiring: Wiring = chain(),
    ) -> None:
        super().__init__()
        self.blocks, self.wiring = blocks, wiring
        self.norms = nn.ParameterList([torch.ones(dim) for _ in blocks])
        self.shares = nn.Parameter(torch.full((len(blocks),), 1 / len(blocks))) if wiring == heads() else None
        self.weights = nn.ModuleList(
            nn.ParameterList(weights)
            for block in blocks
            for weights in block.split(block.structure.init(dim, dim, generator=generator))
        )
        slower = (*self.levels[1:], None)
        for lvl, teacher in zip(self.levels, slower, strict=True):
            if lvl.restarts and (teacher is None or teacher.period == math.inf):
                raise ValueError(f"{lvl!r}: there is no slower level that learns a start for it")

    @property
    def levels(self) -> tuple[level, ...]:
        """Every level of every block, in the order of their weights."""
        return tuple(lvl for block in self.blocks for lvl in block.levels)

    def level_weights(self) -> tuple[Weights, ...]:
        """The model's own level weights."""
        return tuple(tuple(weights) for weights in self.weights)  # type: ignore[arg-type]

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
        slots: tuple[Slots, ...] = (),
    ) -> Float[Tensor, "b t d"]:
        weights = self.level_weights() if weights is None else weights
        shares = [1.0] * len(self.blocks) if self.shares is None else self.shares
        given, y = x, x
        for block, norm, share in zip(self.blocks, self.norms, shares, strict=True):
            mine, weights = weights[: len(block.levels)], weights[len(block.levels) :]
            normed = F.rms_norm(y if self.shares is None else given, (x.shape[-1],), norm, eps=1e-6)
            if taps is not None and any(_only_tapped(w) for maps in mine for w in maps):
                mine, normed = _tap_only(mine, normed)
            read, inputs, outputs = block.structure.forward(plain(block.join(mine)), normed)
            if taps is not None:
                taps.extend(block.taps(mine, Pass(normed, read, inputs, outputs)))
            for bank in slots[: len(block.levels)]:
                read = read + read_slots(bank, normed)
            slots = slots[len(block.levels) :]
            y = y + (read if self.shares is None else read * share)
        return y


def _tap_only(levels: Sequence[Weights], x: Tensor) -> tuple[tuple[Weights, ...], Tensor]:
    """Weights as constants and their block's inputs in the graph: a gradient is read off at the maps' outputs, and
    autograd need not make another one of the weights."""
    constant = tuple(tuple(w.detach() for w in maps) for maps in levels)
    return constant, x if x.requires_grad else x.detach().requires_grad_()


def _only_tapped(weight: Tensor) -> bool:
    """Is it in the graph for the sake of taps alone: neither a model's own parameter, nor made of one?"""
    return weight.requires_grad and weight.is_leaf and not isinstance(weight, nn.Parameter)
