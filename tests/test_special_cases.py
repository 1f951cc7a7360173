"""Special cases are the known models: each recurrence written out, one token at a time, in float64."""

import torch
from torch import Tensor

from nestling.memory import (
    AttentionalBias,
    Gates,
    Rule,
    decay,
    delta_gradient_descent,
    dot,
    gradient_descent,
    l2,
    matrix,
    retain,
)
from nestling.sequence import Memory
from nestling.sequence.scan import Writes

T, D = 53, 5
GENERATOR = torch.Generator().manual_seed(11)
KEYS = torch.nn.functional.normalize(torch.randn(T, D, generator=GENERATOR, dtype=torch.float64), dim=-1)
VALUES, QUERIES = torch.randn(2, T, D, generator=GENERATOR, dtype=torch.float64)
STEP, KEPT = 0.1 + 0.8 * torch.rand(2, T, generator=GENERATOR, dtype=torch.float64)
START = torch.randn(D, D, generator=GENERATOR, dtype=torch.float64)


def layer(bias: AttentionalBias, rule: Rule, gates: Gates, *, gradient_at: str = "token", chunk: int = 16) -> Tensor:
    memory = Memory(matrix(), bias, rule, chunk=chunk, gradient_at=gradient_at)  # type: ignore[arg-type]
    state, reads = memory.begin((START[None, None],)), []
    shaped = Gates(*(gate[None, None] if isinstance(gate, Tensor) else gate for gate in gates))
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        state = memory.open(state, True)
        pairs = Writes(KEYS[None, None, at], VALUES[None, None, at], shaped.at(at))
        y, state = memory.run(state, pairs, QUERIES[None, None, at])
        reads.append(y[0, 0])
    return torch.cat(reads)


def test_linear_attention() -> None:
    weight, reads = START, []
    for k, v, q in zip(KEYS, VALUES, QUERIES, strict=True):
        weight = weight + torch.outer(v, k)
        reads.append(weight @ q)
    torch.testing.assert_close(layer(dot(), gradient_descent(), Gates(1.0)), torch.stack(reads), rtol=0, atol=1e-10)


def test_retention_network() -> None:
    """A fixed decay and the dot product: RetNet's recurrence."""
    weight, reads = START, []
    for k, v, q in zip(KEYS, VALUES, QUERIES, strict=True):
        weight = 0.9 * weight + torch.outer(v, k)
        reads.append(weight @ q)
    gates = Gates(1.0, 0.0, torch.full((T,), 0.9, dtype=torch.float64).log())
    found = layer(dot(), retain(decay(), gradient_descent()), gates)
    torch.testing.assert_close(found, torch.stack(reads), rtol=0, atol=1e-10)


def test_delta_net() -> None:
    weight, reads = START, []
    for k, v, q, b in zip(KEYS, VALUES, QUERIES, STEP, strict=True):
        weight = weight @ (torch.eye(D, dtype=torch.float64) - b * torch.outer(k, k)) + b * torch.outer(v, k)
        reads.append(weight @ q)
    torch.testing.assert_close(layer(l2(), gradient_descent(), Gates(STEP)), torch.stack(reads), rtol=0, atol=1e-10)


def test_delta_product() -> None:
    """Two steps of size two a token, on nothing: a product of two reflections, which turns the memory and keeps its
    length; a matrix of one step is none such."""
    weight, tokens, eye = START, T // 2, torch.eye(D, dtype=torch.float64)
    for k in KEYS[: 2 * tokens]:
        weight = weight @ (eye - 2.0 * torch.outer(k, k))
    k, v = KEYS[None, None, : 2 * tokens], torch.zeros(1, 1, 2 * tokens, D, dtype=torch.float64)
    memory = Memory(matrix(), l2(), gradient_descent(), gradient_at="token")
    pairs = Writes(k, v, Gates(torch.full_like(k[..., 0], 2.0)), steps=2)
    y, state = memory.run(memory.begin((START[None, None],)), pairs, QUERIES[None, None, :tokens])
    torch.testing.assert_close(state.running[0][0, 0], weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(y[0, 0, -1], weight @ QUERIES[tokens - 1], rtol=0, atol=1e-10)
    turn = torch.linalg.solve(START, weight)
    torch.testing.assert_close(turn @ turn.T, eye, rtol=0, atol=1e-9)
    assert torch.linalg.det(turn) > 0.99


def test_frozen_gradients_with_delta_terms_are_a_gated_delta_rule() -> None:
    """Within a chunk, the self-modifying matrix case is S <- a S (I - b k k^T) + b v' k^T with a = retention,
    b = eta' / a and v' = a (v - M_c k), M_c the weights on which the chunk opened."""
    chunk, weight, reads = 16, START, []
    for t, (k, v, q) in enumerate(zip(KEYS, VALUES, QUERIES, strict=True)):
        if t % chunk == 0:
            opened = weight
        a, eta = KEPT[t], STEP[t] / (1 + STEP[t] * k.dot(k))
        b, wanted = eta / a, a * (v - opened @ k)
        weight = a * weight @ (torch.eye(D, dtype=torch.float64) - b * torch.outer(k, k)) + b * torch.outer(wanted, k)
        reads.append(weight @ q)
    rule = retain(decay(), delta_gradient_descent())
    found = layer(l2(), rule, Gates(STEP, 0.0, KEPT.log()), gradient_at="chunk", chunk=chunk)
    torch.testing.assert_close(found, torch.stack(reads), rtol=0, atol=1e-10)


def test_l2_with_delta_settles_at_half_the_value() -> None:
    """The papers' double erase, left as it is: one pair written over and over is read back as v / 2."""
    memory = Memory(matrix(), l2(), delta_gradient_descent(), chunk=1)
    state = memory.begin((START[None, None],))
    pair = Writes(KEYS[None, None, :1], VALUES[None, None, :1], Gates(torch.full((1, 1, 1), 0.8, dtype=torch.float64)))
    for _ in range(200):
        y, state = memory.run(memory.open(state, True), pair, KEYS[None, None, :1])
    torch.testing.assert_close(y[0, 0, 0], VALUES[0] / 2, rtol=0, atol=1e-10)
