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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.rule import Plan
from nestling.memory.structure import stands_for_many

from . import fused
from .fused import Decay, Last


class Stand(NamedTuple):
    """The coefficients of the weights at every token of a chunk."""

    kept: Tensor  # B [..., c, c] of each erase
    written: Tensor  # G [..., c, c] of each write; the same tensor as B without a momentum
    start_kept: Tensor | None  # b [..., c] of W before the chunk; None: 1
    start_read: Tensor | None  # f [..., c] of S before the chunk; None without a momentum

    def at(self, tokens: slice) -> "Stand":
        """At some tokens alone."""
        kept, start_kept, start_read = self.kept[..., tokens, :], self.start_kept, self.start_read
        return Stand(
            kept,
            kept if self.written is self.kept else self.written[..., tokens, :],
            None if start_kept is None else start_kept[..., tokens],
            None if start_read is None else start_read[..., tokens],
        )


class Transfer(NamedTuple):
    """How far each token's write and erase carry to each token of the chunk, as each stands after its own step
    (`after`) and before it (`before`), and to the end. From the gates alone: shared by all maps of a memory."""

    after: Stand
    before: Stand | None  # None where no erase, slope or read asks for it
    last: Stand  # `after` its last token: [..., c] of each write and erase, [...] of what stood before the chunk
    decayed: Tensor | None  # M_cj [..., c]: what of each write is left in S at the end; None without momentum
    start_decayed: Tensor | None  # m_c [...]

    def map(self, function: Callable[[Tensor], Any]) -> "Transfer":
        """The same with every tensor mapped, once each."""
        done: dict[int, Any] = {}

        def mapped(part: Any) -> Any:
            if isinstance(part, Stand):
                return Stand(*map(mapped, part))
            if part is not None and id(part) not in done:
                done[id(part)] = function(part)
            return done.get(id(part))

        return Transfer(*map(mapped, self))

    def unbind(self) -> list["Transfer"]:
        """The transfers of chunks that were computed side by side along the first dim."""
        pieces = self.map(lambda x: x.unbind(0))
        chunks = len(pieces.after.kept)
        return [pieces.map(lambda x: x[index]) for index in range(chunks)]  # noqa: B023


def transfer(plan: Plan, *, before: bool = True) -> Transfer:
    """The matrices that retention, momentum and read-out make of a chunk; [..., c] -> [..., c, c]. `before`: those
    before each token's own step too, which a rule that erases always needs."""
    *leading, c = plan.write.shape
    start_kept = start_read = decayed = start_decayed = None
    if plan.log_keep is not None:
        kept, start_kept = Decay.apply(plan.log_keep)
    else:
        kept = plan.write.new_ones(c, c).tril().expand(*leading, c, c)
    written = kept
    if plan.momentum is not None:
        products, first = Decay.apply(plan.momentum.clamp(min=torch.finfo(plan.momentum.dtype).tiny).log())
        decayed, start_decayed = products[..., -1, :], first[..., -1]
        if plan.read_out is not None:
            products, first = plan.read_out[..., None] * products, plan.read_out * first
        written, start_read = kept @ products, (kept @ first[..., None])[..., 0]
    same = written is kept
    written, written_end = Last.apply(written)
    kept, kept_end = (written, written_end) if same else Last.apply(kept)
    after = Stand(kept, written, start_kept, start_read)
    last = Stand(
        kept_end,
        written_end,
        None if start_kept is None else start_kept[..., -1],
        None if start_read is None else start_read[..., -1],
    )
    return Transfer(after, _earlier(after) if before or plan.erase is not None else None, last, decayed, start_decayed)


def _earlier(after: Stand) -> Stand:
    """The coefficients one token earlier: what stands before each token's own step."""

    def down(matrix: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(matrix[..., :1, :]), matrix[..., :-1, :]], -2)

    def later(vector: Tensor | None, first: float) -> Tensor | None:
        return None if vector is None else torch.cat([torch.full_like(vector[..., :1], first), vector[..., :-1]], -1)

    kept = down(after.kept)
    written = kept if after.written is after.kept else down(after.written)
    return Stand(kept, written, later(after.start_kept, 1.0), later(after.start_read, 0.0))


