"""The Omega rule: every token's step is on the pairs of the last few tokens, not on its own alone (ATLAS, equation 8)::

    g_t = sum_{t-c < i <= t} gamma_ti grad loss(W; k_i, v_i)       at the weights at which token t's gradient is taken

One pair is the online rule; a momentum forgets by time, a window by count, and gamma, where a token chooses it, by
content. Oracles: `memory.naive.naive_window`, `naive_stepped`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import Stand, Transfer


class Recent(NamedTuple):
    """The last pairs of the document, oldest first, as many as a window holds beside the token's own."""

    keys: Tensor  # [b, h, n, k]
    values: Tensor  # [b, h, n, v]
    present: Tensor  # [b, n]; False where the document is younger than that


def begin(like: Tensor, count: int, key_dim: int, value_dim: int) -> Recent:
    """No pairs yet, for weights [b, h, out, in]."""
    b, h = like.shape[:2]
    present = torch.zeros(b, count, dtype=torch.bool, device=like.device)
    return Recent(like.new_zeros(b, h, count, key_dim), like.new_zeros(b, h, count, value_dim), present)


class Joined(NamedTuple):
    """The pairs that a piece's windows reach, the recent ones first."""

    keys: Tensor  # [b, h, n + c, k]
    values: Tensor  # [b, h, n + c, v]
    band: Tensor  # what pair j counts in the window of token t: gamma or 1 inside, else 0 [b, h or 1, c, n + c]
    after: Recent


def join(recent: Recent, keys: Tensor, values: Tensor, valid: Tensor | None, shares: Tensor | None = None) -> Joined:
    """Recent pairs and those of a piece [b, h, c, .], of which `valid` [b, c] hold a token (None: all). shares: gamma
    of each token's pairs, its own first [b, h, c, window]."""
    b, _, c, _ = keys.shape
    n = recent.present.shape[1]
    held = torch.ones(b, c, dtype=torch.bool, device=keys.device) if valid is None else valid
    all_keys, all_values = torch.cat([recent.keys, keys], 2), torch.cat([recent.values, values], 2)
    present = torch.cat([recent.present, held], 1)
    rank = torch.cat([torch.arange(-n, 0, device=keys.device).expand(b, n), held.cumsum(1) - 1], 1)
    age = rank[:, n:, None] - rank[:, None, :]
    inside = (age >= 0) & (age <= n) & present[:, None, :] & held[:, :, None]
    band = inside[:, None].to(keys.dtype)
    if shares is not None:
        band = band * shares.gather(-1, age.clamp(0, n)[:, None].expand(*shares.shape[:3], -1))
    last = torch.cat([torch.arange(n, device=keys.device).expand(b, n), _compact(held) + n], 1)
    last = last.gather(1, held.sum(1, keepdim=True) + torch.arange(n, device=keys.device))
    each = torch.arange(b, device=keys.device)[:, None]
    kept = (
        all_keys.transpose(1, 2)[each, last].transpose(1, 2),
        all_values.transpose(1, 2)[each, last].transpose(1, 2),
    )
    return Joined(all_keys, all_values, band, Recent(*kept, present[each, last]))


def _compact(held: Tensor) -> Tensor:
    """The places that hold a token [b, c], in their order, before those that do not."""
    return torch.argsort((~held).long(), dim=1, stable=True)


def spread(carry: Transfer, write: Tensor, band: Tensor) -> Transfer:
    """How far each pair carries, where each token's own write [..., c] carries as in `carry` and is of all the pairs
    in its window."""

    def over(matrix: Tensor) -> Tensor:
        return (matrix * write[..., None, :]) @ band

    def row(vector: Tensor) -> Tensor:
        return over(vector[..., None, :])[..., 0, :]

    def stand(given: Stand) -> Stand:
        return given._replace(written=over(given.written))

    return carry._replace(
        after=stand(carry.after),
        before=None if carry.before is None else stand(carry.before),
        last=carry.last._replace(written=row(carry.last.written)),
        decayed=None if carry.decayed is None else row(carry.decayed),
    )
