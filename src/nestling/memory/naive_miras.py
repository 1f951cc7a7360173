"""Naive oracles of Miras' design space: any memory, attentional bias and retention gate, one token at a time.

One head of one row, in the words of the paper: a memory is a function of weights and a key, a bias the derivative of
its loss by what was read, a retention gate a recurrence. The gradient is torch.autograd's, taken with a graph.
Nothing is shared with the fast code. Moneta, Yaad and Memora are Miras equations 24 to 27. Fast twins:
`nestling.sequence.Memory` with the parts of `nestling.memory`.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Maps = tuple[Tensor, ...]
"""The linear maps of one memory, each [out, in], from the key's side to the value's."""
Function = Callable[[Maps, Tensor], Tensor]
"""M: (weights, key [k]) -> value [v]."""
Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(read [v], value [v], key [k]) -> d loss / d read [v]."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(what stands [out, in], the gradient of it, eta, a) -> what stands after the token."""


class Flow(NamedTuple):
    """What comes in: keys and queries [t, k], values [t, v], gates [t]; retention is the fraction kept."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    step_size: Tensor
    retention: Tensor


class Run(NamedTuple):
    """What a run leaves: reads [t, v], and what stands at the end of each linear map."""

    reads: Tensor
    standing: Maps


def plain_step(standing: Tensor, gradient: Tensor, step_size: Tensor, retention: Tensor) -> Tensor:
    """W_t = a_t W_{t-1} - eta_t grad."""
    return retention * standing - step_size * gradient


def naive_miras(
    memory: Function,
    slope: Slope | Sequence[Slope],
    standing: Maps,
    flow: Flow,
    *,
    step: Step = plain_step,
    expose: Callable[[Tensor], Tensor] = lambda standing: standing,
    chunk: int = 1,
    read: Literal["after", "before", "boundary"] = "after",
) -> Run:
    """For every token: standing_t = step(standing_{t-1}, grad loss(W; k_t, v_t), eta_t, a_t), W_t = expose(standing_t).

    The gradient is taken at the W on which the chunk opened (chunk=1: at W_{t-1}), by W; y_t = M(q_t) at the W_t
    after the token's own step, the one before it, or the chunk's first. slope: one for all tokens, or one for each.
    """
    reads = []
    opened = standing
    for t in range(flow.keys.shape[0]):
        if t % chunk == 0:
            opened = standing
        before = standing
        own = slope[t] if isinstance(slope, Sequence) else slope
        gradients = _gradient(memory, own, tuple(map(expose, opened)), flow.keys[t], flow.values[t])
        standing = tuple(
            step(part, gradient, flow.step_size[t], flow.retention[t])
            for part, gradient in zip(standing, gradients, strict=True)
        )
        chosen = {"after": standing, "before": before, "boundary": opened}[read]
        reads.append(memory(tuple(map(expose, chosen)), flow.queries[t]))
    return Run(torch.stack(reads), standing)


def naive_anchored(
    memory: Function, slope: Slope, standing: Maps, flow: Flow, *, chunk: int, read: Literal["after", "boundary"]
) -> Run:
    """W_t = W_c - sum over the chunk's j <= t of (prod_{j<l<=t} a_l) eta_j grad loss(W_c; k_j, v_j), W_c the weights on
    which the chunk opened; y_t = M(q_t) at W_t, or at W_c. With a_l = p_l / p_{l-1} and eta_j = p_j n_j it is
    W_c - p_t sum_j n_j grad_j: TTT (2407.04620), whose p is 1/i.
    """
    reads = []
    for first in range(0, len(flow.keys), chunk):
        opened, tokens = standing, range(first, min(first + chunk, len(flow.keys)))
        gradients = {t: _gradient(memory, slope, opened, flow.keys[t], flow.values[t]) for t in tokens}
        for t in tokens:
            left = {j: flow.step_size[j] * flow.retention[j + 1 : t + 1].prod() for j in range(first, t + 1)}
            standing = tuple(
                weight - torch.stack([left[j] * gradients[j][i] for j in left]).sum(0)
                for i, weight in enumerate(opened)
            )
            reads.append(memory(standing if read == "after" else opened, flow.queries[t]))
    return Run(torch.stack(reads), standing)


def _gradient(memory: Function, slope: Slope, weights: Maps, key: Tensor, value: Tensor) -> Maps:
    """The gradient of the loss by the weights, with a graph; a smoothed slope goes in place of the loss's own."""
    along = slope(memory(weights, key), value, key)  # a constant of this derivative, but not of the outer one
    # not torch.autograd.grad, which at every token would walk over the graph of all earlier ones
    return torch.func.grad(lambda own: memory(own, key) @ along)(weights)


