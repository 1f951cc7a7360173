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

Grads = tuple[Tensor | None, ...]


def _add(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """total + alpha a @ b; `total` is used up."""
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (total, a, b))
    return torch.baddbmm(*flat, alpha=alpha).view_as(total) if torch.is_grad_enabled() else _add_(*flat, alpha, total)


def _add_(flat: Tensor, a: Tensor, b: Tensor, alpha: float, total: Tensor) -> Tensor:
    flat.baddbmm_(a, b, alpha=alpha)
    return total


def _minus(a: Tensor, b: Tensor) -> Tensor:
    """-(a @ b)."""
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (a, b)]
    nothing = a.new_empty(len(flat[0]), a.shape[-2], b.shape[-1])
    return torch.baddbmm(nothing, *flat, beta=0.0, alpha=-1.0).view(*a.shape[:-1], b.shape[-1])


def _dots(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """sum_k a_k b_k over the last dim, summed to the shape of `like`."""
    return (a * b).sum(-1).sum_to_size(like.shape)


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
        products = F.threshold_(between.exp_(), least, 0.0)
        first = F.threshold_(total.to(dtype).exp_(), least, 0.0)
        ctx.save_for_backward(log_gates, products, first)
        return products, first

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        log_gates, products, first = ctx.saved_tensors
        inner = grads[0] * products
        total = inner.sum(-1) - inner.sum(-2) + grads[1] * first
        # of a gate l, every prefix sum from l on: a sum from behind
        gates = total.sum(-1, keepdim=True) - total.cumsum(-1) + total
        return torch.where(log_gates > LOG_ZERO, gates, 0.0)


LOG_ZERO = -60.0  # a gate of exactly 0 counts as e^-60


class Look(Function):
    """b * (x D^T) + x Z^T + f * (x S^T) - (x X^T * G) w - (x X^T * B) e: what the weights of every token of a
    chunk answer to x [..., c, in] -> [..., c, out].

    D, Z, S [..., out, in]: what stood before the chunk (its distance from the start, the start, the momentum);
    X [..., c, in], w, e [..., c, out]: inputs, writes and erased; b, f [..., c], G, B [..., c, c]: the stand.
    Z, S with f, b, and e with B may be None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drift: Tensor,
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
        ctx.save_for_backward(x, drift, start, buffer, inputs, writes, erased, b, f, written, kept)
        answer = x @ drift.mT
        if b is not None:
            answer.mul_(b[..., None])
        if start is not None:
            _add(answer, x, start.mT)
        if buffer is not None and f is not None:
            answer.addcmul_(x @ buffer.mT, f[..., None])
        scores = x @ inputs.mT
        if erased is not None:
            _add(answer, scores * kept, erased, -1.0)
        return _add(answer, scores.mul_(written), writes, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        x, drift, start, buffer, inputs, writes, erased, b, f, written, kept = ctx.saved_tensors
        d_start = d_buffer = d_erased = d_b = d_f = d_kept = None
        d_x = g @ drift
        if b is None:
            d_drift = g.mT @ x
        else:
            d_b = _dots(d_x, x, b)
            d_x = d_x * b[..., None]
            d_drift = g.mT @ (x * b[..., None])
        if start is not None:
            d_x, d_start = _add(d_x, g, start), g.mT @ x
        if buffer is not None:
            along = g @ buffer
            d_f = _dots(along, x, f)
            d_x = torch.addcmul(d_x, along, f[..., None])
            d_buffer = g.mT @ (x * f[..., None])
        scores, across = _minus(x, inputs.mT), g @ writes.mT
        d_writes = (scores * written).mT @ g
        d_written = (across * scores).sum_to_size(written.shape)
        d_scores = across * written
        if erased is not None:
            across = g @ erased.mT
            d_erased = (scores * kept).mT @ g
            d_kept = (across * scores).sum_to_size(kept.shape)
            d_scores = torch.addcmul(d_scores, across, kept)
        d_x, d_inputs = _add(d_x, d_scores, inputs, -1.0), _minus(d_scores.mT, x)
        return d_x, d_drift, d_start, d_buffer, d_inputs, d_writes, d_erased, d_b, d_f, d_written, d_kept


class Solve(Function):
    """r with (1 + X X^T * C) r = known: inputs X [..., c, in], C [..., c, c] strictly lower triangular, known
    [..., c, out]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, coefficients: Tensor, known: Tensor) -> Tensor:
        system = (inputs @ inputs.mT).mul_(coefficients)
        solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
        ctx.save_for_backward(inputs, coefficients, solved)
        return solved

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        inputs, coefficients, solved = ctx.saved_tensors
        scores = inputs @ inputs.mT
        d_known = torch.linalg.solve_triangular((scores * coefficients).mT, g, upper=True, unitriangular=True)
        d_system = _minus(d_known, solved.mT)
        d_scores = d_system * coefficients
        d_coefficients = (d_system * scores).sum_to_size(coefficients.shape)
        return (d_scores + d_scores.mT) @ inputs, d_coefficients, d_known


