"""Memory Caching: what is kept of earlier segments and how it is read, by memory.naive run again for every end."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import decay, elastic_net_ftrl, kl, l2, lq, matrix, mlp, momentum, parse, retain, row_norm, sigmoid
from nestling.sequence import Mixer, caching, sequence_memory
from oracles import DEEP, EXACT, NaiveLayer, assert_same, gradients, moved, normal

DIM, HEADS = 8, 2
deep = sequence_memory(mlp(), chunk=4)
exact = sequence_memory(matrix(), rule=retain(decay(), momentum()), chunk=4, gradient_at="token")
RETENTIONS = [decay(), kl(), lq(), sigmoid(), elastic_net_ftrl(), row_norm(each="chunk")]
MEMORIES = {"deep": (deep, DEEP), "exact": (exact, EXACT)}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def inputs(length: int) -> Tensor:
    return normal(length, DIM, seed=length).requires_grad_()


def answer(weights, q: Tensor) -> Tensor:
    return weights[0] @ q if len(weights) == 1 else q + weights[1] @ F.gelu(weights[0] @ q)


class NaiveCaching:
    """One row x [t, d]: outputs, the cached weights of each head, and the means of their segments."""

    def __init__(self, layer, choices, x: Tensor) -> None:
        self.layer, self.choices, self.x = layer, choices, x
        self.naive = NaiveLayer(layer.memory, choices, x)
        self.segment, self.slots = layer.expression.segment, layer.expression.slots
        whole = range(self.segment, len(x), self.segment)
        self.ends = {stop: [self.after(stop, h) for h in range(HEADS)] for stop in whole}
        read = {"residual": self.residual, "soup": self.soup}.get(layer.expression.read, self.gated)
        reads = [torch.stack([read(t, h) for h in range(HEADS)]) for t in range(len(x))]
        self.outputs = torch.stack([self.naive.output(y, token) for y, token in zip(reads, x, strict=True)])

    def after(self, stop: int, head: int) -> tuple[Tensor, ...]:
        return self.naive.run(self.choices, head, slice(0, stop)).weights

    def kept(self, t: int) -> list[int]:
        return [stop for stop in self.ends if stop <= t][-self.slots :]

    def residual(self, t: int, head: int) -> Tensor:
        y = self.naive.runs[head].reads[t]
        for stop in self.kept(t):
            y = y + answer(self.ends[stop][head], self.naive.q[t, head])
        return y

    def gates(self, t: int, head: int) -> dict[int, Tensor]:
        """By the segment's end; 0 for the present one."""
        width = DIM // HEADS
        at = slice(head * width, (head + 1) * width)
        asked = (self.layer.asks.weight @ self.x[t])[at]
        first = t // self.segment * self.segment
        now = asked @ self.x[first : t + 1].mean(0)[at] / 2
        scores = {stop: asked @ self.x[stop - self.segment : stop].mean(0)[at] / 2 for stop in self.kept(t)}
        if self.layer.expression.read == "sparse":
            best = sorted(scores, key=lambda stop: scores[stop].detach())[-self.layer.expression.top :]
            scores = {stop: scores[stop] for stop in best}
        total = now.exp() + sum(score.exp() for score in scores.values())
        return {0: now.exp() / total} | {stop: score.exp() / total for stop, score in scores.items()}

    def gated(self, t: int, head: int) -> Tensor:
        gates = self.gates(t, head)
        y = gates.pop(0) * self.naive.runs[head].reads[t]
        for stop, gate in gates.items():
            y = y + gate * answer(self.ends[stop][head], self.naive.q[t, head])
        return y

    def soup(self, t: int, head: int) -> Tensor:
        gates = self.gates(t, head)
        now = gates.pop(0)
        mixed = [now * weight for weight in self.after(t + 1, head)]
        for stop, gate in gates.items():
            mixed = [weight + gate * old for weight, old in zip(mixed, self.ends[stop][head], strict=True)]
        return answer(mixed, self.naive.q[t, head])


CASES = [
    *(("deep", "residual", n) for n in (1, 7, 63)),
    *(("exact", "residual", n) for n in (7, 63)),
    *(("deep", "gated", n) for n in (1, 7, 63)),
    *(("exact", "gated", n) for n in (7, 63)),
    *(("deep", "sparse", n) for n in (7, 63)),
    *(("deep", "soup", n) for n in (1, 7, 22)),
]


