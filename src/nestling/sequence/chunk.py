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
from torch.nn import functional as F

from nestling.memory.rule import Plan
from nestling.memory.structure import product

_LOG_ZERO = -60.0  # a gate of exactly 0 counts as e^-60


class Transfer(NamedTuple):
    """How far each token's write and erase carry to each token of the chunk, as each stands after its own step
    (`after`) and before it (`before`). From the gates alone: shared by all maps of a memory."""

    after: "Stand"
    before: "Stand"
    decayed: Tensor | None  # M_cj [..., c]: what of each write is left in S at the end; None without momentum
    start_decayed: Tensor | None  # m_c [...]


class Stand(NamedTuple):
    """The coefficients of the weights at every token of a chunk."""

    kept: Tensor  # B [..., c, c] of each erase
    written: Tensor  # G [..., c, c] of each write; the same tensor as B without a momentum
    start_kept: Tensor | None  # b [..., c] of W before the chunk; None: 1
    start_read: Tensor | None  # f [..., c] of S before the chunk; None without a momentum


def _products(log_gates: Tensor) -> tuple[Tensor, Tensor]:
    """prod_{j<l<=t} [..., c, c], zero above the diagonal, and prod_{l<=t} [..., c], from logs [..., c].

    Differences of sums are taken in float64, so that small gates before j cost no precision after it. Products
    too small to matter are exactly zero: denormal numbers would make a CPU many times slower.
    """
    total = log_gates.double().clamp(min=_LOG_ZERO).cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).to(log_gates.dtype)
    c = log_gates.shape[-1]
    above = torch.ones(c, c, dtype=torch.bool, device=log_gates.device).triu(1)
    products = between.masked_fill(above, -torch.inf).exp()
    least = torch.finfo(log_gates.dtype).eps ** 2
    return F.threshold(products, least, 0.0), F.threshold(total.to(log_gates.dtype).exp(), least, 0.0)


