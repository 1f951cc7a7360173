"""What a linear recurrence takes of each token, as its paper makes it, and the recurrence itself.

For those of the linear family that are no gradient steps of one rule on pairs: keys that are gates, erases along other
keys than are written, states of two matrices. The expression around them is `linear_mixer`.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.part import Part, check_families

from .elementwise import unit
from .gating import SLOWEST, Asked, Gating, gated_delta_gates, sigmoid_gates
from .linear import comba, hgrn2, rwkv7
from .mesa import mesa
from .mixer import linear

Given = tuple[Tensor, ...]
"""What the recurrence is given, each [b, t, ...]. A token all of whose streams are zero changes nothing."""


class StreamsModule(nn.Module):
    """Streams with their weights: `run(prepare(mixed, forward(x)), state)`. writing: which of the streams a token
    writes or forgets with, so that without them it only reads."""

    writing: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """What is projected from the tokens beside the convolution: [b, t, d] -> [b, t, n]."""
        raise NotImplementedError

    def prepare(self, mixed: Tensor, raw: Tensor) -> Given:
        """Out of the convolution [b, t, widths * d] and `forward` [b, t, n] -> streams."""
        raise NotImplementedError

    def begin(self, batch: int) -> Any:
        """The state at the start of a document: nothing is known."""
        raise NotImplementedError

    def run(self, given: Given, state: Any, chunk: int, way: str) -> tuple[Tensor, Any]:
        """What is read [b, t, h, v], and the state after it."""
        raise NotImplementedError

    def quiet(self, given: Given) -> Given:
        """The streams of tokens that read a state and leave it as it is."""
        return tuple(torch.zeros_like(part) if i in self.writing else part for i, part in enumerate(given))


class Streams(Part, family=True):
    """A recurrence of a matrix memory with what its paper puts before it."""

    choices: tuple[str, str, str, str]  # Miras' four, in words
    widths: int = 3  # how many streams as wide as the model come from the projection and its convolution

    @abstractmethod
    def build(self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None) -> StreamsModule:
        """The module for a layer of width `dim`, initialised from the generator."""


class _OneMatrix(StreamsModule):
    """Of a memory that is one matrix [v, k] a head, empty at first."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim

    def begin(self, batch: int) -> Any:
        like = next(self.parameters())
        return like.new_zeros(batch, self.heads, self.head_dim, self.head_dim)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[b, t, parts * d] -> so many [b, t, h, k]."""
        return x.unflatten(-1, (parts, self.heads, self.head_dim)).unbind(2)


@dataclass(frozen=True, repr=False)
class hgrn2_streams(Streams):
    """S_t = S_{t-1} Diag(a_t) + v_t (1 - a_t)^T: what is forgotten is the key.

    a_t = g + (1 - g) sigmoid(W x_t), g in (0, 1) learned for every channel and `floor` at first; q = SiLU. In the paper
    the g of all layers are learned together and rise with depth; a mixer knows only of itself. HGRN2 (2404.07904).
    Oracle: `naive_layers.hgrn2`.
    """

    floor: float = 0.9
    widths = 2
    choices = "matrix()", "dot()", "by channel", "gradient_descent()"

    def __post_init__(self) -> None:
        check_families(self)
        if not 0 < self.floor < 1:
            raise ValueError(f"hgrn2_streams: floor must be between 0 and 1, got {self.floor}")

    def build(self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None) -> StreamsModule:
        return Hgrn2Streams(dim, heads, head_dim, self, generator)


class Hgrn2Streams(_OneMatrix):
    writing = (2,)

    def __init__(
        self, dim: int, heads: int, head_dim: int, part: hgrn2_streams, generator: torch.Generator | None
    ) -> None:
        super().__init__(heads, head_dim)
        self.forget = linear(dim, dim, generator)
        self.floor = nn.Parameter(torch.logit(torch.full((dim,), part.floor)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forget(x)

    def prepare(self, mixed: Tensor, raw: Tensor) -> Given:
        q, v = self.split(mixed, 2)
        floor = self.floor.sigmoid()
        (log_retention,) = self.split((floor + (1.0 - floor) * raw.sigmoid()).log(), 1)
        return F.silu(q), v, log_retention

    def run(self, given: Given, state: Any, chunk: int, way: str) -> tuple[Tensor, Any]:
        return hgrn2(*given, initial_state=state, chunk=chunk, way=way)


@dataclass(frozen=True, repr=False)
class _gated(Streams, abstract=True):
    """With a step size and a retention a head and token, as `gating` chooses them."""

    gating: Gating = gated_delta_gates()

    def __post_init__(self) -> None:
        check_families(self)
        if self.gating.by_channel:
            raise ValueError(f"{type(self).__name__} has one retention a head, {self.gating} one a channel")
        if self.gating.tells or self.gating.placed:
            raise ValueError(f"{type(self).__name__} has no window, bound, maps or chunk for {self.gating}")


class _Gated(_OneMatrix):
    def __init__(self, dim: int, heads: int, head_dim: int, gating: Gating, generator: torch.Generator | None) -> None:
        super().__init__(heads, head_dim)
        self.gates = gating.build(dim, heads, head_dim, generator, Asked(("step_size", "log_retention")))

    def forward(self, x: Tensor) -> Tensor:
        return self.gates(x)

    def chosen(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Step size and log retention [b, t, h]."""
        gates = self.gates.choose(raw, 1.0)
        assert isinstance(gates.step_size, Tensor)
        assert isinstance(gates.log_retention, Tensor)
        return gates.step_size.transpose(1, 2), gates.log_retention.transpose(1, 2)


