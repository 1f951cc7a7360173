"""The attentional bias (Miras): the objective on (value read, value wanted) that a memory learns by."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .part import Part

if TYPE_CHECKING:
    from .structure import Structure


class AttentionalBias(Part, family=True):
    """An inner objective. `slope` is d error / d read where the error is affine in what was read (then a matrix
    memory has an exact chunked form at every token's own weights), else None."""

    slope: ClassVar[float | None] = None

    @abstractmethod
    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        """Summed over channels: [..., v] and [..., v] -> [...]."""

    @abstractmethod
    def error(self, read: Tensor, value: Tensor) -> Tensor:
        """d loss / d read [..., v]; the value is a constant of this derivative, but not of the outer one."""

    def target(self, key: Tensor, value: Tensor) -> Tensor:
        """What the memory is to answer for this pair [..., v]: what `loss` and `error` take as the value."""
        return value

    def fits(self, structure: "Structure") -> None:
        """Raises ValueError where a memory of this structure cannot mean what the objective asks for."""


@dataclass(frozen=True, repr=False)
class dot(AttentionalBias):
    """loss = -<M(k), v>; error = -v. Hebbian: linear attention and its kin (Nested Learning equation 64). Oracle:
    `memory.naive`."""

    slope: ClassVar[float | None] = 0.0

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return -(read * value).sum(-1)

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return -value


@dataclass(frozen=True, repr=False)
class l2(AttentionalBias):
    """loss = |M(k) - v|^2 / 2; error = M(k) - v. The delta rule, TTT, Titans (equation 65). Oracle: `memory.naive`."""

    slope: ClassVar[float | None] = 1.0

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (read - value).square().sum(-1)

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return read - value


@dataclass(frozen=True, repr=False)
class residual_l2(AttentionalBias):
    """l2 to the value less the key: loss = |M(k) - (v - k)|^2 / 2 (TTT's target).

    The memory learns what the key lacks. Where the structure adds the key itself (a residual), l2() is this already:
    |k + f(k) - v| = |f(k) - (v - k)|, and this one is refused. Keys and values must be equally wide. Oracles: autograd
    of the loss, `memory.naive_miras` (tests/test_attentional_bias.py).
    """

    slope: ClassVar[float | None] = 1.0

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (read - value).square().sum(-1)

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return read - value

    def target(self, key: Tensor, value: Tensor) -> Tensor:
        if key.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"{self}: v - k needs keys as wide as values, got {key.shape[-1]} and {value.shape[-1]}; use l2()"
            )
        return value - key

    def fits(self, structure: "Structure") -> None:
        if structure.residual:
            raise ValueError(f"{self} takes the key from the value, and {structure} adds it to its answer; use l2()")


@dataclass(frozen=True, repr=False)
class lp(AttentionalBias):
    """loss = |r|_p^p, error = p sign(r) |r|^(p-1), r = M(k) - v (Miras equations 10 to 12). Moneta: p = 3.

    As the paper has it, with the factor p: lp(2) has twice l2's error. p = 1 writes signs alone. The outer gradient
    needs a derivative of the error, so sign(r) is tanh(smooth r), and |r|^(p-1) is (r^2 + 1e-6)^((p-1)/2) (remark 5);
    `loss` is not smoothed, and `error` is its derivative to that extent only. smooth=inf: both exact. Oracles: the
    formula, `memory.naive_miras` (tests/test_attentional_bias.py).
    """

    p: float = 3.0
    smooth: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.p < math.inf:
            raise ValueError(f"lp: p must be at least 1 and finite, got {self.p}")
        _check_smooth(self, self.smooth)

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return (read - value).abs().pow(self.p).sum(-1)

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        residual = read - value
        if self.smooth == math.inf:
            size = residual.abs().clamp(min=torch.finfo(residual.dtype).tiny)  # a root has no gradient at 0
            return self.p * residual.sign() * size.pow(self.p - 1.0)
        size = (residual.square() + 1e-6).pow((self.p - 1.0) / 2.0)
        return self.p * torch.tanh(self.smooth * residual) * size


