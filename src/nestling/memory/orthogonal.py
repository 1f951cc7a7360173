"""Parts that look at a whole matrix: orthogonalised updates (Muon) and full-matrix preconditioners."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adaptive import _not_negative
from .rule import (
    Direction,
    Gates,
    Gradient,
    Norms,
    Plan,
    Scaled,
    State,
    Summed,
    _said,
    _times,
    _wrapper,
    delta_gradient_descent,
    momentum,
    surprise,
)

CUBIC = (1.5, -0.5, 0.0)
"""The classical iteration: converges to singular values of one from below sqrt(3)."""
QUINTIC = (3.4445, -4.775, 2.0315)
"""Steeper at zero, and never quite at one: singular values end between about 0.7 and 1.2 (Jordan et al. 2024)."""


def orthogonalize(
    matrix: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The Newton-Schulz iterate of every matrix [..., out, in], begun at X = matrix / max(|matrix|_F, eps).

    X <- a X + (b A + c A^2) X, A = X X^T (of the shorter side). Nested Learning equations 43 and 44 (a step of 1/4
    there is CUBIC). dtype: what the products are computed in.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix.to(dtype or matrix.dtype)
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    x = x / norm if x is matrix or torch.is_grad_enabled() else x.div_(norm)
    flat = x.flatten(0, -3) if x.dim() > 3 else x
    plus = torch.baddbmm if flat.dim() == 3 else torch.addmm
    a, b, c = coefficients
    for _ in range(steps):
        gram = flat @ flat.mT if wide else flat.mT @ flat
        inner = plus(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        flat = plus(flat, inner, flat, beta=a) if wide else plus(flat, flat, inner, beta=a)
    return flat.view(x.shape).to(matrix.dtype)


@dataclass(frozen=True, repr=False)
class newton_schulz(_wrapper):
    """update = NewtonSchulz(update of `of`): its singular vectors, with all singular values near one.

    The scale of what is inside is lost, a step size there included; it belongs outside: Muon is
    `scale(newton_schulz(momentum(surprise())))`. Batched over leading dims. precision: what the products are
    computed in, the "weight"'s own dtype or "bfloat16". Nested Learning equations 42 to 44 and 52. Oracles: the
    iteration written out in float64, torch.optim.Muon (tests/test_optim_torch.py).
    """

    of: Direction = momentum(surprise())
    steps: int = 5
    coefficients: tuple[float, float, float] = QUINTIC
    eps: float = 1e-7
    precision: str = "weight"
    elementwise = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "coefficients", tuple(self.coefficients))
        if not 1 <= self.steps < 100:
            raise ValueError(f"newton_schulz: steps must be from 1 to 99, got {self.steps}")
        if len(self.coefficients) != 3:
            raise ValueError(f"newton_schulz: coefficients must be three numbers, got {self.coefficients}")
        if self.precision not in ("weight", "bfloat16"):
            raise ValueError(f"newton_schulz: precision must be 'weight' or 'bfloat16', got {self.precision!r}")
        _not_negative("newton_schulz", "eps", self.eps)

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return _said(self.scaled(weight, gradient, state, gates))

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, after = self.of.scaled(weight, gradient, state, gates)
        if not times:
            return torch.zeros_like(added), 1.0, after
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        found = orthogonalize(added, self.steps, self.coefficients, self.eps / abs(times), dtype)
        return found, math.copysign(1.0, times), after


@dataclass(frozen=True, repr=False)
class match_spectrum(_times):
    """update = sqrt(max(1, out / in)) * (update of `of`): torch's adjust_lr_fn="original" (Jordan et al. 2024). Oracle:
    torch.optim.Muon."""

    of: Direction = newton_schulz()

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return False

    def factor(self, weight: Tensor, gates: Gates) -> Tensor | float:
        return math.sqrt(max(1.0, weight.shape[-2] / weight.shape[-1]))


@dataclass(frozen=True, repr=False)
class match_rms(_times):
    """update = rms * sqrt(max(out, in)) * (update of `of`): an orthogonal update of root mean square `rms`, torch's
    adjust_lr_fn="match_rms_adamw" (Liu et al. 2025). Oracle: the formula (tests/test_optim_torch.py)."""

    of: Direction = newton_schulz()
    rms: float = 0.2

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return False

    def factor(self, weight: Tensor, gates: Gates) -> Tensor | float:
        return self.rms * math.sqrt(max(weight.shape[-2:]))


@dataclass(frozen=True, repr=False)
class unit_rms(_wrapper):
    """update = u / rms(u), u the update of `of`: every matrix moves by one step size, root mean square. Source: this
    library, for M3. Oracle: the formula (tests/test_optimizer_memories.py)."""

    of: Direction = newton_schulz()
    eps: float = 1e-12

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return False

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        return _said(self.scaled(weight, gradient, state, gates))

    def scaled(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> Scaled:
        added, times, after = self.of.scaled(weight, gradient, state, gates)
        if not times:
            return torch.zeros_like(added), 1.0, after
        norm = torch.linalg.matrix_norm(added, keepdim=True) / math.sqrt(added.shape[-1] * added.shape[-2])
        return added / norm.clamp(min=self.eps / abs(times)), math.copysign(1.0, times), after


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is: solves and eigenvalues have no coarser form."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class InverseRoot(torch.autograd.Function):
    """(A + eps I)^(-1/2) of symmetric A >= 0 [..., n, n]. Its gradient is written with divided differences, which
    stand where eigenvalues are equal and torch's gradient of eigenvectors does not."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, eps: float) -> Tensor:
        values, vectors = torch.linalg.eigh(_wide(matrix))
        root = (values.clamp(min=0.0) + eps).sqrt()
        ctx.save_for_backward(root, vectors)
        return ((vectors / root[..., None, :]) @ vectors.mT).to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        root, vectors = ctx.saved_tensors
        one, other = root[..., :, None], root[..., None, :]
        inner = vectors.mT @ grads[0].to(vectors.dtype) @ vectors
        full = vectors @ (-inner / (one * other * (one + other))) @ vectors.mT
        return (0.5 * (full + full.mT)).to(grads[0].dtype), None


