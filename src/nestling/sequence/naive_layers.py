"""Naive oracles of whole layers: parameters by name and tokens x [t, d] in, the paper's equations one token at a time.

Each returns what the layer says, y [t, d], and what it remembers after it, by the names in its state. One row, one
document. Nothing here is shared with the fast code; what each recurrence does with its streams is written out again.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.naive import naive_self_modifying

Parameters = Mapping[str, Tensor]
Told = tuple[Tensor, dict[str, Tensor]]
Token = Callable[[int, int], tuple[Tensor, ...]]


def _streams(p: Parameters, x: Tensor) -> Tensor:
    """The convolution of projections, n streams side by side: [t, n d]."""
    return _convolved(p, x @ p["project.weight"].T)


def _convolved(p: Parameters, projected: Tensor) -> Tensor:
    taps = p["convolution.weight"]
    width = taps.shape[1]
    rows = []
    for t in range(len(projected)):
        inside = [taps[:, width - 1 - s] * projected[t - s] for s in range(min(width, t + 1))]
        rows.append(torch.stack(inside).sum(0))
    return torch.stack(rows)


def _head(x: Tensor, head: int, heads: int) -> Tensor:
    """The part of a head of [..., d]."""
    width = x.shape[-1] // heads
    return x[..., head * width : (head + 1) * width]


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def _said(p: Parameters, reads: list[Tensor], x: Tensor) -> Tensor:
    """Reads of every head [t, v] through norm, gate and projection."""
    normed = [y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in reads]
    gated = torch.cat(normed, -1) * p["output.norm"] * _silu(x @ p["output.gate.weight"].T)
    return gated @ p["output.project.weight"].T


def _over(p: Parameters, x: Tensor, heads: int, step: Callable[..., tuple[Tensor, ...]], matrices: int = 1) -> Told:
    """Every head from empty matrices: step(head, t, S, ...) -> what is read and the matrices after it."""
    width, reads, ends = x.shape[1] // heads, [], []
    for head in range(heads):
        state = (torch.zeros(width, width, dtype=x.dtype),) * matrices
        each = []
        for t in range(len(x)):
            y, *state = step(head, t, *state)  # type: ignore[assignment]
            each.append(y)
        reads.append(torch.stack(each))
        ends.append(state)
    names = ["memory"] if matrices == 1 else [f"memory.{i}" for i in range(matrices)]
    kept = {name: torch.stack([state[i] for state in ends]) for i, name in enumerate(names)}
    return _said(p, reads, x), kept


def _timed(p: Parameters, x: Tensor, t: int, head: int) -> Tensor:
    """Mamba-2's gate: a_t = exp(-exp(A) softplus(w.x_t + b))."""
    step = F.softplus(p["streams.gates.project.weight"][head] @ x[t] + p["streams.gates.bias"][head])
    return torch.exp(-torch.exp(p["streams.gates.log_rate"][head]) * step)


def hgrn2(p: Parameters, x: Tensor, heads: int) -> Told:
    """S <- S Diag(a) + v (1 - a)^T, a = g + (1 - g) sigmoid(W x)."""
    q, v = _streams(p, x).chunk(2, -1)
    floor = torch.sigmoid(p["streams.floor"])
    a = floor + (1 - floor) * torch.sigmoid(x @ p["streams.forget.weight"].T)

    def step(head: int, t: int, S: Tensor) -> tuple[Tensor, ...]:
        kept = _head(a[t], head, heads)
        S = S @ torch.diag(kept) + torch.outer(_head(v[t], head, heads), 1 - kept)
        return S @ _silu(_head(q[t], head, heads)), S

    return _over(p, x, heads, step)


def comba(p: Parameters, x: Tensor, heads: int) -> Told:
    """S <- a S - b (S p) k^T + b v k^T, read for q - D p."""
    q, k, v = _silu(_streams(p, x)).chunk(3, -1)

    def step(head: int, t: int, S: Tensor) -> tuple[Tensor, ...]:
        key, b = _unit(_head(k[t], head, heads)), torch.sigmoid(p["streams.gates.step.weight"][head] @ x[t])
        along = torch.sigmoid(p["streams.along"][head]) * key
        S = _timed(p, x, t, head) * S - b * torch.outer(S @ along - _head(v[t], head, heads), key)
        asked = _unit(_head(q[t], head, heads)) - p["streams.feedback"][head] * along
        return S @ asked / math.sqrt(len(S)), S

    return _over(p, x, heads, step)


