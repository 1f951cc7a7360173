"""Linear memories as functions of q, k, v and gates: linear attention, the delta rule, and their kin.

For those who come from flash-linear-attention: tensors are [b, t, h, .] as there, gates are per head [b, t, h] or per
key channel [b, t, h, k], retention is given as its natural log (g there), `step_size` is beta, scale is 1/sqrt(k)
unless told; but the state is [b, h, v, k], the transpose, and always returned. All are one recurrence and one chunk
form, exact at every chunk size, on any device and twice differentiable. Computed in float32 (float64 if given).
way="kernels": by that package's own kernels, on a GPU, in the dtype of q (`kernels.run_kernel`).
"""

import math
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from .kernels import KERNELS, run_kernel
from .linear_chunk import Given, LinearChunks

WAYS = ("chunked", "recurrent", "kernels")


class How(TypedDict, total=False):
    """initial_state [b, h, v, k] (None: zero); chunk: tokens taken at once, without effect on the result; scale: of
    the reads (None: 1/sqrt(k)); read: "after" a token's own write or "before" it; way: "chunked" or "recurrent"."""

    initial_state: Tensor | None
    chunk: int
    scale: float | None
    read: str
    way: str


def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_retention: Tensor | None = None,
    erase: Tensor | None = None,
    erase_along: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk: int = 64,
    scale: float | None = None,
    read: str = "after",
    way: str = "chunked",
) -> tuple[Tensor, Tensor]:
    """Every linear recurrence of a matrix memory.

        S_t = S_{t-1} Diag(a_t) - (S_{t-1} p_t) x_t^T + v_t k_t^T,        y_t = scale S_t q_t

    q, k [b, t, h, k], v [b, t, h, v]; log_retention = log a, at most 0, [b, t, h] or [b, t, h, k], a gate of 0 is
    -inf (None: 1); erase = p [b, t, h, k] (None: nothing is erased); erase_along = x (None: k, which costs less).
    read="before": y_t = scale S_{t-1} q_t. Other arguments as in `How`. Returns y [b, t, h, v] in the dtype of v and
    the final state [b, h, v, k]. Raises ValueError for shapes that do not fit together.
    Oracles: `memory.naive_linear`, way="recurrent".
    """
    _check(q, k, v, log_retention, erase, erase_along, initial_state)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    for name, value, allowed in (("read", read, ("after", "before")), ("way", way, WAYS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if way == "kernels":
        return _by_kernel(q, k, v, log_retention, erase, erase_along, initial_state, scale, read)
    b, _, h, width = q.shape
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        if initial_state is None:
            initial_state = v.new_zeros(b, h, v.shape[-1], width, dtype=dtype)
        scaled = q.to(dtype) * (1.0 / math.sqrt(width) if scale is None else scale)
        rest = (k, v, log_retention, erase, erase_along, initial_state)
        given = Given(scaled, *(None if x is None else x.to(dtype) for x in rest))  # type: ignore[arg-type]
        if way == "recurrent" or not q.numel():
            y, state = _recurrent(given, read == "before")
        else:
            y, state = LinearChunks.apply(*given, min(chunk, q.shape[1]), read == "before")
    return y.to(v.dtype), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_retention: Tensor | None, p: Tensor | None, x: Tensor | None, s: Tensor | None
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must be [b, t, h, k], got {list(q.shape)}")
    b, t, h, width = q.shape
    for name, part, allowed in (
        ("k", k, ((b, t, h, width),)),
        ("v", v, ((b, t, h, v.shape[-1]),)),
        ("log_retention", log_retention, ((b, t, h), (b, t, h, width))),
        ("erase", p, ((b, t, h, width),)),
        ("erase_along", x, ((b, t, h, width),)),
        ("initial_state", s, ((b, h, v.shape[-1], width),)),
    ):
        if part is not None and tuple(part.shape) not in allowed:
            known = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{name} must be {known} beside q {list(q.shape)}, got {list(part.shape)}")
    if x is not None and p is None:
        raise ValueError("erase_along says along what `erase` is erased, but there is no erase")


def _recurrent(given: Given, before: bool) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    q, k, v, log_gates, p, x, state = given
    x = k if x is None else x
    reads = []
    for t in range(q.shape[1]):
        standing, written = state, v[:, t]
        if p is not None:
            seen = (state @ p[:, t, :, :, None])[..., 0]
        if log_gates is not None:
            gates = log_gates[:, t].exp()
            state = state * (gates[..., None, None] if gates.dim() == 2 else gates[..., None, :])
        state = state + written[..., None] * k[:, t, :, None, :]
        if p is not None:
            state = state - seen[..., None] * x[:, t, :, None, :]
        reads.append(((standing if before else state) @ q[:, t, :, :, None])[..., 0])
    return (torch.stack(reads, 1) if reads else v.clone()), state


def _by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_retention: Tensor | None,
    p: Tensor | None,
    x: Tensor | None,
    state: Tensor | None,
    scale: float | None,
    read: str,
) -> tuple[Tensor, Tensor]:
    """Any recurrence, by the kernel of the smallest family that it is in."""
    if p is None:
        form = "linear_attention" if log_retention is None else "gated_linear_attention"
        form += " by channel" if log_retention is not None and log_retention.dim() == 4 else ""
        gates = () if log_retention is None else (log_retention,)
        return run_kernel(form, q, k, v, *gates, initial_state=state, scale=scale, read=read)
    if log_retention is None:
        log_retention = torch.zeros_like(p)
    by_channel = log_retention if log_retention.dim() == 4 else log_retention[..., None].expand_as(p)
    others = by_channel, -p.to(q.dtype), (k if x is None else x).to(q.dtype)
    return run_kernel("linear_memory", q, k, v, *others, initial_state=state, scale=scale, read=read)


def _direct(form: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """A function that has a kernel of its own; its kernel would read past the end of what has another shape."""
    _check(q, k, v, None, None, None, how.get("initial_state"))
    for name, other in zip(KERNELS[form].takes, others, strict=True):
        if other.shape not in (q.shape[:3], q.shape):
            raise ValueError(f"{name} must be {list(q.shape[:3])} or {list(q.shape)}, got {list(other.shape)}")
    return run_kernel(form, q, k, v, *others, **how)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} + v_t k_t^T; features of q and k and a normaliser are the caller's. Katharopoulos et al. 2020."""
    return linear_memory(q, k, v, **how)


def retention(q: Tensor, k: Tensor, v: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """S_t = g_h S_{t-1} + v_t k_t^T with g_h = 1 - 2^(-5 - h) fixed for head h. RetNet (2307.08621)."""
    heads = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    gates = torch.log1p(-torch.exp2(-5.0 - heads)).to(torch.promote_types(q.dtype, torch.float32))
    return linear_memory(q, k, v, log_retention=gates.expand(q.shape[:3]), **how)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_retention: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} Diag(a_t) + v_t k_t^T, log a [b, t, h, k] (GLA, 2312.06635) or [b, t, h]."""
    return linear_memory(q, k, v, log_retention=log_retention, **how)


def mamba2(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_rate: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """S_t = exp(-exp(log_rate) D_t) S_{t-1} + D_t v_t k_t^T, D = step_size [b, t, h], log_rate = A_log [h]; q, k, v are
    C, B, x; scale 1 unless told. Mamba-2 (2405.21060)."""
    how.setdefault("scale", 1.0)
    return linear_memory(q, k, v * step_size[..., None], log_retention=-log_rate.exp() * step_size, **how)


def hgrn2(q: Tensor, v: Tensor, log_retention: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} Diag(a_t) + v_t (1 - a_t)^T, log a [b, t, h, k]: what is forgotten is the key; scale 1 unless told.
    HGRN2 (2404.07904)."""
    how.setdefault("scale", 1.0)
    return linear_memory(q, -torch.expm1(log_retention), v, log_retention=log_retention, **how)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, b = step_size [b, t, h]. DeltaNet (2406.06484)."""
    if how.get("way") == "kernels":
        return _direct("delta_rule", q, k, v, step_size, **how)
    b = step_size[..., None]
    return linear_memory(q, k, v * b, erase=k * b, **how)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_retention: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T: decay first, then the delta rule on what is left. Gated
    DeltaNet (2412.06464). log a [b, t, h]; [b, t, h, k] is `kda`."""
    b = step_size[..., None]
    if log_retention.dim() == 4:
        return kda(q, k, v, step_size, log_retention, **how)
    if how.get("way") == "kernels":
        return _direct("gated_delta_rule", q, k, v, step_size, log_retention, **how)
    erase = k * (step_size * log_retention.exp())[..., None]
    return linear_memory(q, k, v * b, log_retention=log_retention, erase=erase, **how)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step_size: Tensor,
    log_retention: Tensor,
    *,
    erase_gate: Tensor | None = None,
    **how: Unpack[How],
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} Diag(a_t) (I - b_t (e_t * k_t) k_t^T) + b_t v_t k_t^T, log a [b, t, h, k]. Kimi delta attention
    (2510.26692); with an erase gate e [b, t, h, k], what is erased is chosen channel by channel."""
    if how.get("way") == "kernels" and erase_gate is None:
        return _direct("kda", q, k, v, step_size, log_retention, **how)
    b = step_size[..., None]
    erase = k * b * log_retention.exp() if erase_gate is None else k * b * log_retention.exp() * erase_gate
    return linear_memory(q, k, v * b, log_retention=log_retention, erase=erase, **how)


def delta_product(
    q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_retention: Tensor | None = None, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """Several delta steps a token, read after the last: S <- S (I - b_j k_j k_j^T) + b_j v_j k_j^T for j < n, after a
    decay by a_t. k [b, t, n, h, k], v [b, t, n, h, v], step_size [b, t, n, h], q [b, t, h, k], log a [b, t, h].
    DeltaProduct (2502.10297). Raises ValueError for k without n, and for read="before"."""
    if k.dim() != 5 or k.shape[:2] != q.shape[:2]:
        raise ValueError(f"k must be [b, t, n, h, k] beside q {list(q.shape)}, got {list(k.shape)}")
    if how.get("read", "after") != "after":
        raise ValueError("delta_product is read after its last step, got read='before'")
    n = k.shape[2]
    zero = torch.zeros_like(k[:, :, 1:, :, :])
    asked = torch.cat([zero, q.unsqueeze(2).to(k.dtype)], 2)
    if log_retention is None:
        y, state = delta_rule(*(x.flatten(1, 2) for x in (asked, k, v, step_size)), **how)
    else:
        gates = torch.cat([log_retention.unsqueeze(2), log_retention.new_zeros(step_size[:, :, 1:].shape)], 2)
        y, state = gated_delta_rule(*(x.flatten(1, 2) for x in (asked, k, v, step_size, gates)), **how)
    return y[:, n - 1 :: n], state


def rwkv7(
    q: Tensor, k: Tensor, v: Tensor, log_retention: Tensor, removal: Tensor, step_size: Tensor, **how: Unpack[How]
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (Diag(w_t) - r_t (a_t * r_t)^T) + v_t k_t^T: log w [b, t, h, k]; r = removal, a unit key, and
    a = step_size for every channel of it, both [b, t, h, k]; scale 1 unless told. RWKV-7 (2503.14456)."""
    how.setdefault("scale", 1.0)
    return linear_memory(q, k, v, log_retention=log_retention, erase=removal, erase_along=step_size * removal, **how)


