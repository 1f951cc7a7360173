"""The attentional bias (Miras): the objective on (value read, value wanted) that a memory learns by."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .part import Part


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


@dataclass(frozen=True, repr=False)
class dot(AttentionalBias):
    """loss = -<M(k), v>; error = -v. Hebbian: linear attention and its kin (Nested Learning equation 64)."""

    slope: ClassVar[float | None] = 0.0

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return -(read * value).sum(-1)

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return -value


@dataclass(frozen=True, repr=False)
class l2(AttentionalBias):
    """loss = |M(k) - v|^2 / 2; error = M(k) - v. The delta rule, TTT, Titans (equation 65)."""

    slope: ClassVar[float | None] = 1.0

    def loss(self, read: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (read - value).square().sum(-1)

    def error(self, read: Tensor, value: Tensor) -> Tensor:
        return read - value
