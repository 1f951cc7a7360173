"""What a named model is held against: its paper's recurrence, for one head of one row, and how far it is from that."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import naive, naive_miras
from nestling.memory.part import Part
from nestling.memory.rule import Gates, retain
from nestling.memory.state import flatten

from .layer import sequence_memory
from .mixer import Mixer
from .naive_layers import Parameters, Told
from .scan import Memory, Writes

Maps = tuple[Tensor, ...]


class Flow(NamedTuple):
    """What comes into a memory, for one head of one row: keys, queries [t, k], values [t, v], gates [t]; and what a
    gating may tell beside them: shares of a window's pairs [t, window], a bound [t], a step for each map [t, maps].
    Of n steps a token there are t n of each but queries and retention, a token's one after the other."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    step_size: Tensor
    momentum: Tensor
    log_retention: Tensor
    shares: Tensor
    bound: Tensor
    map_steps: Tensor

    @property
    def retention(self) -> Tensor:
        return self.log_retention.exp()


Oracle = Callable[[Memory, Maps, Flow], tuple[Tensor, Maps]]
"""(the memory, its weights, what comes in) -> reads [t, v] and the weights at the end."""

LayerOracle = Callable[[Any, Parameters, Tensor, int], Told]
"""(the mixer, the layer's parameters, tokens [t, d], heads) -> y [t, d] and what it remembers, by name."""


def memory_error(memory: Memory, oracle: Oracle, length: int, width: int) -> float:
    """How far a memory is from its oracle, in float64: the largest relative difference over reads, weights at the end
    and the gradient of every input."""
    weights, flow = _draw(memory, length, width)
    found = _run(memory, weights, flow)
    expected = oracle(memory, weights, flow)
    return _apart(*found, *expected, [*weights, *flow])


def layer_error(mixer: Mixer, oracle: LayerOracle, length: int, width: int) -> float:
    """`memory_error` of a whole layer with two heads: over y, what it remembers and the gradients of x and of every
    parameter, none of which is at its neutral start."""
    mixer = _shortened(mixer)
    generator = torch.Generator().manual_seed(0)
    layer = mixer.build(2 * width, 2, generator).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    x = torch.randn(length, 2 * width, dtype=torch.float64, generator=generator).requires_grad_()
    y, state = layer(x[None])
    expected, kept = oracle(mixer, dict(layer.named_parameters()), x, 2)
    told = {name: tensor[0] for name, tensor in flatten(state).items()}
    ends = tuple(told[name] for name in kept)
    return _apart(y[0], ends, expected, tuple(kept.values()), [x, *layer.parameters()])


def _shortened(part: Any) -> Any:
    """The same expression with chunks, windows and segments of which a few tokens cross the edges."""
    given = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    fewer = {name: min(few, given[name]) for name, few in _FEW.items() if given.get(name)}
    inner = {name: _shortened(value) for name, value in given.items() if isinstance(value, Part)}
    return dataclasses.replace(part, **fewer, **inner)


_FEW: dict[str, Any] = {
    "chunk": 16,
    "projection_chunk": 8,
    "window": 8,
    "segment": 32,
    "shard": 32,
    "local": (4, 8),
    "slots": 2,
    "persistent": 3,
}


def _apart(y: Tensor, ends: Maps, expected: Tensor, wanted: Maps, leaves: list[Tensor]) -> float:
    direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    pairs = [(y.detach(), expected.detach()), *((a.detach(), b.detach()) for a, b in zip(ends, wanted, strict=True))]
    mine = torch.autograd.grad(y, leaves, direction, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, direction, allow_unused=True)
    zero = torch.zeros(1, dtype=torch.float64)
    pairs += [(zero if a is None else a, zero if b is None else b) for a, b in zip(mine, theirs, strict=True)]
    least = 1e-6 * max(float(b.abs().max()) for _, b in pairs)  # of what only rounding keeps from zero
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=least)) for a, b in pairs)