def mesa(p: Parameters, x: Tensor, heads: int) -> Told:
    """y = G (H + Diag(r))^{-1} q, solved as it stands."""
    q, k, v = _silu(_streams(p, x)).chunk(3, -1)
    raw = x @ p["streams.gates.weight"].T + p["streams.gates.bias"]

    def step(head: int, t: int, G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
        key, b, a = _unit(_head(k[t], head, heads)), *torch.sigmoid(raw[t, head::heads])
        G = a * G + b * torch.outer(_head(v[t], head, heads), key)
        H = a * H + b * torch.outer(key, key)
        ridge = torch.diag(F.softplus(p["streams.ridge"][head]) + 0.25)
        return G @ torch.linalg.solve(H + ridge, _unit(_head(q[t], head, heads))), G, H

    return _over(p, x, heads, step, matrices=2)


def rwkv7(p: Parameters, x: Tensor, heads: int) -> Told:
    """S <- S (Diag(w) - r (a * r)^T) + v k~^T, y = S q + (u * q . k~) v."""
    q, k, v = _streams(p, x).chunk(3, -1)
    low = torch.tanh(x @ p["streams.decay_down.weight"].T) @ p["streams.decay_up.weight"].T
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low + p["streams.decay_up.bias"]))
    low = x @ p["streams.rate_down.weight"].T @ p["streams.rate_up.weight"].T
    a = torch.sigmoid(low + p["streams.rate_up.bias"])

    def step(head: int, t: int, S: Tensor) -> tuple[Tensor, ...]:
        query, value, decay, rate = (_head(part[t], head, heads) for part in (q, v, w, a))
        r = _unit(_head(k[t] * p["streams.removal"], head, heads))
        alpha = _head(p["streams.replacement"], head, heads)
        key = _head(k[t], head, heads) * ((1 - alpha) + alpha * rate)
        S = S @ (torch.diag(decay) - torch.outer(r, rate * r)) + torch.outer(value, key)
        return S @ query + (p["streams.bonus"][head] * query) @ key * value, S

    return _over(p, x, heads, step)


def srwm(p: Parameters, x: Tensor, heads: int) -> Told:
    """W <- W + s(b) * (W phi(q) - W phi(k)) phi(k)^T; y, q, k, b = W phi(x) before it."""
    reads, ends, mixed = [], [], _convolved(p, x)
    for head in range(heads):
        W, each = p["start"][head], []
        d = W.shape[1]
        for t in range(len(x)):
            told = W @ torch.softmax(_head(mixed[t], head, heads), -1)
            each.append(told[:d])
            value = W @ torch.softmax(told[d : 2 * d], -1)
            key = torch.softmax(told[2 * d : 3 * d], -1)
            steps = torch.sigmoid(told[3 * d :] + p["bias"][head])
            parts = []
            for i, rows in enumerate((slice(0, d), slice(d, 2 * d), slice(2 * d, 3 * d), slice(3 * d, None))):
                parts.append(W[rows] + steps[i] * torch.outer(value[rows] - W[rows] @ key, key))
            W = torch.cat(parts)
        reads.append(torch.stack(each))
        ends.append(W)
    return _said(p, reads, x), {"memory": torch.stack(ends)}


def lstm(p: Parameters, x: Tensor, heads: int) -> Told:
    """c <- f c + i g, h = o tanh(c)."""
    h = c = torch.zeros_like(x[0])
    said = []
    for token in x:
        raw = p["cell.weight_ih_l0"] @ token + p["cell.bias_ih_l0"] + p["cell.weight_hh_l0"] @ h + p["cell.bias_hh_l0"]
        i, f, g, o = raw.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        said.append(h)
    return torch.stack(said), {"hidden": h, "memory": c}


