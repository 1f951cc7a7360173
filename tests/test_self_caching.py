"""Memory Caching over memories that make their own keys: the oracles' states at the ends of segments, read again."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import parse
from nestling.sequence import Mixer, caching, naive_blocks, naive_layers, self_modifying, srwm
from oracles import assert_same, convolved, gradients, moved, normal, normed, silu

DIM, HEADS, WIDTH, SEGMENT = 8, 2, 4, 4
MEMORIES = {"srwm": srwm(), "self_modifying": self_modifying(chunk=2, projection_chunk=4)}
LAYERS = {"srwm": naive_layers.srwm, "self_modifying": partial(naive_layers.self_modifying, 2, 4, 1.5)}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def heads(x: Tensor) -> Tensor:
    return x.view(HEADS, WIDTH)


class Naive:
    """One row x [t, d]: the mixer's oracle runs again to every token and to every segment's end."""

    def __init__(self, name: str, layer, mixer: caching, x: Tensor) -> None:
        self.name, self.layer, self.mixer, self.x = name, layer, mixer, x
        self.p = dict(layer.memory.named_parameters())
        self.states = [LAYERS[name](self.p, x[:t], HEADS)[1] if t else None for t in range(len(x) + 1)]
        projected = x if name == "srwm" else x @ self.p["mix.weight"].T
        mixed = [convolved(self.p["convolution.weight"], list(projected[: t + 1])) for t in range(len(x))]
        self.queries = [self.asked(token) for token in mixed]
        reads = torch.stack([torch.stack([self.joined(t, head) for head in range(HEADS)]) for t in range(len(x))])
        gated = [silu(self.p["output.gate.weight"] @ token) for token in x]
        merged = [torch.cat([normed(read) for read in row]) * self.p["output.norm"] for row in reads]
        self.outputs = torch.stack(
            [self.p["output.project.weight"] @ (a * b) for a, b in zip(merged, gated, strict=True)]
        )

    def asked(self, mixed: Tensor) -> Tensor:
        if self.name == "srwm":
            return torch.stack([head.exp() / head.exp().sum() for head in heads(mixed)])
        return torch.stack([head / head.norm() for head in heads(silu(mixed)[DIM:])])

    def weights(self, count: int, head: int) -> list[Tensor]:
        """What answers after `count` tokens."""
        if self.name == "srwm":
            return [(self.p["start"] if count == 0 else self.states[count]["memory"])[head, :WIDTH]]
        return [self.states[count][f"memories.2.running.{i}"][head] for i in range(2)]

    def answer(self, weights: list[Tensor], q: Tensor) -> Tensor:
        return weights[0] @ q if self.name == "srwm" else q + weights[1] @ F.gelu(weights[0] @ q)

    def joined(self, t: int, head: int) -> Tensor:
        q = self.queries[t][head]
        present = self.weights(t if self.name == "srwm" else t + 1, head)  # srwm answers before it writes
        if self.mixer.read == "residual":
            stops = list(range(SEGMENT, t + 1, SEGMENT))[-self.mixer.slots :]
            return self.answer(present, q) + sum(self.answer(self.weights(stop, head), q) for stop in stops)
        gates = naive_blocks.segment_gates(self.mixer, self.layer.asks.weight, self.x, t, head, HEADS)
        standing = [self.weights(stop, head) if stop else present for stop in gates]
        if self.mixer.read == "soup":
            pairs = list(zip(gates.values(), standing, strict=True))
            return self.answer([sum(g * w[i] for g, w in pairs) for i in range(len(present))], q)
        return sum(g * self.answer(w, q) for g, w in zip(gates.values(), standing, strict=True))


READS = ("residual", "gated", "soup", "sparse")
CASES = [("srwm", read, 15) for read in READS] + [("srwm", "gated", 5)]
CASES += [("self_modifying", read, 6) for read in READS if read != "sparse"]  # whose oracle takes seconds


@pytest.mark.parametrize(("name", "read", "length"), CASES)
def test_reads_are_those_of_the_definition(name: str, read: str, length: int) -> None:
    mixer = caching(MEMORIES[name], segment=SEGMENT, read=read, slots=2, top=1)
    layer = build(mixer)
    x = normal(length, DIM, seed=length).requires_grad_()
    y, state = layer(x[None])
    naive = Naive(name, layer, mixer, x)
    torch.testing.assert_close(y[0], naive.outputs, rtol=1e-9, atol=1e-9)
    kept = list(range(SEGMENT, length, SEGMENT))[-2:]
    assert int(state.segments.exists.sum()) == len(kept)
    for slot, stop in enumerate(reversed(kept)):
        for head in range(HEADS):
            for mine, expected in zip(state.cached, naive.weights(stop, head), strict=True):
                torch.testing.assert_close(mine[0, head, -1 - slot], expected, rtol=1e-9, atol=1e-9)
    assert_same(gradients(y[0], layer, x), gradients(naive.outputs, layer, x))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", MEMORIES)
def test_a_document_of_one_segment_reads_the_memory_itself(name: str, read: str) -> None:
    x = normal(1, 8, DIM)
    layer = build(caching(MEMORIES[name], segment=8, read=read))
    torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], rtol=1e-12, atol=1e-12)


def test_a_query_from_a_memory_is_the_presents() -> None:
    """With a memory for queries and checkpointing, all gradients are those without checkpointing."""
    generators = ("key", "value", "query", "step_size", "retention")
    x = normal(11, DIM).requires_grad_()
    kept, again = (
        build(caching(self_modifying(chunk=4, projection_chunk=4, generators=generators, checkpoint=on), segment=4))
        for on in (False, True)
    )
    y, z = kept(x[None])[0][0], again(x[None])[0][0]
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    assert (y - kept.memory(x[None])[0][0])[4:].abs().max() > 1e-4
    assert_same(gradients(y, kept, x), gradients(z, again, x))


def test_expressions_read_back() -> None:
    expression = caching(self_modifying(chunk=8, projection_chunk=4), segment=16, read="soup", slots=3)
    assert parse(repr(expression), Mixer) == expression
