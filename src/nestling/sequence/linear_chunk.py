"""One chunk form for every linear recurrence of a matrix memory, its gradients by hand.

    S_t = S_{t-1} Diag(a_t) - (S_{t-1} p_t) x_t^T + v_t k_t^T,        y_t = S_t q_t  or  S_{t-1} q_t

In a chunk that opens on S, with M_ab the decayed scores between rows a and keys b (`decayed`), rows and keys with a
tilde scaled by what is left since the start or at the end, and z_t = -S_{t-1} p_t::

    (1 + M_px) z = -P~ S^T - M_pk v            Y = Q~ S^T + M_qk v + M_qx z       S' = S a + v^T K~ + z^T X~

and where what is erased lies along what is written (x = k), with w = v + z in the place of both::

    (1 + M_pk) w = v - P~ S^T                  Y = Q~ S^T + M_qk w                S' = S a + w^T K~

One unit lower-triangular inverse and a few products a chunk; only two of them wait for the chunk before. A few
chunks are taken at a time, so that they stay in the caches. (spec: memory 5.1.) Oracle: `plain`, written as autograd
would have it, which also gives the second derivatives; and `memory.naive_linear`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .decayed import Decay, decay_of

ELEMENTS = 2**18  # of one tensor at a time on a CPU: 1 MB


class Given(NamedTuple):
    """What a recurrence is given: q, k, p, x [b, t, h, k], v [b, t, h, v], log_gates [b, t, h] or [b, t, h, k],
    state [b, h, v, k]; p: what is erased, None for nothing; x: along what, None for k."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gates: Tensor | None
    p: Tensor | None
    x: Tensor | None
    state: Tensor


class Few(NamedTuple):
    """A few chunks of every head of every row [m, n, c, .], n = b h; rows: q, p; keys: k, x."""

    rows: Tensor
    keys: Tensor
    v: Tensor
    decay: Decay


class Carried(NamedTuple):
    """What the forward pass keeps of a few chunks: the states on which they opened and the one after them
    [m + 1, n, v, k], what was written along every key [m, n, s c, v], and the inverse [m, n, c, c]."""

    states: Tensor
    written: Tensor
    inverse: Tensor | None


