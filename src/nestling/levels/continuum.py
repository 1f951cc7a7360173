"""The continuum memory system (CMS): a chain of MLP blocks that learn at their own periods."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.part import Part
from nestling.memory.rule import EveryState, Gates, Pairs, Rule, every, gradient_descent
from nestling.memory.structure import Structure, Weights, mlp, plain


class Taps(NamedTuple):
    """What a level's linear maps received and gave in one forward pass: where its gradient is read off.

    neurons: those of the hidden layer that are this level's, where a block has several levels.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    neurons: slice | None = None

    def pairs(self, errors: Sequence[Tensor]) -> list[Pairs]:
        """The gradient of every map of the level, from the errors at the outputs: of a group of neurons, the rows
        of the maps that lead to them and the columns of the map that leads on."""
        found = [Pairs(e.flatten(0, -2), x.detach().flatten(0, -2)) for e, x in zip(errors, self.inputs, strict=True)]
        if self.neurons is None:
            return found
        *first, last = found
        mine = [pair._replace(error=pair.error[:, self.neurons]) for pair in first]
        return [*mine, last._replace(input=last.input[:, self.neurons])]


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

    @abstractmethod
    def taps(self, levels: Sequence[Weights], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> list[Taps]:
        """Where each level's gradient is read off, given what the block's maps received and gave."""


@dataclass(frozen=True, repr=False)
class level(Level):
    """A block of the continuum that learns once every `period` tokens.

    The rule is wrapped in a clock: at the tick it steps with step_size / period on the gradient of the
    next-token loss summed over the period (equation 71). period=inf: never, in life; pre-training moves it all
    the same. momentum and retention are the fractions that the rule's parts of that name use, if it has them;
    retention is per tick.
    """

    period: float  # tokens
    structure: Structure = mlp(expansion=2.0, residual=False)
    rule: Rule = gradient_descent()
    step_size: float = 0.3
    momentum: float = 0.9
    retention: float = 1.0

    def __post_init__(self) -> None:
        if not self.period >= 1 or (self.period != math.inf and self.period != int(self.period)):
            raise ValueError(f"period must be >= 1 token (a whole number, or inf), got {self.period}")
        if isinstance(self.rule, every):
            raise ValueError(f"rule {self.rule!r}: a level has its own clock; give the rule without every()")
        if self.rule.exposes:
            raise ValueError(f"rule {self.rule!r} steps an accumulator; a level's weights are its own")
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

    def taps(self, levels: Sequence[Weights], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> list[Taps]:
        return [Taps(inputs, outputs)]

    @property
    def clocked(self) -> every:
        """The whole rule, clock included."""
        return every(self.period, self.rule)

    @property
    def gates(self) -> Gates:
        kept = math.log(self.retention) if self.retention > 0 else -math.inf
        return Gates(self.step_size, self.momentum, kept)


class Continuum(nn.Module):
    """y = x + MLP_k(norm(... x + MLP_1(norm x))): blocks in a chain, fast to slow (equation 70, 73).

    x [b, t, d] -> y [b, t, d]. The weights can be given from outside, one tuple a level: those of a life. Given
    a list, `taps` collects what is needed to compute every level's gradient as pairs.
    """

    def __init__(self, dim: int, chain: tuple[Level, ...], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.chain = chain
        self.norms = nn.ParameterList([torch.ones(dim) for _ in chain])
        self.weights = nn.ModuleList(
            nn.ParameterList(weights)
            for block in chain
            for weights in block.split(block.structure.init(dim, dim, generator=generator))
        )

    @property
    def levels(self) -> tuple[level, ...]:
        """Every level of every block, in the order of their weights."""
        return tuple(lvl for block in self.chain for lvl in block.levels)

    def level_weights(self) -> tuple[Weights, ...]:
        """The model's own level weights."""
        return tuple(tuple(weights) for weights in self.weights)  # type: ignore[arg-type]

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
    ) -> Float[Tensor, "b t d"]:
        weights = self.level_weights() if weights is None else weights
        for block, norm in zip(self.chain, self.norms, strict=True):
            mine, weights = weights[: len(block.levels)], weights[len(block.levels) :]
            normed = F.rms_norm(x, (x.shape[-1],), norm, eps=1e-6)
            y, inputs, outputs = block.structure.forward(plain(block.join(mine)), normed)
            if taps is not None:
                taps.extend(block.taps(mine, inputs, outputs))
            x = x + y
        return x


class LevelsState(NamedTuple):
    """All levels of a model in a life: per level (block by block, fast to slow) its weights and its rule's
    states, one for each linear map."""

    weights: tuple[Weights, ...]
    rules: tuple[tuple[EveryState, ...], ...]


def begin(levels: tuple[level, ...], weights: tuple[Weights, ...]) -> LevelsState:
    """The levels at the start of a life, from the model's weights: clocks at zero, nothing accumulated."""
    rules = tuple(tuple(lvl.clocked.init(weight) for weight in maps) for lvl, maps in zip(levels, weights, strict=True))
    return LevelsState(tuple(tuple(w.detach() for w in maps) for maps in weights), rules)


def write(levels: tuple[level, ...], state: LevelsState, loss: Tensor, taps: list[Taps]) -> LevelsState:
    """Every level takes one step of its own clocked rule on the gradient of `loss`, a sum over tokens.

    One backward pass serves all levels; what comes out of it are errors at the outputs of linear maps, so that
    the delta rules have the pairs that they need; groups of neurons share those of their block. Off its clock a level
    only accumulates.
    """
    awake = [lvl.period != math.inf for lvl in levels]
    outputs = {id(output): output for tap, on in zip(taps, awake, strict=True) if on for output in tap.outputs}
    errors = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True)) if outputs else {}
    weights, rules = [], []
    with torch.no_grad():
        for lvl, on, maps, rule_states, tap in zip(levels, awake, state.weights, state.rules, taps, strict=True):
            if not on:
                weights.append(maps)
                rules.append(rule_states)
                continue
            pairs = tap.pairs([errors[id(output)] for output in tap.outputs])
            stepped = [
                lvl.clocked.step(weight, gradient, rule_state, lvl.gates)
                for weight, gradient, rule_state in zip(maps, pairs, rule_states, strict=True)
            ]
            weights.append(tuple(weight for weight, _ in stepped))
            rules.append(tuple(rule_state for _, rule_state in stepped))
    return LevelsState(tuple(weights), tuple(rules))