class Before(NamedTuple):
    """A linear map as it stood before the chunk. Maps [..., n, out, in] that all have the same inputs are taken
    as one map [..., 1, n out, in]."""

    weight: Tensor  # W
    start: Tensor | None  # the weight that retention returns to, where it does
    buffer: Tensor | None  # S
    many: int  # n where maps stand above one another, else 1

    @classmethod
    def of(cls, weight: Tensor, plan: Plan, inputs: Tensor) -> "Before":
        many = weight.shape[-3] if stands_for_many(inputs, weight) else 1
        maps = (weight, plan.start, plan.buffer)
        if many > 1:
            maps = tuple(x if x is None else x.flatten(-3, -2).unsqueeze(-3) for x in maps)  # type: ignore[assignment]
        return cls(*maps, many)

    def beside(self, x: Tensor) -> Tensor:
        """Tokens of every map [..., n, c, out] as tokens of the one [..., 1, c, n out]."""
        return x if self.many == 1 else x.transpose(-3, -2).flatten(-2).unsqueeze(-3)

    def apart(self, x: Tensor) -> Tensor:
        """The inverse of `beside`."""
        return x if self.many == 1 else x.squeeze(-3).unflatten(-1, (self.many, -1)).transpose(-3, -2).contiguous()

    def maps(self, x: Tensor | None) -> Tensor | None:
        """The one map [..., 1, n out, in] as the maps that it is made of."""
        return x if x is None or self.many == 1 else x.squeeze(-3).unflatten(-2, (self.many, -1))


class MapChunk(NamedTuple):
    """One linear map over one chunk: what it has become, and everything that a read needs."""

    before: Before
    weight: Tensor  # W after the chunk
    buffer: Tensor | None  # S after the chunk
    inputs: Tensor  # x [..., c, in]
    writes: Tensor  # write_j e_j [..., c, out]
    erased: Tensor | None  # erase_j r_j [..., c, out]
    carry: Transfer


def write(
    plan: Plan,
    carry: Transfer,
    weight: Tensor,
    inputs: Tensor,
    errors: Tensor,
    slope: float = 0.0,
    *,
    graph_only: bool = False,
) -> MapChunk:
    """A chunk of writes with errors [..., c, out] taken at the chunk's anchor; or, with a slope, with errors
    slope * W_{t-1} x_t + `errors`, at every token's own weights. graph_only: `weight` and `buffer` of what it gives are
    there for their gradients, and hold anything."""
    before = Before.of(weight, plan, inputs)
    stand, last = carry.before, carry.last
    erases = plan.erase is not None
    if stand is None:  # nothing is seen before its own step, and nothing is asked of this
        assert not erases
        assert not slope
        stand = carry.after
    eta = plan.write if plan.sight is None else plan.write * plan.sight
    after, buffer, writes, erased = fused.write(
        slope,
        graph_only,
        *before[:3],
        inputs,
        before.beside(errors * plan.write[..., None]),
        eta if slope else None,
        plan.erase,
        *(stand.start_kept, stand.start_read, stand.written, stand.kept if erases else None),
        *(last.start_kept, last.start_read, carry.start_decayed),
        *(last.written, last.kept if erases else None, carry.decayed),
    )
    return MapChunk(before, before.maps(after), before.maps(buffer), inputs, writes, erased, carry)  # type: ignore[arg-type]


def read(chunk: MapChunk, queries: Tensor, *, before: bool = False, steps: int = 1, graph_only: bool = False) -> Tensor:
    """W_t q_t for every token of the chunk [..., c, in] -> [..., c, out], or W_{t-1} q_t `before` its write. steps: how
    many writes in a row are one token's, who reads after the last of them, or before the first.
    graph_only: what it gives is there for its gradient, and holds anything."""
    stand = chunk.carry.before if before else chunk.carry.after
    assert stand is not None
    if steps > 1:
        stand = stand.at(slice(0 if before else steps - 1, None, steps))
    writes, erased, kept = chunk.writes, chunk.erased, stand.kept
    if erased is None or stand.written is stand.kept:
        writes, erased, kept = writes if erased is None else writes + erased, None, None  # type: ignore[assignment]
    weight, start, buffer, _ = chunk.before
    maps, stood = (weight, start, buffer), (stand.start_kept, stand.start_read, stand.written, kept)
    return chunk.before.apart(fused.look(graph_only, queries, *maps, chunk.inputs, writes, erased, *stood))
