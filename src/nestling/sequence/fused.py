"""The operations of the coefficient form, with their gradients by hand.

Plain autograd keeps every c x c matrix of every chunk and goes through memory once for each of its operations;
here only what comes in is kept, and the rest is computed again. Forward and backward are both made of ordinary
operations, so that second derivatives exist. Tensors of one map have the same leading dims; coefficients have
them too or stand for several (a size of one). Oracle: the plain expression in each docstring, and finite
differences of first and second order (tests/test_fused.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

LOG_ZERO = -60.0  # a gate of exactly 0 counts as e^-60


def _add(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, *, own: bool = True) -> Tensor:
    """total + alpha a @ b; written over a total of one's `own`, where no graph needs it."""
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (total, a, b)]
    if own and total.is_contiguous() and not torch.is_grad_enabled():
        flat[0].baddbmm_(*flat[1:], alpha=alpha)
        return total
    return torch.baddbmm(*flat, alpha=alpha).view(total.shape)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, written over x of one's own where no graph needs it: memory just used is still in the caches."""
    return x * factor if torch.is_grad_enabled() else x.mul_(factor)


def _plus(total: Tensor, x: Tensor, factor: Tensor, value: float = 1.0) -> Tensor:
    """total + value x * factor, written over a total of one's own where no graph needs it."""
    how = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
    return how(total, x, factor, value=value)


def _minus(a: Tensor, b: Tensor) -> Tensor:
    """-(a @ b)."""
    if torch.compiler.is_compiling():  # which knows no product with a factor of zero
        return -(a @ b)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (a, b)]
    nothing = a.new_empty(len(flat[0]), a.shape[-2], b.shape[-1])
    return nothing.baddbmm_(*flat, beta=0.0, alpha=-1.0).view(*a.shape[:-1], b.shape[-1])


def _dots(a: Tensor, b: Tensor, *, own: bool = False) -> Tensor:
    """sum_k a_k b_k over the last dim; written over an a of one's `own`, where no graph needs it."""
    return (_times(a, b) if own else a * b).sum(-1)


class Decay(Function):
    """log gates [..., c] -> P, first: P_tj = prod_{j<l<=t} [..., c, c], zero above the diagonal; first_t =
    prod_{l<=t} [..., c].

    Differences of sums are taken in float64, so that small gates before j cost no precision after it. Products
    too small to matter are exactly zero: denormal numbers would make a CPU many times slower.
    """

    @staticmethod
    def forward(ctx: Any, log_gates: Tensor) -> tuple[Tensor, Tensor]:
        dtype, c = log_gates.dtype, log_gates.shape[-1]
        total = log_gates.clamp(min=LOG_ZERO).cumsum(-1, dtype=torch.float64)
        above = torch.ones(c, c, dtype=torch.bool, device=log_gates.device).triu(1)
        between = (total[..., :, None] - total[..., None, :]).to(dtype).masked_fill_(above, -torch.inf)
        least = torch.finfo(dtype).eps ** 2
        products = F.threshold(between.exp_(), least, 0.0, inplace=True)
        first = F.threshold(total.to(dtype).exp_(), least, 0.0, inplace=True)
        ctx.save_for_backward(log_gates, products, first)
        return products, first

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        log_gates, products, first = ctx.saved_tensors
        inner = grads[0] * products
        total = inner.sum(-1) - inner.sum(-2) + grads[1] * first
        gates = total.flip(-1).cumsum(-1).flip(-1)  # every prefix sum from a gate on
        return torch.where(log_gates > LOG_ZERO, gates, 0.0)


