"""Named models, each an expression of parts: `zoo["gated_deltanet"].mixer`.

A row tells the recurrence and its source, and holds the oracle that its memory is checked against: the paper's own
recurrence, one head of one row, token by token (`memory.naive*`). What a row is made of is read off its expression.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nestling.memory import naive, naive_linear, naive_miras
from nestling.memory.adaptive import adam
from nestling.memory.attentional_bias import dot, l2, lp, residual_l2
from nestling.memory.compound import features, normed
from nestling.memory.feature import exponential, polynomial
from nestling.memory.oja import oja
from nestling.memory.orthogonal import newton_schulz
from nestling.memory.retention import decay, kl, row_norm
from nestling.memory.rule import Gates, gradient_descent, momentum, normalize, retain, retain_first, scale, surprise
from nestling.memory.state import flatten
from nestling.memory.structure import gated_mlp, matrix, mlp

from .attention import attention
from .caching import caching
from .context import mac
from .gating import fixed_gates, gated_delta_gates, kda_gates, low_rank_gates, mamba2_gates
from .layer import sequence_memory
from .miras import memora, moneta, yaad
from .mixer import Mixer
from .preparation import bare, silu
from .scan import Memory, Writes
from .self_modifying import self_modifying
from .titans import mag, mal
from .tnt import tnt

Maps = tuple[Tensor, ...]
FAR = 1e-9  # of a model from its oracle, in float64


class Flow(NamedTuple):
    """What comes into a memory, for one head of one row: keys, queries [t, k], values [t, v], gates [t]."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    step_size: Tensor
    momentum: Tensor
    log_retention: Tensor

    @property
    def retention(self) -> Tensor:
        return self.log_retention.exp()


Oracle = Callable[[Memory, Maps, Flow], tuple[Tensor, Maps]]
"""(the memory, its weights, what comes in) -> reads [t, v] and the weights at the end."""


@dataclass(frozen=True)
class Model:
    """A named model: its mixer, the recurrence, where it is from, and its oracle. note: where the layer is not the
    paper's, or why no oracle is here."""

    mixer: Mixer
    equation: str
    source: str
    oracle: Oracle | None = None
    note: str = ""

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which it can be run, its own first."""
        if not isinstance(self.mixer, Memory):
            return ("its own",)
        others = (way for way in ("chunked", "recurrent") if way != self.mixer.way and self.mixer.way != "stepped")
        return (self.mixer.way, *(way for way in others if _legal(self.mixer, way)))

    @property
    def choices(self) -> tuple[str, str, str, str]:
        """Miras' four: structure, attentional bias, retention, learning algorithm."""
        return _choices(self.mixer)


def _legal(mixer: Any, way: str) -> bool:
    try:
        dataclasses.replace(mixer, way=way)
    except ValueError:
        return False
    return True


def _choices(mixer: Mixer) -> tuple[str, str, str, str]:
    if isinstance(mixer, attention):
        return f"the last {mixer.window} pairs", "weighted l2", "none", "solved without parameters"
    if not isinstance(mixer, Memory):
        inner = [getattr(mixer, field.name) for field in dataclasses.fields(mixer)]  # type: ignore[arg-type]
        found = next((_choices(part) for part in inner if isinstance(part, Mixer)), ("", "", "", ""))
        return found
    rule, kept = mixer.rule, "none"
    if isinstance(mixer.rule, retain):
        rule, kept = mixer.rule.of, f"{mixer.rule.retention}"
    elif isinstance(mixer.rule, retain_first):
        rule, kept = mixer.rule.of, f"{mixer.rule.retention} first"
    told = f"{rule}" + (f" over {mixer.window} pairs" if mixer.window > 1 else "")
    return f"{mixer.structure}", f"{mixer.attentional_bias}", kept, told


class Size(NamedTuple):
    """Of a mixer with one head of 64: numbers in its state, without convolution tails and what only repeats it; and
    products counted in a forward pass, projections included, a token."""

    state: int
    flops: int


