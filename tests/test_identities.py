"""Three identities of the papers: choose an objective and an optimizer, and a known architecture falls out.

Each side is computed on its own: on the left a memory put together from parts, on the right the architecture's closed
form over the whole sequence at once, without a state and without a step.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import AttentionalBias, Gates, dot, gradient_descent, l2, matrix
from nestling.sequence import Memory, attention, sequence_memory, softmax_memory
from nestling.sequence.scan import Writes
from oracles import convolved, moved, normal, turned

F64 = torch.float64
T, K, V = 41, 6, 5
KEYS = F.normalize(normal(T, K, seed=1), dim=-1)
VALUES, QUERIES, START = normal(T, V, seed=2), normal(T, K, seed=3), normal(V, K, seed=4)
STEPS = 0.1 + 0.8 * torch.rand(T, dtype=F64, generator=torch.Generator().manual_seed(5))
WAYS = [("token", 16, "chunked"), ("token", 7, "recurrent"), ("chunk", 1, "chunked")]


def learned(bias: AttentionalBias, gradient_at: str, chunk: int, way: str) -> Tensor:
    """What a matrix memory that descends on the objective reads [t, v]."""
    memory = Memory(matrix(), bias, gradient_descent(), chunk, gradient_at, way=way)  # type: ignore[arg-type]
    state, reads = memory.begin((START[None, None],)), []
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        pairs = Writes(KEYS[None, None, at], VALUES[None, None, at], Gates(STEPS[None, None, at]))
        y, state = memory.run(memory.open(state, True), pairs, QUERIES[None, None, at])
        reads.append(y[0, 0])
    return torch.cat(reads)


def linear_attention() -> Tensor:
    """Causal attention without the softmax, values weighted by the steps, on top of what the start reads."""
    return (QUERIES @ KEYS.T).tril() @ (STEPS[:, None] * VALUES) + QUERIES @ START.T


def delta_rule() -> Tensor:
    """DeltaNet's state as a sum of products of (generalised) Householder matrices."""
    eye, reads = torch.eye(K, dtype=F64), []
    turns = [eye - b * torch.outer(k, k) for b, k in zip(STEPS, KEYS, strict=True)]
    for t in range(T):
        state, after = torch.zeros(V, K, dtype=F64), eye
        for i in range(t, -1, -1):
            state = state + STEPS[i] * torch.outer(VALUES[i], KEYS[i]) @ after
            after = turns[i] @ after
        reads.append((START @ after + state) @ QUERIES[t])
    return torch.stack(reads)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_dot_product_and_gradient_descent_are_linear_attention(way) -> None:
    torch.testing.assert_close(learned(dot(), *way), linear_attention(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_l2_and_gradient_descent_are_the_delta_rule(way) -> None:
    torch.testing.assert_close(learned(l2(), *way), delta_rule(), rtol=1e-10, atol=1e-10)


def test_the_three_are_not_one_another() -> None:
    softmax = softmax_memory(KEYS, VALUES, QUERIES)
    for one, other in ((linear_attention(), delta_rule()), (linear_attention(), softmax), (delta_rule(), softmax)):
        assert (one - other).abs().max() > 0.1


def test_the_solution_without_parameters_is_softmax_attention() -> None:
    keys, values, queries = (normal(2, 3, 17, n, seed=n) for n in (4, 5, 6))
    queries = queries[..., :4]
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(softmax_memory(keys, values, queries), expected, rtol=1e-12, atol=1e-12)


def test_the_layers_of_the_two_identities() -> None:
    """The whole layers, projections and gates included: both read through one output, from the same parameters."""
    x = normal(19, 8, seed=8)
    for bias in (dot(), l2()):
        expression = sequence_memory(matrix(), bias, gradient_descent(), 4, "token", convolution=1)
        layer = moved(expression.build(8, 2, torch.Generator().manual_seed(0)))
        q, k, v = (
            (F.silu(x @ layer.qkv.weight.T * layer.convolution.weight[:, 0])).view(19, 3, 2, 4).permute(1, 2, 0, 3)
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        step = (x @ layer.gates.weight.T + layer.gates.bias)[:, :2].sigmoid().T[..., None]
        start = layer.start[0]
        written = v
        if isinstance(bias, l2):  # what is new in a value: u = (I + tril(beta K K^T, -1))^-1 (v - W_0 k)
            seen = torch.eye(19, dtype=F64) + (k @ (step * k).mT).tril(-1)
            written = torch.linalg.solve(seen, v - k @ start.mT)
        reads = (q @ k.mT).tril() @ (step * written) + q @ start.mT
        torch.testing.assert_close(layer(x[None])[0], layer.output(reads[None], x[None]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [math.inf, 1, 5])
def test_what_is_read_minimises_the_weighted_objective(window: float) -> None:
    """Independent of the closed form: the objective's gradient vanishes there, and it is higher all around."""
    reads = softmax_memory(KEYS, VALUES, QUERIES, window=window)
    for t in (0, 3, T - 1):
        seen = range(max(0, t - window + 1) if window < math.inf else 0, t + 1)
        weights = torch.stack([torch.exp(QUERIES[t] @ KEYS[i] / math.sqrt(K)) for i in seen])

        def objective(z: Tensor, seen=seen, weights=weights) -> Tensor:
            return sum(w * l2().loss(z, VALUES[i]) for w, i in zip(weights, seen, strict=True))

        z = reads[t].clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(z), z)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-11)
        for seed in range(5):
            assert objective(reads[t] + 0.1 * normal(V, seed=seed)) > objective(reads[t])


def test_a_window_is_what_attention_slides() -> None:
    """The mixer, from its own parameters: rotary positions on keys and queries, then the solution in its window."""
    layer = moved(attention(window=4).build(8, 2, torch.Generator().manual_seed(0)))
    x, projected, streams = normal(13, 8, seed=9), [], []
    for token in x:
        projected.append(layer.qkv.weight @ token)
        streams.append(convolved(layer.convolution.weight, projected).view(3, 2, 4))
    q, k, v = torch.stack(streams).permute(1, 2, 0, 3)  # [h, t, k]
    q, k = (torch.stack([torch.stack([turned(u, t) for t, u in enumerate(head)]) for head in part]) for part in (q, k))
    expected = softmax_memory(k, v, q, window=4).transpose(0, 1).flatten(1) @ layer.project.weight.T
    torch.testing.assert_close(layer(x[None])[0][0], expected, rtol=1e-10, atol=1e-10)
    whole = softmax_memory(k, v, q).transpose(0, 1).flatten(1) @ layer.project.weight.T
    assert (whole - expected)[:4].abs().max() < 1e-12
    assert (whole - expected)[4:].abs().max() > 1e-2


def test_large_scores_do_not_overflow() -> None:
    expected = F.scaled_dot_product_attention(500 * QUERIES[None], KEYS[None], VALUES[None], is_causal=True)[0]
    torch.testing.assert_close(softmax_memory(KEYS, VALUES, 500 * QUERIES), expected, rtol=1e-12, atol=1e-12)


def test_its_outer_gradients() -> None:
    given = tuple(x[:6].clone().requires_grad_() for x in (KEYS, VALUES, QUERIES))
    assert torch.autograd.gradcheck(lambda *xs: softmax_memory(*xs, window=3), given)


def test_what_has_no_solution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dot\(\) has no minimum that is linear in the values; use l2\(\)"):
        softmax_memory(KEYS, VALUES, QUERIES, attentional_bias=dot())
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        softmax_memory(KEYS, VALUES, QUERIES, window=0)
