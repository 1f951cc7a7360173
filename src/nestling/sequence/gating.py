"""How a token chooses its gates: step size, momentum and retention, as each paper parametrises them."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.part import Part, check_families
from nestling.memory.rule import Gates, Pairs, Rule, dampen, every, momentum
from nestling.memory.structure import matrix

from .mixer import linear
from .scan import Memory
from .steps import by_step

SLOWEST = math.exp(-0.5)  # RWKV-7's bound on -log retention


Names = tuple[str, ...]
GATES: Names = Gates._fields


class Asked(NamedTuple):
    """What a layer asks of its gates. names: those that its rule looks at; of the others none is learned. steps: how
    many pairs a token writes, each with a step size and a momentum of its own."""

    names: Names = GATES
    steps: int = 1


def gates_of(rule: Rule) -> Names:
    """The gates that a rule looks at: those that two steps on random pairs depend on."""
    while isinstance(rule, every):
        rule = rule.of
    generator = torch.Generator().manual_seed(0)
    weight, error, x = (
        torch.randn(1, *shape, dtype=torch.float64, generator=generator) for shape in ((3, 4), (2, 3), (2, 4))
    )
    with torch.enable_grad():
        gates = Gates(*(torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.6, -0.4)))
        weight = rule.conceal(weight)
        state = rule.init(weight)
        for t in range(2):
            weight, state = rule.step(weight, Pairs(error[:, t : t + 1], x[:, t : t + 1]), state, gates)
        answer = (rule.expose(weight, state) * torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)).sum()
        answer = answer + 0.0 * sum(gates)  # a rule may look at none
        found = torch.autograd.grad(answer.sum(), list(gates), allow_unused=True)  # type: ignore[arg-type]
    felt = [grad is not None and float(grad.abs()) > 1e-12 for grad in found]
    return tuple(name for name, yes in zip(GATES, felt, strict=True) if yes)


class GatingModule(nn.Module):
    """Gates with their weights: `choose(forward(x), bound)`. In between stand the layer's slots, where those without
    a token hold zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """What is projected from the tokens [b, t, d] -> [b, t, n]."""
        raise NotImplementedError

    def choose(self, raw: Tensor, bound: float) -> Gates:
        """[b, t, n] -> gates [b, h, t]; retention [b, h, t, k] where it is by channel. `bound`: the largest step that
        frozen gradients allow; 1 where they are taken at every token. Of several steps a token [steps, b, h, t], but
        for the retention and for what is the same for all of them."""
        raise NotImplementedError

    def placed(self, gates: Gates, place: Tensor) -> Gates:
        """The gates [..., t] of tokens that stand at these places of their chunks [t], the first at 0."""
        return gates

    def more(self, raw: Tensor) -> dict[str, Tensor]:
        """[b, t, n] -> what else the tokens choose [b, h, t, ...], by the field of `scan.Writes` that it is; a bound as
        so many times that of the bias. Of several steps a token [steps, b, h, t, ...]."""
        return {}


def _has_momentum(rule: Rule) -> bool:
    inner = getattr(rule, "of", None)
    return isinstance(rule, momentum | dampen) or (isinstance(inner, Rule) and _has_momentum(inner))


class Gating(Part, family=True):
    """The expression of gates."""

    momentum: bool = False  # is there a gate for it
    by_channel: bool = False  # has every key channel a retention of its own
    tells: Names = ()  # the fields of `scan.Writes` that `GatingModule.more` gives
    placed: bool = False  # do they depend on a token's place in its chunk

    def fits(self, memory: Memory) -> None:
        """Raises ValueError where these gates are not for such a memory."""
        if self.by_channel and not (memory.exact and isinstance(memory.structure, matrix)):
            raise ValueError(
                f"{self} is for matrix() memories with gradient_at='token', not for {memory.structure} with "
                f"gradient_at={memory.gradient_at!r}"
            )
        if not self.momentum and _has_momentum(memory.rule):
            raise ValueError(f"{self} has no gate for the momentum in {memory.rule}; use sigmoid_gates()")

    @abstractmethod
    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        """The module for a layer of width `dim`, initialised from the generator."""