def size(mixer: Mixer, dim: int = 64, length: int = 256) -> Size:
    """What a mixer costs, measured on itself."""
    module = mixer.build(dim, 1, torch.Generator().manual_seed(0))
    told = flatten(module.init_state(1))
    counted = {name: x.numel() for name, x in told.items() if x.is_floating_point() and "anchor" not in name}
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, length, dim))
    tails = sum(count for name, count in counted.items() if name.split(".")[-1] == "tail")
    return Size(sum(counted.values()) - tails, counter.get_total_flops() // length)


def error(model: Model, way: str, length: int = 40, width: int = 6) -> float:
    """How far a row's memory is from its oracle, in float64: the largest relative difference over reads, weights at
    the end and the gradient of every input. nan where the row has no oracle."""
    memory = model.mixer
    if model.oracle is None or not isinstance(memory, Memory):
        return float("nan")
    memory = dataclasses.replace(memory, way=way)  # type: ignore[arg-type]
    weights, flow = _draw(memory, length, width)
    found = _run(memory, weights, flow)
    expected = model.oracle(memory, weights, flow)
    found, expected = ((y, tuple(end.detach() for end in ends)) for y, ends in (found, expected))
    leaves = [*weights, *flow]
    direction = torch.linspace(-1, 1, found[0].numel(), dtype=torch.float64).view(found[0].shape)
    pairs = [(found[0].detach(), expected[0].detach()), *zip(found[1], expected[1], strict=True)]
    mine = torch.autograd.grad(found[0], leaves, direction, allow_unused=True)
    theirs = torch.autograd.grad(expected[0], leaves, direction, allow_unused=True)
    zero = torch.zeros(1, dtype=torch.float64)
    pairs += [(zero if a is None else a, zero if b is None else b) for a, b in zip(mine, theirs, strict=True)]
    return max(float((a - b).abs().max() / (1e-12 + b.abs().max())) for a, b in pairs)


def _draw(memory: Memory, length: int, width: int) -> tuple[Maps, Flow]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(length, *shape, dtype=torch.float64, generator=generator)

    start = memory.structure.init(width, width, (), generator, unit_keys=True)
    weights = tuple(weight.double().requires_grad_() for weight in start)
    keys, queries = F.normalize(normal(width), dim=-1), F.normalize(normal(width), dim=-1)
    step_size = (0.9 if memory.exact else 0.05) * normal().sigmoid()
    by_channel = isinstance(memory, sequence_memory) and memory.gating.by_channel
    retention = F.logsigmoid(normal(*[width] * by_channel) + 3)
    flow = Flow(keys, normal(width), queries, step_size, normal().sigmoid(), retention)
    return weights, Flow(*(part.requires_grad_() for part in flow))


def _run(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
    keys, values, queries, *gates = (part[None, None] for part in flow)
    state, reads = memory.begin(tuple(weight[None, None] for weight in weights)), []
    for first in range(0, keys.shape[2], memory.chunk):
        at = slice(first, first + memory.chunk)
        state = memory.open(state, True)
        pairs = Writes(keys[:, :, at], values[:, :, at], Gates(*(gate[:, :, at] for gate in gates)))
        y, state = memory.run(state, pairs, queries[:, :, at])
        reads.append(y)
    return torch.cat(reads, 2)[0, 0], tuple(weight[0, 0] for weight in memory.exposed(state.running, state))


def _linear(recurrence: Callable[[Flow, Tensor], tuple[Tensor, Tensor]]) -> Oracle:
    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        reads, state = recurrence(flow, weights[0])
        return reads, (state,)

    return oracle


def _deep(**told: Any) -> Oracle:
    """`naive_memory`, or the Omega rule, with these choices and the memory's own chunk and reads."""

    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        choices = naive.Choices(chunk=1 if memory.exact else memory.chunk, read=memory.read, **told)
        given = (choices, weights, flow.keys, flow.values, flow.queries, flow.step_size)
        if memory.window > 1:
            still = flow.momentum if "momentum" in str(memory.rule) else torch.zeros_like(flow.momentum)
            run = naive.naive_window(*given, still, flow.log_retention, memory.window)
        else:
            run = naive.naive_memory(
                *given,
                flow.momentum if "momentum" in str(memory.rule) else None,
                flow.log_retention if isinstance(memory.rule, retain) else None,
            )
        return run.reads, run.weights

    return oracle


def _once_a_chunk(**told: Any) -> Oracle:
    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        choices = naive.Choices(chunk=memory.chunk, read=memory.read, residual=True)
        given = (weights, flow.keys, flow.values, flow.queries, flow.step_size, flow.momentum, flow.log_retention)
        run = naive.naive_stepped(choices, *given, **told)
        return run.reads, run.weights

    return oracle


def _ttt(recurrence: Callable[[Maps, Tensor], Tensor]) -> Oracle:
    """M(k) = k + LN(recurrence(W, k)) toward v: `normed` and the residual target of TTT."""

    def function(weights: Maps, key: Tensor) -> Tensor:
        inner = recurrence(weights, key)
        return key + (inner - inner.mean()) / (inner.var(correction=0) + 1e-6).sqrt()

    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        given = naive_miras.Flow(flow.keys, flow.values, flow.queries, flow.step_size, torch.ones_like(flow.retention))
        how: dict[str, Any] = {"chunk": memory.chunk, "read": memory.read}
        run = naive_miras.naive_miras(function, lambda read, value, key: read - (value - key), weights, given, **how)
        return run.reads, run.standing

    return oracle


def _miras(run: Callable[..., naive_miras.Run], **told: Any) -> Oracle:
    def oracle(memory: Memory, weights: Maps, flow: Flow) -> tuple[Tensor, Maps]:
        given = naive_miras.Flow(flow.keys, flow.values, flow.queries, flow.step_size, flow.retention)
        found = run(weights, given, chunk=memory.chunk, read=memory.read, **told)
        return found.reads, found.standing

    return oracle


def _exact(bias: Any, rule: Any, structure: Any = matrix(), **around: Any) -> sequence_memory:
    return sequence_memory(structure, bias, rule, gradient_at="token", **around)


def _written(flow: Flow) -> Tensor:
    return flow.step_size[:, None] * flow.values


def _every_channel(flow: Flow) -> Tensor:
    return flow.retention[:, None].expand_as(flow.keys)


_DECAYED = retain(decay(), gradient_descent())
_TITANS = retain(decay(), momentum())

zoo: dict[str, Model] = {
    "sliding_window_attention": Model(
        attention(),
        "y_t = sum_i exp(q_t.k_i / sqrt d) v_i / sum_i exp(q_t.k_i / sqrt d), the last `window` i",
        "Miras 3; Nested Learning 62, 63",
        note="checked against scaled_dot_product_attention in tests/test_identities.py",
    ),
    "linear_attention": Model(
        _exact(dot(), gradient_descent()),
        "S_t = S_{t-1} + eta_t v_t k_t^T",
        "Katharopoulos et al. 2020; Nested Learning 64",
        _linear(
            lambda f, s: naive_linear.naive_linear_attention(f.queries, f.keys, f.step_size[:, None] * f.values, s)
        ),
    ),
    "retnet": Model(
        _exact(dot(), _DECAYED, gating=fixed_gates(), preparation=bare()),
        "S_t = a_h S_{t-1} + v_t k_t^T,  a_h = 1 - 2^(-5-h) of head h",
        "Sun et al. 2023 (arXiv 2307.08621)",
        _linear(lambda f, s: naive_linear.naive_gla(f.queries, f.keys, _written(f), _every_channel(f), s)),
        note="without the rotation of queries and keys",
    ),
    "mamba2": Model(
        _exact(dot(), _DECAYED, gating=mamba2_gates(), preparation=silu()),
        "S_t = a_t S_{t-1} + D_t v_t k_t^T,  log a_t = -exp(A) D_t,  D_t = softplus(w.x_t + b)",
        "Dao and Gu 2024 (arXiv 2405.21060)",
        _linear(lambda f, s: naive_linear.naive_gla(f.queries, f.keys, _written(f), _every_channel(f), s)),
        note="keys and queries of their own for every head; gates against their formulas in tests/test_gating.py",
    ),
    "gla": Model(
        _exact(dot(), _DECAYED, gating=low_rank_gates(), preparation=bare()),
        "S_t = S_{t-1} Diag(a_t) + v_t k_t^T,  log a_t = logsigmoid(W_2 W_1 x_t + b) / 16",
        "Yang et al. 2024 (arXiv 2312.06635)",
        _linear(lambda f, s: naive_linear.naive_gla(f.queries, f.keys, _written(f), f.retention, s)),
    ),
    "kda": Model(
        _exact(l2(), retain_first(decay(), gradient_descent()), gating=kda_gates()),
        "S_t = S_{t-1} Diag(a_t) (I - eta_t k_t k_t^T) + eta_t v_t k_t^T",
        "Kimi Linear 2025 (arXiv 2510.26692)",
        _linear(
            lambda f, s: naive_linear.naive_gated_delta_rule(f.queries, f.keys, f.values, f.step_size, f.retention, s)
        ),
    ),
    "longhorn": Model(
        _exact(l2(), normalize(gradient_descent())),
        "S_t = argmin |S - S_{t-1}|^2 + eta_t |S k_t - v_t|^2",
        "Liu et al. 2024 (arXiv 2407.14207), exact where its kernel is diagonal",
        _linear(
            lambda f, s: naive_linear.naive_longhorn(
                f.queries, f.keys, f.values, f.step_size[:, None].expand_as(f.values), s
            )
        ),
        note="one eta a head; the paper has one a channel",
    ),
    "oja": Model(
        sequence_memory(matrix(), dot(), oja(), 1, "token", way="recurrent"),
        "S_t = S_{t-1} + eta_t v_t (k_t - S_{t-1}^T v_t)^T",
        "Oja 1982; Irie et al. 2022",
        note="checked in tests/test_oja.py",
    ),
    "deep_transformer": Model(
        _exact(dot(), gradient_descent(), structure=features(matrix(), exponential(2))),
        "S_t = S_{t-1} + eta_t v_t phi(k_t)^T,  <phi(q), phi(k)> = 1 + q.k + (q.k)^2 / 2, the first terms of exp(q.k)",
        "ATLAS, section 4",
        note="a matrix: softmax attention without its norm; features to the second degree (tests/test_compound.py)",
    ),
    "dot": Model(
        sequence_memory(features(matrix(), exponential(2)), l2(), gradient_descent(), 16, window=4),
        "S_t = S_{t-1} - eta_t sum_{t-c<i<=t} (S phi(k_i) - v_i) phi(k_i)^T at the chunk's first weights",
        "ATLAS, section 4",
        note="features checked in tests/test_compound.py; the pairs of a window weigh the same",
    ),
    "deltanet": Model(
        _exact(l2(), gradient_descent()),
        "S_t = S_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T",
        "Schlag et al. 2021; Yang et al. 2024; Nested Learning 65",
        _linear(lambda f, s: naive_linear.naive_delta_rule(f.queries, f.keys, f.values, f.step_size, s)),
    ),
    "gated_deltanet": Model(
        _exact(l2(), retain_first(decay(), gradient_descent()), gating=gated_delta_gates()),
        "S_t = a_t S_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T",
        "Yang et al. 2025 (arXiv 2412.06464)",
        _linear(
            lambda f, s: naive_linear.naive_gated_delta_rule(f.queries, f.keys, f.values, f.step_size, f.retention, s)
        ),
    ),
    "dla": Model(
        sequence_memory(mlp(), dot(), retain(decay(), gradient_descent()), 16),
        "W_t = a_t W_{t-1} + eta_t d<M(k_t), v_t>/dW at the chunk's first weights",
        "ATLAS (arXiv 2505.23735)",
        _deep(objective="dot", residual=True),
    ),
    "swla": Model(
        sequence_memory(matrix(), dot(), retain(decay(), gradient_descent()), 16, window=4),
        "S_t = a_t S_{t-1} + eta_t sum_{t-c<i<=t} v_i k_i^T",
        "ATLAS, table 1",
        _deep(objective="dot"),
        note="the pairs of a window weigh the same; the paper's weights are of the token",
    ),
    "omeganet": Model(
        sequence_memory(mlp(), l2(), retain(decay(), gradient_descent()), 16, window=4),
        "W_t = a_t W_{t-1} - eta_t sum_{t-c<i<=t} d|M(k_i) - v_i|^2/2 /dW at the chunk's first weights",
        "ATLAS, equations 10, 11",
        _deep(residual=True),
        note="keys without polynomial features; the pairs of a window weigh the same",
    ),
    "titans": Model(
        sequence_memory(mlp(), l2(), _TITANS, 16),
        "S_t = m_t S_{t-1} - eta_t d|M(k_t) - v_t|^2/2 /dW;  W_t = a_t W_{t-1} + S_t",
        "Behrouz et al. 2025 (arXiv 2501.00663), equations 9 to 14",
        _deep(residual=True),
        note="the layer's own default rule bounds and averages its steps (docs/papers.md)",
    ),
    "titans_mac": Model(mac(), "memory as context", "Titans 21 to 25", note="oracle in tests/test_titans.py"),
    "titans_mag": Model(mag(), "memory as gate", "Titans 26 to 28", note="oracle in tests/test_titans.py"),
    "titans_mal": Model(mal(), "memory as layer", "Titans 29 to 31", note="oracle in tests/test_titans.py"),
    "moneta": Model(
        moneta(),
        "A_t = a_t A_{t-1} - eta_t d|M(k_t) - v_t|_3^3/dW;  W = A / |A|_4^2",
        "Miras (arXiv 2504.13173), equations 24, 25",
        _miras(naive_miras.naive_moneta, p=3.0, q=4.0, sharpness=10.0),
        note="gates are one a head; the paper's one a channel",
    ),
    "yaad": Model(
        yaad(),
        "W_t = a_t W_{t-1} - eta_t (dl_2/dW where |M(k_t) - v_t| <= bound, else bound dl_1/dW)",
        "Miras, equation 26",
        _miras(naive_miras.naive_yaad, bound=1.0, sharpness=10.0),
        note="the bound is a number; the paper's is of the token",
    ),
    "memora": Model(
        memora(),
        "W_t = softmax(a_t log W_{t-1} - eta_t dl_2/dW), row by row",
        "Miras, equation 27",
        _miras(naive_miras.naive_memora, scale=1.0),
        note="gates are one a head; the learned starts are the logits",
    ),
    "ttt_linear": Model(
        sequence_memory(normed(matrix()), residual_l2(), gradient_descent(), 16),
        "W_t = W_{t-1} - eta_t d|k_t + LN(W k_t) - v_t|^2/2 /dW at the chunk's first weights",
        "Sun et al. 2024 (arXiv 2407.04620)",
        _ttt(lambda w, k: w[0] @ k),
        note="LN without a scale, no bias, steps as the layer chooses them",
    ),
    "ttt_mlp": Model(
        sequence_memory(normed(mlp(residual=False, expansion=4.0)), residual_l2(), gradient_descent(), 16),
        "as ttt_linear, W k replaced by W_2 GELU(W_1 k)",
        "Sun et al. 2024",
        _ttt(lambda w, k: w[1] @ F.gelu(w[0] @ k)),
        note="as ttt_linear",
    ),
    "atlas": Model(
        sequence_memory(
            mlp(), l2(), retain(decay(), scale(newton_schulz(momentum(surprise())))), 16, read="boundary", way="stepped"
        ),
        "S <- m S - sum_chunk dl_2/dW;  W <- a W + eta NS_5(S), once a chunk",
        "ATLAS, equations 32, 33; once a chunk as LaCT does",
        _once_a_chunk(readout=naive.naive_newton_schulz),
        note="the window is the chunk; keys without polynomial features",
    ),
    "lact": Model(
        sequence_memory(gated_mlp(), dot(), retain(row_norm(), gradient_descent()), 64, read="boundary", way="stepped"),
        "W <- rownorm(W + sum_chunk eta_t d<M(k_t), v_t>/dW), once a chunk; rows keep their length",
        "Zhang et al. 2025 (arXiv 2505.23884)",
        note="checked in tests/test_retention.py",
    ),
    "tnt": Model(
        tnt(),
        "a memory with large chunks beside small ones that begin anew every shard, read by projected queries",
        "TNT (arXiv 2511.07343), equations 6, 7",
        note="oracle in tests/test_tnt.py",
    ),
    "titans_cached": Model(
        caching(sequence_memory(mlp(), l2(), _TITANS, 16)),
        "y_t = M_t(q_t) + sum over ended segments s of M^(s)(q_t)",
        "Memory Caching (arXiv 2602.24281)",
        note="oracle in tests/test_caching.py",
    ),
    "self_modifying_titans": Model(
        self_modifying(),
        "k, v, eta, a from memories that write their own targets; each one step of DGD with momentum and retention",
        "Nested Learning, equations 83 to 93",
        note="oracle memory.naive.naive_self_modifying, in tests/test_self_modifying.py",
    ),
    "polynomial_delta": Model(
        sequence_memory(features(matrix(), polynomial(2)), l2(), gradient_descent(), gradient_at="token"),
        "S_t = S_{t-1} - eta_t (S phi(k_t) - v_t) phi(k_t)^T, <phi(q), phi(k)> = (1 + q.k)^2",
        "ATLAS, section 3: the delta rule with features of a higher capacity",
        note="features checked in tests/test_compound.py",
    ),
    "unnamed": Model(
        sequence_memory(mlp(), lp(3.0), retain(kl(), scale(adam())), 16, read="boundary", way="stepped"),
        "nobody's: an l_3 objective with KL retention, learned by Adam, once a chunk",
        "docs/architecture.md",
        note="what the tutorial derives",
    ),
}


def rows() -> Iterator[tuple[str, Model]]:
    """The zoo by name."""
    yield from sorted(zoo.items())
