"""Memories inside of a rule: a momentum is a memory of gradients, and any rule may be the one that it learns by."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .retention import decay
from .rule import Direction, Gates, Gradient, Pairs, Rule, State, _require, gradient_descent, momentum, retain, surprise


class _remembering(Direction, abstract=True):
    """A direction that is a memory of gradients, with gates of its own; None: those of the step."""

    step_size: float | None
    momentum: float | None
    retention: float | None
    buffered = True

    def check_gates(self) -> None:
        """Raises ValueError that names the gate which is out of bounds."""
        name = type(self).__name__
        if self.step_size is not None and not self.step_size >= 0:
            raise ValueError(f"{name}: step_size must be >= 0, got {self.step_size}")
        for field in ("momentum", "retention"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: {field} must be in [0, 1], got {value}")

    def own(self, gates: Gates) -> Gates:
        """The memory's own gates, given those of the step."""
        step_size = gates.step_size if self.step_size is None else self.step_size
        kept = gates.momentum if self.momentum is None else self.momentum
        log_retention = gates.log_retention
        if self.retention is not None:
            log_retention = math.log(self.retention) if self.retention > 0 else -math.inf
        return Gates(step_size, kept, log_retention)


class RememberState(NamedTuple):
    memory: Tensor  # M [..., out, in]
    of: State


@dataclass(frozen=True, repr=False)
class remember(_remembering):
    """M, state <- rule.step(M, g, state); update = M: a memory of the gradients, learned by a rule of its own.

    step_size, momentum, retention: the memory's own; None: those of the step. `remember(retention=0.9)` is a
    momentum of 0.9; with a clock it is a slow one: `remember(every(100, retain(decay(), gradient_descent())))`; and
    with retention=0 it holds what its rule last said, between two ticks. read="before": the memory as it stood
    before this gradient. Nested Learning equations 33 to 37. Oracle: `momentum()` (tests/test_nested_optimizers.py).
    """

    rule: Rule = retain(decay(), gradient_descent())
    step_size: float | None = None
    momentum: float | None = None
    retention: float | None = None
    read: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        _require("remember", self.rule, Rule, "a memory is learned by a rule")
        self.check_gates()
        if self.read not in ("after", "before"):
            raise ValueError(f"remember: read must be 'after' or 'before', got {self.read!r}")

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return self.rule.needs_inputs

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.rule.elementwise

    def init(self, weight: Tensor) -> State:
        memory = torch.zeros_like(weight)
        return RememberState(memory, self.rule.init(memory))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        memory, inner = self.rule.step(state.memory, gradient, self.rule.anchor(state.of), self.own(gates))
        return (memory if self.read == "after" else state.memory), RememberState(memory, inner)


class AddState(NamedTuple):
    of: State
    other: State


@dataclass(frozen=True, repr=False)
class add(Direction):
    """update = (update of `of`) + share * (update of `other`): two memories of the same gradients, side by side.
    Source: M3, Nested Learning Algorithm 1. Oracle: that written out (tests/test_optimizer_memories.py)."""

    of: Direction = gradient_descent()
    other: Direction = momentum()
    share: float = 1.0

    def __post_init__(self) -> None:
        for part in (self.of, self.other):
            _require("add", part, Direction, "add sums two directions; put keepers and clocks outside of it")

    @property
    def buffered(self) -> bool:  # type: ignore[override]
        return self.of.buffered or self.other.buffered

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        return self.of.needs_inputs or self.other.needs_inputs

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.of.elementwise and self.other.elementwise

    def init(self, weight: Tensor) -> State:
        return AddState(self.of.init(weight), self.other.init(weight))

    def anchor(self, state: State) -> State:
        return AddState(self.of.anchor(state.of), self.other.anchor(state.other))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        one, of = self.of.update(weight, gradient, state.of, gates)
        two, other = self.other.update(weight, gradient, state.other, gates)
        return torch.add(one, two, alpha=self.share), AddState(of, other)


@dataclass(frozen=True, repr=False)
class gradient_keys(Rule):
    """`of` on the pairs of a memory whose keys are the gradient's rows g_i, and whose errors are the unit vectors:
    objectives of m g^T in place of m x. Their sum is g itself, so that only rules that look at keys differ.

    `remember(gradient_keys(retain(decay(), delta_gradient_descent())))` is delta momentum, bounded; Nested Learning
    equations 46 to 49 with P = I. Oracle: the recurrence written out (tests/test_optimizer_memories.py).
    """

    of: Rule = retain(decay(), gradient_descent())

    def __post_init__(self) -> None:
        _require("gradient_keys", self.of, Rule, "gradient_keys wraps a rule")

    def init(self, weight: Tensor) -> State:
        return self.of.init(weight)

    def anchor(self, state: State) -> State:
        return self.of.anchor(state)

    def step(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        g = gradient.dense()
        units = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device).expand(*g.shape[:-1], -1)
        return self.of.step(weight, Pairs(units, g), state, gates)


@dataclass(frozen=True, repr=False)
class delta_momentum(Direction):
    """S <- S (momentum I - step_size g^T g) - step_size g; update = S: Nested Learning equation 49 with P = I, the
    side and the step size as the derivative of |S g^T + I|^2 / 2 has them.

    Grows without bound where step_size |g|^2 > 1 + momentum; `gradient_keys` has the form in which erase and write
    are both bounded. bounded_erase: the erase alone takes step_size / (1 + step_size |g|^2). Oracle: autograd of the
    objective.
    """

    of: Direction = surprise()
    bounded_erase: bool = False
    buffered = True

    def __post_init__(self) -> None:
        _require("delta_momentum", self.of, Direction, "delta_momentum wraps a direction")

    def init(self, weight: Tensor) -> State:
        return RememberState(torch.zeros_like(weight), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return RememberState(state.memory, self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, inner = self.of.update(weight, gradient, state.of, gates)
        g = gradient.dense()
        kept, size = (
            gate[..., None, None] if isinstance(gate, Tensor) else gate for gate in (gates.momentum, gates.step_size)
        )
        erase = size / (1.0 + size * g.square().sum((-2, -1), keepdim=True)) if self.bounded_erase else size
        memory = kept * state.memory - erase * ((state.memory @ g.mT) @ g) + size * added
        return memory, RememberState(memory, inner)