class Last(Function):
    """A matrix [..., c, n] -> itself and its last row [..., n], whose gradients meet in one pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix.view_as(matrix), matrix[..., -1, :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total = grads[0].clone()
        total[..., -1, :] += grads[1]
        return total


class Look(Function):
    """b * (x W^T) + (1 - b) * (x Z^T) + f * (x S^T) - (x X^T * G) w - (x X^T * B) e: what the weights of every token
    of a chunk answer to x [..., c, in] -> [..., c, out].

    W, Z, S [..., out, in]: the weights before the chunk, the start, the momentum; X [..., c, in], w, e [..., c, out]:
    inputs, writes and erased; b, f [..., c], G, B [..., c, c]: the stand. Z with b, S with f, b (then 1), and e with B
    may be None. graph_only: it is only for gradients, and the answer may be anything.
    """

    @staticmethod
    def forward(
        ctx: Any,
        graph_only: bool,
        x: Tensor,
        weight: Tensor,
        start: Tensor | None,
        buffer: Tensor | None,
        inputs: Tensor,
        writes: Tensor,
        erased: Tensor | None,
        b: Tensor | None,
        f: Tensor | None,
        written: Tensor,
        kept: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, start, buffer, inputs, writes, erased, b, f, written, kept)
        if graph_only:
            return x.new_empty(*weight.shape[:-2], x.shape[-2], weight.shape[-2])
        return _looked(x, weight, start, buffer, inputs, writes, erased, b, f, written, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g = grads[0].contiguous()  # else every product would copy it
        x, weight, start, buffer, inputs, writes, erased, b, f, written, kept = ctx.saved_tensors
        d_erased = d_kept = None
        drift = _drift(weight, start)
        d_x, d_weight, d_start, d_buffer, d_b, d_f = _standing_backward(g, drift, start, buffer, x, b, f)
        scores, across = _minus(x, inputs.mT), g @ writes.mT
        d_writes = (scores * written).mT @ g
        d_written = (across * scores).sum_to_size(written.shape)
        d_scores = _times(across, written)
        if erased is not None:
            across = g @ erased.mT
            d_erased = (scores * kept).mT @ g
            d_kept = (across * scores).sum_to_size(kept.shape)
            d_scores = _plus(d_scores, across, kept)
        d_x, d_inputs = _add(d_x, d_scores, inputs, -1.0), _minus(d_scores.mT, x)
        return None, d_x, d_weight, d_start, d_buffer, d_inputs, d_writes, d_erased, d_b, d_f, d_written, d_kept


class Write(Function):
    """One chunk of writes to a linear map -> W after it, S after it, w, e: with the last two it can be read.

    With K = X X^T, the stand b, f, G, B before each token's own step, and b', f', m, G', B', M at
    the end of the chunk::

        known = b * (X W^T) + (1 - b) * (X Z^T) + f * (X S^T) - (K * G) E
        r with (1 + K * (B beta + slope G eta)) r = known                      W_{t-1} x_t, token by token
        w = E + slope eta * r         e = beta * r
        W' = b' W + (1 - b') Z + f' S - (G' * w + B' * e)^T X          S' = m S - (M * w)^T X

    W, Z, S [..., out, in]; X [..., c, in]; E [..., c, out]: what is written for certain; eta, beta, b, f,
    G', B', M [..., c]; b', f', m [...]; G, B [..., c, c] strictly lower triangular. slope is a number;
    eta goes with it. Z, S and its family, b with b' (then 1, and without Z), and beta with B and B' may be None.
    Without beta and slope, r is not needed. graph_only: it is only for gradients; W' and S' may be anything.
    """

    @staticmethod
    def forward(
        ctx: Any,
        slope: float,
        graph_only: bool,
        weight: Tensor,
        start: Tensor | None,
        buffer: Tensor | None,
        x: Tensor,
        fixed: Tensor,
        eta: Tensor | None,
        beta: Tensor | None,
        b: Tensor | None,
        f: Tensor | None,
        written: Tensor,
        kept: Tensor | None,
        b_end: Tensor | None,
        f_end: Tensor | None,
        m_end: Tensor | None,
        written_end: Tensor,
        kept_end: Tensor | None,
        decayed: Tensor | None,
    ) -> Any:
        ends = b_end, f_end, m_end, written_end, kept_end, decayed
        writes, erased, seen = _read_along(slope, weight, start, buffer, x, fixed, eta, beta, b, f, written, kept)
        if graph_only:
            after, after_buffer = torch.empty_like(weight), None if buffer is None else torch.empty_like(buffer)
        else:
            after, after_buffer = _ended(weight, start, buffer, x, writes, erased, *ends)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(weight, start, buffer, x, fixed, eta, beta, b, f, written, kept),
            *(*ends, seen),
        )
        return after, after_buffer, fixed.view_as(fixed) if writes is fixed else writes, erased

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, g_buffer, d_writes, d_erased = grads
        weight, start, buffer, x, fixed, eta, beta, b, f, written, kept, *ends, seen = ctx.saved_tensors
        b_end, f_end, m_end, written_end, kept_end, decayed = ends
        slope, drift = ctx.slope, _drift(weight, start)
        g = torch.zeros_like(weight) if g is None else g.contiguous()
        g_buffer = torch.zeros_like(weight) if g_buffer is None else g_buffer
        d_buffer = d_eta = d_beta = d_b = d_f = d_written = d_kept = None
        d_b_end = d_f_end = d_m_end = d_kept_end = d_decayed = None
        if seen is not None and torch.is_grad_enabled():  # for second derivatives, as a function of what came in
            known = _standing(weight, start, buffer, x, b, f) - (x @ x.mT * written) @ fixed
            system = x @ x.mT * _system(slope, eta, beta, written, kept)
            seen = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
        writes = fixed if eta is None else torch.addcmul(fixed, seen, eta[..., None], value=slope)

        # through the end of the chunk
        across, change = _minus(x, g.mT), writes * written_end[..., None]
        d_written_end = _dots(across, writes).sum_to_size(written_end.shape)
        d_seen = None
        if beta is not None:
            both, along = (beta * kept_end)[..., None], _dots(across, seen)
            change, d_seen = _plus(change, seen, both), across * both
            d_beta, d_kept_end = along * kept_end, (along * beta).sum_to_size(kept_end.shape)
            if d_erased is not None:
                d_beta, d_seen = d_beta + _dots(d_erased, seen), _plus(d_seen, d_erased, beta[..., None])
            d_beta = d_beta.sum_to_size(beta.shape)
        across = _times(across, written_end[..., None])
        d_writes = across if d_writes is None else _sum(across, d_writes)
        d_x, d_start, d_weight = _minus(change, g), None if start is None else g, g
        if b_end is not None:
            d_b_end, d_weight = (g * drift).sum((-2, -1)).sum_to_size(b_end.shape), g * b_end[..., None, None]
        if buffer is not None:
            d_f_end = (g * buffer).sum((-2, -1)).sum_to_size(f_end.shape)
            d_m_end = (g_buffer * buffer).sum((-2, -1)).sum_to_size(m_end.shape)
            d_buffer = _plus(g * f_end[..., None, None], g_buffer, m_end[..., None, None])
            across = _minus(x, g_buffer.mT)
            d_writes = _plus(d_writes, across, decayed[..., None])
            d_decayed = _dots(across, writes, own=True).sum_to_size(decayed.shape)
            d_x = _add(d_x, writes * decayed[..., None], g_buffer, -1.0)
        d_fixed = d_writes

        # through what the writes and the erases have read
        if seen is not None:
            if eta is not None:
                d_eta, along = slope * _dots(d_writes, seen).sum_to_size(eta.shape), slope * eta[..., None]
                d_seen = d_writes * along if d_seen is None else _plus(d_seen, d_writes, along)
            scores, inner = x @ x.mT, _system(slope, eta, beta, written, kept)
            d_known = torch.linalg.solve_triangular((scores * inner).mT, d_seen, upper=True, unitriangular=True)
            d_inner, across = _minus(d_known, seen.mT), _minus(d_known, fixed.mT)
            d_scores = _plus(d_inner * inner, across, written)
            d_inner, d_written = _times(d_inner, scores), _times(across, scores)
            if eta is not None:
                d_written = _plus(d_written, d_inner, eta[..., None, :], slope)
                d_eta = d_eta + slope * (d_inner * written).sum(-2).sum_to_size(eta.shape)
            if beta is not None:
                d_beta = d_beta + (d_inner * kept).sum(-2).sum_to_size(beta.shape)
                d_kept = _times(d_inner, beta[..., None, :]).sum_to_size(kept.shape)
            d_written = d_written.sum_to_size(written.shape)
            d_fixed = _add(d_fixed, _times(scores, written).mT, d_known, -1.0)
            d_x = _add(d_x, d_scores + d_scores.mT, x)
            d_x, d_weight, d_start, d_buffer, d_b, d_f = _standing_backward(
                d_known, drift, start, buffer, x, b, f, (d_x, d_weight, d_start, d_buffer)
            )
        elif start is not None:
            d_start = g - d_weight
        return (
            *(None, None, d_weight, d_start, d_buffer, d_x, d_fixed, d_eta, d_beta, d_b, d_f, d_written, d_kept),
            *(d_b_end, d_f_end, d_m_end, d_written_end, d_kept_end, d_decayed),
        )


def look(graph_only: bool, *given: Any) -> Tensor:
    """`Look`; where a compiler looks, by the gradients that it derives, which it can join with what stands around."""
    return _looked(*given) if torch.compiler.is_compiling() else Look.apply(graph_only, *given)


def write(slope: float, graph_only: bool, *given: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """`Write`, as `look` is `Look`."""
    if not torch.compiler.is_compiling():
        return Write.apply(slope, graph_only, *given)
    writes, erased, _ = _read_along(slope, *given[:11])
    weight, start, buffer, x = given[:4]
    return (*_ended(weight, start, buffer, x, writes, erased, *given[11:]), writes, erased)


def _looked(
    x: Tensor,
    weight: Tensor,
    start: Tensor | None,
    buffer: Tensor | None,
    inputs: Tensor,
    writes: Tensor,
    erased: Tensor | None,
    b: Tensor | None,
    f: Tensor | None,
    written: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """What `Look` answers."""
    answer = _standing(weight, start, buffer, x, b, f)
    scores = x @ inputs.mT
    if erased is not None and kept is not None:
        answer = _add(answer, scores * kept, erased, -1.0)
    return _add(answer, _times(scores, written), writes, -1.0)


def _read_along(
    slope: float,
    weight: Tensor,
    start: Tensor | None,
    buffer: Tensor | None,
    x: Tensor,
    fixed: Tensor,
    eta: Tensor | None,
    beta: Tensor | None,
    b: Tensor | None,
    f: Tensor | None,
    written: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """w, e and r of `Write`."""
    if eta is None and beta is None:
        return fixed, None, None
    known, scores = _standing(weight, start, buffer, x, b, f), x @ x.mT
    known = _add(known, scores * written, fixed, -1.0)
    system = _times(scores, _system(slope, eta, beta, written, kept))
    seen = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    writes = fixed if eta is None else torch.addcmul(fixed, seen, eta[..., None], value=slope)
    return writes, None if beta is None else seen * beta[..., None], seen


def _sum(own: Tensor, x: Tensor, times: float = 1.0) -> Tensor:
    """own + times x, written over one's own where no graph needs it."""
    return torch.add(own, x, alpha=times) if torch.is_grad_enabled() else own.add_(x, alpha=times)


def _drift(weight: Tensor, start: Tensor | None) -> Tensor:
    """W - Z, what a chunk's retention acts on."""
    return weight if start is None else weight - start


def _stood(weight: Tensor, start: Tensor | None, b: Tensor | None) -> Tensor:
    """b W + (1 - b) Z, a tensor of its own."""
    if start is None or b is None:
        return weight * (1.0 if b is None else b[..., None, None])
    return torch.lerp(start, weight, b[..., None, None])


def _ended(
    weight: Tensor,
    start: Tensor | None,
    buffer: Tensor | None,
    x: Tensor,
    writes: Tensor,
    erased: Tensor | None,
    b_end: Tensor | None,
    f_end: Tensor | None,
    m_end: Tensor | None,
    written_end: Tensor,
    kept_end: Tensor | None,
    decayed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """W' and S'."""
    change = writes * written_end[..., None]
    if erased is not None and kept_end is not None:
        change = _plus(change, erased, kept_end[..., None])
    after = _stood(weight, start, b_end)
    if buffer is not None and f_end is not None:
        after = _plus(after, buffer, f_end[..., None, None])
    after = _add(after, change.mT, x, -1.0)
    if buffer is None or m_end is None or decayed is None:
        return after, None
    fresh = torch.is_grad_enabled() or torch.compiler.is_compiling()
    change = torch.mul(writes, decayed[..., None], out=None if fresh else change)
    return after, _add(buffer * m_end[..., None, None], change.mT, x, -1.0)


def _standing(
    weight: Tensor, start: Tensor | None, buffer: Tensor | None, x: Tensor, b: Tensor | None, f: Tensor | None
) -> Tensor:
    """b * (x W^T) + (1 - b) * (x Z^T) + f * (x S^T): the answer of what stood before the chunk."""
    answer = x @ weight.mT
    if b is not None and start is not None:
        how = torch.lerp if torch.is_grad_enabled() else Tensor.lerp_
        answer = how(x @ start.mT, answer, b[..., None])
    elif b is not None:
        answer = _times(answer, b[..., None])
    if buffer is not None and f is not None:
        answer = _plus(answer, x @ buffer.mT, f[..., None])
    return answer


def _standing_backward(
    g: Tensor,
    drift: Tensor,
    start: Tensor | None,
    buffer: Tensor | None,
    x: Tensor,
    b: Tensor | None,
    f: Tensor | None,
    totals: tuple[Any, ...] = (None, None, None, None),
) -> Any:
    """Gradients of x, W, Z, S, b and f, given W - Z; the first four added to `totals`: those of x and S, and of W
    where there is b, are one's own."""
    d_x, d_weight, d_start, d_buffer = totals
    d_b = d_f = None

    def add(total: Tensor | None, a: Tensor, own: bool = True) -> Tensor:
        return g.mT @ a if total is None else _add(total, g.mT, a, own=own)

    if b is None:
        d_weight, d_x = add(d_weight, x, False), g @ drift if d_x is None else _add(d_x, g, drift)
    else:
        along = g @ drift
        d_x = along * b[..., None] if d_x is None else _plus(d_x, along, b[..., None])
        d_b, d_weight = _dots(along, x, own=True).sum_to_size(b.shape), add(d_weight, x * b[..., None])
        if start is not None:
            d_x, d_start = _add(d_x, g, start), _sum(add(d_start, x, False), d_weight, -1.0)
    if buffer is not None and f is not None:
        along = g @ buffer
        d_x = _plus(d_x, along, f[..., None])
        d_f, d_buffer = _dots(along, x, own=True).sum_to_size(f.shape), add(d_buffer, x * f[..., None])
    return d_x, d_weight, d_start, d_buffer, d_b, d_f


def _system(slope: float, eta: Tensor | None, beta: Tensor | None, written: Tensor, kept: Tensor | None) -> Tensor:
    """B beta + slope G eta: what K is multiplied by in the system that the reads solve."""
    if beta is None or kept is None:
        assert eta is not None
        return written * (slope * eta[..., None, :])
    system = kept * beta[..., None, :]
    return system if eta is None else _plus(system, written, eta[..., None, :], slope)