def positive(owner: Part, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise ValueError(f"{type(owner).__name__}: {name} must be > 0, got {getattr(owner, name)}")


@dataclass(frozen=True, repr=False)
class sigmoid_gates(Gating):
    """step size = reach * bound * sigmoid, momentum = sigmoid, log retention = logsigmoid of projections of the token.

    Titans. With reach = 2 and steps on L2 at every token, I - b k k^T has negative eigenvalues (2411.12537).
    Retention starts at 0.993 a token. Oracle: the formula (tests/test_gating.py).
    """

    reach: float = 1.0
    momentum = True

    def __post_init__(self) -> None:
        positive(self, "reach")

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return SigmoidGates(dim, heads, self, generator, asked) if asked.names else NoGates(heads, self.reach)


class SigmoidGates(nn.Linear, GatingModule):
    def __init__(
        self, dim: int, heads: int, gating: sigmoid_gates, generator: torch.Generator | None, asked: Asked
    ) -> None:
        self.times = [1 if name == "log_retention" else asked.steps for name in asked.names]
        rows = sum(self.times) * heads
        super().__init__(dim, rows, device="meta")  # its own start would draw random numbers for nothing
        made = linear(rows, dim, generator, bias=True, gain=0.3)
        self.weight, self.bias, self.gating, self.names, self.heads = made.weight, made.bias, gating, asked.names, heads
        if "log_retention" in asked.names:
            with torch.no_grad():
                self.bias[rows - heads :].fill_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        parts = raw.split([times * self.heads for times in self.times], -1)
        each = (by_step(part, times).mT for part, times in zip(parts, self.times, strict=True))
        told = dict(zip(self.names, each, strict=True))
        shape = (raw.shape[0], self.heads, raw.shape[1])
        step_size, kept, retention = (told.get(name) for name in GATES)
        reach = self.gating.reach * bound
        return Gates(
            raw.new_full(shape, reach) if step_size is None else reach * step_size.sigmoid(),
            raw.new_zeros(shape) if kept is None else kept.sigmoid(),
            raw.new_zeros(shape) if retention is None else F.logsigmoid(retention),
        )


@dataclass(frozen=True, repr=False)
class around(Gating, abstract=True):
    """Gates around those `of` a kind."""

    of: Gating = sigmoid_gates()

    def __post_init__(self) -> None:
        check_families(self)

    @property
    def momentum(self) -> bool:  # type: ignore[override]
        return self.of.momentum

    @property
    def by_channel(self) -> bool:  # type: ignore[override]
        return self.of.by_channel

    @property
    def tells(self) -> Names:  # type: ignore[override]
        return self.of.tells

    @property
    def placed(self) -> bool:  # type: ignore[override]
        return self.of.placed


class NoGates(GatingModule):
    """Of a rule that looks at none."""

    def __init__(self, heads: int, reach: float) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.heads)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        nothing = raw.transpose(1, 2)
        return Gates(nothing + self.reach * bound, nothing, nothing)


@dataclass(frozen=True, repr=False)
class fixed_gates(Gating):
    """Retention 1 - 2^(-slowest - h) for head h, step size = bound: nothing is learned. RetNet (2307.08621), 3.1.
    Oracle: the formula (tests/test_gating.py)."""

    slowest: float = 5.0

    def __post_init__(self) -> None:
        positive(self, "slowest")

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return FixedGates(heads, self)


class FixedGates(GatingModule):
    def __init__(self, heads: int, gating: fixed_gates) -> None:
        super().__init__()
        self.heads, self.gating = heads, gating

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.heads)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        nothing = raw.transpose(1, 2)
        heads = torch.arange(self.heads, dtype=raw.dtype, device=raw.device)
        retention = torch.log1p(-torch.exp2(-self.gating.slowest - heads))
        return Gates(nothing + bound, nothing, nothing + retention[:, None])


@dataclass(frozen=True, repr=False)
class low_rank_gates(Gating):
    """log retention = logsigmoid(W_2 W_1 x + b) / divisor for every key channel, step size = bound.

    Gated linear attention (2312.06635), 4.4. Oracle: the formula (tests/test_gating.py).
    """

    rank: int = 16
    divisor: float = 16.0
    by_channel = True

    def __post_init__(self) -> None:
        positive(self, "rank", "divisor")

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return LowRankGates(dim, heads, head_dim, self, generator)


