"""Learning rules: how a memory changes, one linear map [..., out, in] at a time.

A rule is a pure function `step(weight, gradient, state, gates) -> (weight, state)`. It is used three times: as
the inner loop of a sequence layer, as the update of a level of the continuum memory, and as a torch optimizer.
Rules are built from parts: directions (what is added, linear in the gradient) inside keepers (what happens to
what was there) inside clocks (when)::

    every(512, retain(decay(), delta_gradient_descent(momentum())))

Rules that are linear in the weights also have a `plan`: the scalars per token from which a whole chunk is
computed at once (`nestling.sequence.chunk`). Oracles: `memory.naive` token by token, and `tests/test_rule.py`.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradient import ChunkEnd, Gates, Gradient, Norms, Pairs, Plan, Summed, _per_token, _wide
from .part import Part
from .retention import Retention, decay
from .state import flatten, select

State = Any
"""Nested NamedTuples of tensors; () where a part remembers nothing."""
Scaled = tuple[Tensor, float, State]
"""An update in two, a tensor and the number that multiplies it; and the state."""


class Rule(Part, family=True):
    """How one linear map learns. Pure: nothing given is changed in place."""

    needs_inputs: bool = False  # of a map's inputs, more than the gradient
    needs_pairs: bool = False  # every pair of error and input, more than their sum
    scales_buffer: bool = False  # a step size outside of a momentum
    exposes: bool = False  # what is stepped is an accumulator, and the memory answers with what is made of it
    elementwise: bool = False  # no entry of a weight looks at another: it may be cut and joined at will
    reopens: bool = False  # it acts where a chunk opens

    def init(self, weight: Tensor) -> State:
        """The state before the first step, for a weight [..., out, in]."""
        return ()

    def point(self, weight: Tensor, state: State, gates: Gates) -> Tensor:
        """The weight at which the gradient of the next step is taken, where that is every token's own."""
        return weight

    def anchor(self, state: State) -> State:
        """The state when the point at which gradients are taken has just moved to the current weights."""
        return state

    @abstractmethod
    def step(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        """The weight and state after one step on a gradient that sums `gradient.tokens` tokens."""

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        """The rule's scalars for a chunk whose gates and squared norms are [..., c]; `exact`: gradients are
        taken at every token's own weights, so that each token is its own anchor."""
        raise ValueError(f"{self} is not linear in the weights and has no chunked form; use way='recurrent'")

    def close(self, state: State, end: ChunkEnd) -> State:
        """The state after a chunk that was computed from `plan`."""
        return state

    def expose(self, weight: Tensor, state: State) -> Tensor:
        """The weight that the memory answers with, from the one that is stepped."""
        return weight

    def conceal(self, weight: Tensor) -> Tensor:
        """What is stepped, for a start weight: see `Retention.conceal`."""
        return weight

    def reopen(self, weight: Tensor, state: State) -> tuple[Tensor, State]:
        """The weight and the state with which a chunk opens, from those that the one before it left."""
        return weight, state


class Additive(Rule, abstract=True):
    """A rule that keeps some of the weight and adds an update to it."""

    def keep(self, weight: Tensor, state: State, gates: Gates) -> Tensor:
        return weight

    @abstractmethod
    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        """What is added to the kept weight, and the new state."""

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        """`update` as a tensor and a number that multiplies it: numbers on the way multiply each other, and a matrix
        is passed over once. The tensor may be one that is kept or was given, and is not written over."""
        added, after = self.update(weight, gradient, state, gates)
        return added, 1.0, after

    def step(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, times, after = self.scaled(weight, gradient, state, gates)
        kept = self.keep(weight, state, gates)
        return _plus(kept, times, added, own=kept is not weight), after


def _plus(one: Tensor, times: float, other: Tensor, *, own: bool) -> Tensor:
    """one + times * other, in one pass; in place where `one` is the caller's own and autograd does not look."""
    if own and not torch.is_grad_enabled() and one.shape == other.shape:
        return one.add_(other, alpha=times)
    return torch.add(one, other, alpha=times)


def _said(scaled: Scaled) -> tuple[Tensor, State]:
    """The update of a part that says it in two, and the state."""
    added, times, after = scaled
    return (added if times == 1.0 else added * times), after


class Direction(Additive, abstract=True):
    """An additive rule whose update can be wrapped. Those that are linear in the gradients and blind to the weight
    have a plan."""

    buffered: bool = False  # is there a momentum in it


def _require(owner: str, value: Any, kind: type, why: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{owner}({value!r}): {why}")


@dataclass(frozen=True, repr=False)
class surprise(Direction):
    """update = -g: the momentary surprise itself, unscaled. Source: Titans 3.1. Oracle: torch.optim.SGD."""

    elementwise = True

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return -gradient.dense(), state

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        return gradient.dense(), -1.0, state

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        return Plan(write=torch.ones_like(norms.input))


class _passing(Additive, abstract=True):
    """A rule around a direction, whose state is its own."""

    of: Direction

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return self.of.needs_inputs

    @property
    def needs_pairs(self) -> bool:  # type: ignore[override]
        return self.of.needs_pairs

    @property
    def scales_buffer(self) -> bool:  # type: ignore[override]
        return self.of.scales_buffer

    def init(self, weight: Tensor) -> State:
        return self.of.init(weight)

    def anchor(self, state: State) -> State:
        return self.of.anchor(state)

    def close(self, state: State, end: ChunkEnd) -> State:
        return self.of.close(state, end)


@dataclass(frozen=True, repr=False)
class _wrapper(_passing, Direction, abstract=True):
    """A direction around another one, whose state and plan it passes on."""

    of: Direction

    @property
    def buffered(self) -> bool:  # type: ignore[override]
        return self.of.buffered

    def __post_init__(self) -> None:
        name = type(self).__name__
        _require(name, self.of, Direction, f"{name} wraps a direction; put keepers and clocks outside of it")

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.of.elementwise


class _times(_wrapper, abstract=True):
    """A direction times a factor that does not look at the gradient."""

    @abstractmethod
    def factor(self, weight: Tensor, gates: Gates) -> Tensor | float:
        """A number, or one for every weight [...]."""

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return _said(self.scaled(weight, gradient, state, gates))

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, after = self.of.scaled(weight, gradient, state, gates)
        factor = self.factor(weight, gates)
        if isinstance(factor, Tensor):
            return _wide(factor) * added, times, after
        return added, times * factor, after


@dataclass(frozen=True, repr=False)
class scale(_times):
    """update = step_size * (update of `of`). Inside momentum as Titans has it, outside as torch has it. Oracles:
    `memory.naive`, torch.optim.SGD."""

    @property
    def scales_buffer(self) -> bool:  # type: ignore[override]
        return self.of.buffered

    def factor(self, weight: Tensor, gates: Gates) -> Tensor | float:
        return gates.step_size

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        return self.of.plan(gates, norms, state, exact).times(gates.step_size)


@dataclass(frozen=True, repr=False)
class gradient_descent(scale):
    """update = -step_size * g. Nested Learning equation 8; `scale(surprise())` under its usual name. Oracle:
    `memory.naive`."""

    of: Direction = surprise()


@dataclass(frozen=True, repr=False)
class dampen(_times):
    """update = (1 - momentum) * (update of `of`): inside `momentum` it makes the buffer an average of updates,
    where the bare form multiplies them by up to 1 / (1 - momentum). Source: torch.optim.SGD's dampening, here one minus
    the gate. Oracle: `memory.naive`."""

    of: Direction = gradient_descent()

    def factor(self, weight: Tensor, gates: Gates) -> Tensor | float:
        return 1.0 - gates.momentum

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        return self.of.plan(gates, norms, state, exact).times(1.0 - gates.momentum)


@dataclass(frozen=True, repr=False)
class clip(_wrapper):
    """error <- error * min(1, bound / |error|), pair by pair, at the output of each linear map.

    In a deep memory the error at an inner map grows with the outer maps, and what it writes makes them grow: a
    loop that no step size along the map's own inputs bounds. A bound on the error does, and with it what a write
    can do is bounded whatever the weights. A gradient given only as a sum is scaled as the one pair that it
    would be, |g| / |x|. Source: this library (docs/log.md has what diverged without). Oracle: `memory.naive`.
    """

    of: Direction = gradient_descent()
    bound: float = 1.0
    needs_inputs = True
    elementwise = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bound > 0:
            raise ValueError(f"clip: bound must be > 0, got {self.bound}")

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        if isinstance(gradient, Pairs):
            error = gradient.error * self._factor(gradient.error.square().sum(-1))[..., None]
            return self.of.update(weight, Pairs(error, gradient.input), state, gates)
        norm = gradient.squared_norm()
        squared = gradient.total.square().sum((-2, -1)) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        total = gradient.total * _wide(self._factor(squared))
        return self.of.update(weight, gradient._replace(total=total), state, gates)

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        if norms.error is None:
            raise ValueError(f"{self} has no chunked form with gradient_at='token'; use way='recurrent'")
        factor = self._factor(norms.error)
        plan = self.of.plan(gates, norms._replace(error=norms.error.clamp(max=self.bound**2)), state, exact)
        return plan._replace(write=plan.write * factor)

    def _factor(self, squared: Tensor) -> Tensor:
        # max(1, |e| / bound) by way of its square: the root has no gradient at an error of zero
        return squared.clamp(min=self.bound**2).rsqrt() * self.bound


class NormalizeState(NamedTuple):
    squared_norm: Tensor  # sum of |x|^2 since the anchor [...]
    of: State


@dataclass(frozen=True, repr=False)
class normalize(_wrapper):
    """step_size <- step_size / (1 + step_size * n), n = sum of |x|^2 over the writes since the anchor.

    The anchor is where gradients are taken. Gradients frozen over a chunk add up like one batch step, which
    diverges above a step of 1 / lambda_max(sum x x^T) <= 1 / n (spec: memory 5.2); this stays below it. Sources: Nested
    Learning equation 57, over a chunk; at every token Longhorn's step (2407.14207). Oracles: `memory.naive`,
    `memory.naive_linear.naive_longhorn`.
    """

    of: Direction = gradient_descent()
    needs_inputs = True
    elementwise = False

    def init(self, weight: Tensor) -> State:
        return NormalizeState(weight.new_zeros(weight.shape[:-2]), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return NormalizeState(torch.zeros_like(state.squared_norm), self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        total = state.squared_norm + gradient.squared_norm()
        gates = gates._replace(step_size=bounded(gates.step_size, total))
        added, inner = self.of.update(weight, gradient, state.of, gates)
        return added, NormalizeState(total, inner)

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        total = norms.input if exact else state.squared_norm[..., None] + norms.input.cumsum(-1)
        gates = gates._replace(step_size=bounded(gates.step_size, total))
        return self.of.plan(gates, norms, state.of, exact)

    def close(self, state: State, end: ChunkEnd) -> State:
        return NormalizeState(state.squared_norm + end.squared_norm, self.of.close(state.of, end))


def bounded(step_size: Tensor | float, squared_norm: Tensor) -> Tensor:
    """eta' = eta / (1 + eta |x|^2): the implicit step along x, never past the target (equation 57, general x)."""
    return step_size / (1.0 + step_size * squared_norm)


class MomentumState(NamedTuple):
    buffer: Tensor  # [..., out, in]
    of: State


@dataclass(frozen=True, repr=False)
class momentum(_wrapper):
    """S <- momentum * S + (update of `of`); update = S. Titans' past and momentary surprise; equation 33.

    The chunk form works with the gate's logarithm: there the gradient of a gate of exactly 0 is 0, where the recurrent
    form has one. Gates that are sigmoids never are 0. Oracle: `memory.naive`.
    """

    of: Direction = gradient_descent()
    buffered = True

    def init(self, weight: Tensor) -> State:
        return MomentumState(torch.zeros_like(weight), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return MomentumState(state.buffer, self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, times, inner = self.of.scaled(weight, gradient, state.of, gates)
        buffer = _plus(_wide(gates.momentum) * state.buffer, times, added, own=True)
        return buffer, MomentumState(buffer, inner)

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        plan = self.of.plan(gates, norms, state.of, exact)
        if plan.momentum is not None:
            raise ValueError(f"{self}: a momentum of a momentum has no chunked form; use way='recurrent'")
        return plan._replace(momentum=_per_token(gates.momentum, norms.input), buffer=state.buffer)

    def close(self, state: State, end: ChunkEnd) -> State:
        assert end.buffer is not None
        return MomentumState(end.buffer, self.of.close(state.of, end))


@dataclass(frozen=True, repr=False)
class delta_gradient_descent(_passing):
    """W <- W - eta' (W x) x^T + (update of `of` with step size eta'), eta' = eta / (1 + eta |x|^2).

    Nested Learning equations 56 and 57, with the general |x| that their closed form leaves out; exact for one
    pair. With l2 the erase and the objective's own both act and W x settles at v/2, as in the paper. Only the
    gradient enters a momentum in `of`; the erase acts on the running weights. Of several pairs at one weight
    the outer products add, with |x|^2 summed: the averaged form. Oracle: the direct solve of equation 56.
    """

    of: Direction = gradient_descent()
    needs_inputs = True

    def __post_init__(self) -> None:
        why = "delta_gradient_descent wraps a direction, as in delta_gradient_descent(momentum())"
        _require("delta_gradient_descent", self.of, Direction, why)

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        step_size = bounded(gates.step_size, gradient.squared_norm())
        added, state = self.of.update(weight, gradient, state, gates._replace(step_size=step_size))
        return added - _wide(step_size) * gradient.project(weight), state

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        step_size = bounded(gates.step_size, norms.input)
        plan = self.of.plan(gates._replace(step_size=step_size), norms, state, exact)
        return plan._replace(erase=step_size)


class RetainState(NamedTuple):
    start: Tensor | None  # the weight at the document's start, where the retention gate remembers it
    of: State


class _keeper(Additive, abstract=True):
    """A retention gate around what is added."""

    retention: Retention
    of: Additive

    def __post_init__(self) -> None:
        name = type(self).__name__
        _require(name, self.retention, Retention, "the first argument is a retention gate, such as decay()")
        if isinstance(self.of, _keeper) or not isinstance(self.of, Additive):
            raise ValueError(f"{name}(..., {self.of!r}): {name} wraps a direction or delta_gradient_descent")

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return self.of.needs_inputs

    @property
    def needs_pairs(self) -> bool:  # type: ignore[override]
        return self.of.needs_pairs

    @property
    def scales_buffer(self) -> bool:  # type: ignore[override]
        return self.of.scales_buffer

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.of.elementwise and self.retention.elementwise

    def init(self, weight: Tensor) -> State:
        return RetainState(weight if self.retention.remembers_start else None, self.of.init(weight))

    def anchor(self, state: State) -> State:
        return RetainState(state.start, self.of.anchor(state.of))

    @property
    def exposes(self) -> bool:  # type: ignore[override]
        return self.retention.exposes

    def expose(self, weight: Tensor, state: State) -> Tensor:
        return self.retention.expose(weight, state.start)

    def conceal(self, weight: Tensor) -> Tensor:
        return self.retention.conceal(weight)

    @property
    def reopens(self) -> bool:  # type: ignore[override]
        return self.retention.reopens

    def reopen(self, weight: Tensor, state: State) -> tuple[Tensor, State]:
        weight, start = self.retention.reopen(weight, state.start)
        return weight, state._replace(start=start)

    def keep(self, weight: Tensor, state: State, gates: Gates) -> Tensor:
        if not isinstance(gates.log_retention, Tensor) or gates.log_retention.dim() < weight.dim() - 1:
            return self.retention.keep(weight, state.start, gates.log_retention)
        columns, start = (None if w is None else w.mT.unsqueeze(-1) for w in (weight, state.start))  # [..., in, out, 1]
        assert columns is not None
        return self.retention.keep(columns, start, gates.log_retention).squeeze(-1).mT

    def step(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        weight, after = super().step(weight, gradient, state, gates)
        return self.retention.settle(weight, state.start, gates.step_size) if self.retention.settles else weight, after

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, inner = self.of.update(weight, gradient, state.of, gates)
        return added, RetainState(state.start, inner)

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, inner = self.of.scaled(weight, gradient, state.of, gates)
        return added, times, RetainState(state.start, inner)

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        if self.retention.settles:
            raise ValueError(
                f"{self.retention} changes the weight after every write and has no chunked form; use way='recurrent'"
            )
        plan = self.of.plan(gates, norms, state.of, exact)
        start = state.start if self.retention.returns else None
        return plan._replace(log_keep=_per_token(gates.log_retention, norms.input), start=start)

    def close(self, state: State, end: ChunkEnd) -> State:
        return RetainState(state.start, self.of.close(state.of, end))


@dataclass(frozen=True, repr=False)
class retain(_keeper):
    """W <- (what `retention` keeps of W) + (update of `of`, its gradient taken at the undecayed weights).

    With decay(): Titans, AdamW's decoupled weight decay, and W (a I - b x x^T) around the delta terms. A retention
    for every input channel takes a gate [..., in]. Oracle: `memory.naive`.
    """

    retention: Retention = decay()
    of: Additive = gradient_descent()


@dataclass(frozen=True, repr=False)
class retain_first(_keeper):
    """W' = what `retention` keeps of W;  W <- W' + (update of `of`, at W': its gradient and what it erases).

    The gated delta rule, a W (I - b x x^T) + b v x^T: after a full forgetting the next token is as the first ever,
    where `retain` still measures surprise against what was forgotten. A gradient frozen over a chunk stays where it
    was frozen. Gated DeltaNet (2412.06464). Oracle: `memory.naive_linear.naive_gated_delta_rule`.
    """

    retention: Retention = decay()
    of: Additive = gradient_descent()

    def point(self, weight: Tensor, state: State, gates: Gates) -> Tensor:
        return self.keep(weight, state, gates)

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return super().update(self.keep(weight, state, gates), gradient, state, gates)

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        return super().scaled(self.keep(weight, state, gates), gradient, state, gates)

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        plan = super().plan(gates, norms, state, exact)
        if plan.start is not None:
            raise ValueError(f"{self} has a chunked form for decay() only; use way='recurrent'")
        assert plan.log_keep is not None
        kept = plan.log_keep.exp()
        return plan._replace(erase=None if plan.erase is None else plan.erase * kept, sight=kept)


class EveryState(NamedTuple):
    elapsed: Tensor  # since the last tick: tokens, int64 [...]; on a timed clock units of time, float64
    gradient: Tensor  # summed since the last tick [..., out, in]
    inputs: Tensor | None  # Gram matrix since the last tick [..., in, in], where the rule needs it
    of: State


class Change(NamedTuple):
    """What a tick makes of a weight: `weight + times * added`; or, where the rule does more than add, `weight`, the new
    one already. Beside it the state inside of the clock."""

    weight: Tensor
    times: float
    added: Tensor | None
    of: State

    def made(self) -> Tensor:
        """The new weight; the old one is not written over."""
        return self.weight if self.added is None else torch.add(self.weight, self.added, alpha=self.times)

    def made_in_place(self) -> Tensor:
        """The new weight, where the old one lies, which must be the caller's alone; elsewhere if the rule keeps it."""
        if self.added is None or _lies_in(self.weight, self.of):
            return self.made()
        return self.weight.add_(self.added, alpha=self.times)


_ALMOST = 1 - 1e-9  # of a timed period: durations that add up to it but for rounding


@dataclass(frozen=True, repr=False)
class every(Rule):
    """A clock around a whole step: `of` steps once each `period` tokens, on the gradient summed over them with
    step_size / period; off the clock nothing changes, retention included. Equation 71.

    A gradient that sums more tokens than are left of a period still makes one step, at the tick, of all that
    was summed. period=inf never steps. The clock of a memory inside, `remember(every(...))`, counts ticks.

    timed: the period is a length of time, any number > 0, and so is what a gradient says of its `tokens`: how long
    its sample stands for. With gradients that are integrals over that time (gradient times duration) the finer a
    signal is sampled, the nearer the steps are to those of the signal itself; samples that last one unit are tokens.
    Oracle: steps on the sum written out (tests/test_rule.py).
    """

    period: float
    of: Rule = gradient_descent()
    timed: bool = False

    def __post_init__(self) -> None:
        if self.timed and not self.period > 0:
            raise ValueError(f"every: the period of a timed clock must be > 0, got {self.period}")
        if not self.timed and (not self.period >= 1 or (self.period != math.inf and self.period != int(self.period))):
            raise ValueError(
                f"every: period must be a whole number of tokens >= 1, or inf, got {self.period}; "
                "timed=True counts time"
            )
        if isinstance(self.of, every) or not isinstance(self.of, Rule):
            raise ValueError(f"every({self.period}, {self.of!r}): a clock wraps a rule that is not a clock")
        if isinstance(self.of, retain_first):
            raise ValueError(f"every({self.period}, {self.of!r}): a sum of gradients is not taken at decayed weights")
        if self.of.needs_pairs:
            raise ValueError(f"every({self.period}, {self.of!r}): a clock keeps the sum of a period, and not its pairs")
        if self.of.reopens:
            raise ValueError(f"every({self.period}, {self.of!r}): a clock's steps have no chunks to open")

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return self.of.needs_inputs

    @property
    def exposes(self) -> bool:  # type: ignore[override]
        return self.of.exposes

    def expose(self, weight: Tensor, state: State) -> Tensor:
        return self.of.expose(weight, state.of)

    def conceal(self, weight: Tensor) -> Tensor:
        return self.of.conceal(weight)

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.of.elementwise

    def init(self, weight: Tensor) -> State:
        counts = torch.float64 if self.timed else torch.int64
        elapsed = torch.zeros(weight.shape[:-2], dtype=counts, device=weight.device)
        square = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
        inputs = weight.new_zeros(square) if self.needs_inputs else None
        return EveryState(elapsed, torch.zeros_like(weight), inputs, self.of.init(weight))

    def step(
        self, weight: Tensor, gradient: Gradient, state: State, gates: Gates, own: bool = False
    ) -> tuple[Tensor, State]:
        """One step. own: as in `accumulate`. The weight is never written over."""
        if self.period == math.inf:
            return weight, state
        after = self.accumulate(gradient, state, own)
        tick = self.due(after)
        if not bool(tick.any()):
            return weight, after
        change = self.change(weight, after, gates)
        stepped = change.made()
        if bool(tick.all()):
            return stepped, self.rest(after, change, own)
        return torch.where(tick[..., None, None], stepped, weight), select(tick, self.rest(after, change), after)

    def accumulate(self, gradient: Gradient, state: EveryState, own: bool = False) -> EveryState:
        """The state with a gradient added to its sum, and its tokens to the clock, which may be due now. own: the sum
        is the caller's alone and is used up, so that the gradient is added to it where it lies; the one exception to
        purity, for who holds the only state."""
        own = own and not torch.is_grad_enabled() and state.gradient.is_contiguous()
        inputs = None if state.inputs is None else state.inputs + gradient.gram()
        return EveryState(state.elapsed + gradient.tokens, gradient.added_to(state.gradient, own), inputs, state.of)

    def due(self, state: EveryState) -> Tensor:
        """Is it time for a tick? bool [...]."""
        return state.elapsed >= (self.period * _ALMOST if self.timed else self.period)

    def change(self, weight: Tensor, state: EveryState, gates: Gates) -> Change:
        """What a tick makes of the weight and of the state inside; nothing is changed yet."""
        gates = gates._replace(step_size=gates.step_size / self.period)
        summed, inner = Summed(state.gradient, state.inputs, tokens=1), self.of.anchor(state.of)
        if isinstance(self.of, Direction):
            added, times, inner = self.of.scaled(weight, summed, inner, gates)
            return Change(weight, times, added, inner)
        stepped, inner = self.of.step(weight, summed, inner, gates)
        return Change(stepped, 0.0, None, inner)

    def rest(self, state: EveryState, change: Change, own: bool = False) -> EveryState:
        """The state after a tick: nothing is summed. own: as in `accumulate`; the change has been made, or never is."""
        free = own and not torch.is_grad_enabled() and not _lies_in(state.gradient, (change.weight, change.of))
        empty = state.gradient.zero_() if free else torch.zeros_like(state.gradient)
        emptied = None if state.inputs is None else torch.zeros_like(state.inputs)
        return EveryState(self._left_over(state.elapsed), empty, emptied, change.of)

    def _left_over(self, elapsed: Tensor) -> Tensor:
        """What a tick leaves on the clock."""
        if not self.timed:
            return elapsed % int(self.period)
        return (elapsed - (elapsed / self.period + (1 - _ALMOST)).floor() * self.period).clamp(min=0.0)


def _lies_in(total: Tensor, kept: State) -> bool:
    """Is any tensor of what is kept the total, or a view of it?"""
    where = total.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == where for tensor in flatten(kept).values())
