"""Memory Caching over the linear recurrences of `linear_mixer`: what stood at the ends of segments is read again."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.state import map_tensors, select

from .layout import lay_out
from .linear_mixer import LinearMixer, linear_mixer
from .mixer import MixerModule, linear
from .segments import Segments, begun, closed, reached, weigh
from .streams import Given


class LinearCachingState(NamedTuple):
    """phase: tokens since the segment opened [b]; tail, memory: of the recurrence. cached: its matrices at the ends of
    segments, the newest last [b, n, h, ., k]; segments: what they are weighed by."""

    phase: Tensor
    tail: Tensor
    memory: Any
    cached: Any
    segments: Segments


class _Running(NamedTuple):
    """What changes from piece to piece."""

    memory: Any
    cached: Any
    segments: Segments


class LinearCaching(MixerModule):
    """`Caching` of a recurrence that is no sequence_memory: what a token reads of a cached state is what it would read
    if it neither wrote nor forgot anything (`StreamsModule.quiet`), and the gates are the same. RWKV-7's bonus is no
    read of a memory, and the present's alone. x [b, t, d] -> [b, t, d]. Source: Memory Caching (2602.24281). Oracle:
    tests/test_linear_caching.py.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        memory: linear_mixer,
        segment: int,
        slots: int,
        gated: bool,
        top: int | None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.segment, self.slots, self.top = heads, segment, slots, top
        self.memory = LinearMixer(dim, heads, memory, generator)
        self.asks: nn.Linear | None = linear(dim, dim, generator) if gated else None

    def init_state(self, batch: int) -> LinearCachingState:
        start, n = self.memory.init_state(batch), self.slots
        cached = map_tensors(lambda x: torch.zeros_like(x)[:, None].expand(-1, n, *x.shape[1:]), start.memory)
        total = start.tail.new_zeros(batch, self.memory.project.in_features)
        segments = begun(total, n)
        return LinearCachingState(
            segments.tokens.clone(), start.tail, start.memory, map_tensors(Tensor.contiguous, cached), segments
        )

    def forward(
        self,
        x: Tensor,
        state: LinearCachingState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, LinearCachingState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        layout = lay_out(state.phase, x.shape[1], (self.segment,), reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        given, tail = self.memory.given(x, state.tail, layout)
        running = _Running(state.memory, state.cached, state.segments)
        fresh, reads = _Running(start.memory, start.cached, start.segments), []
        with torch.autocast(x.device.type, enabled=False):
            tokens = layout.cut(layout.spread(x).to(state.segments.total.dtype), 1)
            for piece, own, *parts in zip(layout.pieces, tokens, *(layout.cut(part, 1) for part in given), strict=True):
                if piece.reset is not None:
                    running = select(piece.reset, fresh, running)
                if piece.opens[0] is not False:
                    running = self._close(running, piece.opens[0])
                y, running = self._piece(own, tuple(parts), layout.present(piece), running)
                reads.append(y)
        y = layout.gather(torch.cat(reads, 1)).transpose(1, 2)
        return self.memory.output(y, x), LinearCachingState(layout.phase, tail, *running)

    def _close(self, running: _Running, opens: bool | Tensor) -> _Running:
        """The matrices on which a segment ended join the others in the rows in which the next one opens."""
        rows, segments = closed(running.segments, opens)
        ended = map_tensors(lambda old, new: torch.cat([old[:, 1:], new[:, None]], 1), running.cached, running.memory)
        return select(rows, _Running(running.memory, ended, segments), running)

    def _piece(self, x: Tensor, parts: Given, held: Tensor | None, running: _Running) -> tuple[Tensor, _Running]:
        """Inputs x [b, c, d] and streams of one piece -> what is read [b, c, h, v]."""
        totals, counts = reached(running.segments, x, held)
        after = running.segments._replace(total=totals[:, -1], tokens=counts[:, -1])
        y, memory = self.memory.run(parts, running.memory, held)
        n = int(running.segments.exists.sum(1).max())  # slots that some row has filled
        found = self._recalled(parts, running.cached, n) if n else y.new_zeros(len(y), 0, *y.shape[1:])
        if self.asks is None:
            return y + found.sum(1), _Running(memory, running.cached, after)
        present = totals / counts.clamp(min=1)[..., None]
        gates = weigh(running.segments, self.asks(x), present, self.heads, n, self.top)
        own = gates[..., 0].transpose(1, 2)[..., None]
        y = own * y + torch.einsum("bhcn,bnchv->bchv", gates[..., 1:], found)
        return y, _Running(memory, running.cached, after)

    def _recalled(self, parts: Given, cached: Any, n: int) -> Tensor:
        """What the tokens read of the last n slots [b, n, c, h, v]; of one that is not filled, zero."""
        wide = tuple(part[:, None].expand(-1, n, *part.shape[1:]).flatten(0, 1) for part in parts)
        kept = map_tensors(lambda slots: slots[:, self.slots - n :].flatten(0, 1), cached)
        found, _ = self.memory.run(self.memory.streams.quiet(wide), kept, None)
        return found.unflatten(0, (len(parts[0]), n))