class End(Function):
    """W = b D + Z + f S - (G * w + B * e)^T X and S' = m S - (M * w)^T X, after a chunk's last token; b, f, m
    [...], G, B, M [..., c], the rest as in Look. S with f, m and M, Z, b, and e with B may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        drift: Tensor,
        start: Tensor | None,
        buffer: Tensor | None,
        inputs: Tensor,
        writes: Tensor,
        erased: Tensor | None,
        b: Tensor | None,
        f: Tensor | None,
        m: Tensor | None,
        written: Tensor,
        kept: Tensor | None,
        decayed: Tensor | None,
    ) -> Any:
        ctx.save_for_backward(drift, start, buffer, inputs, writes, erased, b, f, m, written, kept, decayed)
        weight = drift.clone() if b is None else drift * b[..., None, None]
        if start is not None:
            weight.add_(start)
        if buffer is not None and f is not None:
            weight.addcmul_(buffer, f[..., None, None])
        _add(weight, _change(writes, written, erased, kept).mT, inputs, -1.0)
        if buffer is None or m is None or decayed is None:
            return weight, None
        return weight, _add(buffer * m[..., None, None], (writes * decayed[..., None]).mT, inputs, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, g_buffer = grads
        drift, start, buffer, inputs, writes, erased, b, f, m, written, kept, decayed = ctx.saved_tensors
        d_buffer = d_erased = d_b = d_f = d_m = d_kept = d_decayed = None
        across = _minus(inputs, g.mT)
        d_drift = g
        if b is not None:
            d_b, d_drift = (g * drift).sum((-2, -1)).sum_to_size(b.shape), g * b[..., None, None]
        d_written = _dots(across, writes, written)
        d_writes = across * written[..., None]
        if erased is not None:
            d_erased, d_kept = across * kept[..., None], _dots(across, erased, kept)
        d_inputs = _minus(_change(writes, written, erased, kept), g)
        if buffer is not None:
            d_f = (g * buffer).sum((-2, -1)).sum_to_size(f.shape)
            d_m = (g_buffer * buffer).sum((-2, -1)).sum_to_size(m.shape)
            d_buffer = torch.addcmul(g * f[..., None, None], g_buffer, m[..., None, None])
            across = _minus(inputs, g_buffer.mT)
            d_decayed = _dots(across, writes, decayed)
            d_writes = torch.addcmul(d_writes, across, decayed[..., None])
            d_inputs = _add(d_inputs, writes * decayed[..., None], g_buffer, -1.0)
        d_start = None if start is None else g
        return d_drift, d_start, d_buffer, d_inputs, d_writes, d_erased, d_b, d_f, d_m, d_written, d_kept, d_decayed


def _change(writes: Tensor, written: Tensor, erased: Tensor | None, kept: Tensor | None) -> Tensor:
    change = writes * written[..., None]
    return change if erased is None or kept is None else change.addcmul(erased, kept[..., None])


class Unit(Function):
    """x / |x| over the last dim; of a vector shorter than 1e-12, x / 1e-12."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12).reciprocal_()
        ctx.save_for_backward(x, inverse)
        return x * inverse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (g,) = grads
        x, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are those of the norm itself
            inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
        along = (g * x).sum(-1, keepdim=True) * inverse.pow(3)
        return torch.addcmul(g * inverse, x, torch.where(inverse < 1e12, along, 0.0), value=-1.0)


def unit(x: Tensor) -> Tensor:
    return Unit.apply(x)
