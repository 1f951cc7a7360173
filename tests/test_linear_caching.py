"""Memory Caching over linear recurrences: the oracles' states at the ends of segments, read by the definition."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import parse
from nestling.sequence import (
    Mixer,
    caching,
    comba_streams,
    hgrn2_streams,
    linear_mixer,
    mesa_streams,
    naive_blocks,
    naive_layers,
    rwkv7_streams,
)
from oracles import assert_same, convolved, gradients, moved, normal, normed, silu

DIM, HEADS, WIDTH, SEGMENT = 8, 2, 4, 4
STREAMS = {
    "hgrn2": hgrn2_streams(),
    "comba": comba_streams(),
    "mesa": mesa_streams(),
    "rwkv7": rwkv7_streams(rank=2),
}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def heads(x: Tensor) -> Tensor:
    return x.view(HEADS, WIDTH)


class Naive:
    """One row x [t, d]: the recurrence's oracle runs again to every token and to every segment's end."""

    def __init__(self, name: str, layer, mixer: caching, x: Tensor) -> None:
        self.name, self.layer, self.mixer, self.x = name, layer, mixer, x
        self.p = dict(layer.memory.named_parameters())
        run = getattr(naive_layers, name)
        self.states = [run(self.p, x[: t + 1], HEADS)[1] for t in range(len(x))]
        projected = [self.p["project.weight"] @ token for token in x]
        self.mixed = [convolved(self.p["convolution.weight"], projected[: t + 1]) for t in range(len(x))]
        reads = torch.stack([self.joined(t) for t in range(len(x))])
        gated = [silu(self.p["output.gate.weight"] @ token) for token in x]
        merged = [torch.cat([normed(read) for read in row]) * self.p["output.norm"] for row in reads]
        self.outputs = torch.stack(
            [self.p["output.project.weight"] @ (a * b) for a, b in zip(merged, gated, strict=True)]
        )

    def stream(self, t: int, i: int) -> Tensor:
        return heads(self.mixed[t][i * DIM : (i + 1) * DIM])

    def read(self, t: int, at: int, head: int) -> Tensor:
        """What token t is told by the state after token `at`."""
        state, q = self.states[at], self.stream(t, 0)[head]
        if self.name in ("hgrn2", "rwkv7"):
            return state["memory"][head] @ (silu(q) if self.name == "hgrn2" else q)
        q = silu(q) / silu(q).norm()
        if self.name == "comba":
            key = silu(self.stream(t, 1)[head])
            along = torch.sigmoid(self.p["streams.along"][head]) * key / key.norm()
            return state["memory"][head] @ (q - self.p["streams.feedback"][head] * along) / math.sqrt(WIDTH)
        ridge = torch.diag(F.softplus(self.p["streams.ridge"][head]) + 0.25)
        return state["memory.0"][head] @ torch.linalg.solve(state["memory.1"][head] + ridge, q)

    def bonus(self, t: int, head: int) -> Tensor | float:
        if self.name != "rwkv7":
            return 0.0
        q, k, v = (self.stream(t, i)[head] for i in range(3))
        low = self.p["streams.rate_up.weight"] @ (self.p["streams.rate_down.weight"] @ self.x[t])
        rate = heads(torch.sigmoid(low + self.p["streams.rate_up.bias"]))[head]
        key = k * (1 + (rate - 1) * heads(self.p["streams.replacement"])[head])
        return (self.p["streams.bonus"][head] * q * key).sum() * v

    def joined(self, t: int) -> Tensor:
        each = []
        for head in range(HEADS):
            now = self.read(t, t, head) + self.bonus(t, head)
            if self.mixer.read == "residual":
                stops = list(range(SEGMENT, t + 1, SEGMENT))[-self.mixer.slots :]
                each.append(now + sum(self.read(t, stop - 1, head) for stop in stops))
                continue
            gates = naive_blocks.segment_gates(self.mixer, self.layer.asks.weight, self.x, t, head, HEADS)
            each.append(sum(g * (self.read(t, stop - 1, head) if stop else now) for stop, g in gates.items()))
        return torch.stack(each)


CASES = [(name, "gated", 15) for name in STREAMS]
CASES += [("hgrn2", "residual", 15), ("rwkv7", "residual", 10), ("mesa", "sparse", 15), ("comba", "gated", 1)]


@pytest.mark.parametrize(("name", "read", "length"), CASES)
def test_reads_are_those_of_the_definition(name: str, read: str, length: int) -> None:
    memory = linear_mixer(STREAMS[name], chunk=3, convolution=2)
    mixer = caching(memory, segment=SEGMENT, read=read, slots=2, top=1)
    layer = build(mixer)
    x = normal(length, DIM, seed=length).requires_grad_()
    y, state = layer(x[None])
    naive = Naive(name, layer, mixer, x)
    torch.testing.assert_close(y[0], naive.outputs, rtol=1e-8, atol=1e-8)
    kept = [stop for stop in range(SEGMENT, length, SEGMENT)][-2:]
    assert int(state.segments.exists.sum()) == len(kept)
    cached = state.cached[0] if name == "mesa" else state.cached
    for slot, stop in enumerate(reversed(kept)):
        expected = naive.states[stop - 1]["memory.0" if name == "mesa" else "memory"]
        torch.testing.assert_close(cached[0, -1 - slot], expected, rtol=1e-9, atol=1e-9)
    assert_same(gradients(y[0], layer, x), gradients(naive.outputs, layer, x))


@pytest.mark.parametrize("name", STREAMS)
def test_a_document_of_one_segment_reads_the_memory_itself(name: str) -> None:
    x = normal(1, 8, DIM)
    layer = build(caching(linear_mixer(STREAMS[name]), segment=8))
    torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STREAMS)
def test_a_quiet_token_leaves_the_state_as_it_is(name: str) -> None:
    layer, x = build(linear_mixer(STREAMS[name])), normal(2, 5, DIM)
    _, state = layer(x)
    streams = layer.streams
    width = layer.project.weight.shape[0]
    given = streams.prepare(normal(2, 3, width, seed=1), streams(normal(2, 3, DIM, seed=2)))
    after = streams.run(streams.quiet(given), state.memory, 64, "chunked")[1]
    for mine, before in zip(after, state.memory, strict=True):
        torch.testing.assert_close(mine, before, rtol=0, atol=1e-14)


def test_expressions_read_back() -> None:
    expression = caching(linear_mixer(mesa_streams()), segment=5, read="sparse", slots=3, top=2)
    assert parse(repr(expression), Mixer) == expression
