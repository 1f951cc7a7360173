"""A memory as a layer: keys, values, queries and gates projected from the tokens. Titans and its kin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.attentional_bias import Bounded
from nestling.memory.part import LATER
from nestling.memory.retention import decay_to_start
from nestling.memory.rule import Gates, Rule, clip, dampen, momentum, normalize, retain
from nestling.memory.structure import Weights

from .compiled import chunk_step
from .convolution import ShortConvolution
from .gating import Asked, Gating, gates_of, sigmoid_gates
from .layout import Layout, Piece, lay_out
from .mixer import Mixer, MixerModule, Output, check_width, linear, step_bound
from .preparation import Preparation, silu_unit
from .scan import Memory, MemoryState, States, Writes, scan
from .steps import gates_in_turn, in_turn


class SequenceState(NamedTuple):
    """What a sequence layer remembers of the document it is in. phase: tokens since its chunk opened [b]."""

    phase: Tensor
    tail: Tensor  # the convolution's last inputs [b, width - 1, 3 d]
    memory: MemoryState


@dataclass(frozen=True, repr=False)
class sequence_memory(Memory, Mixer):
    """A memory with projected keys, values, queries and gates: the expression of `SequenceMemory`.

    steps: how many pairs a token writes, one after the other, before it reads once; it forgets with the first of them.
    read="before" is before the first. A window and a rule's clock (`every`) count pairs. Gradients frozen over a chunk
    are frozen over all of its pairs: with gradient_at="token" every step sees what those before it wrote. Sources:
    Titans, Miras; several steps: DeltaProduct (2502.10297). Oracles: those of its parts, of each named one in
    `sequence.zoo`; several steps: tests/test_steps.py."""

    rule: Rule = retain(decay_to_start(), momentum(dampen(normalize(clip()))))
    convolution: int = 4
    gating: Gating = sigmoid_gates()
    preparation: Preparation = silu_unit()
    steps: int = field(default=1, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1 a token, got {self.steps}")
        self.gating.fits(self)

    @property
    def chunk_pairs(self) -> int:
        return self.chunk * self.steps

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "SequenceMemory":
        return SequenceMemory(dim, heads, self, generator)


class SequenceMemory(MixerModule):
    """One memory a head, written and read token by token, with learned projections around it.

    k, v, q = heads of convolution(W x), as `preparation` makes them (SiLU, k and q L2-normalised); step size, momentum
    and log retention for each head and token as `gating` chooses them (sigmoids of projections); y = what the memory
    reads for q, through norm, gate and output projection. With several `steps` a token there are as many k, v, step
    sizes and momenta. The initial weights are parameters: the outer loss learns them through every write.
    x [b, t, d] -> [b, t, d]. Sources: Titans 3 and 4.4; Miras. Oracle: memory.naive.
    Raises ValueError when heads do not divide dim, or parts do not fit together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        memory: sequence_memory = sequence_memory(),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_width(dim, heads)
        self.heads, self.memory = heads, memory
        head_dim, width = dim // heads, (1 + 2 * memory.steps) * dim
        self.qkv = linear(width, dim, generator)
        self.convolution = ShortConvolution(width, memory.convolution, generator)
        asked = Asked(gates_of(memory.rule), memory.steps)
        self.gates = memory.gating.build(dim, heads, head_dim, generator, asked)
        self.start = nn.ParameterList(memory.structure.init(head_dim, head_dim, (heads,), generator, unit_keys=True))
        self.output = Output(dim, heads, generator)
        self.widths = (head_dim, head_dim)
        bound = 1.0 if memory.exact else step_bound(memory.chunk_pairs, head_dim)
        self.step_bound = bound / memory.window  # every pair is in so many steps

    def init_state(self, batch: int) -> SequenceState:
        weights = tuple(weight.expand(batch, *weight.shape).contiguous() for weight in self.start)
        phase = torch.zeros(batch, dtype=torch.int64, device=weights[0].device)
        return SequenceState(phase, self.convolution.init_state(batch), self.memory.begin(weights, self.widths))

    def forward(
        self,
        x: Tensor,
        state: SequenceState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, SequenceState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        layout = self._layout(state.phase, x.shape[1], reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        step = chunk_step(self.step, self.memory.chunk, self.step_options)
        y, (memory,), tail = self.through(x, state.tail, layout, (state.memory,), (start.memory,), step)
        return self.output(y, x), SequenceState(layout.phase, tail, memory)

    def _layout(self, phase: Tensor, length: int, reset: Tensor | None, valid: Tensor | None) -> Layout:
        """By chunks; for kernels, which have chunks of their own, one piece where the rows agree."""
        if self.memory.way == "kernels":
            phase = torch.zeros_like(phase)
            whole = lay_out(phase, length, (length,), reset, valid)
            if whole.source is None:
                return whole
        return lay_out(phase, length, (self.memory.chunk,), reset, valid)

    def standing(self, state: SequenceState) -> Weights:
        return self.memory.standing(state.memory)

    def through(
        self,
        x: Tensor,
        tail: Tensor,
        layout: Layout,
        states: States,
        starts: States,
        step: "MemoryStep",
        own: Sequence[Any] = (),
    ) -> tuple[Tensor, States, Tensor]:
        """Project x [b, t, d] and go through the layout's pieces with `step`: what was read [b, h, t, v], by token;
        the states and the convolution's tail after it. The first of the states is that of this memory. own: for every
        piece, the tensors in tuples that `step` needs besides; gradients may reach no others (`scan.scan`)."""
        mixed, tail = self.convolution(layout.spread(self.qkv(x)), tail, layout)
        raw = layout.spread(self.gates(x))
        with torch.autocast(mixed.device.type, enabled=False):
            dtype = self.start[0].dtype
            given = self._given(mixed.to(dtype), raw.to(dtype), layout, states[0], own)

            def one(piece: Piece, given: tuple[Writes, Tensor, Any], states: States) -> tuple[Tensor, States]:
                return step(piece, *given, states)

            y, states = scan(layout, states, starts, given, one, checkpoint=self.memory.checkpoint)
        return layout.gather(y.transpose(1, 2)).transpose(1, 2), states, tail

    def _given(
        self, mixed: Tensor, raw: Tensor, layout: Layout, state: MemoryState, own: Sequence[Any]
    ) -> list[tuple[Writes, Tensor, Any]]:
        """For every piece what is written, queries, and its `own`; from streams and gates as they were projected."""
        n = self.memory.steps
        streams = self.memory.preparation.streams(mixed, self.heads, n)
        q, *kv = streams.split([self.heads, n * self.heads, n * self.heads], 1)
        queries = layout.cut(q, -2)
        keys, values = (layout.cut(in_turn(part.unflatten(1, (n, -1)).movedim(1, 0)), -2, n) for part in kv)

        chosen = self.gates.placed(self.gates.choose(raw, self.step_bound), layout.places(self.memory.chunk))
        told = self.gates.more(raw)
        if isinstance(self.memory.attentional_bias, Bounded) and "bound" in told:
            told["bound"] = told["bound"] * self.memory.attentional_bias.bound
        more = {name: layout.cut(in_turn(part) if n > 1 else part, 2, n) for name, part in told.items()}
        cut = (layout.cut(gate, 2, n) for gate in gates_in_turn(chosen, n))  # type: ignore[arg-type]
        gates = [Gates(*piece) for piece in zip(*cut, strict=True)]
        # the transfers of all pieces at once, where there are no empty slots, and memory for them
        whole = layout.valid is None and not self.memory.checkpoint
        carry = self.memory.transfers(state, gates) if whole else [None] * len(gates)

        given = []
        for i, piece in enumerate(layout.pieces):
            pairs = Writes(keys[i], values[i], gates[i], layout.present(piece), carry=carry[i], steps=n)
            pairs = pairs._replace(**{name: parts[i] for name, parts in more.items()})  # type: ignore[arg-type]
            given.append((pairs, queries[i], own[i] if own else ()))
        return given

    def step(self, piece: Piece, pairs: Writes, queries: Tensor, own: Any, states: States) -> tuple[Tensor, States]:
        """One piece: open the chunk where one opens, write, and read."""
        opened = self.memory.open(states[0], piece.opens[0])
        y, after = self.memory.run(opened, pairs, queries, graph_only=piece.graph_only)
        return y, (after, *states[1:])


MemoryStep = Callable[[Piece, Writes, Tensor, Any, States], tuple[Tensor, States]]
"""(piece, what is written, queries [b, h, c, k], what else the step was given, states) -> what is read [b, h, c, v],
states."""