def spans(t: int, chunk: int, elements: int, together: int | None = None) -> Iterator[tuple[slice, int]]:
    """Tokens [start, stop) of a few whole chunks, and their size; the rest of the last one comes alone. `elements`:
    of one token of all rows and heads."""
    few = together or max(1, ELEMENTS // (chunk * elements))
    start, whole = 0, t // chunk * chunk
    while start < whole:
        stop = min(start + few * chunk, whole)
        yield slice(start, stop), chunk
        start = stop
    if whole < t:
        yield slice(whole, t), t - whole


def by_chunk(x: Tensor, at: slice, c: int) -> Tensor:
    """[b, t, h, ...] -> a view of some tokens [m, b, h, c, ...]."""
    return x[:, at].unflatten(1, (-1, c)).movedim((1, 3), (0, 2))


def cut(x: Tensor, at: slice, c: int) -> Tensor:
    """[b, t, h, ...] -> some tokens [m, b h, c, ...]."""
    return by_chunk(x, at, c).flatten(1, 2)


def stack(kinds: tuple[Tensor | None, ...], at: slice, c: int) -> Tensor:
    """Several [b, t, h, d] -> some tokens of all of them [m, b h, kinds c, d]."""
    views = [by_chunk(x, at, c) for x in kinds if x is not None]
    m, b, h, _, d = views[0].shape
    out = views[0].new_empty(m, b, h, len(views) * c, d)
    for place, view in zip(out.split(c, -2), views, strict=True):
        place.copy_(view)
    return out.flatten(1, 2)


def few_of(given: Given, at: slice, c: int, before: bool) -> Few:
    times = (before,) if given.p is None else (before, True)
    gates = None if given.log_gates is None else cut(given.log_gates, at, c)
    rows, keys = stack((given.q, given.p), at, c), stack((given.k, given.x), at, c)
    return Few(rows, keys, cut(given.v, at, c), decay_of(times, gates))


class LinearChunks(Function):
    """`Given`, chunk, before -> y [b, t, h, v], the state after the last token [b, h, v, k]."""

    @staticmethod
    def forward(ctx: Any, *given_and_how: Any) -> tuple[Tensor, Tensor]:
        *tensors, chunk, before = given_and_how
        given = Given(*tensors)
        heads = given.state.shape[:2]
        y, state = given.v.new_empty(given.v.shape), given.state.flatten(0, 1)
        kept: list[Tensor | None] = []
        ctx.chunk, ctx.before = chunk, before
        for at, c in _spans(given, chunk):
            few = few_of(given, at, c, before)
            read, carried = _forward(few, state, given.p is not None, given.x is not None)
            by_chunk(y, at, c).copy_(read.unflatten(1, heads))
            state = carried.states[-1]
            kept += carried
        ctx.save_for_backward(*given, *kept)
        return y, state.view(given.state.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        given, kept = Given(*ctx.saved_tensors[:7]), ctx.saved_tensors[7:]
        if torch.is_grad_enabled():
            return (*_again(given, ctx.chunk, ctx.before, grads), None, None)
        d_y, d_state = grads[0], grads[1].flatten(0, 1)
        out = Given(*(None if x is None else torch.empty_like(x) for x in given))  # type: ignore[arg-type]
        for index, (at, c) in reversed(list(enumerate(_spans(given, ctx.chunk)))):
            few, carried = few_of(given, at, c, ctx.before), Carried(*kept[3 * index : 3 * index + 3])
            parts, d_state = _backward(few, carried, cut(d_y, at, c), d_state, given.x is not None)
            for place, part in zip(out[:6], parts, strict=True):
                if place is not None and part is not None:
                    by_chunk(place, at, c).copy_(part.unflatten(1, given.state.shape[:2]))
        return (*out[:6], d_state.view(given.state.shape), None, None)


def _spans(given: Given, chunk: int) -> Iterator[tuple[slice, int]]:
    b, t, h, d = given.q.shape
    return spans(t, chunk, b * h * d, None if given.q.device.type == "cpu" else t)


def _forward(few: Few, state: Tensor, erases: bool, untied: bool) -> tuple[Tensor, Carried]:
    """What a few chunks read [m, n, c, v], and what the backward pass needs."""
    rows, keys, v, decay = few
    m, n, c, width = v.shape
    scores, since, ends = decay.scores(rows, keys), decay.since_start(rows), decay.to_end(keys)
    written, inverse, steps = v, None, None
    if erases:
        eye = torch.eye(c, dtype=v.dtype, device=v.device)
        inverse = torch.linalg.solve_triangular(scores[..., c:, -c:], eye, upper=False, unitriangular=True)
        written = torch.cat([v, (inverse @ (scores[..., c:, :c] @ v)).neg_()], -2) if untied else inverse @ v
        steps = inverse @ since[..., c:, :]
    states = v.new_zeros(m + 1, n, width, keys.shape[-1])
    states[0] = state
    for i in range(m):
        if steps is not None:
            written[i, :, -c:].baddbmm_(steps[i], states[i].mT, alpha=-1.0)
        decay.carry(states[i + 1], states[i], i).baddbmm_(written[i].mT, ends[i])
    read = since[..., :c, :] @ states[:-1].mT
    read.flatten(0, 1).baddbmm_(scores[..., :c, :].flatten(0, 1), written.flatten(0, 1))
    return read, Carried(states, written, inverse)


def _backward(
    few: Few, carried: Carried, d_read: Tensor, d_state: Tensor, untied: bool
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradients of q, k, v, log gates, p and x of a few chunks, and of the state on which the first opened."""
    rows, keys, v, decay = few
    states, written, inverse = carried
    m, _, c, _ = v.shape
    scores, since, ends = decay.scores(rows, keys), decay.since_start(rows), decay.to_end(keys)
    d_written = scores[..., :c, :].mT @ d_read
    d_states = torch.cat([d_read.mT @ since[..., :c, :], d_state[None]])
    steps = None if inverse is None else inverse @ since[..., c:, :]
    for i in reversed(range(m)):
        d_written[i].baddbmm_(ends[i], d_states[i + 1].mT)
        decay.carry(d_states[i], d_states[i + 1], i)
        if steps is not None:
            d_states[i].baddbmm_(d_written[i, :, -c:].mT, steps[i], alpha=-1.0)
    d_scores, d_since, d_v = d_read @ written.mT, d_read @ states[:-1], d_written
    if inverse is not None:
        minus = (inverse.mT @ d_written[..., -c:, :]).neg_()  # less the gradient of what the system is solved for
        d_system, d_since = minus @ written[..., -c:, :].mT, torch.cat([d_since, minus @ states[:-1]], -2)
        d_v = -minus
        if untied:
            d_v = d_written[..., :c, :] + scores[..., c:, :c].mT @ minus
            d_system = torch.cat([minus @ v.mT, d_system], -1)
        d_scores = torch.cat([d_scores, d_system], -2)
    d_rows, d_keys = decay.scores_backward(d_scores, rows, keys)
    d_rows, d_keys = decay.through(d_rows, d_since, d_keys, written @ d_states[1:])
    d_gates = decay.gates_backward(rows, d_rows, keys, d_keys, states[1:], d_states[1:])
    d_q, d_p = (d_rows, None) if inverse is None else d_rows.split(c, -2)
    d_k, d_x = d_keys.split(c, -2) if untied else (d_keys, None)
    return (d_q, d_k, d_v, d_gates, d_p, d_x), d_states[0]


def _again(given: Given, chunk: int, before: bool, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The gradients of `plain`, with a graph of their own."""
    with torch.enable_grad():
        wanted = [x for x in given if x is not None and x.requires_grad]
        y = plain(given, chunk, before)
        found = iter(torch.autograd.grad(y, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in given]


def plain(given: Given, chunk: int, before: bool) -> tuple[Tensor, Tensor]:
    """The same by autograd, chunk after chunk."""
    state, reads = given.state, []
    chunk = chunk if given.log_gates is None or given.log_gates.dim() == 3 else min(chunk, 16)
    for start in range(0, given.q.shape[1], chunk):
        q, k, v, log_gates, p, x = (
            None if part is None else part[:, start : start + chunk].transpose(1, 2) for part in given[:6]
        )
        assert q is not None
        assert k is not None
        assert v is not None
        log_gates = q.new_zeros(q.shape[:-1]) if log_gates is None else log_gates
        gates = (log_gates if log_gates.dim() == 4 else log_gates[..., None]).clamp(min=-60.0)
        g = gates.cumsum(-2, dtype=torch.float64)  # [b, h, c, 1 or k]
        earlier = torch.cat([torch.zeros_like(g[..., :1, :]), g[..., :-1, :]], -2)

        def scores(rows: Tensor, keys: Tensor, at: Tensor, offset: int, g: Tensor = g) -> Tensor:
            met = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).tril(offset)[..., None]
            between = (at[..., :, None, :] - g[..., None, :, :]).masked_fill(~met, -torch.inf).to(rows.dtype).exp()
            if g.shape[-1] == 1:
                return rows @ keys.mT * between[..., 0]
            return torch.einsum("bhtjk,bhtk,bhjk->bhtj", between, rows, keys)

        at, offset = (earlier, -1) if before else (g, 0)
        y = (q * at.to(q.dtype).exp()) @ state.mT + scores(q, k, at, offset) @ v
        left = (g[..., -1:, :] - g).to(q.dtype).exp()
        after = state * g[..., -1:, :].to(q.dtype).exp() + v.mT @ (k * left)
        if p is not None:
            x = k if x is None else x
            known = (p * earlier.to(q.dtype).exp()) @ state.mT + scores(p, k, earlier, -1) @ v
            system = torch.eye(g.shape[-2], dtype=q.dtype, device=q.device) + scores(p, x, earlier, -1)
            seen = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
            y, after = y - scores(q, x, at, offset) @ seen, after - seen.mT @ (x * left)
        reads.append(y)
        state = after
    return torch.cat(reads, -2).transpose(1, 2), state
