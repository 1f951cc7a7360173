"""Steps averaged over a chunk: TTT's 1/i, and forgetting toward the weights on which a chunk opened."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nestling.memory import Gates, decay, decay_to_anchor, gradient_descent, l2, lp, matrix, mlp, momentum, retain
from nestling.memory.naive_miras import Flow, naive_anchored
from nestling.sequence import Memory, averaged_gates, bound_gates, comba_streams, sequence_memory, shards
from nestling.sequence.scan import Writes

CHUNK = 4
RULE = retain(decay_to_anchor(), gradient_descent())
TTT = sequence_memory(matrix(), l2(), RULE, CHUNK, gating=averaged_gates(chunk=CHUNK))


def built(mixer: Any = TTT, dim: int = 8) -> Any:
    """With every parameter moved, those of the places too."""
    generator = torch.Generator().manual_seed(0)
    layer = mixer.build(dim, 2, generator).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return layer


def drawn(length: int, rows: int = 2, dim: int = 8) -> torch.Tensor:
    return torch.randn(rows, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reads(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What every head reads [b, h, t, k], from W_i = W_c - p_i sum_j eta_j (W_c k_j - v_j) k_j^T written out."""
    projected, taps = layer.qkv(x), layer.convolution.weight
    padded = F.pad(projected, (0, 0, taps.shape[1] - 1, 0))
    mixed = sum(taps[:, s] * padded[:, s : s + x.shape[1]] for s in range(taps.shape[1]))
    heads = F.silu(mixed).unflatten(-1, (6, -1)).transpose(1, 2)
    q, k, v = heads.chunk(3, 1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    sizes = torch.sigmoid(x @ layer.gates.inner.weight.T + layer.gates.inner.bias)
    found = []
    for row in range(len(x)):
        for head in range(2):
            W = opened = layer.start[0][head]
            total = torch.zeros_like(W)
            for t in range(x.shape[1]):
                i = t % CHUNK + 1
                if i == 1:
                    opened, total = W, torch.zeros_like(W)
                key, value = k[row, head, t], v[row, head, t]
                total = total + sizes[row, t, head] * torch.outer(opened @ key - value, key)
                W = opened - torch.exp(layer.gates.log_share[i - 1]) / i * total
                found.append(W @ q[row, head, t])
    return torch.stack(found).unflatten(0, (len(x), 2, x.shape[1]))


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
@pytest.mark.parametrize("length", [1, 7, 22])
def test_token_i_stands_at_the_mean_of_the_chunks_steps(way, length):
    layer, x = built(dataclasses.replace(TTT, way=way)), drawn(length)
    expected = layer.output(reads(layer, x), x)
    y, _ = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    leaves = [p for name, p in layer.named_parameters() if not name.startswith("output")]
    direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    mine = torch.autograd.grad(y, leaves, direction)
    theirs = torch.autograd.grad(expected, leaves, direction)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_place_is_kept_over_calls_documents_and_padding():
    """One pass is token by token; rows that start documents apart, and rows with padding, are as each alone."""
    layer, x = built(), drawn(23)
    whole, _ = layer(x)
    state, parts = None, []
    for t in range(23):
        y, state = layer(x[:, t : t + 1], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, 6], reset[1, 9] = True, True
    y, _ = layer(x, reset=reset)
    for row, first in ((0, 6), (1, 9)):
        torch.testing.assert_close(y[row, first:], layer(x[row : row + 1, first:])[0][0], rtol=1e-10, atol=1e-12)
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[0, 5:8] = False
    y, _ = layer(x, valid=valid)
    torch.testing.assert_close(y[0, valid[0]], layer(x[:1, valid[0]])[0][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(y[1], whole[1], rtol=1e-10, atol=1e-12)
    _, state = layer(x[:, :6])
    y, _ = layer(x[:, 6:], state, valid=valid[:, 6:])
    torch.testing.assert_close(y[1], whole[1, 6:], rtol=1e-10, atol=1e-12)


def test_within_shards_places_are_those_of_the_inner_chunk():
    layer, x = built(shards(TTT, shard=8)), drawn(16)
    y, _ = layer(x)
    again, state = layer(x[:, :11])
    rest, _ = layer(x[:, 11:], state)
    torch.testing.assert_close(torch.cat([again, rest], 1), y, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """One number, W_0 = 0, v = 1: gradients at the anchor are -1, and the mean of steps 0.5 and 0.1 is 0.3."""
    one = torch.ones(3, 1, dtype=torch.float64)
    flow = Flow(one, one, one, torch.tensor([0.5, 0.05, 0.5]), torch.tensor([0.0, 0.5, 0.0]))
    run = naive_anchored(lambda w, k: w[0] @ k, lambda r, v, k: r - v, (0 * one[:1],), flow, chunk=2, read="after")
    torch.testing.assert_close(run.reads[:, 0].float(), torch.tensor([0.5, 0.3, 0.3 + 0.5 * 0.7]))


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
def test_momentum_and_an_anchor(way):
    """Written by hand for one map: what is forgotten goes back to where the chunk opened, the momentum goes on."""
    memory = Memory(matrix(), l2(), retain(decay_to_anchor(), momentum()), CHUNK, way=way)
    generator = torch.Generator().manual_seed(2)
    k, v, q = torch.randn(3, 10, 3, dtype=torch.float64, generator=generator)
    eta, m, a = torch.rand(3, 10, dtype=torch.float64, generator=generator)
    W, S, expected = torch.randn(3, 3, dtype=torch.float64, generator=generator), torch.zeros(3, 3).double(), []
    start = opened = W
    for t in range(10):
        opened = W if t % CHUNK == 0 else opened
        S = m[t] * S - eta[t] * torch.outer(opened @ k[t] - v[t], k[t])
        W = opened + a[t] * (W - opened) + S
        expected.append(W @ q[t])
    state, found = memory.begin((start[None, None],)), []
    for first in range(0, 10, CHUNK):
        at = slice(first, min(first + CHUNK, 10))
        gates = Gates(*(gate[None, None, at] for gate in (eta, m, a.log())))
        pairs = Writes(k[None, None, at], v[None, None, at], gates)
        y, state = memory.run(memory.open(state, True), pairs, q[None, None, at])
        found.append(y[0, 0])
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: sequence_memory(rule=RULE, gating=averaged_gates()), "averages over 16 tokens, .* chunk is 64"),
        (
            lambda: sequence_memory(mlp(), l2(), retain(decay(), gradient_descent()), 16, gating=averaged_gates()),
            r"return to where a chunk opened, .*not for retain\(\)",
        ),
        (lambda: sequence_memory(matrix(), l2(), RULE, 16, "token"), "has no chunks"),
        (lambda: sequence_memory(mlp(), l2(), RULE, 16, read="boundary", way="stepped"), "writes only when it is over"),
        (lambda: comba_streams(averaged_gates()), "no window, bound, maps or chunk"),
        (lambda: averaged_gates(chunk=0), "chunk must be > 0"),
        (lambda: bound_gates(averaged_gates()).fits(Memory(matrix(), lp(3.0), RULE, 16)), "huber_switch"),
    ],
)
def test_what_does_not_fit_is_said(build, words):
    with pytest.raises(ValueError, match=words):
        build()
