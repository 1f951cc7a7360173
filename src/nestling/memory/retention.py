"""The retention gate (Miras): what is kept of a memory when something new is written."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .part import Part


class Retention(Part, family=True):
    """What stays of a weight at a write, given the log of the retention gate (the fraction KEPT).

    remembers_start: it is given the weight at the document's start; returns: what is forgotten goes back to that.
    exposes: what is kept and written to is an accumulator, and the memory answers with another weight that is made of
    it. settles: the weight is changed once more after each write; then no chunk can be written at once. reopens: it
    acts where a chunk opens.
    """

    remembers_start: ClassVar[bool] = False
    returns: ClassVar[bool] = False
    exposes: bool = False
    settles: bool = False
    elementwise: ClassVar[bool] = False  # no entry of a weight looks at another
    reopens: bool = False

    @abstractmethod
    def keep(self, weight: Tensor, start: Tensor | None, log_retention: Tensor | float) -> Tensor:
        """The retained weight [..., out, in], given that at the document's start where the gate remembers it;
        the gate has the weight's leading dims."""

    def expose(self, weight: Tensor, start: Tensor | None) -> Tensor:
        """The weight that the memory answers with, from the accumulator [..., out, in] and that at the start."""
        return weight

    def conceal(self, weight: Tensor) -> Tensor:
        """The accumulator for a start weight [..., out, in]: that which is exposed as this weight. Where only some
        weights can be exposed (on a simplex, in an interval), and a start is anything: the start itself."""
        return weight

    def settle(self, weight: Tensor, start: Tensor | None, step_size: Tensor | float) -> Tensor:
        """The weight after a write (or a chunk of them), from what was kept and written together."""
        return weight

    def reopen(self, weight: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight with which a chunk opens, and what is remembered as the start, from those the last chunk left."""
        return weight, start


class _decaying(Retention, abstract=True):
    """W <- a W with a = exp(log_retention), of whatever stands there."""

    def keep(self, weight: Tensor, start: Tensor | None, log_retention: Tensor | float) -> Tensor:
        if not isinstance(log_retention, Tensor) and log_retention == 0.0:
            return weight
        return weight * _fraction(log_retention)


@dataclass(frozen=True, repr=False)
class decay(_decaying):
    """W <- a W with a = exp(log_retention): forgetting toward zero at a rate that the token chooses.

    Titans' alpha is the fraction forgotten, 1 - a; flash-linear-attention's g is log a. float32 cannot hold
    1 - 7e-8, therefore the log. Oracle: `memory.naive`.
    """

    elementwise: ClassVar[bool] = True


class _returning(Retention, abstract=True):
    """W <- Z + a (W - Z) with a = exp(log_retention), Z what is remembered as the start."""

    remembers_start: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    returns: ClassVar[bool] = True

    def keep(self, weight: Tensor, start: Tensor | None, log_retention: Tensor | float) -> Tensor:
        assert start is not None
        return torch.lerp(start, weight, _fraction(log_retention))


@dataclass(frozen=True, repr=False)
class decay_to_start(_returning):
    """W <- W_0 + a (W - W_0): forgetting toward the weights that the document (or the life) began with.

    A deep memory that decays toward zero cannot come back: with all its maps near zero so are all its
    gradients. The learned start is then gone for good; here it is what is left when all else is forgotten. Source: this
    library (docs/log.md). Oracle: `memory.naive`.
    """


@dataclass(frozen=True, repr=False)
class decay_to_anchor(_returning):
    """W <- W_c + a (W - W_c), W_c the weights on which the chunk opened: forgetting what this chunk wrote.

    At a = (i - 1) / i and steps of eta / i (`averaged_gates`), token i of a chunk stands at W_c less the mean of the
    chunk's steps so far: TTT's 1/i (2407.04620). Oracle: `memory.naive_miras.naive_anchored`.
    """

    reopens = True

    def reopen(self, weight: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, weight


@dataclass(frozen=True, repr=False)
class lq(_decaying):
    """A_t = a A_{t-1} - eta g;  W_t = A_t / |A_t|_q^(q-2), the norm over a whole map (Miras equation 25).

    Moneta: q = 4. A normaliser and not the mirror map of |W|_q^2, which would take powers of A's entries. It inverts:
    |W|_q = |A|_q^(3-q), and a tenfold A at q = 4 is a tenth of W. So the start is concealed, as A_0 =
    W_0 |W_0|_q^((q-2)/(3-q)), and the norm counts as at least `floor`, or a forgotten A would be an endless W.
    q = 2 is decay(); at q = 3 every W has norm one, the start's too. Oracle: `memory.naive_miras.naive_moneta`.
    """

    q: float = 4.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        for name, least in (("q", 1.0), ("floor", 0.0)):
            if not least < getattr(self, name) < math.inf:
                raise ValueError(f"lq: {name} must be more than {least} and finite, got {getattr(self, name)}")

    @property
    def exposes(self) -> bool:  # type: ignore[override]
        return self.q != 2

    def expose(self, weight: Tensor, start: Tensor | None) -> Tensor:
        return weight * self._norm(weight, 2.0 - self.q)

    def conceal(self, weight: Tensor) -> Tensor:
        return weight if self.q == 3 else weight * self._norm(weight, (self.q - 2.0) / (3.0 - self.q))

    def _norm(self, weight: Tensor, power: float) -> Tensor:
        """|A|_q^power [..., 1, 1]."""
        total = weight.abs().pow(self.q).sum((-2, -1), keepdim=True)
        return total.clamp(min=self.floor**self.q).pow(power / self.q)


@dataclass(frozen=True, repr=False)
class kl(_decaying):
    """W_t = scale * softmax(Z_t), Z_t = a Z_{t-1} - eta g: each row of a map, over its inputs, lies on the simplex of
    sum `scale` (Miras equations 21 and 27; Memora).

    The same as the paper's W_t = scale * softmax(a log W_{t-1} - eta g), since softmax forgets what is added to a
    whole row; but the logits Z are linear in what is written. The start weights are logits too. Oracle:
    `memory.naive_miras.naive_memora`.
    """

    scale: float = 1.0
    exposes = True

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"kl: scale must be more than 0 and finite, got {self.scale}")

    def expose(self, weight: Tensor, start: Tensor | None) -> Tensor:
        return self.scale * weight.softmax(-1)


@dataclass(frozen=True, repr=False)
class sigmoid(_decaying):
    """W_t = sigmoid(Z_t), Z_t = a Z_{t-1} - eta g: mirror descent with F' = logit; entries lie in (0, 1) (Miras, the
    Bregman divergence). The state, and the start weights, are logits. Oracle: `memory.naive_miras`
    (tests/test_retention.py).
    """

    exposes = True

    def expose(self, weight: Tensor, start: Tensor | None) -> Tensor:
        return weight.sigmoid()


@dataclass(frozen=True, repr=False)
class elastic_net(_decaying):
    """W_t = soft(lam (a W_{t-1} - eta g), eta lasso lam), lam = 1 / (1 + eta ridge): learning-retaining (Miras
    equation 22, with ridge = 1/beta, lasso = 1/alpha, and the retention gate a beside it).

    soft(z, b) = sign(z) max(0, |z| - b) forgets small weights wholly. Each write settles so: no chunked form. Oracles:
    the minimiser on a grid, `memory.naive_miras` (tests/test_retention.py).
    """

    lasso: float = 0.01
    ridge: float = 0.0
    settles = True

    def __post_init__(self) -> None:
        for name in ("lasso", "ridge"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"elastic_net: {name} must be at least 0 and finite, got {getattr(self, name)}")

    def settle(self, weight: Tensor, start: Tensor | None, step_size: Tensor | float) -> Tensor:
        step_size = step_size[..., None, None] if isinstance(step_size, Tensor) else step_size
        kept = 1.0 / (1.0 + step_size * self.ridge)
        return _soft(weight * kept, step_size * self.lasso * kept)


@dataclass(frozen=True, repr=False)
class elastic_net_ftrl(_decaying):
    """A_t = a A_{t-1} - eta g;  W_t = soft(A_t, threshold): the elastic net that follows the regularised leader (Miras
    equation 23, at a constant eta / alpha = threshold). What is small answers nothing, and is not forgotten. Oracle:
    `memory.naive_miras` (tests/test_retention.py).
    """

    threshold: float = 0.01
    exposes = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"elastic_net_ftrl: threshold must be at least 0 and finite, got {self.threshold}")

    def expose(self, weight: Tensor, start: Tensor | None) -> Tensor:
        return _soft(weight, self.threshold)

    def conceal(self, weight: Tensor) -> Tensor:
        return weight + self.threshold * weight.sign()


@dataclass(frozen=True, repr=False)
class row_norm(_decaying):
    """W_t = a W_{t-1} - eta g, then each row made as long again as it was at the start (LaCT's weight norm).

    each="write": after every write, or every tick of a clock; no chunked form. each="chunk": where a chunk opens, as
    LaCT does, on what all its tokens wrote: with read="boundary", its recurrence without momentum. Oracles:
    `memory.naive_miras.naive_lact`, tests/test_retention.py.
    """

    each: Literal["write", "chunk"] = "write"
    remembers_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.each not in ("write", "chunk"):
            raise ValueError(f"row_norm: each must be 'write' or 'chunk', got {self.each!r}")

    @property
    def settles(self) -> bool:  # type: ignore[override]
        return self.each == "write"

    @property
    def reopens(self) -> bool:  # type: ignore[override]
        return self.each == "chunk"

    def settle(self, weight: Tensor, start: Tensor | None, step_size: Tensor | float) -> Tensor:
        assert start is not None
        length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp(min=1e-12)
        return weight * (torch.linalg.vector_norm(start, dim=-1, keepdim=True) / length)

    def reopen(self, weight: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (self.settle(weight, start, 0.0) if self.reopens else weight), start


def _soft(weight: Tensor, threshold: Tensor | float) -> Tensor:
    return weight.sign() * (weight.abs() - threshold).clamp(min=0.0)


def _fraction(log_retention: Tensor | float) -> Tensor | float:
    return log_retention.exp()[..., None, None] if isinstance(log_retention, Tensor) else math.exp(log_retention)