class LowRankGates(GatingModule):
    def __init__(
        self, dim: int, heads: int, head_dim: int, gating: low_rank_gates, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.heads, self.gating = heads, gating
        self.down = linear(gating.rank, dim, generator)
        self.up = linear(heads * head_dim, gating.rank, generator, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def choose(self, raw: Tensor, bound: float) -> Gates:
        retention = F.logsigmoid(by_head(raw, self.heads)) / self.gating.divisor
        nothing = torch.zeros_like(retention[..., 0])
        return Gates(nothing + bound, nothing, retention)


@dataclass(frozen=True, repr=False)
class _timed(Gating, abstract=True):
    """log retention = -exp(A_log) dt, dt = softplus(W x + dt_bias): dt starts log-uniform in [least, most], exp(A_log)
    uniform in [1, 16]. Raises ValueError unless 0 < least <= most."""

    least: float = 1e-3
    most: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "least")
        if self.most < self.least:
            raise ValueError(f"{type(self).__name__}: most must be >= least = {self.least}, got {self.most}")


@dataclass(frozen=True, repr=False)
class mamba2_gates(_timed):
    """log retention = -exp(A_log) dt, step size = bound * dt, dt = softplus(W x + dt_bias): what is written and what is
    forgotten go together; of several steps a token, the first's dt is what it forgets. Mamba-2 (2405.21060), its
    published code. Oracle: the formula (tests/test_gating.py)."""

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return Mamba2Gates(dim, heads, self, generator, asked.steps)


class Mamba2Gates(GatingModule):
    def __init__(
        self, dim: int, heads: int, gating: mamba2_gates, generator: torch.Generator | None, steps: int
    ) -> None:
        super().__init__()
        self.steps = steps
        self.project = linear(steps * heads, dim, generator, gain=0.3)
        self.log_rate, self.bias = _start(heads, steps * heads, gating.least, gating.most, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        step = by_step(F.softplus(raw + self.bias), self.steps).mT
        first = step if self.steps == 1 else step[0]
        return Gates(bound * step, torch.zeros_like(step), -self.log_rate.exp()[:, None] * first)


@dataclass(frozen=True, repr=False)
class gated_delta_gates(_timed):
    """step size = reach * bound * sigmoid(W_b x), log retention as in `mamba2_gates`.

    Gated DeltaNet (2412.06464): with `retain_first()` on L2 at every token. reach = 2: negative eigenvalues. Oracle:
    the formula (tests/test_gating.py).
    """

    reach: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "reach")

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return DeltaGates(dim, heads, heads, self, generator, asked.steps)


@dataclass(frozen=True, repr=False)
class kda_gates(_timed):
    """`gated_delta_gates` with a retention for every key channel, from a projection of rank `rank`; A_log one a head.

    Kimi delta attention (2510.26692). Oracle: the formula (tests/test_gating.py).
    """

    reach: float = 1.0
    rank: int = 16
    by_channel = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "reach", "rank")

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return DeltaGates(dim, heads, heads * head_dim, self, generator, asked.steps)


class DeltaGates(GatingModule):
    """`steps` step sizes a head and `width` retentions."""

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        gating: gated_delta_gates | kda_gates,
        generator: torch.Generator | None,
        steps: int,
    ) -> None:
        super().__init__()
        self.heads, self.gating, self.steps = heads, gating, steps
        self.step = linear(steps * heads, dim, generator, gain=0.3)
        if isinstance(gating, kda_gates):
            down = linear(gating.rank, dim, generator)
            self.project: nn.Module = nn.Sequential(down, linear(width, gating.rank, generator, gain=0.3))
        else:
            self.project = linear(width, dim, generator, gain=0.3)
        self.log_rate, self.bias = _start(heads, width, gating.least, gating.most, generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.step(x), self.project(x)], -1)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        step, width = by_step(raw[..., : self.steps * self.heads], self.steps).mT, len(self.bias)
        spent = by_head(F.softplus(raw[..., -width:] + self.bias), self.heads)  # [b, h, t, k or 1]
        retention = -self.log_rate.exp()[:, None, None] * spent
        retention = retention if self.gating.by_channel else retention[..., 0]
        return Gates(self.gating.reach * bound * step.sigmoid(), torch.zeros_like(step), retention)


@dataclass(frozen=True, repr=False)
class rwkv7_gates(Gating):
    """log retention = -exp(-1/2) sigmoid(w_0 + W_2 tanh(W_1 x)) for every key channel, step size = bound * sigmoid.

    RWKV-7 (2503.14456), its decay to the letter; its step size is one a channel, here one a head. The former is
    `nestling.sequence.rwkv7`. Oracle: the formula (tests/test_gating.py).
    """

    rank: int = 16
    by_channel = True

    def __post_init__(self) -> None:
        positive(self, "rank")

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        return Rwkv7Gates(dim, heads, head_dim, self, generator, asked.steps)


class Rwkv7Gates(GatingModule):
    def __init__(
        self, dim: int, heads: int, head_dim: int, gating: rwkv7_gates, generator: torch.Generator | None, steps: int
    ) -> None:
        super().__init__()
        self.heads, self.steps = heads, steps
        self.step = linear(steps * heads, dim, generator, gain=0.3)
        self.down = linear(gating.rank, dim, generator)
        self.up = linear(heads * head_dim, gating.rank, generator, bias=True)
        with torch.no_grad():  # from slow to fast along the channels of a head
            self.up.bias.copy_(torch.linspace(-6.0, 1.0, head_dim).repeat(heads))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.step(x), self.up(self.down(x).tanh())], -1)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        step, decayed = raw.tensor_split([self.steps * self.heads], -1)
        step, retention = by_step(step, self.steps).mT, -SLOWEST * by_head(decayed, self.heads).sigmoid()
        return Gates(bound * step.sigmoid(), torch.zeros_like(step), retention)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[..., t, h * n] -> [..., h, t, n]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _start(
    heads: int, width: int, least: float, most: float, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log [h], exp uniform in [1, 16]; dt_bias [width], its softplus log-uniform in [least, most]."""
    log_rate = (1.0 + 15.0 * torch.rand(heads, generator=generator)).log()
    spread = math.log(most) - math.log(least)
    step = (math.log(least) + spread * torch.rand(width, generator=generator)).exp()
    return nn.Parameter(log_rate), nn.Parameter(step + torch.log(-torch.expm1(-step)))