def attention(p: Parameters, x: Tensor, heads: int) -> Told:
    """softmax(q_t . k_i / sqrt k) v_i over all i <= t, q and k turned by their positions; and over the persistent
    tokens, if any, with q and k as they are."""
    return windowed(math.inf, p, x, heads)


def windowed(window: float, p: Parameters, x: Tensor, heads: int) -> Told:
    """`attention` over the last `window` i."""
    mixed = _streams({"project.weight": p["qkv.weight"], "convolution.weight": p["convolution.weight"]}, x)
    q, k, v = mixed.chunk(3, -1)
    always = p.get("persistent", x[:0])
    k_always, v_always = (always @ p["qkv.weight"][x.shape[1] :].T).chunk(2, -1)
    turned = [torch.stack([_turned(_head(row, head, heads), i) for i, row in enumerate(k)]) for head in range(heads)]
    said = []
    for t in range(len(x)):
        each, seen = [], [i for i in range(t + 1) if t - i < window]
        for head in range(heads):
            query = _head(q[t], head, heads)
            scores = torch.cat([_head(k_always, head, heads) @ query, turned[head][seen] @ _turned(query, t)])
            weights = torch.exp((scores - scores.max()) / math.sqrt(len(query)))
            values = torch.cat([_head(v_always, head, heads), _head(v, head, heads)[seen]])
            each.append((weights / weights.sum()) @ values)
        said.append(p["project.weight"] @ torch.cat(each))
    last = len(x) if math.isinf(window) else int(window) - 1
    return torch.stack(said), {"keys": _kept(k, heads, last), "values": _kept(v, heads, last)}


def _kept(stream: Tensor, heads: int, last: int) -> Tensor:
    """The last so many rows of every head [h, last, k], zero where there have not been as many."""
    rows = [stream[t] if t >= 0 else torch.zeros_like(stream[0]) for t in range(len(stream) - last, len(stream))]
    return torch.stack([torch.stack([_head(row, head, heads) for row in rows]) for head in range(heads)])


def self_modifying(chunk: int, projection_chunk: int, safety: float, p: Parameters, x: Tensor, heads: int) -> Told:
    """`memory.naive.naive_self_modifying` in every head, with memories for key, value, step size and retention."""
    mixed = _silu(_convolved(p, x @ p["mix.weight"].T))
    momentum = torch.sigmoid(x @ p["gates.weight"].T + p["gates.bias"])
    members = {name: f"starts.{i}" for i, name in enumerate(("key", "value", "step_size", "retention", "main"))}
    width = x.shape[1] // heads
    bound = safety / (1.0 + math.sqrt(max(chunk, projection_chunk) / width)) ** 2
    reads, ends = [], []
    for head in range(heads):
        u, q = (torch.stack([_unit(_head(row, head, heads)) for row in part]) for part in mixed.chunk(2, -1))
        starts: dict[str, tuple[Tensor, ...]] = {
            name: (p[f"{at}.0"][head], p[f"{at}.1"][head]) for name, at in members.items()
        }
        own = (p["gate_bias"][head], p["value_scale"][head], bound, chunk, projection_chunk)
        run = naive_self_modifying(u, q, momentum[:, head], starts, *own)
        reads.append(run.reads)
        ends.append(run.weights)
    kept = {}
    for group, names in enumerate((("key", "value"), ("step_size", "retention"))):
        for i in range(2):
            each = [torch.stack([end[name][i] for name in names]) for end in ends]
            kept[f"memories.{group}.running.{i}"] = torch.stack(each)
    kept |= {f"memories.2.running.{i}": torch.stack([end["main"][i] for end in ends]) for i in range(2)}
    return _said(p, reads, x), kept


def _turned(x: Tensor, position: int) -> Tensor:
    """Each pair (x_i, x_{i + k/2}) turned by position / 10000^(2 i / k)."""
    half = len(x) // 2
    turned = [torch.zeros((), dtype=x.dtype)] * len(x)
    for i in range(half):
        angle = position / 10_000.0 ** (2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return torch.stack(turned)
