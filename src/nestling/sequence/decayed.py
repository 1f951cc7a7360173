"""Scores between tokens of a chunk under retention: sum_d row_td key_jd exp(g_td - g_jd), without a division.

g is the sum of log gates from the chunk's start up to a token, its own included, in float64. A row looks at time g_t
(after its own token's gate) or g_{t-1} (before it); only keys that it can have met count, so that the exponent is at
most 0. One gate a head makes one c x c matrix of factors; a gate for every key channel has none: there rows and keys
are scaled apart, by factors that cannot overflow, or block by block. Gradients by hand; of the gates by the identity
that dL/dg = row * dL/drow - key * dL/dkey, whatever lies between. Oracle: `linear_chunk.plain`, `memory.naive_linear`.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import LOG_ZERO

BLOCK = 16  # tokens of a block whose differences are written out, channel by channel
RANGE = 60.0  # of g within a chunk, in which one product of rescaled rows and keys is exact


def triangle(times: tuple[bool, ...], keys: int, c: int, like: Tensor) -> Tensor:
    """1 where a row may meet a key [r c, keys c]: keys before it, and its own where it looks after its token."""
    full = torch.ones(c, c, dtype=like.dtype, device=like.device)
    return torch.cat([full.tril(-1 if before else 0) for before in times]).repeat(1, keys)


def factors(exponent: Tensor) -> Tensor:
    """exp, written over the exponent. Factors too small to matter are exactly zero: denormal numbers, and exponents
    that lead to them, would make a CPU many times slower."""
    least = torch.finfo(exponent.dtype).eps ** 2
    return F.threshold(exponent.clamp_(min=math.log(least) - 1.0).exp_(), least, 0.0, inplace=True)


class Decay(ABC):
    """What the gates of a few chunks do. rows [m, n, r c, d]: r kinds of rows, kind i looking before its token's
    gate where times[i]; keys [m, n, s c, d]: s kinds of keys; m chunks of n heads."""

    times: tuple[bool, ...]

    @abstractmethod
    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[m, n, r c, s c], zero where a row cannot have met a key."""

    @abstractmethod
    def scores_backward(self, d: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of rows and keys; `d` is one's own to write over."""

    def since_start(self, rows: Tensor) -> Tensor:
        """Rows times what is left at their time of what stood before the chunk."""
        return rows

    def to_end(self, keys: Tensor) -> Tensor:
        """Keys times what is left of them at the end of the chunk."""
        return keys

    def carry(self, total: Tensor, state: Tensor, index: int) -> Tensor:
        """`total` with what is left of a state [n, v, d] at the end of chunk `index` added to it in place."""
        return total.add_(state)

    def through(self, d_rows: Tensor, d_since: Tensor, d_keys: Tensor, d_ends: Tensor) -> tuple[Tensor, Tensor]:
        """d_rows and d_keys, with those that come through `since_start` and `to_end` added to them in place."""
        return d_rows.add_(d_since), d_keys.add_(d_ends)

    def gates_backward(
        self, rows: Tensor, d_rows: Tensor, keys: Tensor, d_keys: Tensor, states: Tensor, d_states: Tensor
    ) -> Tensor | None:
        """The gradient of the log gates; `states` [m, n, v, d]: those after each chunk."""
        return None


class Kept(Decay):
    """No retention gate: all is kept."""

    def __init__(self, times: tuple[bool, ...]) -> None:
        self.times = times

    def _mask(self, rows: Tensor, keys: Tensor) -> Tensor:
        c = rows.shape[-2] // len(self.times)
        return triangle(self.times, keys.shape[-2] // c, c, rows)

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        return (rows @ keys.mT).mul_(self._mask(rows, keys))

    def scores_backward(self, d: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        d = d.mul_(self._mask(rows, keys))
        return d @ keys, d.mT @ rows


class _Gated(Decay):
    """log gates [m, n, c] or [m, n, c, d], as factors [m, n, ., 1 or d]."""

    def __init__(self, times: tuple[bool, ...], log_gates: Tensor) -> None:
        self.times = times
        self.log_gates = log_gates if log_gates.dim() == 4 else log_gates[..., None]
        self.g = self.log_gates.clamp(min=LOG_ZERO).cumsum(-2, dtype=torch.float64)  # [m, n, c, 1 or d]
        since = self._exp(self.g)
        self._since = self._at_rows(since, torch.ones_like(since[..., :1, :]))
        self._to_end = self._exp(self.g[..., -1:, :] - self.g)
        self._whole = self._exp(self.g[..., -1:, :])

    def _at_rows(self, after: Tensor, first: Tensor) -> Tensor:
        """What stands after every token's gate [m, n, c, .], for every kind of rows [m, n, r c, .]; before the first
        token's gate stands `first` [m, n, 1, .]."""
        c = after.shape[-2]
        out = after.new_empty(*after.shape[:2], len(self.times) * c, after.shape[-1])
        for kind, before in zip(out.split(c, -2), self.times, strict=True):
            if before:
                kind[..., :1, :], kind[..., 1:, :] = first, after[..., :-1, :]
            else:
                kind.copy_(after)
        return out

    def _exp(self, exponent: Tensor) -> Tensor:
        return factors(exponent.to(self.log_gates.dtype, copy=True))

    def since_start(self, rows: Tensor) -> Tensor:
        return rows * self._since

    def to_end(self, keys: Tensor) -> Tensor:
        return (keys.unflatten(-2, (-1, self.g.shape[-2])) * self._to_end[..., None, :, :]).flatten(-3, -2)

    def carry(self, total: Tensor, state: Tensor, index: int) -> Tensor:
        return total.addcmul_(state, self._whole[index])

    def through(self, d_rows: Tensor, d_since: Tensor, d_keys: Tensor, d_ends: Tensor) -> tuple[Tensor, Tensor]:
        c = self.g.shape[-2]
        d_keys.unflatten(-2, (-1, c)).addcmul_(d_ends.unflatten(-2, (-1, c)), self._to_end[..., None, :, :])
        return d_rows.addcmul_(d_since, self._since), d_keys

    def gates_backward(
        self, rows: Tensor, d_rows: Tensor, keys: Tensor, d_keys: Tensor, states: Tensor, d_states: Tensor
    ) -> Tensor | None:
        c, whole = self.g.shape[-2], self.g.shape[-1] > 1

        def product(x: Tensor, d_x: Tensor) -> Tensor:
            along = x * d_x if whole else (x * d_x).sum(-1, keepdim=True)
            return along.unflatten(-2, (-1, c))  # [m, n, kinds, c, 1 or d]

        total = -product(keys, d_keys).sum(-3)
        for before, along in zip(self.times, product(rows, d_rows).unbind(-3), strict=True):
            if before:
                total[..., :-1, :] += along[..., 1:, :]
            else:
                total += along
        ends = states * d_states
        total[..., -1, :] += ends.sum(-2) if whole else ends.sum((-2, -1)).unsqueeze(-1)
        gates = total.flip(-2).cumsum(-2).flip(-2)  # every sum from a gate on
        gates = torch.where(self.log_gates > LOG_ZERO, gates, 0.0)
        return gates if whole else gates[..., 0]


class PerHead(_Gated):
    """One gate a head: scores are those of no gate, times a matrix of factors."""

    def __init__(self, times: tuple[bool, ...], log_gates: Tensor) -> None:
        super().__init__(times, log_gates)
        c = self.g.shape[-2]
        between = (self.g - self.g.mT).to(log_gates.dtype)
        ahead = torch.ones(c, c, dtype=torch.bool, device=log_gates.device).triu(1)
        after = factors(between.masked_fill_(ahead, -torch.inf))
        self.factors = self._at_rows(after, torch.zeros_like(after[..., :1, :]))

    def _over(self, scores: Tensor) -> Tensor:
        """`scores` times the factors, in place."""
        for part in scores.split(self.g.shape[-2], -1):
            part.mul_(self.factors)
        return scores

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        return self._over(rows @ keys.mT)

    def scores_backward(self, d: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        d = self._over(d)
        return d @ keys, d.mT @ rows


class PerChannel(_Gated):
    """A gate for every key channel. Where g moves little within the chunk, rows and keys are rescaled to its middle
    and meet in one product; else blocks of 16 tokens: differences written out inside a block, and between blocks
    rows since the block's start and keys up to it."""

    def __init__(self, times: tuple[bool, ...], log_gates: Tensor) -> None:
        super().__init__(times, log_gates)
        low, high = torch.aminmax(self.g)
        self.near = bool(torch.maximum(-low, high) < RANGE)
        if self.near:
            middle = self.g[..., -1:, :] / 2
            self._rows = self._at_rows(self._factor(self.g - middle), self._factor(-middle))
            self._keys = self._factor(middle - self.g)

    def _factor(self, exponent: Tensor) -> Tensor:
        return exponent.to(self.log_gates.dtype).exp()

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        c = self.g.shape[-2]
        if self.near:
            mask = triangle(self.times, keys.shape[-2] // c, c, rows).bool()
            return ((rows * self._rows) @ self._rescaled(keys).mT).masked_fill_(~mask, 0.0)
        apart, kinds = rows.unflatten(-2, (-1, c)), keys.unflatten(-2, (-1, c))
        out = rows.new_zeros(*rows.shape[:2], len(self.times), c, kinds.shape[-3], c)
        for start in range(0, c, BLOCK):
            at = slice(start, min(start + BLOCK, c))
            if start:
                left, right = self._between(apart, kinds, at)
                met = left.flatten(-3, -2) @ right.flatten(-3, -2).mT
                out[..., at, :, :start] = met.unflatten(-1, (-1, start)).unflatten(-3, (len(self.times), -1))
            inside = torch.einsum(
                "nmstjd,nmrtd->nmrtsj", self._inside(at) * kinds[..., None, at, :], self._meet(apart, at)
            )
            out[..., at, :, at] = self._unmeet(inside)
        return out.flatten(-2).flatten(2, 3)

    def scores_backward(self, d: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        c = self.g.shape[-2]
        if self.near:
            mask = triangle(self.times, keys.shape[-2] // c, c, rows).bool()
            d = d.masked_fill_(~mask, 0.0)
            d_keys = (d.mT @ (rows * self._rows)).unflatten(-2, (-1, c)) * self._keys[..., None, :, :]
            return (d @ self._rescaled(keys)) * self._rows, d_keys.flatten(-3, -2)
        apart, kinds = rows.unflatten(-2, (-1, c)), keys.unflatten(-2, (-1, c))
        d = d.unflatten(-1, (-1, c)).unflatten(2, (-1, c))  # [m, n, r, c, s, c]
        d_rows, d_keys = torch.zeros_like(apart), torch.zeros_like(kinds)
        for start in range(0, c, BLOCK):
            at = slice(start, min(start + BLOCK, c))
            if start:
                left, right = self._between(apart, kinds, at)
                met = d[..., at, :, :start].flatten(-2).flatten(2, 3)
                d_left = (met @ right.flatten(-3, -2)).unflatten(-2, (len(self.times), -1))
                d_right = (met.mT @ left.flatten(-3, -2)).unflatten(-2, (-1, start))
                since, until = self._edges(at)
                d_rows[..., at, :] += d_left * since
                d_keys[..., :start, :] += d_right * until
            factors, meeting = self._inside(at), self._meet(apart, at)
            inner = self._meet(d[..., at, :, at].flatten(-2), at=None).unflatten(-1, (kinds.shape[-3], -1))
            d_met = torch.einsum("nmrtsj,nmstjd->nmrtd", inner, factors * kinds[..., None, at, :])
            d_rows[..., at, :] += self._unmeet(d_met)
            d_keys[..., at, :] += (torch.einsum("nmrtsj,nmrtd->nmstjd", inner, meeting) * factors).sum(-3)
        return d_rows.flatten(2, 3), d_keys.flatten(2, 3)

    def _rescaled(self, keys: Tensor) -> Tensor:
        return (keys.unflatten(-2, (-1, self.g.shape[-2])) * self._keys[..., None, :, :]).flatten(-3, -2)

    def _edges(self, at: slice) -> tuple[Tensor, Tensor]:
        """Factors of a block's rows since it started [m, n, r, ., d], and of all keys before it up to there."""
        edge = self.g[..., at.start - 1 : at.start, :]
        early = slice(at.start - 1, at.stop - 1)
        rows = torch.stack([self.g[..., early if before else at, :] for before in self.times], 2)
        return self._exp(rows - edge[..., None, :, :]), self._exp(edge - self.g[..., : at.start, :])[..., None, :, :]

    def _between(self, rows: Tensor, keys: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        since, until = self._edges(at)
        return rows[..., at, :] * since, keys[..., : at.start, :] * until

    def _inside(self, at: slice) -> Tensor:
        """exp(g_t - g_j) of a block for j <= t, else 0 [m, n, 1, t, j, d]."""
        g = self.g[..., at, :]
        c = g.shape[-2]
        ahead = torch.ones(c, c, dtype=torch.bool, device=g.device).triu(1)[..., None]
        return self._exp((g[..., :, None, :] - g[..., None, :, :]).masked_fill_(ahead, -torch.inf)).unsqueeze(2)

    def _meet(self, rows: Tensor, at: slice | None) -> Tensor:
        """A block's rows [m, n, r, t, .], those that look before their token one token earlier: as those of t - 1
        that look after it. What the first of a block meets lies before the block."""
        rows = rows if at is None else rows[..., at, :]
        kinds = [
            F.pad(kind[..., 1:, :], (0, 0, 0, 1)) if before else kind
            for before, kind in zip(self.times, rows.unbind(2), strict=True)
        ]
        return torch.stack(kinds, 2)

    def _unmeet(self, met: Tensor) -> Tensor:
        """The inverse of `_meet` for [m, n, r, t, ...], zero for the first."""
        kinds = [
            torch.cat([torch.zeros_like(kind[:, :, :1]), kind[:, :, :-1]], 2) if before else kind
            for before, kind in zip(self.times, met.unbind(2), strict=True)
        ]
        return torch.stack(kinds, 2)


def decay_of(times: tuple[bool, ...], log_gates: Tensor | None) -> Decay:
    """The decay of a few chunks with log gates [m, n, c], [m, n, c, d] or None."""
    if log_gates is None:
        return Kept(times)
    return PerHead(times, log_gates) if log_gates.dim() == 3 else PerChannel(times, log_gates)
