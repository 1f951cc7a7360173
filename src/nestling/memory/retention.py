"""The retention gate (Miras): what is kept of a memory when something new is written."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .part import Part


class Retention(Part, family=True):
    """What stays of a weight at a write, given the log of the retention gate (the fraction KEPT)."""

    remembers_start: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False  # no entry of a weight looks at another

    @abstractmethod
    def keep(self, weight: Tensor, start: Tensor | None, log_retention: Tensor | float) -> Tensor:
        """The retained weight [..., out, in], given that at the document's start where the gate remembers it;
        the gate has the weight's leading dims."""


@dataclass(frozen=True, repr=False)
class decay(Retention):
    """W <- a W with a = exp(log_retention): forgetting toward zero at a rate that the token chooses.

    Titans' alpha is the fraction forgotten, 1 - a; flash-linear-attention's g is log a. float32 cannot hold
    1 - 7e-8, therefore the log.
    """

    elementwise: ClassVar[bool] = True

    def keep(self, weight: Tensor, start: Tensor | None, log_retention: Tensor | float) -> Tensor:
        return weight * _fraction(log_retention)


@dataclass(frozen=True, repr=False)
class decay_to_start(Retention):
    """W <- W_0 + a (W - W_0): forgetting toward the weights that the document (or the life) began with.

    A deep memory that decays toward zero cannot come back: with all its maps near zero so are all its
    gradients. The learned start is then gone for good; here it is what is left when all else is forgotten.
    """

    remembers_start: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def keep(self, weight: Tensor, start: Tensor | None, log_retention: Tensor | float) -> Tensor:
        assert start is not None
        return torch.lerp(start, weight, _fraction(log_retention))


def _fraction(log_retention: Tensor | float) -> Tensor | float:
    return log_retention.exp()[..., None, None] if isinstance(log_retention, Tensor) else math.exp(log_retention)