def longhorn(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, **how: Unpack[How]) -> tuple[Tensor, Tensor]:
    """Row i: S_i <- (I - e_i k k^T) S_i + e_i v_i k with e_i = b_i / (1 + b_i |k|^2): the implicit step, exact, not the
    diagonal approximation of the published kernel. b = step_size [b, t, h], or [b, t, h, v]: each row is then a head of
    its own, at v times the cost; scale 1 unless told. Longhorn (2407.14207)."""
    how.setdefault("scale", 1.0)
    if step_size.dim() == 3:
        return delta_rule(q, k, v, step_size / (1.0 + step_size * k.square().sum(-1)), **how)
    width = v.shape[-1]
    bounded = step_size / (1.0 + step_size * k.square().sum(-1, keepdim=True))
    q, k = (x.repeat_interleave(width, 2) for x in (q, k))
    start = how.get("initial_state")
    how["initial_state"] = None if start is None else start.flatten(1, 2).unsqueeze(2)
    y, state = delta_rule(q, k, v.flatten(2).unsqueeze(-1), bounded.flatten(2), **how)
    return y.squeeze(-1).unflatten(2, (-1, width)), state.squeeze(2).unflatten(1, (-1, width))


def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    step_size: Tensor,
    log_retention: Tensor,
    *,
    feedback: Tensor | None = None,
    **how: Unpack[How],
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} - b_t (S_{t-1} p_t) k_t^T + b_t v_t k_t^T, y_t = S_t (q_t - D p_t): the erase reads the memory
    before it has decayed. p [b, t, h, k], D = feedback [h] (None: 0). Comba (2506.02475)."""
    b = step_size[..., None]
    asked = q if feedback is None else q - feedback[:, None] * p
    if how.get("way") == "kernels":
        return _direct("comba", asked, k, v, p.to(asked.dtype), step_size, log_retention, **how)
    return linear_memory(asked, k, v * b, log_retention=log_retention, erase=p * b, **how)
