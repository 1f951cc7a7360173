"""What else a token may choose: how much each pair of a window counts, a bound, a step size for each map."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.attentional_bias import Bounded
from nestling.memory.rule import Gates

from .gating import Asked, Gating, GatingModule, Names, around, by_head, positive
from .mixer import linear
from .scan import Memory
from .steps import by_step


@dataclass(frozen=True, repr=False)
class _more(around, abstract=True):
    """Gates `of` a kind, and one thing more."""

    @property
    def tells(self) -> Names:  # type: ignore[override]
        return (*self.of.tells, self.name)

    @property
    @abstractmethod
    def name(self) -> str:
        """The field of `scan.Writes` that it tells."""

    @abstractmethod
    def values(self, raw: Tensor) -> Tensor:
        """Projections [..., h, t, n] -> what is told."""

    @abstractmethod
    def width(self) -> tuple[int, float]:
        """How many numbers a head tells, and the bias that their projection starts with."""

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        inner = self.of.build(dim, heads, head_dim, generator, asked)
        return MoreGates(dim, heads, self, inner, generator, asked.steps)


class MoreGates(GatingModule):
    def __init__(
        self, dim: int, heads: int, part: _more, inner: GatingModule, generator: torch.Generator | None, steps: int
    ) -> None:
        super().__init__()
        self.part, self.heads, self.inner, self.steps = part, heads, inner, steps
        width, bias = part.width()
        self.told = linear(steps * heads * width, dim, generator, bias=True, gain=0.3)
        nn.init.constant_(self.told.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x), self.told(x)], -1)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        return self.inner.choose(raw[..., : -len(self.told.bias)], bound)

    def placed(self, gates: Gates, place: Tensor) -> Gates:
        return self.inner.placed(gates, place)

    def more(self, raw: Tensor) -> dict[str, Tensor]:
        rest, own = raw.split([raw.shape[-1] - len(self.told.bias), len(self.told.bias)], -1)
        told = self.part.values(by_head(by_step(own, self.steps), self.heads))
        return self.inner.more(rest) | {self.part.name: told}


@dataclass(frozen=True, repr=False)
class window_gates(_more):
    """gamma_ti = sigmoid(W x_t + b) for each of the last `window` pairs i, as many as the memory's window holds: how
    much each counts in the token's step. 0.95 at the start. ATLAS (2505.23735), equation 9; it gives no form. Oracle:
    the formula (tests/test_zoo_parts.py)."""

    window: int = 4
    name = "shares"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "window")

    def fits(self, memory: Memory) -> None:
        self.of.fits(memory)
        if memory.window != self.window:
            raise ValueError(f"{self} weighs {self.window} pairs, but the memory's window is {memory.window}")

    def width(self) -> tuple[int, float]:
        return self.window, 3.0

    def values(self, raw: Tensor) -> Tensor:
        return raw.sigmoid()


@dataclass(frozen=True, repr=False)
class bound_gates(_more):
    """bound_t = bound * softplus(W x_t + b), b such that it starts at `bound`, that of the bias: each token's own. Yaad
    (Miras, equation 26), whose thresholds come from the token; one a head. Oracle: the formula
    (tests/test_zoo_parts.py)."""

    name = "bound"

    def fits(self, memory: Memory) -> None:
        self.of.fits(memory)
        if not isinstance(memory.attentional_bias, Bounded):
            raise ValueError(f"{self} is for huber_switch() and its kin, not for {memory.attentional_bias}")
        if memory.window > 1:
            raise ValueError(f"{self} is for steps on one pair, not for window={memory.window}")

    def width(self) -> tuple[int, float]:
        return 1, inverse_softplus(1.0)

    def values(self, raw: Tensor) -> Tensor:
        return F.softplus(raw[..., 0])


@dataclass(frozen=True, repr=False)
class map_gates(_more):
    """step size of map i = that of the gates * softplus(W_i x + b), `start` at the start, for each of `maps` maps.

    For one step a chunk, or one a token (`way`). LaCT (2505.23884): three, of its gated MLP, with `unit_steps()`.
    Oracle: the formula (tests/test_zoo_parts.py).
    """

    maps: int = 3
    start: float = 0.001
    name = "map_steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "maps", "start")

    def fits(self, memory: Memory) -> None:
        self.of.fits(memory)
        count = len(memory.structure.shapes(8, 8))
        if count != self.maps:
            raise ValueError(f"{self} has steps for {self.maps} maps, but {memory.structure} has {count}")
        if memory.way == "chunked":
            raise ValueError(f"{self} has no chunked form; use way='stepped' or way='recurrent'")

    def width(self) -> tuple[int, float]:
        return self.maps, inverse_softplus(self.start)

    def values(self, raw: Tensor) -> Tensor:
        return F.softplus(raw)


@dataclass(frozen=True, repr=False)
class unit_steps(Gating):
    """Step size 1, momentum = sigmoid, and nothing forgotten: LaCT's, beside `map_gates`. Oracle: the formula
    (tests/test_zoo_parts.py)."""

    momentum = True

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return UnitSteps(dim, heads, generator, asked)


class UnitSteps(GatingModule):
    def __init__(self, dim: int, heads: int, generator: torch.Generator | None, asked: Asked) -> None:
        super().__init__()
        self.heads, self.steps = heads, asked.steps
        rows, learned = asked.steps * heads, "momentum" in asked.names
        self.momentum = linear(rows, dim, generator, bias=True, gain=0.3) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.heads) if self.momentum is None else self.momentum(x)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        nothing = raw.new_zeros(raw.shape[0], self.heads, raw.shape[1])
        kept = nothing if self.momentum is None else by_step(raw, self.steps).mT.sigmoid()
        return Gates(torch.ones_like(nothing), kept, nothing)


def inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
