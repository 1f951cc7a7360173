"""Naive oracles of the linear memories: each paper's own recurrence, for one head of one row, token by token.

q, k [t, k], v [t, v], gates [t] or [t, k]; each returns the reads [t, v], unscaled, and the last state [v, k]. Nothing
here is shared with the fast code. Fast twins: `nestling.sequence.linear`, `nestling.sequence.mesa`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Run = tuple[Tensor, Tensor]


def _over(q: Tensor, state: Tensor, step: Callable[[Tensor, int], Tensor]) -> Run:
    reads = []
    for t in range(q.shape[0]):
        state = step(state, t)
        reads.append(state @ q[t])
    return torch.stack(reads), state


def naive_linear_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Run:
    return _over(q, s, lambda S, t: S + torch.outer(v[t], k[t]))


def naive_retention(q: Tensor, k: Tensor, v: Tensor, head: int, s: Tensor) -> Run:
    """RetNet, the gate of head 0, 1, ..."""
    return _over(q, s, lambda S, t: (1 - 2 ** (-5 - head)) * S + torch.outer(v[t], k[t]))


def naive_gla(q: Tensor, k: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Run:
    """GLA, gates a = exp(log retention) [t, k]."""
    return _over(q, s, lambda S, t: S @ torch.diag(a[t]) + torch.outer(v[t], k[t]))


def naive_mamba2(q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_rate: Tensor, s: Tensor) -> Run:
    """Mamba-2: h <- exp(D A) h + D x B^T, A = -exp(log_rate)."""
    return _over(q, s, lambda S, t: torch.exp(step[t] * -torch.exp(log_rate)) * S + step[t] * torch.outer(v[t], k[t]))


def naive_hgrn2(q: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Run:
    return _over(q, s, lambda S, t: S @ torch.diag(a[t]) + torch.outer(v[t], 1 - a[t]))


def naive_delta_rule(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: Tensor) -> Run:
    """One step of gradient descent on |S k - v|^2 / 2."""
    return _over(q, s, lambda S, t: S - b[t] * torch.outer(S @ k[t] - v[t], k[t]))


def naive_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, s: Tensor) -> Run:
    """Decay first, then the delta rule on the decayed state; a [t], or [t, k] for Kimi delta attention."""

    def step(state: Tensor, t: int) -> Tensor:
        decayed = state * a[t]
        return decayed - b[t] * torch.outer(decayed @ k[t] - v[t], k[t])

    return _over(q, s, step)


def naive_kda_erase(q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, e: Tensor, s: Tensor) -> Run:
    """Kimi delta attention with a gate e [t, k] on what is erased."""

    def step(state: Tensor, t: int) -> Tensor:
        factor = torch.eye(k.shape[1], dtype=k.dtype) - b[t] * torch.outer(e[t] * k[t], k[t])
        return state @ torch.diag(a[t]) @ factor + b[t] * torch.outer(v[t], k[t])

    return _over(q, s, step)


def naive_delta_product(q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, s: Tensor) -> Run:
    """DeltaProduct with a decay before the first of n steps; k [t, n, k], v [t, n, v], b [t, n], a [t]."""

    def step(state: Tensor, t: int) -> Tensor:
        state = a[t] * state
        for j in range(k.shape[1]):
            householder = torch.eye(k.shape[2], dtype=k.dtype) - b[t, j] * torch.outer(k[t, j], k[t, j])
            state = state @ householder + b[t, j] * torch.outer(v[t, j], k[t, j])
        return state

    return _over(q, s, step)


def naive_rwkv7(q: Tensor, k: Tensor, v: Tensor, w: Tensor, r: Tensor, a: Tensor, s: Tensor) -> Run:
    """RWKV-7; w, r, a [t, k]."""

    def step(state: Tensor, t: int) -> Tensor:
        return state @ (torch.diag(w[t]) - torch.outer(r[t], a[t] * r[t])) + torch.outer(v[t], k[t])

    return _over(q, s, step)


def naive_longhorn(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: Tensor) -> Run:
    """Longhorn: row i minimises |S_i - old|^2 + b_i (S_i k - v_i)^2, solved as it stands; b [t, v]."""

    def step(state: Tensor, t: int) -> Tensor:
        eye = torch.eye(k.shape[1], dtype=k.dtype)
        rows = [
            torch.linalg.solve(eye + b[t, i] * torch.outer(k[t], k[t]), state[i] + b[t, i] * v[t, i] * k[t])
            for i in range(v.shape[1])
        ]
        return torch.stack(rows)

    return _over(q, s, step)


def naive_comba(q: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor, a: Tensor, d: Tensor, s: Tensor) -> Run:
    """Comba with the erase at the undecayed state, as its kernels have it; d: output feedback []."""

    def step(state: Tensor, t: int) -> Tensor:
        return a[t] * state - b[t] * torch.outer(state @ p[t], k[t]) + b[t] * torch.outer(v[t], k[t])

    return _over(q - d * p, s, step)


def naive_mesa(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, ridge: Tensor, g: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """MesaNet with a direct solve; ridge [k]."""
    reads = []
    for t in range(q.shape[0]):
        g = a[t] * g + b[t] * torch.outer(v[t], k[t])
        h = a[t] * h + b[t] * torch.outer(k[t], k[t])
        reads.append(g @ torch.linalg.solve(h + torch.diag(ridge), q[t]))
    return torch.stack(reads), g, h
