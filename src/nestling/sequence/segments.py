"""Segments of a document, for those who keep what stood at their ends: means of their inputs, and weights by them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """means: of each of the last segments' inputs [b, n, d], the newest last, and which of them there are [b, n]; total
    [b, d] of the inputs of this segment so far, and how many tokens [b]."""

    means: Tensor
    exists: Tensor
    total: Tensor
    tokens: Tensor


def begun(total: Tensor, slots: int) -> Segments:
    """No segment yet, in as many slots; of inputs like `total` [b, d], which is zero."""
    b = len(total)
    exists = torch.zeros(b, slots, dtype=torch.bool, device=total.device)
    tokens = torch.zeros(b, dtype=torch.int64, device=total.device)
    return Segments(total.new_zeros(b, slots, total.shape[1]), exists, total, tokens)


def reached(segments: Segments, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The total [b, c, d] and the number of tokens [b, c] of this segment after each of the inputs x [b, c, d], which
    are zero where there is no token (`valid` [b, c])."""
    held = torch.ones_like(x[..., 0], dtype=torch.int64) if valid is None else valid.long()
    return segments.total[:, None] + x.cumsum(1), segments.tokens[:, None] + held.cumsum(1)


def closed(segments: Segments, opens: bool | Tensor) -> tuple[Tensor, Segments]:
    """The rows in which a segment ends where the next one opens (in all, or in some rows), and the segments of these
    rows thereafter: before a document's first token nothing has ended."""
    rows = segments.tokens > 0
    if isinstance(opens, Tensor):
        rows = rows & opens
    mean = segments.total / segments.tokens.clamp(min=1)[:, None]
    return rows, Segments(
        torch.cat([segments.means[:, 1:], mean[:, None]], 1),
        torch.cat([segments.exists[:, 1:], torch.ones_like(segments.exists[:, :1])], 1),
        torch.zeros_like(segments.total),
        torch.zeros_like(segments.tokens),
    )


def weigh(segments: Segments, asked: Tensor, present: Tensor, heads: int, n: int, top: int | None = None) -> Tensor:
    """Weights [b, h, c, 1 + n] of now and of the last n segments, for what the tokens ask for and the mean of this
    segment up to each [b, c, d]: softmax_i(u_t . p_i / sqrt k) by head; top: over so many of the n at most."""
    asked, now = (part.unflatten(-1, (heads, -1)) for part in (asked, present))  # [b, c, h, k]
    first = segments.means.shape[1] - n
    past = segments.means[:, first:].unflatten(-1, (heads, -1))
    own = (asked * now).sum(-1)[..., None]
    scores = torch.cat([own, torch.einsum("bchk,bnhk->bchn", asked, past)], -1).transpose(1, 2)
    scores = scores / asked.shape[-1] ** 0.5
    open_to = segments.exists[:, None, None, first:].expand(*scores.shape[:3], n)
    if top is not None and n > top:
        best = scores[..., 1:].masked_fill(~open_to, -torch.inf).topk(top, -1).indices
        open_to = open_to & torch.zeros_like(open_to).scatter(-1, best, True)
    allowed = torch.cat([open_to.new_ones(*scores.shape[:3], 1), open_to], -1)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)
