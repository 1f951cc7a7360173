"""Self-modifying Titans: keys, values, step size and retention are memories too, and write their own targets."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.compound import biased, features
from nestling.memory.rule import Gates
from nestling.memory.structure import Structure, Weights, gated_mlp, matrix, mlp, plain, side_by_side, together

from .compiled import chunk_step
from .convolution import ShortConvolution
from .elementwise import Heads, unit
from .layout import Piece, lay_out
from .mixer import Mixer, MixerModule, Output, check_width, linear, step_bound
from .scan import Memory, MemoryState, States, Writes, scan

PROJECTIONS = ("key", "value", "query", "step_size", "retention")
_VECTORS = PROJECTIONS[:3]


@dataclass(frozen=True, repr=False)
class self_modifying(Memory, Mixer):
    """The expression of `SelfModifying`. chunk: of the main memory; projection_chunk: of the memories that generate
    its projections (one must divide the other). generators: which projections are memories that modify themselves,
    of "key", "value", "query", "step_size" and "retention"; the others are learned at the lowest frequency, as
    ordinary weights. step_bound: how far the step gate reaches, in units of the inverse of the largest eigenvalue
    expected of a chunk of random keys; frozen gradients diverge far above the default, chunks of one token do not.
    gate_structure: of the memories that end in a gate, without residual; None: as of the others. A hidden layer for one
    number takes a quarter of the layer's time, which matrix() spares (benchmarks/gates.py has what that costs).
    Source: Nested Learning equations 83 to 93. Oracle: `naive_layers.self_modifying`.
    """

    projection_chunk: int = 64
    convolution: int = 4
    generators: tuple[str, ...] = ("key", "value", "step_size", "retention")
    step_bound: float = 1.5
    gate_structure: Structure | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact:
            raise ValueError("self_modifying needs gradient_at='chunk': targets are made where the chunk opened")
        if self.window != 1:
            raise ValueError(f"self_modifying: every memory steps on its own pair, window must be 1, got {self.window}")
        small, large = sorted((self.chunk, self.projection_chunk))
        if small < 1 or large % small:
            raise ValueError(
                f"chunk {self.chunk} and projection_chunk {self.projection_chunk}: one must divide the other"
            )
        unknown = [name for name in self.generators if name not in PROJECTIONS]
        if unknown or not self.generators or len(set(self.generators)) < len(self.generators):
            raise ValueError(f"generators must name at least one of {PROJECTIONS}, each once, got {self.generators}")
        if not self.step_bound > 0:
            raise ValueError(f"step_bound must be > 0, got {self.step_bound}")
        if not isinstance(self.gate_structure, Structure | None):
            raise ValueError(
                f"gate_structure must be a structure, such as matrix(), or None, got {self.gate_structure!r}"
            )

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "SelfModifying":
        return SelfModifying(dim, heads, self, generator)


class SelfModifyingState(NamedTuple):
    """phase: tokens since the larger chunk opened [b]; memories: generators of vectors and of gates, side by
    side, and main; bounded: how many step sizes (one a token and head) came within 1% of their bound, since the
    document's start [b]. `bounded_steps` adds them up over a model's layers."""

    phase: Tensor
    tail: Tensor
    memories: States
    bounded: Tensor


def bounded_steps(state: Any) -> int:
    """How many step sizes came within 1% of their bound since the document began, in all rows and all layers of a
    sequence state; 0 where no layer has a bound that it counts. Many mean that the bound and not the gate decides how
    much is written: see `self_modifying.step_bound`."""
    if isinstance(state, SelfModifyingState):
        return int(state.bounded.sum())
    return sum(map(bounded_steps, state)) if isinstance(state, tuple) else 0


class SelfModifying(MixerModule):
    """Self-modifying (deep self-referential) Titans, Nested Learning equations 83 to 93, in heads.

    With u_t = L2-normalised heads of a mixed, convolved x_t, and every memory at the weights of its chunk's start::

        q_t = W_q x_t                       k_t = M_k(u_t)      v_t = M_v(u_t)
        eta_t = bound * sigmoid(M_eta(u_t))                     log a_t = log sigmoid(M_a(u_t))
        target of each memory M: M(v_t), a constant of the inner derivative but not of the outer one
        each memory: one step of `rule` on (k_t, target)        y_t = M_mem(q_t)

    q, k, v are L2-normalised, v with a learned scale. M_eta and M_a end in one scalar a head, without residual.
    With a memory for the query, q_t = M_q(u_t); a projection without a memory is one of x_t, as W_q is.
    Where the paper is silent: the momentum gate is a projection of x_t; bounds and normalisations are those
    that keep frozen gradients from diverging (docs/papers.md). All initial weights are parameters; no write is
    outside of the graph. x [b, t, d] -> [b, t, d]. Oracle: memory.naive.naive_self_modifying.
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
        bare, bare_gate = _bare(expression.structure), _bare(expression.gate_structure or expression.structure)
        self.generated = tuple(name for name in PROJECTIONS if name in expression.generators)
        self.projected = tuple(name for name in _VECTORS if name not in self.generated)
        gates = [name for name in PROJECTIONS[3:] if name not in self.generated]
        vectors = [name for name in self.generated if name in _VECTORS]
        # generators with answers of one width run side by side
        self.groups = [group for group in (vectors, [name for name in self.generated if name not in vectors]) if group]
        shared = (expression.attentional_bias, expression.rule)
        how: Any = ("chunk", expression.read, expression.way)
        self.memories = (
            *(
                Memory(
                    together(expression.structure if group is vectors else bare_gate),
                    *shared,
                    expression.projection_chunk,
                    *how,
                )
                for group in self.groups
            ),
            Memory(expression.structure, *shared, expression.chunk, *how),
        )

        streams = 1 + len(self.projected)
        self.mix = linear(streams * dim, dim, generator)
        self.convolution = ShortConvolution(streams * dim, expression.convolution, generator)
        self.gates = linear((1 + len(gates)) * heads, dim, generator, bias=True, gain=0.3)  # momentum first
        self.value_scale = nn.Parameter(torch.ones(heads))
        self.gate_bias = nn.Parameter(torch.tensor([0.0, 5.0]).repeat(heads, 1))  # step size, retention
        ends = [(bare, head_dim) if name in vectors else (bare_gate, 1) for name in self.generated]
        self.starts = nn.ModuleList(
            nn.ParameterList(structure.init(head_dim, width, (heads,), generator, unit_keys=True))
            for structure, width in (*ends, (bare, head_dim))
        )
        self.output = Output(dim, heads, generator)
        largest = max(expression.chunk, expression.projection_chunk)
        self.step_bound = step_bound(largest, head_dim, expression.step_bound)

    def init_state(self, batch: int) -> SelfModifyingState:
        members: list[Weights] = [tuple(start) for start in self.starts]  # type: ignore[arg-type]
        left = iter(members)
        starts = [side_by_side([next(left) for _ in group]) for group in self.groups] + [members[-1]]
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
        state = self.init_state(x.shape[0]) if state is None else state
        y, state = self._through(x, state, reset, valid)
        return torch.zeros_like(x) if y is None else self.output(y, x), state

    def answering(self, state: SelfModifyingState) -> Weights:
        """What answers: the main memory [b, h, out, in]."""
        return self.standing(state)

    def answer(
        self, x: Tensor, state: SelfModifyingState, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, SelfModifyingState]:
        """What the main memory answers to the tokens x [b, t, d] of one document, and its queries, each [b, h, t, k];
        and the state after them."""
        both, state = self._through(x, state, None, valid, asked=True)
        if both is None:  # nothing but padding
            both = self.value_scale.new_zeros(len(x), self.heads, x.shape[1], 2 * x.shape[2] // self.heads)
        y, queries = both.chunk(2, -1)
        return y, queries, state

    def recall(self, weights: Weights, queries: Tensor) -> Tensor:
        """What a main memory of these weights [..., out, in] says to queries [..., t, k]."""
        return self.expression.structure.forward(plain(weights), queries)[0]

    def _through(
        self,
        x: Tensor,
        state: SelfModifyingState,
        reset: Tensor | None,
        valid: Tensor | None,
        *,
        asked: bool = False,
    ) -> tuple[Tensor | None, SelfModifyingState]:
        """What is read [b, h, t, v], with the queries beside it where that is asked; None where no token is."""
        start = self.init_state(x.shape[0])
        sizes = (self.expression.projection_chunk, self.expression.chunk)
        layout = lay_out(state.phase, x.shape[1], sizes, reset, valid)
        if not layout.pieces:  # nothing, or nothing but padding
            return None, state
        mixed, tail = self.convolution(layout.spread(self.mix(x)), state.tail, layout)
        raw = layout.spread(self.gates(x))
        own = (self.value_scale[:, None, None], self.gate_bias)
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.value_scale.dtype
            n = (1 + len(self.projected)) * self.heads
            streams = Heads.apply(mixed.to(dtype), n, n)
            u, *projected = (layout.cut(part, -2) for part in streams.split(self.heads, 1))
            raw_gates = layout.cut(raw.to(dtype).mT.unflatten(1, (-1, self.heads)), -1)  # [b, gate, h, c] each

            places = [layout.present(piece) for piece in layout.pieces]
            given = [(asked, own, *parts) for parts in zip(places, raw_gates, u, *projected, strict=True)]
            step = chunk_step(self._step, min(sizes), self.step_options)
            y, (*memories, bounded) = scan(
                *(layout, (*state.memories, state.bounded), (*start.memories, start.bounded), given, step),
                checkpoint=self.expression.checkpoint,
            )
        y = layout.gather(y.transpose(1, 2)).transpose(1, 2)
        return y, SelfModifyingState(layout.phase, tail, tuple(memories), bounded)

    def _step(self, piece: Piece, given: Any, states: Any) -> tuple[Tensor, Any]:
        """One piece: every memory's chunk opened where one opens, projections, writes, and the main memory's answer
        [b, h, c, v], beside the queries if asked; states: those of the memories, and how many steps met their bound."""
        asked, own, present, raw_gates, u, *projected = given
        *generators, main = self.memories
        *states, bounded = states
        *opened, known = (
            memory.open(state, piece.opens[memory is main]) for memory, state in zip(self.memories, states, strict=True)
        )
        q, k, v, gates, near = self.project(opened, u, projected, raw_gates, *own)
        near = near if present is None else near & present[:, None]
        carry = main.transfer(known, gates) if present is None else None
        run = partial(Memory.run, pairs=Writes(k, v, gates, present, True, carry), graph_only=piece.graph_only)
        y, known = run(main, known, queries=q)
        written = (run(memory, state)[1] for memory, state in zip(generators, opened, strict=True))
        return torch.cat([y, q], -1) if asked else y, (*written, known, bounded + near.sum((1, 2)))

    def standing(self, state: SelfModifyingState) -> Weights:
        return self.memories[-1].standing(state.memories[-1])

    def project(
        self,
        states: list[MemoryState],
        u: Tensor,
        projected: list[Tensor],
        raw: Tensor,
        value_scale: Tensor,
        gate_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Gates, Tensor]:
        """Queries, keys, values and gates of a piece [b, h, c, .]: from the generators as they were when the chunk
        opened, or as they were projected; and where the step size comes within 1% of its bound."""
        answers: dict[str, Tensor] = {}
        for memory, state, group in zip(self.memories, states, self.groups, strict=False):
            answers |= zip(group, memory.at_anchor(state, u).unbind(2), strict=True)
        fixed = dict(zip(self.projected, projected, strict=True))
        q, k, v = (unit(answers[name]) if name in answers else fixed[name] for name in ("query", "key", "value"))
        momentum, *rest = raw.unbind(1)
        others = iter(rest)
        eta, kept = (answers[name][..., 0] if name in answers else next(others) for name in ("step_size", "retention"))
        step_size = (eta + gate_bias[:, 0, None]).sigmoid()
        log_retention = F.logsigmoid(kept + gate_bias[:, 1, None])
        gates = Gates(self.step_bound * step_size, momentum.sigmoid(), log_retention)
        return q, k, v * value_scale, gates, step_size.detach() > 0.99


def _bare(structure: Structure) -> Structure:
    """The structure without its residual, which can end in a gate."""
    if isinstance(structure, mlp | gated_mlp):
        return replace(structure, residual=False)
    if isinstance(structure, biased | features):
        return replace(structure, of=_bare(structure.of))
    if isinstance(structure, matrix):
        return structure
    raise ValueError(f"self_modifying: matrix() and mlp() memories can be made to end in a gate, not {structure}")
