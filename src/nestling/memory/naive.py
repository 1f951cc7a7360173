"""Naive oracles: the papers' equations for one head of one row, one token at a time.

Slow, and written to be read beside the papers. Nothing here is shared with the fast code: the error at the
output of each linear map is torch.autograd's, taken with a graph, so that an outer gradient flows through every
write. Fast twins: `nestling.sequence.Memory`, `SequenceMemory` and `SelfModifying`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Maps = tuple[Tensor, ...]
"""The linear maps of one memory, each [out, in], from the key's side to the value's."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the papers leave to choose.

    Memory: M(x) = W_L s(... s(W_1 x)), s the activation, and x + that with `residual`. objective: "dot", -<M(k), v>,
    or "l2", |M(k) - v|^2 / 2. decay_to: what is left when all is forgotten, "zero" or the "start". delta: the erase
    of delta gradient descent. normalized: the step bounded by the inputs seen since the chunk opened. clip: the
    longest error at a map's output. dampened: the gradient enters the momentum times (1 - momentum). step_size: of
    the gradient, "inside" the momentum (Titans) or "outside" of it (torch). chunk: gradients are taken where a chunk
    of so many tokens opened; 1: at every token's own weights. read: token t reads "after" its own write, "before" it,
    or at the chunk's "boundary".
    """

    objective: Literal["dot", "l2"] = "l2"
    residual: bool = False
    activation: Callable[[Tensor], Tensor] = F.gelu
    decay_to: Literal["zero", "start"] = "zero"
    delta: bool = False
    normalized: bool = False
    clip: float = math.inf
    dampened: bool = False
    step_size: Literal["inside", "outside"] = "inside"
    chunk: int = 1
    read: Literal["after", "before", "boundary"] = "after"


class NaiveRun(NamedTuple):
    """What a run leaves: reads [t, v], and of each linear map the weights W and the momentum S, [out, in]."""

    reads: Tensor
    weights: Maps
    momentum: Maps


def naive_memory(
    choices: Choices,
    weights: Maps,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    step_size: Tensor,
    momentum: Tensor | None = None,
    log_retention: Tensor | None = None,
) -> NaiveRun:
    """Write the pairs (k_t, v_t) into one memory, and read it for q_t.

    For every linear map W, its input x_t and the error e_t at its output, both at the weights on which the chunk
    opened (or W_{t-1}, where chunk is 1)::

        e_t <- e_t min(1, clip / |e_t|)
        eta_t <- eta_t / (1 + eta_t |x_t|^2)                   with delta; this eta_t is the erase's too
        eta_t <- eta_t / (1 + eta_t n_t)                       normalized; n_t = sum of |x|^2 since the chunk opened
        S_t = m_t S_{t-1} - eta_t e_t x_t^T                    dampened: (1 - m_t) eta_t e_t x_t^T
        W_t = a_t W_{t-1} - eta_t (W_{t-1} x_t) x_t^T + S_t    the middle term with delta only
        y_t = M(q_t) at W_t

    With the step size outside, S_t sums the bare e_t x_t^T and W_t takes eta_t S_t. Decay to the start W_0 keeps
    W_0 + a_t (W_{t-1} - W_0) instead. `momentum` None: m_t = 0; `log_retention` None: a_t = 1.

    weights: each [out, in]; keys and queries [t, k]; values [t, v]; the gates step_size, momentum = m and
    log_retention = log a [t]. Sources: Titans equations 9 to 18; Nested Learning 56, 57 (with the general |x|),
    65, 88 and 90; spec: memory 2.2 and 5.2.
    """
    memory = _begin(weights)
    reads = []
    for t in range(keys.shape[0]):
        if t % choices.chunk == 0:
            memory = _open(memory)
        before = memory.running
        gates = Gates(
            step_size[t],
            torch.zeros_like(step_size[t]) if momentum is None else momentum[t],
            torch.ones_like(step_size[t]) if log_retention is None else log_retention[t].exp(),
        )
        memory = _write(choices, memory, keys[t], values[t], gates)
        standing = {"after": memory.running, "before": before, "boundary": memory.anchor}[choices.read]
        reads.append(_answer(choices, standing, queries[t]))
    return NaiveRun(torch.stack(reads), memory.running, memory.momentum)


def naive_window(
    choices: Choices,
    weights: Maps,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    step_size: Tensor,
    momentum: Tensor,
    log_retention: Tensor,
    window: int,
    shares: Tensor | None = None,
) -> NaiveRun:
    """The Omega rule: each token's step is on the sum of the losses of the last `window` pairs::

        g_t = sum_{t - window < i <= t} gamma_ti dL(k_i, v_i)/dW    where the chunk opened, or at W_{t-1}
        S_t = m_t S_{t-1} - eta_t g_t        dampened: (1 - m_t) eta_t g_t
        W_t = a_t W_{t-1} + S_t              or W_0 + a_t (W_{t-1} - W_0) + S_t

    gamma_ti = shares[t, t - i] (None: 1). Arguments as of `naive_memory`; of `choices`, objective, residual,
    activation, decay_to, dampened, chunk and read. Source: ATLAS, equations 8 to 11, with the signs of descent.
    """
    running, anchor, buffers, reads = list(weights), list(weights), [torch.zeros_like(w) for w in weights], []
    pairs: dict[int, tuple[list[Tensor], Maps]] = {}  # at the anchor
    for t in range(keys.shape[0]):
        if t % choices.chunk == 0:
            anchor, pairs = list(running), {}
        before, reached = tuple(running), range(max(0, t - window + 1), t + 1)
        pairs |= {j: _errors(choices, tuple(anchor), keys[j], values[j]) for j in reached if j not in pairs}
        for i in range(len(weights)):
            gradient = torch.zeros_like(weights[i])
            for other in reached:
                inputs, errors = pairs[other]
                gamma = 1.0 if shares is None else shares[t, t - other]
                gradient = gradient + gamma * torch.outer(errors[i], inputs[i])
            surprise = -step_size[t] * gradient * ((1 - momentum[t]) if choices.dampened else 1.0)
            forgotten_to = weights[i] if choices.decay_to == "start" else 0.0
            buffers[i] = momentum[t] * buffers[i] + surprise
            running[i] = forgotten_to + log_retention[t].exp() * (running[i] - forgotten_to) + buffers[i]
        standing = {"after": tuple(running), "before": before, "boundary": tuple(anchor)}[choices.read]
        reads.append(_answer(choices, standing, queries[t]))
    return NaiveRun(torch.stack(reads), tuple(running), tuple(buffers))


def naive_stepped(
    choices: Choices,
    weights: Maps,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    step_size: Tensor,
    momentum: Tensor,
    log_retention: Tensor,
    readout: Callable[[Tensor], Tensor] | None = None,
    window: int = 1,
    shares: Tensor | None = None,
) -> NaiveRun:
    """One step for every whole chunk of `choices.chunk` tokens; a token reads what stood before its chunk::

        g = sum_t eta_t sum_{t - window < i <= t} gamma_ti dloss(M_W(k_i), v_i)/dW     over the chunk
        S <- m S - g                   m: the mean of the chunk's; dampened: (1 - m) g
        W <- a W + S                   a: the product of the chunk's; or W_0 + a (W - W_0) + S

    With a readout, S <- m S - g / eta and W <- a W + eta readout(S), eta the mean of the chunk's. window and shares as
    of `naive_window`; other arguments as of `naive_memory`; of `choices`, also objective, residual, activation and
    decay_to. Sources: LaCT; ATLAS 32, 33.
    """
    running, buffers, reads = list(weights), [torch.zeros_like(w) for w in weights], []
    for first in range(0, keys.shape[0], choices.chunk):
        tokens = list(range(first, min(first + choices.chunk, keys.shape[0])))
        reads += [_answer(choices, tuple(running), queries[t]) for t in tokens]
        if len(tokens) < choices.chunk:
            break
        reached = range(max(0, first - window + 1), tokens[-1] + 1)
        pairs = {t: _errors(choices, tuple(running), keys[t], values[t]) for t in reached}
        m, a, eta = momentum[tokens].mean(), log_retention[tokens].sum().exp(), step_size[tokens].mean()
        for i in range(len(weights)):
            each = [
                step_size[t]
                * (1.0 if shares is None else shares[t, t - j])
                * torch.outer(pairs[j][1][i], pairs[j][0][i])
                for t in tokens
                for j in range(max(0, t - window + 1), t + 1)
            ]
            gradient = torch.stack(each).sum(0) / (1.0 if readout is None else eta)
            forgotten_to = weights[i] if choices.decay_to == "start" else 0.0
            buffers[i] = m * buffers[i] - ((1 - m) * gradient if choices.dampened else gradient)
            added = buffers[i] if readout is None else eta * readout(buffers[i])
            running[i] = forgotten_to + a * (running[i] - forgotten_to) + added
    return NaiveRun(torch.stack(reads), tuple(running), tuple(buffers))


def naive_newton_schulz(matrix: Tensor) -> Tensor:
    """Five iterations X <- a X + b X X^T X + c (X X^T)^2 X from matrix / |matrix|: Muon's (Jordan et al. 2024)."""
    x = matrix / matrix.square().sum().sqrt()
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


