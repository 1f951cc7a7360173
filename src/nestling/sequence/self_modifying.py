"""Self-modifying Titans: keys, values, step size and retention are memories too, and write their own targets."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.rule import Gates
from nestling.memory.structure import Structure, Weights, matrix, mlp, together

from .convolution import ShortConvolution
from .fused import unit
from .layout import Piece, lay_out
from .mixer import Mixer, MixerModule, Output, check_width, linear, split_heads, step_bound
from .scan import Memory, MemoryState, States, Writes, scan


@dataclass(frozen=True, repr=False)
class self_modifying(Memory, Mixer):
    """The expression of `SelfModifying`. chunk: of the main memory; projection_chunk: of the memories for k, v,
    step size and retention (one must divide the other)."""

    projection_chunk: int = 64
    convolution: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact:
            raise ValueError("self_modifying needs gradient_at='chunk': targets are made where the chunk opened")
        small, large = sorted((self.chunk, self.projection_chunk))
        if small < 1 or large % small:
            raise ValueError(
                f"chunk {self.chunk} and projection_chunk {self.projection_chunk}: one must divide the other"
            )

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "SelfModifying":
        return SelfModifying(dim, heads, self, generator)


class SelfModifyingState(NamedTuple):
    """phase: tokens since the larger chunk opened [b]; memories: generators (of k, v, step size and retention,
    side by side) and main; bounded: how many step sizes came within 1% of their bound, since the document's
    start [b]."""

    phase: Tensor
    tail: Tensor
    memories: States
    bounded: Tensor


class SelfModifying(MixerModule):
    """Self-modifying (deep self-referential) Titans, Nested Learning equations 83 to 93, in heads.

    With u_t = L2-normalised heads of a mixed, convolved x_t, and every memory at the weights of its chunk's start::

        q_t = W_q x_t                       k_t = M_k(u_t)      v_t = M_v(u_t)
        eta_t = bound * sigmoid(M_eta(u_t))                     log a_t = log sigmoid(M_a(u_t))
        target of each memory M: M(v_t), a constant of the inner derivative but not of the outer one
        each memory: one step of `rule` on (k_t, target)        y_t = M_mem(q_t)

    q, k, v are L2-normalised, v with a learned scale. M_eta and M_a end in one scalar a head, without residual.
    Where the paper is silent: the momentum gate is a projection of x_t; bounds and normalisations are those
    that keep frozen gradients from diverging (docs/papers.md). All initial weights are parameters; no write is
    outside of the graph. x [b, t, d] -> [b, t, d]. Oracle: memory.naive.self_modifying.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expression: self_modifying = self_modifying(),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_width(dim, heads)
        self.heads, self.expression = heads, expression
        head_dim = dim // heads
        bare, residual = _bare(expression.structure)
        generators = together(bare, (residual, residual, False, False))  # of k, v, step size, retention
        shared = (expression.attentional_bias, expression.rule)
        how: Any = ("chunk", expression.read, expression.way)
        self.memories = (
            Memory(generators, *shared, expression.projection_chunk, *how),
            Memory(expression.structure, *shared, expression.chunk, *how),
        )

        self.mix = linear(2 * dim, dim, generator)
        self.convolution = ShortConvolution(2 * dim, expression.convolution, generator)
        self.momentum = linear(heads, dim, generator, bias=True, gain=0.3)
        self.value_scale = nn.Parameter(torch.ones(heads))
        self.gate_bias = nn.Parameter(torch.tensor([0.0, 5.0]).repeat(heads, 1))  # step size, retention
        widths = (head_dim, head_dim, 1, 1, head_dim)
        self.starts = nn.ModuleList(
            nn.ParameterList(bare.init(head_dim, width, (heads,), generator, unit_keys=True)) for width in widths
        )
        self.output = Output(dim, heads, generator)
        self.step_bound = step_bound(max(expression.chunk, expression.projection_chunk), head_dim)

    def init_state(self, batch: int) -> SelfModifyingState:
        members: list[Weights] = [tuple(start) for start in self.starts]  # type: ignore[arg-type]
        assert isinstance(self.memories[0].structure, together)
        starts = (self.memories[0].structure.join(members[:4]), members[4])
        states = [
            memory.begin(tuple(weight.expand(batch, *weight.shape).contiguous() for weight in start))
            for memory, start in zip(self.memories, starts, strict=True)
        ]
        count = torch.zeros(batch, dtype=torch.int64, device=self.value_scale.device)
        return SelfModifyingState(count, self.convolution.init_state(batch), tuple(states), count)

    def forward(
        self,
        x: Tensor,
        state: SelfModifyingState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, SelfModifyingState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        sizes = (self.expression.projection_chunk, self.expression.chunk)
        layout = lay_out(state.phase, x.shape[1], sizes, reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        mixed, tail = self.convolution(layout.spread(self.mix(x)), state.tail, layout)
        raw_momentum = layout.spread(self.momentum(x))
        bounded = []
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.value_scale.dtype
            both = split_heads(F.silu(mixed.to(dtype)), 2 * self.heads)
            u, queries = (layout.cut(part, -2) for part in unit(both).chunk(2, 1))
            kept = layout.cut(raw_momentum.to(dtype).transpose(1, 2).sigmoid(), -1)

            def step(index: int, piece: Piece, states: States) -> tuple[Tensor, States]:
                present = layout.present(piece)
                generators, main = self.memories
                generating = generators.open(states[0], piece.opens[0])
                known = main.open(states[1], piece.opens[1])
                k, v, gates, near = self.project(generating, u[index], kept[index])
                bounded.append((piece, near if present is None else near & present[:, None]))
                carry = main.transfers(known, [gates])[0] if present is None else None
                pairs = Writes(k, v, gates, present, True, carry)
                y, known = main.run(known, pairs, queries[index])
                return y, (generators.run(generating, pairs)[1], known)

            y, memories = scan(layout, state.memories, start.memories, step)
        y = layout.gather(y.transpose(1, 2)).transpose(1, 2)
        count = _count(state.bounded, bounded)
        return self.output(y, x), SelfModifyingState(layout.phase, tail, memories, count)

    def project(self, state: MemoryState, u: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Gates, Tensor]:
        """Keys, values and gates of a piece [b, h, c, .] from the memories as they were when the chunk opened;
        and where the step size comes within 1% of its bound."""
        answers = self.memories[0].at_anchor(state, u)
        k = unit(answers[:, :, 0])
        v = unit(answers[:, :, 1]) * self.value_scale[:, None, None]
        raw = answers[:, :, 2:, :, 0] + self.gate_bias[..., None]
        step_size = raw[:, :, 0].sigmoid()
        gates = Gates(self.step_bound * step_size, kept, F.logsigmoid(raw[:, :, 1]))
        return k, v, gates, step_size.detach() > 0.99


def _bare(structure: Structure) -> tuple[Structure, bool]:
    """The structure without its residual, and whether it had one."""
    if isinstance(structure, mlp):
        return replace(structure, residual=False), structure.residual
    if isinstance(structure, matrix):
        return structure, False
    raise ValueError(f"self_modifying: matrix() and mlp() memories can be made to end in a gate, not {structure}")


def _count(before: Tensor, found: list[tuple[Piece, Tensor]]) -> Tensor:
    for piece, near in found:
        if piece.reset is not None:
            before = torch.where(piece.reset, torch.zeros_like(before), before)
        before = before + near.sum((1, 2))
    return before
