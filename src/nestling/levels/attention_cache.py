"""The sequence state of a model with an attention cache: the last tokens' keys and values, bounded by a context."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class CacheState(NamedTuple):
    """What a pre-trained decoder remembers of the document that it is in.

    keys, values: for each layer [b, heads, slots, channels]; as many slots as are `used`, int64 [b], the same for all
    rows (a life of an older version has empty ones after them). valid: which slots hold a token, bool [b, slots];
    padding takes a slot and is never looked at. offset: tokens of the document that stood before the first slot,
    int64 [b], where positions go on over cuts.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    valid: Tensor
    used: Tensor
    offset: Tensor


class Window(NamedTuple):
    """Where some tokens stand. positions: int64 [b, t]. mask: what each may look at, [b, 1, t, slots], added to the
    scores; None where that is everything before it. first: the first slot that is kept after them."""

    positions: Tensor
    mask: Tensor | None
    first: int


def place(state: CacheState, valid: Tensor, context: int, overlap: int, dtype: torch.dtype) -> tuple[Window, Tensor]:
    """Where the next tokens stand, valid [b, t], after what the state holds; and which slots, theirs included, are
    tokens [b, slots].

    A token that finds the cache full first cuts it down to its last `overlap` slots. So the cuts are at fixed distances
    from the document's start, wherever calls begin and end: the token in slot s looks at the slots from
    m (context - overlap) on, m the number of cuts before it.
    """
    used = int(state.used[0])
    if bool((state.used != used).any()):
        raise ValueError(f"rows of one cache are cut together, but hold {state.used.tolist()} tokens")
    held = torch.cat([state.valid[:, :used], valid], 1)
    slots = torch.arange(held.shape[1], device=held.device)
    hop = context - overlap
    start = ((slots - context).div(hop, rounding_mode="floor") + 1).clamp(min=0) * hop
    count = held.cumsum(1)
    positions = count - 1 + state.offset[:, None]
    if not overlap:  # each window counts from zero
        positions = positions - F.pad(count, (1, 0)).gather(1, start.expand(len(held), -1))
    first = int(start[-1])
    mask = None
    if first or not bool(held.all()):
        queries = slots[used:, None]
        seen = (slots <= queries) & (slots >= start[used:, None]) & held[:, None]
        seen = seen | (slots == queries)  # a padded token looks at itself: a softmax over nothing is not a number
        mask = torch.zeros(seen.shape, dtype=dtype, device=held.device).masked_fill(~seen, torch.finfo(dtype).min)
        mask = mask[:, None]
    return Window(positions[:, used:].clamp(min=0), mask, first), held


def keep(
    whole: Sequence[tuple[Tensor, Tensor]], held: Tensor, before: CacheState, first: int, overlap: int
) -> CacheState:
    """The state after a call, from each layer's keys and values of all slots [b, heads, slots, channels]: those
    themselves, where no slot is cut off."""
    used = held.shape[1] - first
    offset = before.offset + held[:, :first].sum(1) if overlap else before.offset
    keys, values = (tuple(_rest(each, first) for each in of) for of in zip(*whole, strict=True))
    return CacheState(keys, values, held[:, first:], torch.full_like(before.used, used), offset)


def _rest(slots: Tensor, first: int) -> Tensor:
    """Slots from the first kept one on; a copy where others are cut off, which would stay in memory with a view."""
    return slots[:, :, first:].clone() if first else slots