class NaiveSelfModifying(NamedTuple):
    """What a self-modifying run leaves: reads [t, v], the weights of each memory, and the tokens' step sizes."""

    reads: Tensor
    weights: dict[str, Maps]
    step_sizes: Tensor  # [t]


def naive_self_modifying(
    u: Tensor,
    queries: Tensor,
    momentum: Tensor,
    starts: dict[str, Maps],
    gate_bias: Tensor,
    value_scale: Tensor,
    step_bound: float,
    chunk: int,
    projection_chunk: int,
    choices: Choices = Choices(residual=True, decay_to="start", delta=True, clip=1.0, dampened=True),
    projected: dict[str, Tensor] | None = None,
) -> NaiveSelfModifying:
    """The inner part of self-modifying Titans: memories for key, value, step size, retention, and the main one.

    The first four open a chunk each `projection_chunk` tokens and the main one each `chunk` tokens; a bar marks a
    memory at the weights on which its chunk opened::

        k_t = norm(M_k(u_t))            v_t = value_scale * norm(M_v(u_t))                          (barred)
        eta_t = step_bound * sigmoid(M_eta(u_t) + gate_bias_0)    a_t = sigmoid(M_a(u_t) + gate_bias_1)  (barred)
        each memory: one step as in `naive_memory` on the key k_t and the value M(v_t) (barred), which is a
        constant of the inner derivative, but not of the outer one
        y_t = M_main(q_t) after its own write, or as `choices.read` says

    Without erase, clip, momentum average or residual where `choices` says so; `choices.chunk` is not used.

    With a memory "query", q_t = norm(M_q(u_t)), else queries. What has no memory is `projected`: [t, k], normalised,
    for "key" and "value", [t] for "step_size" and "retention".

    u and queries [t, k], L2-normalised; momentum [t]; starts: the initial weights of each memory by its name, "main"
    among them, [out, in] each, of which those for step size and retention end in one number and have no residual;
    gate_bias [2]; value_scale [].
    Sources: Nested Learning equations 83 to 93; spec: nested-learning 2, recipe.
    """
    functions = {
        name: replace(choices, residual=choices.residual and name not in ("step_size", "retention")) for name in starts
    }
    memories = {name: _begin(start) for name, start in starts.items()}
    reads, step_sizes = [], []
    for t in range(u.shape[0]):
        for name in memories:
            if t % (chunk if name == "main" else projection_chunk) == 0:
                memories[name] = _open(memories[name])
        before = memories["main"].running
        made = {name: values[t] for name, values in (projected or {}).items()} | {
            name: _answer(functions[name], memories[name].anchor, u[t]) for name in memories if name != "main"
        }
        k, v = made["key"] / made["key"].norm(), value_scale * made["value"] / made["value"].norm()
        q = made["query"] / made["query"].norm() if "query" in made else queries[t]
        gates = Gates(
            step_bound * torch.sigmoid(made["step_size"].reshape(()) + gate_bias[0]),
            momentum[t],
            torch.sigmoid(made["retention"].reshape(()) + gate_bias[1]),
        )
        for name, function in functions.items():
            target = _answer(function, memories[name].anchor, v)
            memories[name] = _write(function, memories[name], k, target, gates)
        main = memories["main"]
        standing = {"after": main.running, "before": before, "boundary": main.anchor}[choices.read]
        reads.append(_answer(functions["main"], standing, q))
        step_sizes.append(gates.step_size)
    final = {name: memory.running for name, memory in memories.items()}
    return NaiveSelfModifying(torch.stack(reads), final, torch.stack(step_sizes))