def residual_mlp(weights: Maps, key: Tensor) -> Tensor:
    """M(x) = x + LN(W_2 GELU(W_1 x)): the memory of Moneta, Yaad and Memora, and of Titans. LN without a scale."""
    inner = weights[1] @ F.gelu(weights[0] @ key)
    return key + (inner - inner.mean()) / (inner.var(correction=0) + 1e-6).sqrt()


def naive_moneta(
    starts: Maps, flow: Flow, *, p: float, q: float, sharpness: float, chunk: int, read: Literal["after", "boundary"]
) -> Run:
    """A_t = a_t A_{t-1} - eta_t grad l_p(W), W_t = A_t / |A_t|_q^{q-2} (equations 24 and 25).

    The residual's sign is tanh(sharpness r), |r|^(p-1) = (r^2 + 1e-6)^((p-1)/2) (remark 5). A_0 is such that W_0 is
    the start: at q = 4, W / |W|_4^2. What stands at the end is W.
    """

    def expose(accumulated: Tensor) -> Tensor:
        return accumulated / (accumulated.abs() ** q).sum() ** ((q - 2) / q)

    def slope(answer: Tensor, value: Tensor, key: Tensor) -> Tensor:
        r = answer - value
        return p * torch.tanh(sharpness * r) * (r**2 + 1e-6) ** ((p - 1) / 2)

    lengths = [(start.abs() ** q).sum() ** (1 / q) for start in starts]
    standing = tuple(start * n ** ((q - 2) / (3 - q)) for start, n in zip(starts, lengths, strict=True))
    run = naive_miras(residual_mlp, slope, standing, flow, expose=expose, chunk=chunk, read=read)
    return Run(run.reads, tuple(map(expose, run.standing)))


def naive_yaad(
    starts: Maps, flow: Flow, *, bound: float | Tensor, sharpness: float, chunk: int, read: Literal["after", "boundary"]
) -> Run:
    """W_t = a_t W_{t-1} - eta_t grad l_2 where |M(k) - v|_2 <= bound, else - eta_t bound grad l_1 (equation 26).

    l_2 is half the squared norm. The l_1 gradient's sign is tanh(sharpness r). bound: one for all, or of every token.
    """

    def slope(most: float | Tensor) -> Slope:
        def own(answer: Tensor, value: Tensor, key: Tensor) -> Tensor:
            r = answer - value
            return r if (r**2).sum() <= most**2 else most * torch.tanh(sharpness * r)

        return own

    slopes = [slope(bound[t] if isinstance(bound, Tensor) else bound) for t in range(len(flow.keys))]
    return naive_miras(residual_mlp, slopes, starts, flow, chunk=chunk, read=read)


def naive_lact(starts: Maps, flow: Flow, map_steps: Tensor, momentum: Tensor, *, chunk: int) -> Run:
    """For every whole chunk, W <- rownorm(a W + U), U <- m U + sum_t eta_t s_ti d<M(k_t), v_t>/dW, rows as long as at
    the start; M(k) = W_3 (silu(W_1 k) * (W_2 k)), m the chunk's mean, a the product, s_ti = map_steps[t, i] of map i.
    Tokens of a chunk read what stood before it. LaCT (2505.23884).
    """

    def memory(weights: Maps, key: Tensor) -> Tensor:
        return weights[2] @ (F.silu(weights[0] @ key) * (weights[1] @ key))

    standing, moved, reads = starts, tuple(torch.zeros_like(start) for start in starts), []
    for first in range(0, len(flow.keys), chunk):
        tokens = range(first, min(first + chunk, len(flow.keys)))
        reads += [memory(standing, flow.queries[t]) for t in tokens]
        if len(tokens) < chunk:
            break
        gradients = [_gradient(memory, lambda r, v, k: -v, standing, flow.keys[t], flow.values[t]) for t in tokens]
        m, a = momentum[first : first + chunk].mean(), flow.retention[first : first + chunk].prod()
        after = []
        for i, buffer in enumerate(moved):
            sizes = [flow.step_size[t] * map_steps[t, i] for t in tokens]
            after.append(m * buffer - torch.stack([s * g[i] for s, g in zip(sizes, gradients, strict=True)]).sum(0))
        moved = tuple(after)
        made = [a * weight + buffer for weight, buffer in zip(standing, moved, strict=True)]
        standing = tuple(
            weight / weight.norm(dim=1, keepdim=True) * start.norm(dim=1, keepdim=True)
            for weight, start in zip(made, starts, strict=True)
        )
    return Run(torch.stack(reads), standing)