@dataclass(frozen=True, repr=False)
class comba_streams(_gated):
    """S_t = a_t S_{t-1} - b_t (S_{t-1} p_t) k_t^T + b_t v_t k_t^T, y_t = S_t (q_t - D p_t), p_t = sigmoid(d) k_t.

    d and D are learned, one a head; D starts at `feedback` (the paper has 1, and 0.02 for small models). SiLU, q and k
    L2-normalised; p is not, else d would act through the read alone. Comba (2506.02475). Oracle: `naive_layers.comba`.
    """

    feedback: float = 0.02
    choices = "matrix()", "l2() of a shorter key", "decay()", "gradient_descent()"

    def build(self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None) -> StreamsModule:
        return CombaStreams(dim, heads, head_dim, self, generator)


class CombaStreams(_Gated):
    writing = (4, 5)

    def __init__(
        self, dim: int, heads: int, head_dim: int, part: comba_streams, generator: torch.Generator | None
    ) -> None:
        super().__init__(dim, heads, head_dim, part.gating, generator)
        self.along = nn.Parameter(torch.ones(heads))
        self.feedback = nn.Parameter(torch.full((heads,), part.feedback))

    def prepare(self, mixed: Tensor, raw: Tensor) -> Given:
        q, k, v = self.split(F.silu(mixed), 3)
        k = unit(k)
        return unit(q), k, v, self.along.sigmoid()[:, None] * k, *self.chosen(raw)

    def run(self, given: Given, state: Any, chunk: int, way: str) -> tuple[Tensor, Any]:
        return comba(*given, feedback=self.feedback, initial_state=state, chunk=chunk, way=way)


@dataclass(frozen=True, repr=False)
class mesa_streams(_gated):
    """G_t = a_t G_{t-1} + b_t v_t k_t^T,  H_t = a_t H_{t-1} + b_t k_t k_t^T,  y_t = G_t (H_t + Diag(r))^{-1} q_t.

    Every token reads the least-squares solution, by `iterations` of conjugate gradients. r = softplus(.) + `ridge`,
    learned for every key channel, 1 at first; gates are sigmoids; SiLU, q and k L2-normalised. MesaNet (2506.05233).
    Oracle: `naive_layers.mesa`.
    """

    gating: Gating = sigmoid_gates()
    iterations: int = 30
    ridge: float = 0.25
    choices = "two matrices", "l2() of all pairs", "decay(), toward a ridge", "conjugate gradients"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"mesa_streams: iterations must be at least 1, got {self.iterations}")
        if not 0 < self.ridge < 1:
            raise ValueError(f"mesa_streams: ridge must be between 0 and 1, got {self.ridge}")

    def build(self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None) -> StreamsModule:
        return MesaStreams(dim, heads, head_dim, self, generator)


