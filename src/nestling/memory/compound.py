"""Structures around structures: a layer norm, biases, feature maps of the keys."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .feature import FeatureMap, elu_plus_one
from .part import check_families
from .structure import Apply, Structure, Weights, check_residual, matrix, mlp


@dataclass(frozen=True, repr=False)
class _around(Structure, abstract=True):
    """A structure around another one, whose linear maps it shares."""

    of: Structure = matrix()

    def __post_init__(self) -> None:
        check_families(self)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.of.linear

    @property
    def bare(self) -> bool:  # type: ignore[override]
        return self.of.bare

    @property
    def residual(self) -> bool:  # type: ignore[override]
        return self.of.residual

    @property
    def meets_keys(self) -> int:  # type: ignore[override]
        return self.of.meets_keys

    def map_keys(self, keys: Tensor) -> Tensor:
        return self.of.map_keys(keys)


@dataclass(frozen=True, repr=False)
class normed(_around):
    """M(k) = k + LN(f(k)), f = `of`: Titans, TTT and Miras. LN has no scale and shift of its own.

    With x^ = (f - mean f) / s, s = sqrt(var f + 1e-6), the error g at the value becomes, at f's output::

        (g - mean g - x^ mean(g x^)) / s

    TTT-Linear is normed(biased(matrix())) with l2(): its target v - k for LN(f) is v for k + LN(f). Oracles: autograd
    (tests/test_compound.py), `sequence.oracles.ttt`.
    """

    of: Structure = mlp(residual=False)
    residual: bool = True
    linear = False
    bare = False

    def __post_init__(self) -> None:
        check_families(self)
        if not self.of.bare:
            raise ValueError(f"normed({self.of!r}): needs a structure without a residual or a norm of its own")

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        check_residual(self, self.residual, key_dim, value_dim)
        if value_dim < 2:
            raise ValueError(f"{self}: a norm needs values of at least 2 channels, got {value_dim}")
        return self.of.shapes(key_dim, value_dim)

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        inner, inputs, outputs = self.of.forward(apply, keys)
        normal = F.layer_norm(inner, inner.shape[-1:], eps=_EPS)
        return (keys + normal if self.residual else normal), inputs, outputs

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        centred = outputs[-1] - outputs[-1].mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + _EPS).rsqrt()
        normal = centred * scale
        along = normal * (error * normal).mean(-1, keepdim=True)
        return self.of.backward(weights, outputs, scale * (error - error.mean(-1, keepdim=True) - along))

    def init(
        self,
        key_dim: int,
        value_dim: int,
        leading: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        *,
        unit_keys: bool = False,
    ) -> Weights:
        self.shapes(key_dim, value_dim)
        return self.of.init(key_dim, value_dim, leading, generator, unit_keys=unit_keys)


@dataclass(frozen=True, repr=False)
class biased(_around):
    """`of` with a bias at every linear map: its last column, for a constant input of one. It starts at zero. Source:
    TTT (2407.04620), whose maps have biases. Oracle: autograd (tests/test_compound.py)."""

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return tuple((rows, columns + 1) for rows, columns in self.of.shapes(key_dim, value_dim))

    def map_keys(self, keys: Tensor) -> Tensor:
        return _with_one(self.of.map_keys(keys))

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        values, inputs, outputs = self.of.forward(lambda index, x: apply(index, _with_one(x)), keys)
        return values, tuple(map(_with_one, inputs)), outputs

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        return self.of.backward(tuple(weight[..., :-1] for weight in weights), outputs, error)

    def init(
        self,
        key_dim: int,
        value_dim: int,
        leading: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        *,
        unit_keys: bool = False,
    ) -> Weights:
        weights = self.of.init(key_dim, value_dim, leading, generator, unit_keys=unit_keys)
        return tuple(F.pad(weight, (0, 1)) for weight in weights)


@dataclass(frozen=True, repr=False)
class features(_around):
    """M(k) = `of` at phi(k), and of queries likewise. The inner gradient never passes through phi.

    Raises ValueError, when weights are made, where they would take more than 2 GiB. Sources: ATLAS, section 3;
    Katharopoulos et al. 2020. Oracle: autograd (tests/test_compound.py).
    """

    kind: FeatureMap = elu_plus_one()

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return self.of.shapes(self.kind.width(key_dim), value_dim)

    def map_keys(self, keys: Tensor) -> Tensor:
        return self.of.map_keys(self.kind.features(keys))

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.of.forward(apply, self.kind.features(keys))

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        return self.of.backward(weights, outputs, error)

    def init(
        self,
        key_dim: int,
        value_dim: int,
        leading: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        *,
        unit_keys: bool = False,
    ) -> Weights:
        width = self.kind.width(key_dim)
        numbers = math.prod(leading) * sum(rows * columns for rows, columns in self.of.shapes(width, value_dim))
        if 4 * numbers > _MOST_BYTES:
            raise ValueError(
                f"{self.of} over the {width:,} features that {self.kind} makes of {key_dim} channels would have "
                f"{4e-9 * numbers:,.1f} GB of weights for each row; take matrix(), a lower degree or narrower heads"
            )
        return self.of.init(width, value_dim, leading, generator, unit_keys=unit_keys)


_EPS = 1e-6  # of the variance
_MOST_BYTES = 2**31  # of start weights in float32; the state has them for every row, and writes once more


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)
