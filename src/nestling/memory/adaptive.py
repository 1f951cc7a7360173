"""Parts that remember moments of the gradients: the optimizers that scale every entry by what it has seen.

In the terms of Nested Learning (appendix B) each is the closed-form solution of an L2 objective that maps the
gradients of a context to their own spread. All wrap a direction, whose update is the numerator; the moments below
the bar are of the gradient itself. No step size is in them: `scale(adam())`.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import (
    Direction,
    Gates,
    Gradient,
    Norms,
    Plan,
    Scaled,
    State,
    Summed,
    _plus,
    _said,
    _wide,
    _wrapper,
    momentum,
    surprise,
)


def _fraction(name: str, field: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: {field} must be in [0, 1), got {value}")


def _not_negative(name: str, field: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: {field} must be >= 0, got {value}")


def _counter(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[:-2], dtype=torch.int64, device=weight.device)


def _correction(beta: float, count: Tensor, like: Tensor) -> Tensor | float:
    """1 / (1 - beta^t) [..., 1, 1]: the inverse of how far a decaying average is filled after t steps; in float64,
    since 1 - 0.999 has three digits left in float32. One count on a CPU is a number, for speed."""
    if count.dim() == 0 and count.device.type == "cpu" and not torch.compiler.is_compiling():
        return 1.0 / (1.0 - beta ** int(count))
    return (1.0 - torch.pow(beta, count.double())).reciprocal().to(like.dtype)[..., None, None]


class Transform(_wrapper, abstract=True):
    """A direction on a changed gradient: everything inside, moments included, sees the changed one."""

    @abstractmethod
    def transform(self, weight: Tensor, total: Tensor) -> Tensor:
        """The gradient [..., out, in] that `of` is given in place of `total`."""

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        inputs = gradient.gram() if self.of.needs_inputs else None
        changed = Summed(self.transform(weight, gradient.dense()), inputs, gradient.tokens)
        return self.of.update(weight, changed, state, gates)


@dataclass(frozen=True, repr=False)
class ridge(Transform):
    """g <- g + strength * W: the gradient of the loss plus strength |W|^2 / 2; torch's weight_decay where it is not
    decoupled. `retain(decay(), ...)` is the decoupled one. Oracle: torch.optim.SGD."""

    of: Direction = surprise()
    strength: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative("ridge", "strength", self.strength)

    def transform(self, weight: Tensor, total: Tensor) -> Tensor:
        return total.add(weight, alpha=self.strength)


@dataclass(frozen=True, repr=False)
class ascent(Transform):
    """g <- -g: the objective is to grow; torch's maximize. Oracle: torch.optim.SGD."""

    of: Direction = surprise()

    def transform(self, weight: Tensor, total: Tensor) -> Tensor:
        return -total


@dataclass(frozen=True, repr=False)
class nesterov(momentum):
    """S <- momentum * S + a, a the update of `of`; update = a + momentum * S: momentum, read a step ahead.

    torch's SGD: `nesterov(surprise())`; its Muon: `nesterov(dampen(surprise()))`. Oracle: torch.optim.SGD.
    """

    of: Direction = surprise()

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, times, inner = self.of.scaled(weight, gradient, state.of, gates)
        kept = _wide(gates.momentum)
        buffer = _plus(kept * state.buffer, times, added, own=True)
        return _plus(kept * buffer, times, added, own=True), state._replace(buffer=buffer, of=inner)

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        raise ValueError(f"{self} reads its buffer and its last write; it has no chunked form: use way='recurrent'")


class CountState(NamedTuple):
    steps: Tensor  # taken, int64 [...]
    of: State


