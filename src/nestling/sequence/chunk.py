"""A chunk of tokens at once: the coefficient form of every rule that has a plan.

With gates known and the pairs (e_j, x_j) of a linear map, all weights of a chunk are fixed combinations::

    W_t = b_t W + f_t S - sum_{j<=t} (G_tj write_j e_j + B_tj erase_j r_j) x_j^T,      r_j = W_{j-1} x_j
    S_t = m_t S - sum_{j<=t} M_tj write_j e_j x_j^T

B_tj and M_tj are the products of retention and momentum over j < l <= t, G = B diag(read_out) M, and b, m, f
their columns for what stood before the chunk. Per-token weights never exist: a read is two products with the
chunk's start and a causal c x c matrix per head. What a token's erase sees (r_j) and, with gradients at every
token's own weights, its error, depend on earlier tokens of the chunk linearly: one unit lower-triangular solve.
(spec: memory 2.2 and 5.1.) Oracle: `memory.naive`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.memory.rule import Plan

from .fused import Decay, End, Look, Solve


class Stand(NamedTuple):
    """The coefficients of the weights at every token of a chunk."""

    kept: Tensor  # B [..., c, c] of each erase
    written: Tensor  # G [..., c, c] of each write; the same tensor as B without a momentum
    start_kept: Tensor | None  # b [..., c] of W before the chunk; None: 1
    start_read: Tensor | None  # f [..., c] of S before the chunk; None without a momentum


class Transfer(NamedTuple):
    """How far each token's write and erase carry to each token of the chunk, as each stands after its own step
    (`after`) and before it (`before`). From the gates alone: shared by all maps of a memory."""

    after: Stand
    before: Stand
    decayed: Tensor | None  # M_cj [..., c]: what of each write is left in S at the end; None without momentum
    start_decayed: Tensor | None  # m_c [...]


def transfer(plan: Plan) -> Transfer:
    """The matrices that retention, momentum and read-out make of a chunk; [..., c] -> [..., c, c]."""
    c = plan.write.shape[-1]
    start_kept = start_read = decayed = start_decayed = None
    if plan.log_keep is not None:
        kept, start_kept = Decay.apply(plan.log_keep)
    else:
        kept = plan.write.new_ones(c, c).tril()
    written = kept
    if plan.momentum is not None:
        products, first = Decay.apply(plan.momentum.clamp(min=torch.finfo(plan.momentum.dtype).tiny).log())
        decayed, start_decayed = products[..., -1, :], first[..., -1]
        if plan.read_out is not None:
            products, first = plan.read_out[..., None] * products, plan.read_out * first
        written, start_read = kept @ products, (kept @ first[..., None])[..., 0]
    after = Stand(kept, written, start_kept, start_read)
    return Transfer(after, _earlier(after), decayed, start_decayed)


def _earlier(after: Stand) -> Stand:
    """The coefficients one token earlier: what stands before each token's own step."""

    def down(matrix: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(matrix[..., :1, :]), matrix[..., :-1, :]], -2)

    def later(vector: Tensor | None, first: float) -> Tensor | None:
        return None if vector is None else torch.cat([torch.full_like(vector[..., :1], first), vector[..., :-1]], -1)

    kept = down(after.kept)
    written = kept if after.written is after.kept else down(after.written)
    return Stand(kept, written, later(after.start_kept, 1.0), later(after.start_read, 0.0))


class MapChunk(NamedTuple):
    """One linear map over one chunk: everything a read or the chunk's end needs."""

    before: "Before"
    inputs: Tensor  # x [..., c, in]
    writes: Tensor  # write_j e_j [..., c, out]
    erased: Tensor | None  # erase_j r_j [..., c, out]
    carry: Transfer


