"""A reservoir: a few pieces of what was read awake, kept by chance. By default it keeps nothing."""

from typing import NamedTuple

import torch
from torch import Tensor

from .grow import draws


class Reservoir(NamedTuple):
    """A uniform sample of the pieces that a life has read. pieces: int64 [n, t], of which the first `filled` are
    held; seen: pieces that came by; rest: tokens that are not yet a piece."""

    pieces: Tensor
    filled: int
    seen: int
    rest: Tensor

    @property
    def bytes_stored(self) -> int:
        """Wake text kept, in bytes: a token of a vocabulary up to 256 is one; two, up to 65,536; else four."""
        held = self.pieces[: self.filled]
        largest = max((int(part.max()) for part in (held, self.rest) if part.numel()), default=0)
        return (held.numel() + self.rest.numel()) * (1 if largest < 256 else 2 if largest < 65_536 else 4)


def no_reservoir() -> Reservoir:
    """Keeps nothing."""
    return reservoir(0, 1)


def reservoir(pieces: int, tokens: int) -> Reservoir:
    """Room for so many pieces of so many tokens. Raises ValueError for less than none."""
    if pieces < 0 or tokens < 1:
        raise ValueError(f"a reservoir holds >= 0 pieces of >= 1 token, got {pieces} of {tokens}")
    return Reservoir(torch.zeros(pieces, tokens, dtype=torch.int64), 0, 0, torch.zeros(0, dtype=torch.int64))


def keep(held: Reservoir, tokens: Tensor, key: object) -> Reservoir:
    """The reservoir after so many tokens [n] more were read: the n-th piece takes the place of a random one with
    probability room / n (Vitter's algorithm R). The draws are those of `key` and of the piece's number, so that it
    makes no difference in which parts the text came."""
    room, length = held.pieces.shape
    if room == 0:
        return held
    text = torch.cat([held.rest, tokens.cpu()])
    whole = text.numel() // length
    pieces, filled, seen = held.pieces.clone(), held.filled, held.seen
    for piece in text[: whole * length].view(whole, length):
        seen += 1
        place = filled if filled < room else int(torch.randint(0, seen, (1,), generator=draws(key, "kept", seen)))
        if place < room:
            pieces[place] = piece
            filled = max(filled, place + 1)
    return Reservoir(pieces, filled, seen, text[whole * length :].clone())