class FullState(NamedTuple):
    outer: Tensor  # sum of g g^T [..., out, out]
    of: State


@dataclass(frozen=True, repr=False)
class full_matrix_adagrad(_wrapper):
    """H <- H + g g^T; update = (H + eps I)^(-1/2) (update of `of`), H [..., out, out].

    For a vector, which is a column, this is full-matrix Adagrad (Duchi et al. 2011); for a matrix, the memory of
    Nested Learning equations 106 to 111. With `average` inside: Adagrad with momentum. Oracles: eigenvalues
    (tests/test_nested_optimizers.py), the Denman-Beavers iteration (tests/test_optimizer_memories.py).
    """

    of: Direction = surprise()
    eps: float = 1e-8
    elementwise = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"full_matrix_adagrad: eps must be > 0, got {self.eps}")

    def init(self, weight: Tensor) -> State:
        rows = weight.shape[-2]
        return FullState(weight.new_zeros(*weight.shape[:-2], rows, rows), self.of.init(weight))

    def anchor(self, state: State) -> State:
        return FullState(state.outer, self.of.anchor(state.of))

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        added, inner = self.of.update(weight, gradient, state.of, gates)
        g = gradient.dense()
        outer = state.outer + g @ g.mT
        return InverseRoot.apply(outer, self.eps) @ added, FullState(outer, inner)


@dataclass(frozen=True, repr=False)
class joint_delta_gradient_descent(delta_gradient_descent):
    """W <- argmin_W |W X + E|^2 / 2 + |W - W_t|^2 / (2 eta) over the n pairs of a step at once:
    W <- W (I + eta X X^T)^(-1) + (update of `of` on the gradient E X^T (I + eta X X^T)^(-1)).

    Nested Learning equation 56 for a batch, in closed form; delta_gradient_descent is its case of one pair. Of fewer
    pairs than inputs the inverse is that of an n x n matrix (Woodbury). Oracle: the direct solve.
    """

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        total = gradient.dense()
        erased = _damped(gradient, torch.cat([weight, total], -2), gates.step_size)
        old, slope = erased.split([weight.shape[-2]] * 2, -2)
        inputs = gradient.gram() if self.of.needs_inputs else None
        added, state = self.of.update(weight, Summed(total - slope, inputs, gradient.tokens), state, gates)
        return added - old, state

    def plan(self, gates: Gates, norms: Norms, state: State, exact: bool) -> Plan:
        raise ValueError(f"{self} solves for all pairs of a step together; use way='recurrent'")


def _damped(gradient: Gradient, rows: Tensor, step_size: Tensor | float) -> Tensor:
    """rows (I - (I + eta X X^T)^(-1)): of rows [..., m, in], what the inputs of a step take away."""
    eta, wide = step_size[..., None, None] if isinstance(step_size, Tensor) else step_size, _wide(rows)
    x = None if isinstance(gradient, Summed) else _wide(gradient.input)
    if x is not None and x.shape[-2] < x.shape[-1]:
        small = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device) + eta * (x @ x.mT)
        away = torch.linalg.solve(small, eta * (wide @ x.mT).mT).mT @ x
    else:
        gram = eta * _wide(gradient.gram())
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        away = torch.linalg.solve(eye + gram, gram @ wide.mT).mT
    return away.to(rows.dtype)


__all__ = [
    "CUBIC",
    "QUINTIC",
    "full_matrix_adagrad",
    "joint_delta_gradient_descent",
    "match_rms",
    "match_spectrum",
    "newton_schulz",
    "orthogonalize",
    "unit_rms",
]