@dataclass(frozen=True, repr=False)
class Bounded(AttentionalBias, abstract=True):
    """A bias with a bound on the residual: a number, or one that each token chooses (`scan.Writes.bound`)."""

    bound: float = 1.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"{type(self).__name__}: bound must be > 0, got {self.bound}")

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return self.error_within(read, value, self.bound)

    @abstractmethod
    def error_within(self, read: Tensor, value: Tensor, bound: Tensor | float) -> Tensor:
        """`error` with this bound, > 0, in place of the part's own: a number or [..., 1]."""


@dataclass(frozen=True, repr=False)
class huber_coordinates(Bounded):
    """Huber's loss of every coordinate: error_j = r_j where |r_j| <= bound, else bound * sign(r_j). Source: Miras,
    robust biases. Oracles: autograd of the loss, `memory.naive_miras` (tests/test_attentional_bias.py)."""

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return _huber((read - value).abs(), self.bound).sum(-1)

    def error_within(self, read: Tensor, value: Tensor, bound: Tensor | float) -> Tensor:
        return (read - value).clamp(-bound, bound)  # type: ignore[arg-type]


@dataclass(frozen=True, repr=False)
class huber_norm(Bounded):
    """Huber's loss of the residual's norm: error = r * min(1, bound / |r|): l2 with each token's error clipped.

    Unlike `clip`, which bounds the error at every linear map, this bounds it at the memory's answer. Source: Miras,
    robust biases. Oracles: autograd of the loss, `memory.naive_miras` (tests/test_attentional_bias.py).
    """

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return _huber(torch.linalg.vector_norm(read - value, dim=-1), self.bound)

    def error_within(self, read: Tensor, value: Tensor, bound: Tensor | float) -> Tensor:
        residual = read - value
        squared = residual.square().sum(-1, keepdim=True)
        return residual * (squared / bound**2).clamp(min=1.0).rsqrt()


@dataclass(frozen=True, repr=False)
class huber_switch(Bounded):
    """Yaad's switch, token by token (Miras equation 26): l2 where |r| <= bound, else bound times l1.

    error = r, or bound * tanh(smooth r), the smoothed sign (see `lp`; smooth=inf: exact). l2 is half the square
    here as everywhere, where the paper has the whole. It jumps at the bound: from a norm of `bound` to one of up to
    bound * sqrt(v); huber_norm() does not. In the paper every token chooses its bound. Oracle:
    `memory.naive_miras.naive_yaad`.
    """

    smooth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smooth(self, self.smooth)

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        residual = read - value
        near = residual.square().sum(-1) <= self.bound**2
        far = (self.bound if self.bound < math.inf else 0.0) * residual.abs().sum(-1)  # never taken, and no number
        return torch.where(near, 0.5 * residual.square().sum(-1), far)

    def error_within(self, read: Tensor, value: Tensor, bound: Tensor | float) -> Tensor:
        residual = read - value
        near = residual.square().sum(-1, keepdim=True) <= bound**2
        far = bound if isinstance(bound, Tensor) or bound < math.inf else 0.0
        return torch.where(near, residual, far * lp(1.0, self.smooth).error(read, value))


@dataclass(frozen=True, repr=False)
class value_shift(Bounded):
    """The worst case over values shifted by at most `bound`: loss = max_{|d| <= bound} |r - d|^2 / 2 =
    (|r| + bound)^2 / 2, error = r + bound r / |r| (Miras, robust bias). |r| is sqrt(|r|^2 + 1e-12) in both. Oracles:
    autograd of the loss, the worst of many shifts (tests/test_attentional_bias.py).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound == math.inf:
            raise ValueError("value_shift: bound must be finite, got inf")

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (_norm(read - value)[..., 0] + self.bound).square()

    def error_within(self, read: Tensor, value: Tensor, bound: Tensor | float) -> Tensor:
        residual = read - value
        return residual * (1.0 + bound / _norm(residual))


def _check_smooth(bias: AttentionalBias, smooth: float) -> None:
    if not smooth > 0:
        raise ValueError(f"{type(bias).__name__}: smooth must be > 0 (inf: not smoothed), got {smooth}")


def _huber(size: Tensor, bound: float) -> Tensor:
    """size^2 / 2 up to the bound, then bound (size - bound / 2)."""
    inside = size.clamp(max=bound)
    return inside * (size - 0.5 * inside)


def _norm(residual: Tensor) -> Tensor:
    return (residual.square().sum(-1, keepdim=True) + 1e-12).sqrt()