def transfer(plan: Plan) -> Transfer:
    """The matrices that retention, momentum and read-out make of a chunk; [..., c] -> [..., c, c]."""
    c = plan.write.shape[-1]
    start_kept = start_read = decayed = start_decayed = None
    if plan.log_keep is not None:
        kept, start_kept = _products(plan.log_keep)
    else:
        kept = plan.write.new_ones(c, c).tril()
    written = kept
    if plan.momentum is not None:
        products, first = _products(plan.momentum.clamp(min=torch.finfo(plan.momentum.dtype).tiny).log())
        decayed, start_decayed = products[..., -1, :], first[..., -1]
        if plan.read_out is not None:
            products, first = plan.read_out[..., None] * products, plan.read_out * first
        both = kept @ torch.cat([products, first[..., None]], -1)
        written, start_read = both[..., :-1], both[..., -1]
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

    weight: Tensor  # W before the chunk [..., out, in]
    buffer: Tensor | None  # S before the chunk
    start: Tensor | None  # the weight that retention returns to, where it does
    inputs: Tensor  # x [..., c, in]
    writes: Tensor  # write_j e_j [..., c, out]
    erased: Tensor | None  # erase_j r_j [..., c, out]
    carry: Transfer

    def take(self, members: slice) -> "MapChunk":
        """The same for some of the memories [b, h, n, ...] that run together."""

        def some(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[2] == 1 else x[:, :, members]

        *tensors, carry = self
        return MapChunk._make([*map(some, tensors), carry])


def _from_start(stand: Stand, weight: Tensor, plan: "Plan | MapChunk", x: Tensor) -> Tensor:
    """What stood before the chunk answers to x [..., c, in]: (b_t W + (1 - b_t) start + f_t S) x_t."""
    answer = product(x, weight.mT)
    if stand.start_kept is not None:
        kept = stand.start_kept[..., None]
        answer = answer * kept if plan.start is None else torch.lerp(product(x, plan.start.mT), answer, kept)
    if plan.buffer is not None:
        assert stand.start_read is not None
        answer = torch.addcmul(answer, product(x, plan.buffer.mT), stand.start_read[..., None])
    return answer


def _solve(system: Tensor, known: Tensor) -> Tensor:
    """r with (1 + system) r = known, system strictly lower triangular [..., c, c]; one system may stand for many."""
    many = known.shape[-3] if known.dim() > 3 and system.shape[-3] == 1 else 1
    if many > 1:
        system, known = system.squeeze(-3), known.transpose(-3, -2).flatten(-2)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    return solved.unflatten(-1, (many, -1)).transpose(-3, -2) if many > 1 else solved


def write_frozen(plan: Plan, carry: Transfer, weight: Tensor, inputs: Tensor, errors: Tensor) -> MapChunk:
    """A chunk of writes whose errors [..., c, out] are known: taken at the chunk's anchor."""
    writes = errors * plan.write[..., None]
    chunk = MapChunk(weight, plan.buffer, plan.start, inputs, writes, None, carry)
    if plan.erase is None:
        return chunk
    scores = inputs @ inputs.mT
    known = _from_start(carry.before, weight, plan, inputs) - product(scores * carry.before.written, writes)
    # (1 + scores B diag(erase)) r = known
    system = scores * carry.before.kept * plan.erase[..., None, :]
    seen = _solve(system, known)
    return chunk._replace(erased=seen * plan.erase[..., None])


def write_exact(plan: Plan, carry: Transfer, weight: Tensor, inputs: Tensor, values: Tensor, slope: float) -> MapChunk:
    """A chunk of writes whose errors slope * W_{t-1} x_t - v_t are taken at every token's own weights."""
    scores = inputs @ inputs.mT
    written = scores * carry.before.written
    known = _from_start(carry.before, weight, plan, inputs) + product(written, values * plan.write[..., None])
    system = slope * written * plan.write[..., None, :]
    if plan.erase is not None:
        system = system + scores * carry.before.kept * plan.erase[..., None, :]
    seen = _solve(system, known)
    writes = (slope * seen - values) * plan.write[..., None]
    erased = None if plan.erase is None else seen * plan.erase[..., None]
    return MapChunk(weight, plan.buffer, plan.start, inputs, writes, erased, carry)


def read(chunk: MapChunk, queries: Tensor, *, before: bool = False) -> Tensor:
    """W_t q_t for every token of the chunk [..., c, in] -> [..., c, out], or W_{t-1} q_t `before` its write."""
    stand = chunk.carry.before if before else chunk.carry.after
    answer = _from_start(stand, chunk.weight, chunk, queries)
    scores = queries @ chunk.inputs.mT
    if chunk.erased is None:
        return answer - product(scores * stand.written, chunk.writes)
    if stand.written is stand.kept:
        return answer - product(scores * stand.kept, chunk.writes + chunk.erased)
    answer = answer - product(scores * stand.written, chunk.writes)
    return answer - product(scores * stand.kept, chunk.erased)


def end(chunk: MapChunk) -> tuple[Tensor, Tensor | None]:
    """W and S after the last token of the chunk."""
    stand, weight = chunk.carry.after, chunk.weight
    if stand.start_kept is not None:
        kept = stand.start_kept[..., -1:, None]
        weight = weight * kept if chunk.start is None else torch.lerp(chunk.start, weight, kept)
    if chunk.buffer is not None:
        assert stand.start_read is not None
        weight = weight + chunk.buffer * stand.start_read[..., -1:, None]
    change = chunk.writes * stand.written[..., -1, :, None]
    if chunk.erased is not None:
        change = change + chunk.erased * stand.kept[..., -1, :, None]
    weight = weight - product(change.mT, chunk.inputs)
    if chunk.buffer is None:
        return weight, None
    assert chunk.carry.decayed is not None
    assert chunk.carry.start_decayed is not None
    fresh = product((chunk.writes * chunk.carry.decayed[..., None]).mT, chunk.inputs)
    return weight, chunk.buffer * chunk.carry.start_decayed[..., None, None] - fresh
