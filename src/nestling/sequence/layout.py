"""Where each token of a batch lies in its row's chunks: phases, document starts, padding.

The chunks of a row are counted from its last document start, and go on over calls. Rows that agree are sliced;
rows that differ are laid out on a grid of slots on which all their chunks line up, with empty slots between,
and empty slots change nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Slots [start, stop) that lie in one chunk of every size."""

    start: int
    stop: int
    opens: tuple[bool | Tensor, ...]  # per chunk size: does a chunk open here (for which rows [b])
    reset: Tensor | None  # rows [b] that begin a new document here
    graph_only: bool = False  # it is gone through again, for its gradients: what comes out may hold anything


class Layout(NamedTuple):
    """How one call's tokens [b, t] become pieces of slots [b, s]."""

    pieces: tuple[Piece, ...]
    phase: Tensor  # tokens since the last chunk of the largest size opened, after this call [b]
    begins: Tensor | None  # rows whose first token starts a document, where the layout needs no slots [b]
    source: Tensor | None  # the token in each slot [b, s]; None: slot = token
    slot: Tensor | None  # the slot of each token [b, t]
    valid: Tensor | None  # slots that hold a token [b, s]
    document: Tensor | None  # which of the row's documents each slot belongs to [b, s]
    first: Tensor | None  # the slot at which each row goes on from before the call [b]
    stop: Tensor | None  # the slot after the row's last token [b]

    def spread(self, x: Tensor) -> Tensor:
        """[b, t, ...] by token -> [b, s, ...] by slot, zero in empty slots."""
        if self.source is None or self.valid is None:
            return x
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        held = self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2))
        return torch.where(held, x[rows, self.source], 0.0)

    def cut(self, x: Tensor, dim: int, steps: int = 1) -> tuple[Tensor, ...]:
        """`x` by slot along `dim`, or with so many `steps` a slot, piece by piece. One cut for all pieces: its gradient
        is one concatenation, where that of a slice each would be as long as `x` for every piece."""
        return x.split([(piece.stop - piece.start) * steps for piece in self.pieces], dim)

    def present(self, piece: Piece) -> Tensor | None:
        """The slots of a piece that hold a token [b, c]; None where all do."""
        if self.valid is None:
            return None
        found = self.valid[:, piece.start : piece.stop]
        return None if bool(found.all()) else found

    def places(self, chunk: int) -> Tensor:
        """How far each slot [s] is from where its chunk opened, for one of the chunk sizes."""
        last = self.pieces[-1].stop
        if self.valid is None:  # slots begin where the rows stood, all alike
            return (torch.arange(last, device=self.phase.device) - last + self.phase[0]) % chunk
        return torch.arange(last, device=self.phase.device) % chunk

    def gather(self, y: Tensor) -> Tensor:
        """[b, s, ...] by slot -> [b, t, ...] by token."""
        if self.slot is None:
            return y
        if y.shape[1] == 0:  # nothing but padding
            return y.new_zeros(*self.slot.shape, *y.shape[2:])
        return y[torch.arange(y.shape[0], device=y.device)[:, None], self.slot]


def lay_out(
    phase: Tensor,
    length: int,
    chunks: tuple[int, ...],
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> Layout:
    """The layout of `length` tokens a row, from phases [b], document starts [b, t] and tokens present [b, t].

    Raises ValueError when one chunk size does not divide the largest.
    """
    frame = max(chunks)
    if any(frame % chunk for chunk in chunks):
        raise ValueError(f"chunk sizes must divide the largest of them, got {chunks}")
    if not len(phase):  # no rows: nothing to go through
        return Layout((), phase, None, None, None, None, None, None, None)
    if reset is not None and not bool(reset.any()):
        reset = None
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is None and (reset is None or not bool(reset[:, 1:].any())):
        begins = None if reset is None else reset[:, 0]
        started = phase if begins is None else torch.where(begins, torch.zeros_like(phase), phase)
        phases = started.tolist()
        if len(set(phases)) == 1:
            return _uniform(started, length, chunks, frame, phases[0], begins)
    return _general(phase, length, chunks, frame, reset, valid)


def _cuts(first: int, stop: int, step: int) -> list[int]:
    return [first, *range(first // step * step + step, stop, step)]


def _uniform(
    phase: Tensor, length: int, chunks: tuple[int, ...], frame: int, first: int, begins: Tensor | None
) -> Layout:
    starts = _cuts(first, first + length, min(chunks)) if length else []
    stops = [*starts[1:], first + length]
    pieces = tuple(
        Piece(
            start - first,
            stop - first,
            tuple(start % chunk == 0 for chunk in chunks),
            begins if start == first else None,
        )
        for start, stop in zip(starts, stops, strict=False)
    )
    return Layout(pieces, (phase + length) % frame, begins, None, None, None, None, None, None)


def _general(
    phase: Tensor, length: int, chunks: tuple[int, ...], frame: int, reset: Tensor | None, valid: Tensor | None
) -> Layout:
    b, device = phase.shape[0], phase.device
    valid = torch.ones(b, length, dtype=torch.bool, device=device) if valid is None else valid
    reset = torch.zeros_like(valid) if reset is None else reset & valid
    document = reset.long().cumsum(1)  # [b, t], 0 is the one that was being read before the call
    counts = torch.zeros(b, int(document.max()) + 1 if length else 1, dtype=torch.int64, device=device)
    counts.scatter_add_(1, document, valid.long())
    before = (counts.cumsum(1) - counts).gather(1, document)
    rank = valid.long().cumsum(1) - 1 - before  # within its document, in this call
    first = torch.where(counts[:, 0] > 0, phase, torch.zeros_like(phase))
    rank = torch.where(document == 0, rank + first[:, None], rank)
    ends = counts.clone()
    ends[:, 0] += first
    lengths = (ends + frame - 1) // frame * frame
    offset = lengths.cumsum(1) - lengths
    slot = offset.gather(1, document) + rank
    total = int((slot + 1).where(valid, 0).max()) if length else 0

    source = torch.zeros(b, total + 1, dtype=torch.int64, device=device)  # the last column takes the padding
    filled = torch.zeros(b, total + 1, dtype=torch.bool, device=device)
    slot = torch.where(valid, slot, torch.full_like(slot, total))
    source.scatter_(1, slot, torch.arange(length, device=device).expand(b, length))
    filled.scatter_(1, slot, valid)
    last = torch.where(valid, slot, -1).amax(1) if length else torch.full_like(phase, -1)

    begins = torch.zeros(b, total + 1, dtype=torch.bool, device=device)
    begins.scatter_(1, torch.where(reset, slot, torch.full_like(slot, total)), reset)
    pieces = []
    for start in range(0, total, min(chunks)):
        live = (first <= start) & (start <= last)
        opens = tuple(live if start % chunk == 0 else False for chunk in chunks)
        starts_here = begins[:, start]
        pieces.append(
            Piece(start, min(start + min(chunks), total), opens, starts_here if bool(starts_here.any()) else None)
        )
    after = torch.where(last >= 0, (last + 1) % frame, phase)
    in_slot = torch.zeros_like(source).scatter_(1, slot, document)
    # padded tokens read nothing; slot 0 stands in for their missing slot
    slot = torch.where(valid, slot, torch.zeros_like(slot))
    stop = torch.where(last >= 0, last + 1, first)
    source, filled, in_slot = source[:, :total], filled[:, :total], in_slot[:, :total]
    in_slot = in_slot.cummax(1).values if total else in_slot  # an empty slot belongs with what stands before it
    return Layout(tuple(pieces), after, None, source, slot, filled, in_slot, first, stop)