@pytest.mark.parametrize(("kind", "read", "length"), CASES)
def test_reads_are_those_of_the_definition(kind: str, read: str, length: int) -> None:
    memory, choices = MEMORIES[kind]
    segment = 12 if length == 63 else 4
    layer = build(caching(memory, segment=segment, read=read, slots=3, top=2))
    x = inputs(length)
    y, state = layer(x[None])
    naive = NaiveCaching(layer, choices, x)
    torch.testing.assert_close(y[0], naive.outputs, rtol=1e-10, atol=1e-10)
    assert state.exists.sum() == min(3, (length - 1) // segment)
    for slot, stop in enumerate(reversed(naive.kept(length - 1))):
        mean = naive.x[stop - segment : stop].mean(0)
        torch.testing.assert_close(state.means[0, -1 - slot], mean, rtol=1e-10, atol=1e-10)
        for index, weight in enumerate(state.cached):
            for h in range(HEADS):
                expected = naive.ends[stop][h][index]
                torch.testing.assert_close(weight[0, h, -1 - slot], expected, rtol=1e-10, atol=1e-10)
    assert_same(gradients(y[0], layer, x), gradients(naive.outputs, layer, x))


@pytest.mark.parametrize("read", ["residual", "gated", "soup", "sparse"])
def test_outer_gradients_by_finite_differences(read: str) -> None:
    layer = build(caching(deep, segment=4, read=read, slots=2, top=1))
    x = inputs(10)
    some = [p for name, p in layer.named_parameters() if "start" in name or "asks" in name]
    names = [name for name, _ in layer.named_parameters() if "start" in name or "asks" in name]

    def run(x: Tensor, *some: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, some, strict=True)), (x[None],))[0]

    assert torch.autograd.gradcheck(run, (x, *some), atol=1e-6, fast_mode=True)


def test_of_one_linear_map_soup_and_gates_are_the_same() -> None:
    x = inputs(23)[None]
    soup, gated = (build(caching(exact, segment=4, read=read, slots=3)) for read in ("soup", "gated"))
    torch.testing.assert_close(soup(x)[0], gated(x)[0], rtol=1e-10, atol=1e-10)
    soup, gated = (build(caching(deep, segment=4, read=read, slots=3)) for read in ("soup", "gated"))
    assert (soup(x)[0] - gated(x)[0]).abs().max() > 1e-4


def test_a_document_of_one_segment_reads_the_memory_itself() -> None:
    x = inputs(8)[None]
    for read in ("residual", "gated", "soup", "sparse"):
        layer = build(caching(deep, segment=8, read=read))
        torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], rtol=1e-12, atol=1e-12)


def test_sparse_with_room_for_all_is_gated_and_with_less_is_not() -> None:
    x = inputs(30)[None]
    gated = build(caching(deep, segment=4, slots=4))(x)[0]
    found = [build(caching(deep, segment=4, read="sparse", slots=4, top=top))(x)[0] for top in (4, 2, 1)]
    torch.testing.assert_close(found[0], gated, rtol=1e-12, atol=1e-12)
    for one, other in pairwise(found):
        assert (one - other).abs().max() > 1e-4


def test_the_read_timing_of_the_memory_is_kept() -> None:
    """Of a gate that is all on the present, every way of averaging is the memory's own read."""
    x = inputs(11)[None]
    for timing in ("after", "before", "boundary"):
        memory = sequence_memory(mlp(), chunk=4, read=timing)
        layer = build(caching(memory, segment=4, read="soup", slots=2))
        plain = build(caching(memory, segment=4, slots=2))
        torch.testing.assert_close(layer(x)[0][:, :4], plain(x)[0][:, :4], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("read", ["gated", "soup"])
@pytest.mark.parametrize("way", ["chunked", "recurrent", "stepped"])
@pytest.mark.parametrize("retention", RETENTIONS, ids=str)
def test_what_is_kept_is_what_the_memory_answers_with(retention, way, read) -> None:
    """In the first chunk of its second segment, a memory that is read at its boundary is what ended there: gates that
    add up to one change nothing."""
    memory = sequence_memory(mlp(), l2(), retain(retention, momentum()), 4, read="boundary", way=way)
    layer, x = build(caching(memory, segment=4, read=read, slots=2)), inputs(8)[None]
    torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], rtol=1e-10, atol=1e-10)


def test_checkpointing_changes_nothing() -> None:
    x = inputs(19)
    kept, again = (
        build(caching(sequence_memory(mlp(), chunk=4, checkpoint=checkpoint), segment=8))
        for checkpoint in (False, True)
    )
    y, z = kept(x[None])[0][0], again(x[None])[0][0]
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    assert_same(gradients(y, kept, x), gradients(z, again, x))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("caching(attention())", r"of a sequence_memory\(\), .* or srwm\(\), not of attention\(\)"),
        ("caching(lstm())", r"read again with a query, and lstm\(\) has none"),
        ("caching(linear_mixer(), read='soup')", r"averages the weights of a memory, not the matrices of linear_mixer"),
        ("caching(self_modifying(read='before'), read='soup')", r"after a token's own write, not those of self_modif"),
        ("caching(self_modifying(chunk=32, projection_chunk=8), segment=8)", "memory's chunk 32, got 8"),
        ("caching(segment=100)", "segment must be a multiple of the memory's chunk 64, got 100"),
        ("caching(read='all')", "read must be one of .*got 'all'"),
        ("caching(slots=0)", "slots must be at least 1, got 0"),
        ("caching(read='sparse', top=0)", "top must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_expressions_read_back() -> None:
    expression = caching(exact, segment=16, read="sparse", slots=3, top=2)
    assert parse(repr(expression), Mixer) == expression
