"""Evaluation of something that learns: on a copy, with clocks stopped, from fresh sequence states."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.structure import Weights

from .reading import LevelledModel


@torch.no_grad()
def surprise_by_position(
    model: LevelledModel,
    documents: Sequence[bytes],
    *,
    weights: tuple[Weights, ...] | None = None,
    piece: int = 2048,
    rows: int = 16,
) -> Tensor:
    """Nats of every byte but the first of each piece, by position in its piece [pieces, piece - 1]; nan where a
    piece is shorter. Each piece of at most `piece` bytes of a document is read from a fresh state, with the
    levels' `weights` as they stand; nothing is learned and nothing is kept."""
    pieces = [d[at : at + piece] for d in documents for at in range(0, len(d), piece)]
    pieces = [p for p in pieces if len(p) > 1]
    found = torch.full((len(pieces), piece - 1), torch.nan, dtype=torch.float64)
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        longest = len(pieces[chosen[0]])
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
        valid = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, index in enumerate(chosen):
            text = pieces[index]
            tokens[row, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
            valid[row, : len(text)] = True
        logits, _ = model(tokens, None, weights=weights, valid=valid)
        nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").double()
        found[torch.tensor(chosen), : longest - 1] = nats.masked_fill(~valid[:, 1:], torch.nan)
    return found


def mean_surprise(
    model: LevelledModel, documents: Sequence[bytes], *, weights: tuple[Weights, ...] | None = None, piece: int = 2048
) -> float:
    """Mean nats of a byte of the documents, each predicted from what stands before it in its piece."""
    return float(surprise_by_position(model, documents, weights=weights, piece=piece).nanmean())
