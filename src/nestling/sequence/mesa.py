"""The Mesa layer: every token reads the least-squares solution over all pairs so far."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .linear import linear_memory


def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_retention: Tensor,
    ridge: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    iterations: int = 30,
    chunk: int = 64,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The memory that solves its regression, by conjugate gradients at every token at once.

        G_t = a_t G_{t-1} + b_t v_t k_t^T        H_t = a_t H_{t-1} + b_t k_t k_t^T
        y_t = G_t (H_t + Diag(ridge))^{-1} q_t

    q, k [b, t, h, k], v [b, t, h, v], b = step_size and log a [b, t, h], ridge > 0 [h, k]; states G [b, h, v, k] and
    H [b, h, k, k]. Each iteration is one pass of linear attention. Gradients are those of the exact solution, by a
    second solve, and right where `iterations` (at most 30; never more than k are needed in exact numbers) suffice.
    MesaNet (2506.05233). Raises ValueError for a ridge of another shape, or no iterations.
    Oracle: `memory.naive_linear.naive_mesa`, a direct solve.
    """
    b, _, h, width = q.shape
    if ridge.shape != (h, width):
        raise ValueError(f"ridge must be {[h, width]} beside q {list(q.shape)}, got {list(ridge.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    dtype, given = torch.promote_types(v.dtype, torch.float32), v.dtype  # conjugate gradients need the digits
    q, k, v, step_size, log_retention, ridge = (x.to(dtype) for x in (q, k, v, step_size, log_retention, ridge))
    g, inner = (None, q.new_zeros(b, h, width, width)) if initial_state is None else initial_state
    solved = Solve.apply(q, k, step_size, log_retention, ridge, inner, iterations, chunk)
    y, after = linear_memory(
        solved, k, v * step_size[..., None], log_retention=log_retention, initial_state=g, chunk=chunk, scale=1.0
    )
    _, inner = _apply(torch.zeros_like(q), (k, step_size, log_retention, ridge, inner), chunk)
    return y.to(given), (after, inner)


def _apply(x: Tensor, parts: Sequence[Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """(H_t + Diag(ridge)) x_t for every token, and the last H."""
    k, step_size, log_retention, ridge, inner = parts
    weighted = k * step_size[..., None]
    y, state = linear_memory(x, k, weighted, log_retention=log_retention, initial_state=inner, chunk=chunk, scale=1.0)
    return y + ridge * x, state


class Solve(Function):
    """right-hand sides [b, t, h, k] and the parts of H -> x_t with (H_t + Diag(ridge)) x_t = right_t."""

    @staticmethod
    def forward(ctx: Any, right: Tensor, *parts: Any) -> Tensor:
        *tensors, iterations, chunk = parts
        x = _conjugate_gradients(right, tensors, iterations, chunk)
        ctx.save_for_backward(x, *tensors)
        ctx.iterations, ctx.chunk = iterations, chunk
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        again = torch.is_grad_enabled()
        d_right = Solve.apply(grads[0], *tensors, ctx.iterations, ctx.chunk)  # H is symmetric
        with torch.enable_grad():
            own = [part.view_as(part) for part in tensors]  # else the graph would go on through x
            wanted = [part for part in own if part.requires_grad]
            seen, _ = _apply(x, own, ctx.chunk)
            found = iter(torch.autograd.grad(seen, wanted, -d_right, create_graph=again) if wanted else ())
        return (d_right, *(next(found) if part.requires_grad else None for part in own), None, None)


def _conjugate_gradients(right: Tensor, parts: list[Tensor], iterations: int, chunk: int) -> Tensor:
    """Every token for itself; one that has arrived stays where it is."""
    x, residual, direction = torch.zeros_like(right), right, right
    squared = residual.square().sum(-1, keepdim=True)
    least = squared * torch.finfo(right.dtype).eps ** 2
    for _ in range(iterations):
        seen, _ = _apply(direction, parts, chunk)
        going = squared > least
        length = torch.where(going, squared / (direction * seen).sum(-1, keepdim=True), 0.0)
        x, residual = x + length * direction, residual - length * seen
        after = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(going, after / squared, 0.0) * direction
        squared = after
    return x
