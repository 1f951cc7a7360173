"""Memory Caching: the memory as it stood at the end of earlier segments is kept, and read beside the one of now."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.state import select
from nestling.memory.structure import Weights, plain

from .layer import SequenceMemory, sequence_memory
from .layout import Piece, lay_out
from .linear_caching import LinearCaching
from .linear_mixer import linear_mixer
from .lstm import lstm
from .mixer import Mixer, MixerModule, linear
from .scan import MemoryState, States, Writes
from .segments import Segments, begun, closed, reached, weigh
from .self_caching import SelfCaching
from .self_modifying import self_modifying
from .srwm import srwm

_READS = ("residual", "gated", "soup", "sparse")


@dataclass(frozen=True, repr=False)
class caching(Mixer):
    """A memory whose states at the ends of segments stay readable: the expression of `Caching`; of `LinearCaching`
    where the memory is a linear_mixer(), of `SelfCaching` where it is a self_modifying() or an srwm().

    segment: tokens, a multiple of the memory's chunk where that is part of the model. slots: how many ends are kept;
    the oldest makes room, so that the state does not grow with the document. read: "residual", the sum of all; "gated",
    weighted by what the token asks for; "soup", the weights averaged, read once (not of a linear_mixer()); "sparse",
    gated over the `top` best and the present. Source: 2602.24281. Oracles: `naive_blocks.caching`,
    tests/test_linear_caching.py, tests/test_self_caching.py.
    """

    memory: Mixer = sequence_memory()
    segment: int = 256
    read: Literal["residual", "gated", "soup", "sparse"] = "gated"
    slots: int = 16
    top: int = 4

    def __post_init__(self) -> None:
        memory = self.memory
        if isinstance(memory, lstm):
            raise ValueError(f"caching: a state is read again with a query, and {memory} has none: it is what it says")
        if not isinstance(memory, sequence_memory | linear_mixer | self_modifying | srwm):
            raise ValueError(
                "caching: states are kept of a sequence_memory(), linear_mixer(), self_modifying() or srwm(), "
                f"not of {memory}"
            )
        if self.segment < 1 or self.segment % self._chunk:
            raise ValueError(
                f"caching: segment must be a multiple of the memory's chunk {self._chunk}, got {self.segment}"
            )
        if self.read not in _READS:
            raise ValueError(f"caching: read must be one of {_READS}, got {self.read!r}")
        if self.read == "soup" and isinstance(memory, linear_mixer):
            raise ValueError(f"caching: read='soup' averages the weights of a memory, not the matrices of {memory}")
        if self.read == "soup" and isinstance(memory, self_modifying) and memory.read != "after":
            raise ValueError(f"caching: read='soup' averages weights after a token's own write, not those of {memory}")
        for name in ("slots", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"caching: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def _chunk(self) -> int:
        """Tokens of a chunk where it is part of the model."""
        if isinstance(self.memory, self_modifying):
            return max(self.memory.chunk, self.memory.projection_chunk)
        return self.memory.chunk if isinstance(self.memory, sequence_memory) else 1

    def build(
        self, dim: int, heads: int, generator: torch.Generator | None = None
    ) -> "Caching | LinearCaching | SelfCaching":
        top = self.top if self.read == "sparse" else None
        kept = (self.segment, self.slots)
        if isinstance(self.memory, linear_mixer):
            return LinearCaching(dim, heads, self.memory, *kept, self.read != "residual", top, generator)
        if isinstance(self.memory, self_modifying | srwm):
            return SelfCaching(dim, heads, self.memory, *kept, self.read, top, generator)
        return Caching(dim, heads, self, generator)


class CachingState(NamedTuple):
    """phase: tokens since the segment opened [b]; tail, memory: of the memory. cached: its weights at the ends of
    segments, the newest last [b, h, n, out, in]; means: of each of those segments' inputs [b, n, d], and which of
    them there are [b, n]; total [b, d] of the inputs of this segment so far, and how many tokens [b]."""

    phase: Tensor
    tail: Tensor
    memory: MemoryState
    cached: Weights
    means: Tensor
    exists: Tensor
    total: Tensor
    tokens: Tensor


class Caching(MixerModule):
    """Memory Caching (arXiv 2602.24281). M_i is the memory at the end of segment i, M_t that of now, s the segment
    of token t, and p_i the mean of segment i's inputs (of s: up to token t)::

        residual  y_t = M_t(q_t) + sum_{i<s} M_i(q_t)
        gated     y_t = g_s M_t(q_t) + sum_{i<s} g_i M_i(q_t),  g = softmax_{i<=s}(u_t . p_i / sqrt k), u = W_u x
        soup      y_t = M(q_t) with every weight g_s W_t + sum_{i<s} g_i W_i
        sparse    as gated, with the softmax over s and the `top` earlier segments of the largest u_t . p_i

    There is one gate a head: u_t and p_i are cut into heads. A segment goes on from the weights that the one before
    it ended on. Of the earlier segments the last `slots` are kept. "sparse" reads them all and drops the rest: what it
    saves is not time. "soup" averages a set of weights for every token, and is slow. x [b, t, d] -> [b, t, d].
    Oracle: `naive_blocks.caching`.
    """

    def __init__(
        self, dim: int, heads: int, expression: caching = caching(), generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.expression = expression
        assert isinstance(expression.memory, sequence_memory)
        self.memory = SequenceMemory(dim, heads, expression.memory, generator)
        self.asks: nn.Linear | None = None if expression.read == "residual" else linear(dim, dim, generator)

    def init_state(self, batch: int) -> CachingState:
        start, n = self.memory.init_state(batch), self.expression.slots
        cached = tuple(w.new_zeros(*w.shape[:2], n, *w.shape[2:]) for w in start.memory.running)
        total = self.memory.output.norm.new_zeros(batch, self.memory.qkv.in_features)
        return CachingState(*start, cached, *begun(total, n))

    def standing(self, state: CachingState) -> Weights:
        return self.memory.memory.standing(state.memory)

    def forward(
        self,
        x: Tensor,
        state: CachingState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, CachingState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        sizes = (self.memory.memory.chunk, self.expression.segment)
        layout = lay_out(state.phase, x.shape[1], sizes, reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        spread = layout.spread(x).to(state.total.dtype)
        with torch.autocast(x.device.type, enabled=False):
            asked = None if self.asks is None else layout.cut(self.asks(spread), 1)
        tokens = layout.cut(spread, 1)
        own = list(zip(tokens, asked or (None,) * len(tokens), strict=True))

        def step(piece: Piece, pairs: Writes, queries: Tensor, own: Any, states: States) -> tuple[Tensor, States]:
            x, asked = own
            return self._step(x, asked, piece, pairs, queries, states)

        y, states, tail = self.memory.through(x, state.tail, layout, _packed(state), _packed(start), step, own)
        memory, kept = states
        return self.memory.output(y, x), CachingState(layout.phase, tail, memory, kept.running, *kept.rule[0])

    def _step(
        self, x: Tensor, asked: Tensor | None, piece: Piece, pairs: Writes, queries: Tensor, states: States
    ) -> tuple[Tensor, States]:
        """One piece of inputs [b, c, d], and of what they ask the caches for [b, c, d]."""
        memory, kept = states
        if piece.opens[1] is not False:
            ended = self.memory.memory.open(memory, True)
            kept = self._keep(kept, self.memory.memory.standing(ended), piece.opens[1])
        memory = self.memory.memory.open(memory, piece.opens[0])
        segments: Segments = kept.rule[0]
        totals, counts = reached(segments, x, pairs.valid)
        n = int(segments.exists.sum(1).max())  # slots that some row has filled
        gates = None
        if asked is not None:
            top = self.expression.top if self.expression.read == "sparse" else None
            present = totals / counts.clamp(min=1)[..., None]
            gates = weigh(segments, asked, present, self.memory.heads, n, top)
        cached = tuple(weight[:, :, weight.shape[2] - n :] for weight in kept.running)
        if self.expression.read == "soup":
            assert gates is not None
            y, memory = self._soup(memory, pairs, queries, cached, gates)
        else:
            y, memory = self.memory.memory.run(memory, pairs, queries)
            y = self._join(y, queries, cached, segments.exists[:, segments.exists.shape[1] - n :], gates)
        after = segments._replace(total=totals[:, -1], tokens=counts[:, -1])
        return y, (memory, kept._replace(rule=(after,)))

    def _keep(self, kept: MemoryState, ended: Weights, opens: bool | Tensor) -> MemoryState:
        """The weights on which a segment ended join the others in the rows in which the next one opens."""
        rows, pushed = closed(kept.rule[0], opens)
        pairs = zip(kept.running, ended, strict=True)
        weights = tuple(torch.cat([old[:, :, 1:], new.unsqueeze(2)], 2) for old, new in pairs)
        return select(rows, MemoryState((), weights, (pushed,)), kept)

    def _join(self, now: Tensor, queries: Tensor, cached: Weights, exists: Tensor, gates: Tensor | None) -> Tensor:
        """What the memory of now reads [b, h, c, v] with what the cached ones read."""
        read = self.memory.memory.structure.forward(plain(cached), queries.unsqueeze(2))[0]  # [b, h, n, c, v]
        if gates is None:
            return now + torch.where(exists[:, None, :, None, None], read, 0.0).sum(2)
        return gates[..., :1] * now + torch.einsum("bhcn,bhncv->bhcv", gates[..., 1:], read)

    def _soup(
        self, memory: MemoryState, pairs: Writes, queries: Tensor, cached: Weights, gates: Tensor
    ) -> tuple[Tensor, MemoryState]:
        """Token by token, since every token has weights of its own to average."""
        reads = []
        for t in range(queries.shape[2]):
            here = None if pairs.valid is None else pairs.valid[:, t : t + 1]
            before = memory
            _, memory = self.memory.memory.run(memory, pairs.at(t)._replace(valid=here, carry=None))
            now, of = {
                "after": (memory.running, memory),
                "before": (before.running, before),
                "boundary": (memory.anchor, before),
            }[self.memory.memory.read]
            g = gates[:, :, t, :, None, None]
            mixed = tuple(
                g[:, :, 0] * weight + (g[:, :, 1:] * old).sum(2)
                for weight, old in zip(self.memory.memory.exposed(now, of), cached, strict=True)
            )
            reads.append(self.memory.memory.structure.forward(plain(mixed), queries[:, :, t : t + 1])[0])
        return torch.cat(reads, 2), memory


def _packed(state: CachingState) -> States:
    """As states of memories: the one that is written, and those that are cached, side by side."""
    segments = Segments(state.means, state.exists, state.total, state.tokens)
    return state.memory, MemoryState((), state.cached, (segments,))