def _draw(memory: Memory, length: int, width: int) -> tuple[Maps, Flow]:
    generator, pairs = torch.Generator().manual_seed(0), length * _steps(memory)

    def normal(*shape: int, count: int = pairs) -> Tensor:
        return torch.randn(count, *shape, dtype=torch.float64, generator=generator)

    start = memory.structure.init(width, width, (), generator, unit_keys=True)
    weights = tuple(weight.double().requires_grad_() for weight in start)
    keys, queries = F.normalize(normal(width), dim=-1), F.normalize(normal(width, count=length), dim=-1)
    step_size = (0.9 if memory.exact else 0.05) * normal().sigmoid()
    by_channel = isinstance(memory, sequence_memory) and memory.gating.by_channel
    retention = F.logsigmoid(normal(*[width] * by_channel, count=length) + 3)
    told = normal(memory.window).sigmoid(), 1.0 + normal().sigmoid(), normal(len(weights)).sigmoid()
    flow = Flow(keys, normal(width), queries, step_size, normal().sigmoid(), retention, *told)
    return weights, Flow(*(part.requires_grad_() for part in flow))


def _run(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
    n, once = _steps(memory), flow.log_retention
    flow = flow._replace(log_retention=torch.stack([once, *[torch.zeros_like(once)] * (n - 1)], 1).flatten(0, 1))
    keys, values, queries, *gates = (part[None, None] for part in flow[:6])
    told = {name: getattr(flow, name)[None, None] for name in _tells(memory)}
    widths = keys.shape[-1], values.shape[-1]
    state, reads = memory.begin(tuple(weight[None, None] for weight in weights), widths), []
    for first in range(0, queries.shape[2], memory.chunk):
        at, asked = slice(first * n, (first + memory.chunk) * n), slice(first, first + memory.chunk)
        state = memory.open(state, True)
        pairs = Writes(keys[:, :, at], values[:, :, at], Gates(*(gate[:, :, at] for gate in gates)), steps=n)
        pairs = pairs._replace(**{name: part[:, :, at] for name, part in told.items()})
        y, state = memory.run(state, pairs, queries[:, :, asked])
        reads.append(y)
    return torch.cat(reads, 2)[0, 0], tuple(weight[0, 0] for weight in memory.exposed(state.running, state))


def _tells(memory: Memory) -> tuple[str, ...]:
    return memory.gating.tells if isinstance(memory, sequence_memory) else ()


def _steps(memory: Memory) -> int:
    return memory.steps if isinstance(memory, sequence_memory) else 1


def by_token(flow: Flow, pairs: Tensor) -> Tensor:
    """[t n, ...] of every step -> [t, n, ...]."""
    return pairs.unflatten(0, (len(flow.queries), -1))


def layer(run: Callable[[Parameters, Tensor, int], Told]) -> LayerOracle:
    """One that needs to know no option of the mixer."""
    return lambda mixer, parameters, x, heads: run(parameters, x, heads)


def linear(recurrence: Callable[[Flow, Tensor], tuple[Tensor, Tensor]]) -> Oracle:
    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        reads, state = recurrence(flow, weights[0])
        return reads, (state,)

    return oracle


def featured(oracle: Oracle, features: Callable[[Tensor], Tensor]) -> Oracle:
    """`oracle` on phi(k) and phi(q), each [k] -> [n]."""

    def on_features(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        keys, queries = (torch.stack([features(row) for row in rows]) for rows in (flow.keys, flow.queries))
        return oracle(memory, weights, flow._replace(keys=keys, queries=queries))

    return on_features


def squares(key: Tensor) -> Tensor:
    """phi with <phi(q), phi(k)> = (1 + q.k)^2: 1, k_i sqrt 2, k_i^2 and k_i k_j sqrt 2, i < j."""
    channels = [torch.ones_like(key[0]), *key]
    pairs = [(i, j) for i in range(len(channels)) for j in range(i, len(channels))]
    return torch.stack([channels[i] * channels[j] * (1.0 if i == j else math.sqrt(2.0)) for i, j in pairs])


def two_terms(key: Tensor) -> Tensor:
    """phi with <phi(q), phi(k)> = 1 + q.k + (q.k)^2 / 2: 1, k_i, k_i^2 / sqrt 2 and k_i k_j, i < j."""
    after_linear = squares(key) / math.sqrt(2.0)
    n = len(key) + 1
    return torch.cat([torch.ones_like(key[:1]), key, after_linear[n:]])


def oja(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
    """S <- S + eta v (k - S^T v)^T, read after it."""
    (S,), reads = weights, []
    for t in range(len(flow.keys)):
        kept = flow.keys[t] - S.T @ flow.values[t]
        S = S + flow.step_size[t] * flow.values[t][:, None] * kept
        reads.append(S @ flow.queries[t])
    return torch.stack(reads), (S,)


def deep(**told: Any) -> Oracle:
    """`naive_memory`, or the Omega rule, with these choices and the memory's own chunk and reads."""

    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        choices = naive.Choices(chunk=1 if memory.exact else memory.chunk, read=memory.read, **told)
        given = (choices, weights, flow.keys, flow.values, flow.queries, flow.step_size)
        if memory.window > 1:
            still = flow.momentum if "momentum" in str(memory.rule) else torch.zeros_like(flow.momentum)
            shares = flow.shares if "shares" in _tells(memory) else None
            kept = flow.log_retention if isinstance(memory.rule, retain) else torch.zeros_like(flow.log_retention)
            run = naive.naive_window(*given, still, kept, memory.window, shares)
        else:
            run = naive.naive_memory(
                *given,
                flow.momentum if "momentum" in str(memory.rule) else None,
                flow.log_retention if isinstance(memory.rule, retain) else None,
            )
        return run.reads, run.weights

    return oracle


def once_a_chunk(**told: Any) -> Oracle:
    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        choices = naive.Choices(chunk=memory.chunk, read=memory.read, residual=True)
        given = (weights, flow.keys, flow.values, flow.queries, flow.step_size, flow.momentum, flow.log_retention)
        shares = flow.shares if "shares" in _tells(memory) else None
        run = naive.naive_stepped(choices, *given, window=memory.window, shares=shares, **told)
        return run.reads, run.weights

    return oracle


def ttt(f: Callable[[Maps, Tensor], Tensor]) -> Oracle:
    """TTT (2407.04620), its loss as the paper prints it: |LN(f(W, k)) - (v - k)|^2 / 2 by autograd at W_c, on which the
    chunk opened. W_t = W_c - sum over the chunk's j <= t of (prod_{j<l<=t} a_l) eta_j grad_j; y = q + LN(f(W_t, q))."""

    def normal(x: Tensor) -> Tensor:
        centred = x - x.sum() / len(x)
        return centred / (centred.square().sum() / len(x) + 1e-6).sqrt()

    def loss(weights: Maps, key: Tensor, value: Tensor) -> Tensor:
        return (normal(f(weights, key)) - (value - key)).square().sum() / 2

    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        standing, reads = weights, []
        for t, (key, value) in enumerate(zip(flow.keys, flow.values, strict=True)):
            if t % memory.chunk == 0:
                opened, steps = standing, [torch.zeros_like(weight) for weight in standing]
            pairs = zip(steps, torch.func.grad(loss)(opened, key, value), strict=True)
            steps = [flow.retention[t] * step + flow.step_size[t] * gradient for step, gradient in pairs]
            standing = tuple(weight - step for weight, step in zip(opened, steps, strict=True))
            reads.append(flow.queries[t] + normal(f(standing, flow.queries[t])))
        return torch.stack(reads), standing

    return oracle


def lact(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
    given = naive_miras.Flow(flow.keys, flow.values, flow.queries, flow.step_size, flow.retention)
    run = naive_miras.naive_lact(weights, given, flow.map_steps, flow.momentum, chunk=memory.chunk)
    return run.reads, run.standing


def around(run: Callable[[naive.Choices], LayerOracle], **told: Any) -> LayerOracle:
    """One of a mixer around a memory with these choices; the memory's own chunk and reads, where it names them."""

    def oracle(mixer: Any, *given: Any) -> Told:
        memory = getattr(mixer, "memory", None)
        own = {} if memory is None else {"chunk": memory.chunk, "read": memory.read}
        return run(naive.Choices(**told, **own))(mixer, *given)

    return oracle


def miras(run: Callable[..., naive_miras.Run], *, names: tuple[str, ...] = (), **told: Any) -> Oracle:
    """names: what it is given of the flow beside keys, values, queries and gates."""

    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        more = {name: getattr(flow, name) for name in names}
        given = naive_miras.Flow(flow.keys, flow.values, flow.queries, flow.step_size, flow.retention)
        found = run(weights, given, chunk=memory.chunk, read=memory.read, **told, **more)
        return found.reads, found.standing

    return oracle


def written(flow: Flow) -> Tensor:
    return flow.step_size[:, None] * flow.values


def every_channel(flow: Flow) -> Tensor:
    return flow.retention[:, None].expand_as(flow.keys)
