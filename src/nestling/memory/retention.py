"""The retention gate (Miras): what is kept of a memory when something new is written."""

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .part import Part


class Retention(Part, family=True):
    """What stays of a weight at a write, given the log of the retention gate (the fraction KEPT)."""

    @abstractmethod
    def keep(self, weight: Tensor, log_retention: Tensor | float) -> Tensor:
        """The retained weight [..., out, in]; the gate has the weight's leading dims."""


@dataclass(frozen=True, repr=False)
class decay(Retention):
    """W <- a W with a = exp(log_retention): forgetting toward zero at a rate that the token chooses.

    Titans' alpha is the fraction forgotten, 1 - a; flash-linear-attention's g is log a. float32 cannot hold
    1 - 7e-8, therefore the log.
    """

    def keep(self, weight: Tensor, log_retention: Tensor | float) -> Tensor:
        if isinstance(log_retention, Tensor):
            return weight * log_retention.exp()[..., None, None]
        return weight * math.exp(log_retention)