def naive_memora(logits: Maps, flow: Flow, *, scale: float, chunk: int, read: Literal["after", "boundary"]) -> Run:
    """W_t = scale softmax(a_t log W_{t-1} - eta_t grad l_2), row by row (equation 27).

    The literal recurrence: from W_0 = scale softmax(logits) on, the weights stand between tokens, and no logits.
    """

    def step(weight: Tensor, gradient: Tensor, step_size: Tensor, retention: Tensor) -> Tensor:
        raised = torch.exp(retention * torch.log(weight) - step_size * gradient)
        return scale * raised / raised.sum(-1, keepdim=True)

    def slope(answer: Tensor, value: Tensor, key: Tensor) -> Tensor:
        return answer - value

    standing = tuple(scale * torch.exp(z) / torch.exp(z).sum(-1, keepdim=True) for z in logits)
    return naive_miras(residual_mlp, slope, standing, flow, step=step, chunk=chunk, read=read)


def naive_adam(logits: Maps, flow: Flow, *, p: float, sharpness: float, chunk: int, read: Literal["boundary"]) -> Run:
    """An l_p objective with KL retention, learned by Adam: for every whole chunk, when the next one opens::

        g = sum_t eta_t grad l_p(W; k_t, v_t) / eta        eta the mean of the chunk's, l_p smoothed as in naive_moneta
        m = 0.9 m + 0.1 g,  v = 0.999 v + 0.001 g^2        after n steps: m^ = m / (1 - 0.9^n), v^ = v / (1 - 0.999^n)
        Z <- a Z - eta m^ / (sqrt(v^) + 1e-8)              a the product of the chunk's
        W = softmax(Z) row by row, M(k) = k + W_2 GELU(W_1 k); tokens of a chunk read what stood before it

    Miras equations 12 and 21; Kingma and Ba 2015; docs/architecture.md.
    """

    def memory(weights: Maps, key: Tensor) -> Tensor:
        return key + weights[1] @ F.gelu(weights[0] @ key)

    def slope(answer: Tensor, value: Tensor, key: Tensor) -> Tensor:
        r = answer - value
        return p * torch.tanh(sharpness * r) * (r**2 + 1e-6) ** ((p - 1) / 2)

    def expose(standing: Maps) -> Maps:
        return tuple(torch.exp(z) / torch.exp(z).sum(-1, keepdim=True) for z in standing)

    standing, reads = logits, []
    means = squares = tuple(torch.zeros_like(z) for z in logits)
    for n, first in enumerate(range(0, len(flow.keys), chunk)):
        if n:
            done = range(first - chunk, first)
            sizes, kept = flow.step_size[first - chunk : first], flow.retention[first - chunk : first].prod()
            opened, eta = expose(standing), sizes.mean()
            gradients = [_gradient(memory, slope, opened, flow.keys[t], flow.values[t]) for t in done]
            pairs = list(zip(sizes, gradients, strict=True))
            g = [torch.stack([s * each[i] for s, each in pairs]).sum(0) / eta for i in range(len(logits))]
            means = tuple(0.9 * m + 0.1 * own for m, own in zip(means, g, strict=True))
            squares = tuple(0.999 * v + 0.001 * own**2 for v, own in zip(squares, g, strict=True))
            roots = [(v / (1 - 0.999**n)).sqrt() + 1e-8 for v in squares]
            updates = [m / (1 - 0.9**n) / root for m, root in zip(means, roots, strict=True)]
            standing = tuple(kept * z - eta * update for z, update in zip(standing, updates, strict=True))
        reads += [memory(expose(standing), query) for query in flow.queries[first : first + chunk]]
    return Run(torch.stack(reads), expose(standing))