class Gates(NamedTuple):
    """One token's numbers: eta, m and a."""

    step_size: Tensor
    momentum: Tensor
    retention: Tensor


class _Standing(NamedTuple):
    """A memory between two tokens. seen: the sum of |x|^2 since the chunk opened, of each map."""

    start: Maps
    anchor: Maps
    running: Maps
    momentum: Maps
    seen: Maps


def _begin(weights: Maps) -> _Standing:
    return _open(_Standing(weights, weights, weights, tuple(torch.zeros_like(w) for w in weights), ()))


def _open(memory: _Standing) -> _Standing:
    """A chunk opens: from here on, gradients are taken at the weights as they now stand."""
    return memory._replace(anchor=memory.running, seen=tuple(w.new_zeros(()) for w in memory.running))


def _answer(choices: Choices, weights: Maps, x: Tensor) -> Tensor:
    """M(x) [v]."""
    return _forward(choices, weights, x, [0.0] * len(weights))[0]


def _forward(choices: Choices, weights: Maps, x: Tensor, nudges: list) -> tuple[Tensor, list[Tensor]]:
    """M(x) [v], with a nudge added to each map's output, and the input of each map."""
    inputs, output = [], x
    for i, (weight, nudge) in enumerate(zip(weights, nudges, strict=True)):
        inputs.append(choices.activation(output) if i else x)
        output = weight @ inputs[-1] + nudge
    return (x + output if choices.residual else output), inputs


