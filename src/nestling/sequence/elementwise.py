"""What stands around a memory, element by element: convolution, heads and norms, with gradients by hand.

Plain autograd writes a tensor as long as the sequence for each of these operations and each of their gradients, and
a CPU then waits for memory; here rows are taken a few at a time, so that what is only passed on stays in the caches.
Every function has its plain expression beside it: that gives the second derivatives, and is the oracle
(tests/test_elementwise.py).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

ELEMENTS = 2**18  # of one tensor at a time: 1 MB
LEAST_NORM = 1e-12
LEAST_SQUARE = 1e-6  # beside a mean square


def again(plain: Callable[..., Tensor], given: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """The gradients of plain(*given), with a graph of their own."""
    with torch.enable_grad():
        tensors = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad(plain(*given), tensors, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in given)


def few(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of all tensors [b, ...] at a time."""
    b = len(tensors[0])
    rows = max(1, ELEMENTS * b // max(1, tensors[0].numel()))
    return zip(*(x.split(rows) for x in tensors), strict=True)


class Convolve(Function):
    """What came before [b, back, d], x [b, t, d], w [d, back + 1] -> y [b, t, d], y_t = sum_s w_s * x_{t - back + s}:
    what conv1d with a group a channel computes, without its change of layout."""

    @staticmethod
    def plain(tail: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        extended, t = torch.cat([tail, x], 1), x.shape[1]
        return sum((extended[:, s : s + t] * weight[:, s] for s in range(weight.shape[1])), torch.zeros_like(x))

    @staticmethod
    def forward(ctx: Any, tail: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tail, x, weight)
        taps, back, y = weight.t().contiguous(), tail.shape[1], torch.empty_like(x)
        _taps(torch.cat([tail, x[:, :back]], 1), taps, y[:, :back])
        for part, out in few(x, y):
            _taps(part, taps, out[:, back:])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        tail, x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(Convolve.plain, (tail, x, weight), g)
        taps, back, d_x = weight.t().contiguous(), tail.shape[1], torch.empty_like(x)
        d_taps = torch.zeros_like(taps)
        for part, out, d_part in few(x, g, d_x):
            _taps_backward(part, taps, out[:, back:], d_part, d_taps)
        head = torch.cat([tail, x[:, :back]], 1)
        d_head = torch.empty_like(head)
        _taps_backward(head, taps, g[:, :back], d_head, d_taps)
        d_x[:, :back] += d_head[:, back:]
        return d_head[:, :back], d_x, d_taps.t()


def _taps(x: Tensor, taps: Tensor, y: Tensor) -> None:
    """y [b, t - back, d] = sum_s taps_s * x [b, t, d] from s on."""
    n = y.shape[1]
    if n:
        torch.mul(x[:, :n], taps[0], out=y)
        for shift in range(1, len(taps)):
            y.addcmul_(x[:, shift : shift + n], taps[shift])


def _taps_backward(x: Tensor, taps: Tensor, g: Tensor, d_x: Tensor, d_taps: Tensor) -> None:
    """The gradients of `_taps`: d_x is set, d_taps added to."""
    n = g.shape[1]
    d_x[:, n:].zero_()
    if n:
        torch.mul(g, taps[0], out=d_x[:, :n])
        d_taps[0] += (g * x[:, :n]).sum((0, 1))
        for shift in range(1, len(taps)):
            d_x[:, shift : shift + n].addcmul_(g, taps[shift])
            d_taps[shift] += (g * x[:, shift : shift + n]).sum((0, 1))


class Heads(Function):
    """x [b, t, n k] -> heads of SiLU(x) [b, n, t, k], the first `units` of them L2-normalised."""

    @staticmethod
    def plain(x: Tensor, heads: int, units: int) -> Tensor:
        y = F.silu(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        return torch.cat([F.normalize(y[:, :units], dim=-1, eps=LEAST_NORM), y[:, units:]], 1)

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, units: int) -> Tensor:
        b, t, d = x.shape
        y = x.new_empty(b, heads, t, d // heads)
        inverse = x.new_empty(b, units, t, 1)
        for part, out, inv in few(x, y, inverse):
            out.copy_(F.silu(part).unflatten(-1, (heads, -1)).transpose(1, 2))
            inv.copy_(torch.linalg.vector_norm(out[:, :units], dim=-1, keepdim=True))
            out[:, :units] *= inv.clamp_(min=LEAST_NORM).reciprocal_()
        ctx.save_for_backward(x, y, inverse)
        ctx.heads, ctx.units = heads, units
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        x, y, inverse = ctx.saved_tensors
        units = ctx.units
        if torch.is_grad_enabled():
            return again(Heads.plain, (x, ctx.heads, units), g)
        d_x = torch.empty_like(x)
        for part, out, inv, g_out, d_part in few(x, y, inverse, g, d_x):
            d_y = torch.empty(part.shape, dtype=g.dtype, device=g.device)
            by_head = d_y.unflatten(-1, (ctx.heads, -1)).transpose(1, 2)
            by_head[:, units:] = g_out[:, units:]
            by_head[:, :units] = _unit_backward(g_out[:, :units], out[:, :units], inv)
            torch.ops.aten.silu_backward.grad_input(d_y, part, grad_input=d_part)
        return d_x, None, None


class Unit(Function):
    """x / |x| over the last dim; of a vector shorter than 1e-12, x / 1e-12."""

    @staticmethod
    def plain(x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=LEAST_NORM)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=LEAST_NORM).reciprocal_()
        y = x * inverse
        ctx.save_for_backward(x, y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        x, y, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            (d_x,) = again(Unit.plain, (x,), grads[0])
            return d_x
        return _unit_backward(grads[0], y, inverse)


def _unit_backward(g: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    along = (g * y).sum(-1, keepdim=True)
    along = torch.where(inverse < 1.0 / LEAST_NORM, along, 0.0)
    return torch.addcmul(g, y, along, value=-1.0).mul_(inverse)


def unit(x: Tensor) -> Tensor:
    return Unit.apply(x)


class Gated(Function):
    """y [b, n, t, k], gate [b, t, n k], weight [n k] -> (y / its root mean square) * weight * SiLU(gate) [b, t, n k]:
    an RMS norm by head and a gate, of which what came in is kept and no more."""

    @staticmethod
    def plain(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        normed = F.rms_norm(y, y.shape[-1:], eps=LEAST_SQUARE).transpose(1, 2).flatten(-2)
        return normed * weight * F.silu(gate)

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        inverse, said = y.new_empty(*y.shape[:-1], 1), torch.empty_like(gate)
        for part, inv, raw, out in few(y, inverse, gate, said):
            inv.copy_(part.square().mean(-1, keepdim=True).add_(LEAST_SQUARE).rsqrt_())
            torch.mul(part, inv, out=_by_head(out, y.shape[1]))
            out.mul_(F.silu(raw).mul_(weight))
        ctx.save_for_backward(y, inverse, gate, weight)
        return said

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        g = grads[0].contiguous()
        y, inverse, gate, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(Gated.plain, (y, gate, weight), g)
        d_y, d_gate, d_weight = torch.empty_like(y), torch.empty_like(gate), torch.zeros_like(weight)
        for part, inv, raw, g_part, d_part, d_raw in few(y, inverse, gate, g, d_y, d_gate):
            opened, normed = F.silu(raw), torch.empty_like(raw)
            by_head = torch.mul(part, inv, out=_by_head(normed, y.shape[1]))
            along = g_part * normed
            d_weight += (along * opened).sum((0, 1))
            torch.ops.aten.silu_backward.grad_input(along.mul_(weight), raw, grad_input=d_raw)
            d_normed = _by_head(opened.mul_(g_part).mul_(weight), y.shape[1])
            mean = (d_normed * by_head).mean(-1, keepdim=True)
            torch.mul(torch.addcmul(d_normed, by_head, mean, value=-1.0), inv, out=d_part)
        return d_y, d_gate, d_weight


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[b, t, n k] as [b, n, t, k], the same memory."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