class Before(NamedTuple):
    """A linear map as it stood before the chunk. Maps [..., n, out, in] that all have the same inputs are taken
    as one map [..., 1, n out, in]."""

    drift: Tensor  # W; its distance from `start`, where there is one
    start: Tensor | None  # the weight that retention returns to, where it does
    buffer: Tensor | None  # S
    many: int  # n where maps stand above one another, else 1

    @classmethod
    def of(cls, weight: Tensor, plan: Plan, inputs: Tensor) -> "Before":
        drift = weight if plan.start is None else weight - plan.start
        many = weight.shape[-3] if weight.dim() > 4 and inputs.shape[-3] == 1 else 1
        maps = (drift, plan.start, plan.buffer)
        if many > 1:
            maps = tuple(x if x is None else x.flatten(-3, -2).unsqueeze(-3) for x in maps)
        return cls(*maps, many)

    def beside(self, x: Tensor) -> Tensor:
        """Tokens of every map [..., n, c, out] as tokens of the one [..., 1, c, n out]."""
        return x if self.many == 1 else x.transpose(-3, -2).flatten(-2).unsqueeze(-3)

    def apart(self, x: Tensor) -> Tensor:
        """The inverse of `beside`."""
        return x if self.many == 1 else x.squeeze(-3).unflatten(-1, (self.many, -1)).transpose(-3, -2).contiguous()


def _look(
    before: Before, stand: Stand, x: Tensor, inputs: Tensor, writes: Tensor, erased: Tensor | None = None
) -> Tensor:
    if erased is not None and stand.written is stand.kept:
        writes, erased = writes + erased, None
    kept = None if erased is None else stand.kept
    drift, start, buffer, _ = before
    return Look.apply(
        x, drift, start, buffer, inputs, writes, erased, stand.start_kept, stand.start_read, stand.written, kept
    )


def write_frozen(plan: Plan, carry: Transfer, weight: Tensor, inputs: Tensor, errors: Tensor) -> MapChunk:
    """A chunk of writes whose errors [..., c, out] are known: taken at the chunk's anchor."""
    before = Before.of(weight, plan, inputs)
    writes = before.beside(errors * plan.write[..., None])
    chunk = MapChunk(before, inputs, writes, None, carry)
    if plan.erase is None:
        return chunk
    known = _look(before, carry.before, inputs, inputs, writes)
    # (1 + scores B diag(erase)) r = known
    seen = Solve.apply(inputs, carry.before.kept * plan.erase[..., None, :], known)
    return chunk._replace(erased=seen * plan.erase[..., None])


def write_exact(plan: Plan, carry: Transfer, weight: Tensor, inputs: Tensor, values: Tensor, slope: float) -> MapChunk:
    """A chunk of writes whose errors slope * W_{t-1} x_t - v_t are taken at every token's own weights."""
    before = Before.of(weight, plan, inputs)
    write = plan.write[..., None]
    wanted = before.beside(values * write)
    known = _look(before, carry.before, inputs, inputs, -wanted)
    system = slope * carry.before.written * plan.write[..., None, :]
    if plan.erase is not None:
        system = system + carry.before.kept * plan.erase[..., None, :]
    seen = Solve.apply(inputs, system, known)
    erased = None if plan.erase is None else seen * plan.erase[..., None]
    return MapChunk(before, inputs, slope * seen * write - wanted, erased, carry)


def read(chunk: MapChunk, queries: Tensor, *, before: bool = False) -> Tensor:
    """W_t q_t for every token of the chunk [..., c, in] -> [..., c, out], or W_{t-1} q_t `before` its write."""
    stand = chunk.carry.before if before else chunk.carry.after
    return chunk.before.apart(_look(chunk.before, stand, queries, chunk.inputs, chunk.writes, chunk.erased))


def end(chunk: MapChunk) -> tuple[Tensor, Tensor | None]:
    """W and S after the last token of the chunk."""
    stand, (drift, start, buffer, many) = chunk.carry.after, chunk.before
    weight, buffer = End.apply(
        drift,
        start,
        buffer,
        chunk.inputs,
        chunk.writes,
        chunk.erased,
        None if stand.start_kept is None else stand.start_kept[..., -1],
        None if stand.start_read is None else stand.start_read[..., -1],
        chunk.carry.start_decayed,
        stand.written[..., -1, :],
        None if chunk.erased is None else stand.kept[..., -1, :],
        chunk.carry.decayed,
    )
    if many == 1:
        return weight, buffer
    return tuple(x if x is None else x.squeeze(-3).unflatten(-2, (many, -1)) for x in (weight, buffer))
