"""What stands between the projections of a token and the queries, keys and values that a memory gets."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory.part import Part

from .elementwise import Heads, unit
from .mixer import split_heads


class Preparation(Part, family=True):
    """A choice of nonlinearity and norm."""

    @abstractmethod
    def streams(self, mixed: Tensor, heads: int, steps: int = 1) -> Tensor:
        """Queries, n = steps keys and n values side by side [b, t, (1 + 2 n) d] -> heads [b, (1 + 2 n) h, t, k]."""


@dataclass(frozen=True, repr=False)
class silu_unit(Preparation):
    """SiLU, then L2-normalised queries and keys: Titans, DeltaNet and what came after. Oracle: the formula
    (tests/test_gating.py)."""

    def streams(self, mixed: Tensor, heads: int, steps: int = 1) -> Tensor:
        return Heads.apply(mixed, (1 + 2 * steps) * heads, (1 + steps) * heads)


@dataclass(frozen=True, repr=False)
class silu(Preparation):
    """SiLU alone: Mamba-2. Keys are as long as they come, and steps with an erase may then go too far. Source:
    2405.21060. Oracle: the formula (tests/test_gating.py)."""

    def streams(self, mixed: Tensor, heads: int, steps: int = 1) -> Tensor:
        return Heads.apply(mixed, (1 + 2 * steps) * heads, 0)


@dataclass(frozen=True, repr=False)
class unit_keys(Preparation):
    """L2-normalised queries and keys, without a nonlinearity. Source: Nested Learning's normalised keys, without
    Titans' SiLU. Oracle: the formula (tests/test_gating.py)."""

    def streams(self, mixed: Tensor, heads: int, steps: int = 1) -> Tensor:
        streams, units = split_heads(mixed, (1 + 2 * steps) * heads), (1 + steps) * heads
        return torch.cat([unit(streams[:, :units]), streams[:, units:]], 1)


@dataclass(frozen=True, repr=False)
class bare(Preparation):
    """As projected: RetNet, gated linear attention. Sources: 2307.08621, 2312.06635. Oracle: the formula
    (tests/test_gating.py)."""

    def streams(self, mixed: Tensor, heads: int, steps: int = 1) -> Tensor:
        return split_heads(mixed, (1 + 2 * steps) * heads)