class MesaStreams(_Gated):
    writing = (3, 4)

    def __init__(
        self, dim: int, heads: int, head_dim: int, part: mesa_streams, generator: torch.Generator | None
    ) -> None:
        super().__init__(dim, heads, head_dim, part.gating, generator)
        self.part = part
        self.ridge = nn.Parameter(torch.full((heads, head_dim), math.log(math.expm1(1.0 - part.ridge))))

    def prepare(self, mixed: Tensor, raw: Tensor) -> Given:
        q, k, v = self.split(F.silu(mixed), 3)
        return unit(q), unit(k), v, *self.chosen(raw)

    def begin(self, batch: int) -> Any:
        return super().begin(batch), super().begin(batch)

    def run(self, given: Given, state: Any, chunk: int, way: str) -> tuple[Tensor, Any]:
        ridge, chunk = F.softplus(self.ridge) + self.part.ridge, 1 if way == "recurrent" else chunk
        q, k, v, step_size, log_retention = given
        gates = step_size, log_retention, ridge
        return mesa(q, k, v, *gates, initial_state=state, iterations=self.part.iterations, chunk=chunk)


@dataclass(frozen=True, repr=False)
class rwkv7_streams(Streams):
    """S_t = S_{t-1} (Diag(w_t) - r_t (a_t * r_t)^T) + v_t k~_t^T, y_t = S_t q_t + (sum u * q_t * k~_t) v_t.

    log w = -exp(-1/2) sigmoid(.) and a = sigmoid(.), each for every channel from a projection of rank `rank`;
    r = unit(k * xi), k~ = k * (1 + (a - 1) alpha); xi, alpha and the bonus u are learned for every channel. RWKV-7
    (2503.14456), but for what goes from the first layer to the others; its shift of tokens is a convolution of
    width 2. Oracle: `naive_layers.rwkv7`.
    """

    rank: int = 16
    choices = "matrix()", "l2()", "by channel", "gradient_descent(), a step size a channel"

    def __post_init__(self) -> None:
        check_families(self)
        if self.rank < 1:
            raise ValueError(f"rwkv7_streams: rank must be at least 1, got {self.rank}")

    def build(self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None) -> StreamsModule:
        return Rwkv7Streams(dim, heads, head_dim, self, generator)


class Rwkv7Streams(_OneMatrix):
    writing = (1, 3, 4)

    def __init__(
        self, dim: int, heads: int, head_dim: int, part: rwkv7_streams, generator: torch.Generator | None
    ) -> None:
        super().__init__(heads, head_dim)
        self.decay_down, self.rate_down = (linear(part.rank, dim, generator) for _ in range(2))
        self.decay_up, self.rate_up = (linear(dim, part.rank, generator, bias=True) for _ in range(2))
        with torch.no_grad():  # from slow to fast along the channels of a head
            self.decay_up.bias.copy_(torch.linspace(-6.0, 1.0, head_dim).repeat(heads))
        self.removal, self.replacement = nn.Parameter(torch.full((dim,), 0.85)), nn.Parameter(torch.ones(dim))
        self.bonus = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.decay_up(self.decay_down(x).tanh()), self.rate_up(self.rate_down(x))], -1)

    def prepare(self, mixed: Tensor, raw: Tensor) -> Given:
        q, k, v = self.split(mixed, 3)
        decayed, rate = self.split(raw.sigmoid(), 2)
        removal, replacement = (x.view(self.heads, -1) for x in (self.removal, self.replacement))
        return q, k * (1.0 + (rate - 1.0) * replacement), v, -SLOWEST * decayed, unit(k * removal), rate

    def run(self, given: Given, state: Any, chunk: int, way: str) -> tuple[Tensor, Any]:
        y, after = rwkv7(*given, initial_state=state, chunk=chunk, way=way)
        q, k, v, *_ = given
        return y + (self.bonus * q * k).sum(-1, keepdim=True) * v, after