class _counting(_wrapper, abstract=True):
    """A direction whose update is multiplied by a number that depends on how many steps have been taken."""

    @abstractmethod
    def factor(self, count: Tensor) -> Tensor:
        """The number [...] after `count` [...] earlier steps."""

    def init(self, weight: Tensor) -> State:
        return CountState(_counter(weight), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return CountState(state.steps, self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, inner = self.of.update(weight, gradient, state.of, gates)
        factor = self.factor(state.steps.double()).to(added.dtype)
        return _wide(factor) * added, CountState(state.steps + 1, inner)


@dataclass(frozen=True, repr=False)
class hold_back(_counting):
    """update = (update of `of`) at the first step, (1 - share) times it later: torch's dampening, which lets the
    first gradient into the buffer whole. Oracle: torch.optim.SGD."""

    of: Direction = surprise()
    share: float = 0.0

    def factor(self, count: Tensor) -> Tensor:
        return 1.0 - self.share * count.clamp(max=1.0)


@dataclass(frozen=True, repr=False)
class slow_down(_counting):
    """update = (update of `of`) / (1 + rate * t), t = 0, 1, ...: torch's lr_decay in Adagrad. Oracle:
    torch.optim.Adagrad."""

    of: Direction = surprise()
    rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative("slow_down", "rate", self.rate)

    def factor(self, count: Tensor) -> Tensor:
        return 1.0 / (1.0 + self.rate * count)


class AverageState(NamedTuple):
    steps: Tensor  # taken, int64 [...]
    mean: Tensor  # [..., out, in]
    of: State


@dataclass(frozen=True, repr=False)
class average(_wrapper):
    """m <- beta m + (1 - beta) (update of `of`); update = m / (1 - beta^t): Adam's first moment, unbiased.

    Without the correction it is `momentum(dampen(...))` with momentum = beta. Kingma and Ba 2015. Oracle:
    torch.optim.Adam.
    """

    of: Direction = surprise()
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("average", "beta", self.beta)

    def init(self, weight: Tensor) -> State:
        return AverageState(_counter(weight), torch.zeros_like(weight), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return state._replace(of=self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return _said(self.scaled(weight, gradient, state, gates))

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, inner = self.of.scaled(weight, gradient, state.of, gates)
        count, fresh = state.steps + 1, (1.0 - self.beta) * times
        mean = _plus(state.mean * self.beta, fresh, added, own=True)
        after, correction = AverageState(count, mean, inner), _correction(self.beta, count, mean)
        return (mean * correction, 1.0, after) if isinstance(correction, Tensor) else (mean, correction, after)


class AdagradState(NamedTuple):
    square: Tensor  # sum of g^2 [..., out, in]
    of: State


def _by_root(
    added: Tensor, times: float, square: Tensor, correction: Tensor | float, eps: float
) -> tuple[Tensor, float]:
    """times * added / (sqrt(square * correction) + eps), in two; with gradient zero (not infinite) where nothing has
    been seen."""
    if torch.is_grad_enabled():
        seen = square > 0
        root = torch.where(seen, torch.where(seen, square, 1.0).sqrt(), 0.0)
    else:
        root = square.sqrt()  # ours to write over
    factor = correction**0.5
    if isinstance(factor, Tensor):
        return added / (root * factor + eps), times
    return added / _shifted(root, eps / factor), times / factor


def _shifted(root: Tensor, eps: float) -> Tensor:
    return root + eps if torch.is_grad_enabled() else root.add_(eps)


@dataclass(frozen=True, repr=False)
class adagrad(_wrapper):
    """v <- v + share * g^2; update = (update of `of`) / (sqrt(v) + eps). v begins at `initial`.

    Duchi et al. 2011, the diagonal form. share = 1 but for M3, whose Algorithm 1 sums beta_2 g^2. Oracle:
    torch.optim.Adagrad.
    """

    of: Direction = surprise()
    eps: float = 1e-10
    initial: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("eps", "initial", "share"):
            _not_negative("adagrad", field, getattr(self, field))

    def init(self, weight: Tensor) -> State:
        return AdagradState(torch.full_like(weight, self.initial), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return AdagradState(state.square, self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return _said(self.scaled(weight, gradient, state, gates))

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, inner = self.of.scaled(weight, gradient, state.of, gates)
        g = gradient.dense()
        square = torch.addcmul(state.square, g, g, value=self.share)
        return *_by_root(added, times, square, 1.0, self.eps), AdagradState(square, inner)


class RmsState(NamedTuple):
    steps: Tensor  # taken, int64 [...]
    square: Tensor  # average of g^2 [..., out, in]
    mean: Tensor | None  # average of g, where the square is centered
    largest: Tensor | None  # of all averages of g^2, where amsgrad asks for it
    of: State


@dataclass(frozen=True, repr=False)
class rmsprop(_wrapper):
    """v <- beta v + (1 - beta) g^2; update = (update of `of`) / (sqrt(v) + eps).

    corrected: v / (1 - beta^t) in place of v, as Adam has it. centered: v - (average of g)^2, the variance.
    amsgrad: the largest v so far (Reddi et al. 2018). Oracles: torch.optim.RMSprop, torch.optim.Adam.
    """

    of: Direction = surprise()
    beta: float = 0.99
    eps: float = 1e-8
    corrected: bool = False
    centered: bool = False
    amsgrad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("rmsprop", "beta", self.beta)
        _not_negative("rmsprop", "eps", self.eps)

    def init(self, weight: Tensor) -> State:
        zeros = torch.zeros_like(weight)
        mean, largest = (zeros if asked else None for asked in (self.centered, self.amsgrad))
        return RmsState(_counter(weight), zeros, mean, largest, self.of.init(weight))

    def anchor(self, state: State) -> State:
        return state._replace(of=self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return _said(self.scaled(weight, gradient, state, gates))

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, inner = self.of.scaled(weight, gradient, state.of, gates)
        g, fresh, mean, largest = gradient.dense(), 1.0 - self.beta, state.mean, state.largest
        kept = state.square * self.beta
        square = torch.addcmul(kept, g, g, value=fresh) if torch.is_grad_enabled() else kept.addcmul_(g, g, value=fresh)
        seen, count = square, state.steps + 1
        if mean is not None:
            mean = torch.lerp(mean, g, fresh)
            seen = torch.addcmul(seen, mean, mean, value=-1)
        if largest is not None:
            seen = largest = torch.maximum(largest, seen)
        correction = _correction(self.beta, count, seen) if self.corrected else 1.0
        update = _by_root(added, times, seen, correction, self.eps)
        return *update, RmsState(count, square, mean, largest, inner)


@dataclass(frozen=True, repr=False)
class adam(_wrapper):
    """update = m / (sqrt(v) + eps), m and v the unbiased moments of the update of `of` and of the gradient.

    The line `rmsprop(average(of, beta1), beta2, eps, corrected=True)` under its usual name. Kingma and Ba 2015;
    as a memory: Nested Learning equations 101 to 105. Oracle: torch.optim.Adam.
    """

    of: Direction = surprise()
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.moments is not None  # its bounds are checked

    @cached_property
    def moments(self) -> rmsprop:
        return rmsprop(average(self.of, self.beta1), self.beta2, self.eps, corrected=True, amsgrad=self.amsgrad)

    def init(self, weight: Tensor) -> State:
        return self.moments.init(weight)

    def anchor(self, state: State) -> State:
        return self.moments.anchor(state)

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return self.moments.update(weight, gradient, state, gates)

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        return self.moments.scaled(weight, gradient, state, gates)
