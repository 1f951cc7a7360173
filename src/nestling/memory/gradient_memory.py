"""A whole memory, all four of Miras' choices, that is fed gradients; and descent on an objective of one's own."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .adaptive import Transform
from .attentional_bias import AttentionalBias, dot, l2
from .feature import FeatureMap, identity
from .nested import _remembering
from .retention import decay_to_start
from .rule import (
    Direction,
    Gates,
    Gradient,
    Pairs,
    Rule,
    State,
    Summed,
    _passing,
    _require,
    every,
    gradient_descent,
    retain,
    surprise,
)
from .structure import Structure, Weights, mlp, plain, together


class GradientMemoryState(NamedTuple):
    maps: Weights  # of the memory, each [..., out, in]
    rules: tuple[State, ...]
    of: State


@dataclass(frozen=True, repr=False)
class gradient_memory(_remembering):
    """A memory m of gradients, of any structure, learned on an objective L of its own; update = what it answers.

    form="units": m maps in -> out channels; its pairs are the gradient's rows u_i with minus the unit vectors, its
    answer is read at the unit vectors::

        m <- retention m - step_size d/dm sum_i L(m(u_i), -e_i);    update = [m(e_1) ... m(e_in)]

    With matrix() that is m itself: dot() is momentum, l2() delta momentum with P = I, and newton_schulz around it
    Muon; so an mlp() is the deep form of all three (Nested Learning equations 50 and 52; 34, 48 and 42). form="ones":
    the letter of 50, m maps in -> in, minimises L(m(u_i), -1) and is read at the rows u_i again. Under dot() the last
    map then only ever writes the vector of ones: every row of the update is constant.

    A structure must tell u from -u: gated_mlp(), whose answer to small keys is even in them, does not descend.
    The last of several maps starts at zero, so that nothing is said before anything was learned; the others at random
    from `seed`, and decay_to_start() keeps that start. step_size, momentum, retention: as of `remember`. Maps are
    written together, at the weights from before. A clock counts steps.
    Oracle: autograd of L (tests/test_gradient_memory.py).
    """

    structure: Structure = mlp(residual=False)
    attentional_bias: AttentionalBias = dot()
    rule: Rule = retain(decay_to_start(), gradient_descent())
    of: Direction = surprise()
    step_size: float | None = None
    momentum: float | None = None
    retention: float | None = None
    form: Literal["units", "ones"] = "units"
    seed: int = 0

    def __post_init__(self) -> None:
        name = "gradient_memory"
        _require(name, self.structure, Structure, "the first argument is a structure, such as mlp(residual=False)")
        _require(name, self.attentional_bias, AttentionalBias, "the second argument is an objective, such as dot()")
        _require(name, self.rule, Rule, "a memory is learned by a rule")
        _require(name, self.of, Direction, "it is fed what a direction says")
        self.check_gates()
        self.attentional_bias.fits(self.structure)
        if isinstance(self.structure, together):
            raise ValueError(f"{name}: needs one memory's structure, got {self.structure}")
        if self.form not in ("units", "ones"):
            raise ValueError(f"{name}: form must be 'units' or 'ones', got {self.form!r}")
        if self.rule.reopens:
            raise ValueError(f"{name}: {self.rule} acts where a chunk opens, and a step has no chunks")

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return self.of.needs_inputs

    def init(self, weight: Tensor) -> State:
        rows, columns = weight.shape[-2:]
        out = rows if self.form == "units" else columns
        generator = torch.Generator().manual_seed(self.seed)
        drawn = self.structure.init(columns, out, generator=generator, unit_keys=True)
        starts = [w.to(weight) for w in drawn[:-1]] + [torch.zeros_like(drawn[-1]).to(weight)]
        maps = tuple(self.rule.conceal(w.expand(*weight.shape[:-2], -1, -1).clone()) for w in starts)
        return GradientMemoryState(maps, tuple(self.rule.init(w) for w in maps), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return state._replace(of=self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        told, of = self.of.update(weight, gradient, state.of, gates)
        rows = -told
        own = self.own(gates)
        maps, rules = self._write(state, rows, own, gradient.tokens)
        if self.form == "ones":
            return self._read(maps, rules, rows), GradientMemoryState(maps, rules, of)
        units = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device).expand(*rows.shape[:-2], -1, -1)
        return self._read(maps, rules, units).mT, GradientMemoryState(maps, rules, of)

    def _exposed(self, maps: Weights, rules: tuple[State, ...]) -> Weights:
        return tuple(self.rule.expose(w, s) for w, s in zip(maps, rules, strict=True))

    def _read(self, maps: Weights, rules: tuple[State, ...], keys: Tensor) -> Tensor:
        return self.structure.forward(plain(self._exposed(maps, rules)), keys)[0]

    def _write(
        self, state: GradientMemoryState, rows: Tensor, gates: Gates, tokens: float
    ) -> tuple[Weights, tuple[State, ...]]:
        anchored = tuple(self.rule.anchor(s) for s in state.rules)
        at = tuple(self.rule.point(w, s, gates) for w, s in zip(state.maps, anchored, strict=True))
        at = self._exposed(at, anchored)
        answers, inputs, outputs = self.structure.forward(plain(at), rows)
        wanted = torch.ones_like(answers)
        if self.form == "units":
            wanted = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device).expand_as(answers)
        error = self.attentional_bias.error(answers, self.attentional_bias.target(rows, -wanted))
        errors = self.structure.backward(at, outputs, error)
        after = [
            self.rule.step(w, self._pairs(e, x, tokens), s, gates)
            for w, e, x, s in zip(state.maps, errors, inputs, anchored, strict=True)
        ]
        maps, rules = zip(*after, strict=True)
        return maps, rules

    def _pairs(self, error: Tensor, x: Tensor, tokens: float) -> Gradient:
        """One pair a row; a clock is given their sum, since it counts steps, and not rows."""
        pairs = Pairs(error, x)
        if not isinstance(self.rule, every):
            return pairs
        return Summed(pairs.dense(), pairs.gram() if self.rule.needs_inputs else None, tokens)


@dataclass(frozen=True, repr=False)
class lift(Transform):
    """g <- phi(g), along the gradient's rows: higher-order features of gradients, Nested Learning equation 51, whose
    m <- m - P phi(g) is `momentum(scale(full_matrix_adagrad(lift(surprise(), odd_power(3)))))`.

    phi must keep the width of a row, as odd_power() does. Raises ValueError at the first step where it does not.
    Oracle: the equation written out (tests/test_gradient_memory.py).
    """

    of: Direction = surprise()
    kind: FeatureMap = identity()
    elementwise = False  # a feature may look at the whole row

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("lift", self.kind, FeatureMap, "the second argument is a feature map, such as odd_power(3)")

    def transform(self, weight: Tensor, total: Tensor) -> Tensor:
        if (found := self.kind.width(total.shape[-1])) != total.shape[-1]:
            raise ValueError(f"{self}: features of {total.shape[-1]} channels must be as many, got {found}")
        return self.kind.features(total)


@dataclass(frozen=True, repr=False)
class generalized_gradient_descent(_passing):
    """`of` on the gradient of an objective of one's own over a map's inputs x and its surprise u = -dL/d(W x):

        W <- (what `of` makes of) d/dW sum L~(W x, u)

    Nested Learning definition 5, equations 59 and 60, an explicit step, with `retain` around it as the retention.
    dot() is gradient descent (55); l2() with normalize() inside is delta gradient descent (57), for one pair.
    reduction: what the outer loss did over the n pairs of a step: of a "mean" u is n times the surprise, and L~ is
    averaged.
    Needs the pairs themselves, not their sum. Oracle: autograd of L~ (tests/test_gradient_memory.py).
    """

    attentional_bias: AttentionalBias = l2()
    of: Direction = gradient_descent()
    reduction: Literal["sum", "mean"] = "sum"
    needs_inputs = True
    needs_pairs = True

    def __post_init__(self) -> None:
        name = "generalized_gradient_descent"
        _require(name, self.attentional_bias, AttentionalBias, "the first argument is an objective, such as l2()")
        if not isinstance(self.of, Direction):
            raise ValueError(f"{name}(..., {self.of!r}): {name} wraps a direction, as in {name}(l2(), momentum())")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"{name}: reduction must be 'sum' or 'mean', got {self.reduction!r}")

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        if not isinstance(gradient, Pairs):
            raise ValueError(f"{self} needs the error and input of every pair, and was given their sum")
        x = gradient.input
        n = x.shape[-2] if self.reduction == "mean" else 1
        target = self.attentional_bias.target(x, -n * gradient.error)
        error = self.attentional_bias.error(x @ weight.mT, target) / n
        return self.of.update(weight, Pairs(error, x), state, gates)


__all__ = ["generalized_gradient_descent", "gradient_memory", "lift"]