def _errors(choices: Choices, weights: Maps, key: Tensor, value: Tensor) -> tuple[list[Tensor], Maps]:
    """The input of each map, and the loss's derivative by a nudge of its output; the value is a constant here."""

    def loss(nudges: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        read, inputs = _forward(choices, weights, key, nudges)
        return -(read @ value) if choices.objective == "dot" else 0.5 * (read - value).square().sum(), inputs

    # not torch.autograd.grad, which at every token would walk over the graph of all earlier ones
    errors, inputs = torch.func.grad(loss, has_aux=True)([weight.new_zeros(len(weight)) for weight in weights])
    return inputs, tuple(errors)


def _write(choices: Choices, memory: _Standing, key: Tensor, value: Tensor, gates: Gates) -> _Standing:
    """The memory after one token's step on each of its maps."""
    inputs, errors = _errors(choices, memory.anchor, key, value)
    running, momentum, seen = [], [], []
    for i, (x, error) in enumerate(zip(inputs, errors, strict=True)):
        weight, step_size = memory.running[i], gates.step_size
        seen.append(memory.seen[i] + x @ x)
        forgotten_to = memory.start[i] if choices.decay_to == "start" else 0.0
        changed = forgotten_to + gates.retention * (weight - forgotten_to)
        if choices.delta:
            step_size = step_size / (1 + step_size * (x @ x))
            changed = changed - step_size * torch.outer(weight @ x, x)
        if choices.normalized:
            step_size = step_size / (1 + step_size * seen[i])
        length = error.norm()
        surprise = -torch.outer(error * (choices.clip / length) if length > choices.clip else error, x)
        if choices.dampened:
            surprise = (1 - gates.momentum) * surprise
        if choices.step_size == "inside":
            momentum.append(gates.momentum * memory.momentum[i] + step_size * surprise)
            running.append(changed + momentum[i])
        else:
            momentum.append(gates.momentum * memory.momentum[i] + surprise)
            running.append(changed + step_size * momentum[i])
    return memory._replace(running=tuple(running), momentum=tuple(momentum), seen=tuple(seen))
