"""Memory Caching over memories that make their own keys: `self_modifying` and `srwm`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.state import select
from nestling.memory.structure import Weights

from .layout import lay_out
from .mixer import MixerModule, linear
from .segments import Segments, begun, closed, reached, weigh
from .self_modifying import self_modifying
from .srwm import srwm


class SelfCachingState(NamedTuple):
    """phase: tokens since the segment opened [b]; memory: the state of the mixer itself. cached: what it answers with,
    as that stood at the ends of segments, the newest last [b, h, n, out, in]; segments: what they are weighed by."""

    phase: Tensor
    memory: Any
    cached: Weights
    segments: Segments


class _Running(NamedTuple):
    """What changes from piece to piece."""

    memory: Any
    cached: Weights
    segments: Segments


class SelfCaching(MixerModule):
    """`Caching` of a memory whose queries are the present's: what is kept of a segment are the weights that answer
    (`self_modifying`'s main memory; `srwm`'s rows for answers), and every token asks them with the query that it asks
    the present with (unit W_q x_t, or M_q(u_t) where that is a memory; phi(x_t)). Keys, values and step sizes are
    always the present's. "soup" of `srwm` is "gated": its answer is linear in the matrix. x [b, t, d] -> [b, t, d].
    Source: Memory Caching (2602.24281). Oracle: tests/test_self_caching.py.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        memory: self_modifying | srwm,
        segment: int,
        slots: int,
        read: str,
        top: int | None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.segment, self.slots, self.top = dim, heads, segment, slots, top
        self.memory: Any = memory.build(dim, heads, generator)
        self.asks: nn.Linear | None = None if read == "residual" else linear(dim, dim, generator)
        self.mixes = read == "soup" and isinstance(memory, self_modifying)

    def init_state(self, batch: int) -> SelfCachingState:
        start, n = self.memory.init_state(batch), self.slots
        cached = tuple(w.new_zeros(*w.shape[:2], n, *w.shape[2:]) for w in self.memory.answering(start))
        total = cached[0].new_zeros(batch, self.dim)
        segments = begun(total, n)
        return SelfCachingState(segments.tokens.clone(), start, cached, segments)

    def standing(self, state: SelfCachingState) -> Weights:
        return self.memory.standing(state.memory)

    def forward(
        self,
        x: Tensor,
        state: SelfCachingState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, SelfCachingState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        layout = lay_out(state.phase, x.shape[1], (self.segment,), reset, valid)
        if not layout.pieces:  # nothing, or nothing but padding
            return torch.zeros_like(x), state
        running, fresh, reads = _Running(*state[1:]), _Running(*start[1:]), []
        for piece, tokens in zip(layout.pieces, layout.cut(layout.spread(x), 1), strict=True):
            if piece.reset is not None:
                running = select(piece.reset, fresh, running)
            if piece.opens[0] is not False:
                running = self._close(running, piece.opens[0])
            y, running = self._piece(tokens, layout.present(piece), running)
            reads.append(y.transpose(1, 2))
        y = layout.gather(torch.cat(reads, 1)).transpose(1, 2)
        return self.memory.output(y, x), SelfCachingState(layout.phase, *running)

    def _close(self, running: _Running, opens: bool | Tensor) -> _Running:
        """What answered where a segment ended joins the others in the rows in which the next one opens."""
        rows, segments = closed(running.segments, opens)
        pairs = zip(running.cached, self.memory.answering(running.memory), strict=True)
        kept = tuple(torch.cat([old[:, :, 1:], new.unsqueeze(2)], 2) for old, new in pairs)
        return select(rows, running._replace(cached=kept, segments=segments), running)

    def _piece(self, x: Tensor, held: Tensor | None, running: _Running) -> tuple[Tensor, _Running]:
        """Inputs x [b, c, d] of one piece -> what is read [b, h, c, v]."""
        wide = x.to(running.segments.total.dtype)
        totals, counts = reached(running.segments, wide, held)
        after = running.segments._replace(total=totals[:, -1], tokens=counts[:, -1])
        n = int(running.segments.exists.sum(1).max())  # slots that some row has filled
        cached = tuple(weight[:, :, self.slots - n :] for weight in running.cached)
        gates = None
        if self.asks is not None:
            with torch.autocast(x.device.type, enabled=False):
                present = totals / counts.clamp(min=1)[..., None]
                gates = weigh(running.segments, self.asks(wide), present, self.heads, n, self.top)
        if self.mixes:
            assert gates is not None
            y, memory = self._soup(x, held, running.memory, cached, gates)
        else:
            y, queries, memory = self.memory.answer(x, running.memory, held)
            found = self.memory.recall(cached, queries.unsqueeze(2))  # [b, h, n, c, v]; of an empty slot, void
            exists = running.segments.exists[:, None, self.slots - n :, None, None]
            found = torch.where(exists, found, 0.0)
            if gates is None:
                y = y + found.sum(2)
            else:
                y = gates[..., :1] * y + torch.einsum("bhcn,bhncv->bhcv", gates[..., 1:], found)
        return y, _Running(memory, running.cached, after)

    def _soup(self, x: Tensor, held: Tensor | None, memory: Any, cached: Weights, gates: Tensor) -> tuple[Tensor, Any]:
        """Token by token, since every token has weights of its own to average."""
        reads = []
        for t in range(x.shape[1]):
            _, queries, memory = self.memory.answer(
                x[:, t : t + 1], memory, None if held is None else held[:, t : t + 1]
            )
            g = gates[:, :, t, :, None, None]
            pairs = zip(self.memory.answering(memory), cached, strict=True)
            mixed = tuple(g[:, :, 0] * weight + (g[:, :, 1:] * old).sum(2) for weight, old in pairs)
            reads.append(self.memory.recall(mixed, queries))
        return torch.cat(reads, 2), memory
