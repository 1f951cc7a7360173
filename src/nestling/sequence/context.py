"""Memory as context: attention over persistent tokens, what the memory reads, and the segment itself (Titans)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.state import select
from nestling.memory.structure import Weights, plain

from .attention import attend, check_turns, prefix
from .convolution import ShortConvolution
from .elementwise import Heads
from .layer import sequence_memory
from .layout import lay_out
from .mixer import Mixer, MixerModule, check_width, linear, merge_heads, split_heads
from .scan import Memory
from .titans import MemoryGate


@dataclass(frozen=True, repr=False)
class mac(Mixer):
    """Memory as context: the expression of `MemoryAsContext`. segment: tokens that attend to one another, and between
    reads of the memory (the memory's own chunk is another thing); persistent: learned tokens that every query sees;
    convolution: width of the short convolution on the attention's q, k, v. Source: Titans 21 to 25. Oracle:
    `naive_blocks.mac`."""

    memory: Mixer = sequence_memory()
    segment: int = 256
    persistent: int = 16
    convolution: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.memory, Memory):
            raise ValueError(f"mac reads a memory before it is written, which {self.memory} has none to do with")
        if self.segment < 1:
            raise ValueError(f"mac: segment must be at least 1 token, got {self.segment}")
        if self.persistent < 0:
            raise ValueError(f"mac: persistent must be at least 0 tokens, got {self.persistent}")

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "MemoryAsContext":
        return MemoryAsContext(dim, heads, self, generator)


class ContextState(NamedTuple):
    """phase: tokens since the segment opened [b]; tail: the convolution's; memory: the memory's own state; opened:
    its weights when the segment opened; keys and values [b, h, 2, segment, k] of the segment so far: of what was read
    for its tokens, and of the tokens; zero where none has come yet."""

    phase: Tensor
    tail: Tensor
    memory: Any
    opened: Weights
    keys: Tensor
    values: Tensor


class _Running(NamedTuple):
    """What changes from piece to piece."""

    memory: Any
    opened: Weights
    keys: Tensor
    values: Tensor


class MemoryAsContext(MixerModule):
    """Titans' memory as context (equations 21 to 25). For the segment S with memory M as it stood when S opened::

        h_t = norm(M(q_t)), q_t = unit heads of SiLU(W_Q x_t)
        y_t = attention of x_t over [persistent | h_j, j <= t | x_j, j <= t], j in the segment of t
        M is written with y_t (`memory` run over y)         o_t = y_t (x) (what it then reads for y_t)

    (x) is `MemoryGate`. Two places where the letter of the paper would let a token see later ones: a read h_j is made
    with token j's query, so tokens before j must not see it although it stands before the segment; and the gate's
    read is of the memory after token t's write, not after the segment's. h_j and x_j have the position of j, the
    persistent tokens none; only the x_j have been through the convolution. x [b, t, d] -> [b, t, d].
    Oracle: `naive_blocks.mac`. Raises ValueError when heads do not divide dim, or a head is of odd width.
    """

    def __init__(self, dim: int, heads: int, expression: mac = mac(), generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_width(dim, heads)
        check_turns(dim, heads)
        assert isinstance(expression.memory, Memory)
        self.heads, self.segment, self.structure = heads, expression.segment, expression.memory.structure
        self.memory = expression.memory.build(dim, heads, generator)
        self.query = linear(dim, dim, generator)
        self.norm = nn.Parameter(torch.ones(dim))
        self.qkv = linear(3 * dim, dim, generator)
        self.convolution = ShortConvolution(3 * dim, expression.convolution, generator)
        self.project = linear(dim, dim, generator)
        self.gate = MemoryGate(dim)
        self.persistent: nn.Parameter | None = None
        if expression.persistent:
            self.persistent = nn.Parameter(torch.randn(expression.persistent, dim, generator=generator))

    def init_state(self, batch: int) -> ContextState:
        memory = self.memory.init_state(batch)
        weight = self.project.weight
        empty = weight.new_zeros(batch, self.heads, 2, self.segment, weight.shape[0] // self.heads)
        phase = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        opened = self.memory.standing(memory)
        return ContextState(phase, self.convolution.init_state(batch), memory, opened, empty, empty)

    def forward(
        self,
        x: Tensor,
        state: ContextState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, ContextState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        layout = lay_out(state.phase, x.shape[1], (self.segment,), reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        tokens = layout.spread(x)
        mixed, tail = self.convolution(layout.spread(self.qkv(x)), state.tail, layout)
        asked = Heads.apply(self.query(tokens).to(self.norm.dtype), self.heads, self.heads)
        always = None if self.persistent is None else prefix(self.persistent, self.qkv.weight, self.heads)
        running = _Running(state.memory, state.opened, state.keys, state.values)
        fresh = _Running(start.memory, start.opened, start.keys, start.values)
        out = []
        for piece, streams, q in zip(layout.pieces, layout.cut(mixed, 1), layout.cut(asked, 2), strict=True):
            if piece.reset is not None:
                running = select(piece.reset, fresh, running)
            running = self._open(running, piece.opens[0])
            first = 0 if piece.opens[0] is True or layout.valid is not None else int(state.phase[0])
            present = layout.present(piece)
            y, running = self._attend(streams, q, running, first, present, always)
            m, memory = self.memory(y, running.memory, valid=present)
            out.append(self.gate(y, m))
            running = running._replace(memory=memory)
        return layout.gather(torch.cat(out, 1)), ContextState(layout.phase, tail, *running)

    def _open(self, running: _Running, rows: bool | Tensor) -> _Running:
        """A segment opens in `rows`: what is read from here on is the memory as it stands, and nothing is cached."""
        if rows is False:
            return running
        empty = torch.zeros_like(running.keys)
        opened = _Running(running.memory, self.memory.standing(running.memory), empty, empty)
        return opened if rows is True else select(rows, opened, running)

    def _attend(
        self,
        streams: Tensor,
        asked: Tensor,
        running: _Running,
        first: int,
        present: Tensor | None,
        always: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, _Running]:
        """A piece of one segment, from its token `first` on: convolved q, k, v [b, c, 3 d] and the memory's queries
        [b, h, c, k] -> what was attended to [b, c, d], with the caches filled."""
        with torch.autocast(asked.device.type, enabled=False):
            found = self.structure.forward(plain(running.opened), asked)[0]
        h = merge_heads(F.rms_norm(found, found.shape[-1:], eps=1e-6)) * self.norm
        q, *of_tokens = (split_heads(part, self.heads) for part in streams.chunk(3, -1))
        of_reads = (
            split_heads(part, self.heads) for part in F.linear(h, self.qkv.weight[len(self.norm) :]).chunk(2, -1)
        )
        stop = first + q.shape[2]
        caches = []
        for before, *both in zip((running.keys, running.values), of_reads, of_tokens, strict=True):
            here = torch.stack(both, 2)
            if present is not None:  # an empty slot keeps what came before the call
                here = torch.where(present[:, None, None, :, None], here, before[..., first:stop, :])
            caches.append(torch.cat([before[..., :first, :], here, before[..., stop:, :]], -2))
        position = torch.arange(stop, device=q.device)
        seen = position[first:, None] >= position
        keys, values = (cache[..., :stop, :].flatten(2, 3) for cache in caches)
        places = (position[first:], position.repeat(2))
        y = attend(q, keys, values, places, seen.repeat(1, 2), always)
        return self.project(merge_heads(y)), running._replace(keys=caches[0], values=caches[1])
