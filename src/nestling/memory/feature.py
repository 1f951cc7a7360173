"""Feature maps: what a memory is given in place of the key and the query, phi(k) and phi(q)."""

import itertools
import math
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .part import Part


class FeatureMap(Part, family=True):
    """A function of keys and queries without weights."""

    @abstractmethod
    def width(self, key_dim: int) -> int:
        """How many features a key of so many channels has."""

    @abstractmethod
    def features(self, keys: Tensor) -> Tensor:
        """phi: [..., k] -> [..., width]."""


@dataclass(frozen=True, repr=False)
class identity(FeatureMap):
    """phi(k) = k: linear attention as Nested Learning equation 64 has it. Oracle: tests/test_compound.py."""

    def width(self, key_dim: int) -> int:
        return key_dim

    def features(self, keys: Tensor) -> Tensor:
        return keys


@dataclass(frozen=True, repr=False)
class elu_plus_one(FeatureMap):
    """phi(k) = elu(k) + 1, positive: linear attention's (Katharopoulos et al. 2020). Oracle: the formula
    (tests/test_compound.py)."""

    def width(self, key_dim: int) -> int:
        return key_dim

    def features(self, keys: Tensor) -> Tensor:
        return F.elu(keys) + 1.0


@dataclass(frozen=True, repr=False)
class odd_power(FeatureMap):
    """phi(k) = sign(k) |k|^exponent, channel by channel: with a gradient as key it points where the gradient does, and
    weighs large entries more (exponent > 1) or less (< 1; towards 0 signs alone). Source: one choice for the phi of
    Nested Learning equation 51. Oracle: the formula (tests/test_gradient_memory.py)."""

    exponent: float = 3.0

    def __post_init__(self) -> None:
        if not self.exponent > 0:
            raise ValueError(f"odd_power: exponent must be > 0, got {self.exponent}")

    def width(self, key_dim: int) -> int:
        return key_dim

    def features(self, keys: Tensor) -> Tensor:
        size = keys.abs().clamp(min=torch.finfo(keys.dtype).tiny)  # a root has no gradient at 0
        return keys.sign() * size.pow(self.exponent)


@dataclass(frozen=True, repr=False)
class signed(FeatureMap):
    """phi(k) = [k, -k]: a memory whose weights are all positive, as kl() and sigmoid() keep them, says W+ k - W- k, and
    so tells k from -k. Source: exponentiated gradient with both signs (Kivinen and Warmuth 1997). Oracle: that written
    out (tests/test_gradient_memory.py)."""

    def width(self, key_dim: int) -> int:
        return 2 * key_dim

    def features(self, keys: Tensor) -> Tensor:
        return torch.cat([keys, -keys], -1)


@dataclass(frozen=True, repr=False)
class _monomials(FeatureMap, abstract=True):
    """All monomials of the channels up to `degree`, C(k + degree, degree) of them, each with a weight."""

    degree: int = 2

    def __post_init__(self) -> None:
        if self.degree < 1 or self.degree != int(self.degree):
            name = type(self).__name__
            raise ValueError(f"{name}: degree must be a whole number of at least 1, got {self.degree}")

    def width(self, key_dim: int) -> int:
        return math.comb(key_dim + self.degree, self.degree)

    def features(self, keys: Tensor) -> Tensor:
        factors, weights = _factors(self, keys.shape[-1])
        channels = F.pad(keys, (1, 0), value=1.0)  # factor 0 is the constant
        found = weights.to(keys)
        for chosen in factors.to(keys.device):
            found = found * channels.index_select(-1, chosen)
        return found

    @staticmethod
    @abstractmethod
    def squared_weight(powers: list[int], rest: int) -> float:
        """Of the monomial with these powers of channels, `rest` short of the degree."""


@dataclass(frozen=True, repr=False)
class polynomial(_monomials):
    """<phi(q), phi(k)> = (1 + <q, k>)^degree exactly: monomials with the roots of multinomial weights (ATLAS).

    |phi(k)|^2 = 2^degree for a unit key, and what a write changes grows with it: bound the steps, as normalize() does.
    Oracle: the kernel (tests/test_compound.py).
    """

    @staticmethod
    def squared_weight(powers: list[int], rest: int) -> float:
        return math.factorial(sum(powers) + rest) / math.prod(map(math.factorial, [*powers, rest]))


@dataclass(frozen=True, repr=False)
class exponential(_monomials):
    """<phi(q), phi(k)> = sum_{i <= degree} <q, k>^i / i!: the Taylor series of exp(<q, k>), cut off (ATLAS, phi*).

    The kernel of softmax attention, without its denominator. Oracle: the series (tests/test_compound.py).
    """

    @staticmethod
    def squared_weight(powers: list[int], rest: int) -> float:
        return 1.0 / math.prod(map(math.factorial, powers))


@lru_cache(maxsize=32)
def _factors(kind: _monomials, key_dim: int) -> tuple[Tensor, Tensor]:
    """Of each monomial its factors [degree, width] (0 the constant, i the channel i - 1) and weight [width]."""
    every = list(itertools.combinations_with_replacement(range(key_dim + 1), kind.degree))
    weights = []
    for factors in every:
        powers = Counter(factors)
        rest = powers.pop(0, 0)
        weights.append(math.sqrt(kind.squared_weight(list(powers.values()), rest)))
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return torch.tensor(every).T.contiguous(), torch.tensor(weights, dtype=torch.float64)
