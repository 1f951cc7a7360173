"""Memory beside, before and in the context of attention: Titans' equations written out, forward, state, gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import decay, elastic_net_ftrl, kl, l2, lq, matrix, mlp, momentum, parse, retain, sigmoid
from nestling.memory.structure import plain
from nestling.sequence import Mixer, attention, mac, mag, mal, self_modifying, sequence_memory
from oracles import (
    DEEP,
    EXACT,
    F64,
    NaiveLayer,
    assert_same,
    convolved,
    gradients,
    moved,
    normal,
    normed,
    silu,
    softmaxed,
    turned,
)

DIM, HEADS = 8, 2
LENGTHS = (1, 7, 63)
deep = sequence_memory(mlp(), chunk=4)
exact = sequence_memory(matrix(), rule=retain(decay(), momentum()), chunk=4, gradient_at="token")
MEMORIES = {"deep": (deep, DEEP), "exact": (exact, EXACT)}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def inputs(length: int) -> Tensor:
    return normal(length, DIM, seed=length).requires_grad_()


class NaiveAttention:
    """Attention over x [t, d]: keys, values and outputs, by the definition."""

    def __init__(self, layer, x: Tensor, window: int) -> None:
        projected: list[Tensor] = []
        q, self.k, self.v, self.outputs = [], [], [], []
        tokens = [] if layer.persistent is None else list(layer.persistent)
        beside = [(layer.qkv.weight @ token).view(3, HEADS, -1) for token in tokens]
        for t, token in enumerate(x):
            projected.append(layer.qkv.weight @ token)
            a, b, c = convolved(layer.convolution.weight, projected).view(3, HEADS, -1)
            for part, new in ((q, a), (self.k, b), (self.v, c)):
                part.append(new)
            heads = []
            for h in range(HEADS):
                seen = range(max(0, t - window + 1), t + 1)
                scores = [a[h] @ k[h] / 2 for _, k, _ in beside]  # the root of a head's width of 4
                scores += [turned(a[h], t) @ turned(self.k[i][h], i) / 2 for i in seen]
                heads.append(softmaxed(scores, [v[h] for *_, v in beside] + [self.v[i][h] for i in seen]))
            self.outputs.append(layer.project.weight @ torch.cat(heads))


def gated(gate, y: Tensor, m: Tensor) -> Tensor:
    return normed(y, gate.of_attention) * silu(normed(m, gate.of_memory))


def assert_weights(found: tuple[Tensor, ...], naive: NaiveLayer) -> None:
    for index, weight in enumerate(found):
        for h in range(HEADS):
            torch.testing.assert_close(weight[0, h], naive.runs[h].weights[index], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", MEMORIES)
def test_memory_as_gate(kind: str, length: int) -> None:
    memory, choices = MEMORIES[kind]
    layer = build(mag(memory, window=5, persistent=3))
    x = inputs(length)
    y, state = layer(x[None])
    remembered = NaiveLayer(layer.memory, choices, x)
    attended = NaiveAttention(layer.attention, x, 5)
    pairs = zip(attended.outputs, remembered.outputs, strict=True)
    expected = torch.stack([gated(layer.gate, a, m) for a, m in pairs])
    torch.testing.assert_close(y[0], expected, rtol=1e-10, atol=1e-10)
    assert_weights(layer.memory.standing(state.memory), remembered)
    cached = min(4, length)
    torch.testing.assert_close(
        state.attention.keys[0, :, 4 - cached :], torch.stack(attended.k[length - cached :], 1), rtol=1e-10, atol=1e-10
    )
    assert_same(gradients(y[0], layer, x), gradients(expected, layer, x))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", MEMORIES)
def test_memory_as_layer(kind: str, length: int) -> None:
    memory, choices = MEMORIES[kind]
    layer = build(mal(memory, window=5, persistent=3))
    x = inputs(length)
    y, state = layer(x[None])
    remembered = NaiveLayer(layer.memory, choices, x)
    between = torch.stack([normed(m, layer.norm) for m in remembered.outputs])
    attended = NaiveAttention(layer.attention, between, 5)
    expected = torch.stack(attended.outputs)
    torch.testing.assert_close(y[0], expected, rtol=1e-10, atol=1e-10)
    assert_weights(layer.memory.standing(state.memory), remembered)
    cached = min(4, length)
    torch.testing.assert_close(
        state.attention.values[0, :, 4 - cached :],
        torch.stack(attended.v[length - cached :], 1),
        rtol=1e-10,
        atol=1e-10,
    )
    assert_same(gradients(y[0], layer, x), gradients(expected, layer, x))


@pytest.mark.parametrize("way", ["chunked", "stepped"])
@pytest.mark.parametrize("retention", [kl(), lq(), sigmoid(), elastic_net_ftrl()], ids=str)
def test_a_segment_reads_what_the_memory_answers_with(retention, way) -> None:
    memory = sequence_memory(mlp(), l2(), retain(retention, momentum()), 4, read="boundary", way=way)
    layer, x = build(mac(memory, segment=4)), inputs(5)[None]
    _, before = layer(x[:, :4])
    _, after = layer(x[:, 4:], before)
    of, asked = layer.memory.memory, normal(1, HEADS, 3, DIM // HEADS)
    expected = of.at_anchor(of.open(before.memory.memory, True), asked)
    found = layer.structure.forward(plain(after.opened), asked)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class NaiveContext:
    """Memory as context over x [t, d], segment by segment: the memory is run again from the document's start over
    all that attention has put out, and read for the segment's queries at the weights which that leaves."""

    def __init__(self, layer, choices, x: Tensor) -> None:
        self.layer, outputs, projected = layer, [], []
        weights = [tuple(weight[h] for weight in layer.memory.start) for h in range(HEADS)]
        for first in range(0, len(x), layer.segment):
            self.keys: list[tuple[Tensor, Tensor]] = []  # of the reads and of the tokens, [h, k] each
            self.values: list[tuple[Tensor, Tensor]] = []
            self.turned: list[list[Tensor]] = []  # by head, [2, k]
            for t in range(first, min(first + layer.segment, len(x))):
                projected.append(layer.qkv.weight @ x[t])
                outputs.append(self.attended(x[t], projected, weights))
            naive = NaiveLayer(layer.memory, choices, torch.stack(outputs))
            weights = [run.weights for run in naive.runs]
        self.naive = naive
        pairs = zip(outputs, naive.outputs, strict=True)
        self.outputs = torch.stack([gated(layer.gate, y, m) for y, m in pairs])

    def attended(self, token: Tensor, projected: list[Tensor], opened) -> Tensor:
        layer = self.layer
        asked = silu(layer.query.weight @ token).view(HEADS, -1)
        found = [self.answer(opened[h], asked[h] / asked[h].norm()) for h in range(HEADS)]
        h = torch.cat([normed(part) for part in found]) * layer.norm
        q, k, v = convolved(layer.convolution.weight, projected).view(3, HEADS, -1)
        _, k_read, v_read = (layer.qkv.weight @ h).view(3, HEADS, -1)
        self.keys.append((k_read, k))
        self.values.append((v_read, v))
        now, heads = len(self.keys) - 1, []
        self.turned.append([torch.stack([turned(key[n], now) for key in self.keys[now]]) for n in range(HEADS)])
        _, k_beside, v_beside = (layer.qkv.weight @ layer.persistent.T).view(3, HEADS, DIM // HEADS, -1)
        for n in range(HEADS):
            scores = torch.cat([q[n] @ k_beside[n], torch.cat([two[n] for two in self.turned]) @ turned(q[n], now)])
            values = torch.cat([v_beside[n].T, torch.stack([v[n] for two in self.values for v in two])])
            weights = (scores / 2).exp()
            heads.append(weights @ values / weights.sum())
        return layer.project.weight @ torch.cat(heads)

    def answer(self, weights, q: Tensor) -> Tensor:
        if len(weights) == 1:
            return weights[0] @ q
        return q + weights[1] @ F.gelu(weights[0] @ q)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", MEMORIES)
def test_memory_as_context(kind: str, length: int) -> None:
    memory, choices = MEMORIES[kind]
    layer = build(mac(memory, segment=24 if length > 7 else 3, persistent=2))
    x = inputs(length)
    y, state = layer(x[None])
    naive = NaiveContext(layer, choices, x)
    torch.testing.assert_close(y[0], naive.outputs, rtol=1e-10, atol=1e-10)
    assert_weights(layer.memory.standing(state.memory), naive.naive)
    for found, pairs in ((state.keys, naive.keys), (state.values, naive.values)):
        expected = torch.stack([torch.stack(pair, 1) for pair in pairs], 2)  # [h, 2, j, k]
        torch.testing.assert_close(found[0, :, :, : len(pairs)], expected, rtol=1e-10, atol=1e-10)
        assert not found[0, :, :, len(pairs) :].any()
    assert_same(gradients(y[0], layer, x), gradients(naive.outputs, layer, x))


@pytest.mark.parametrize("expression", [mag(deep, 3, 2), mal(exact, 3, 2), mac(exact, 3, 2)], ids=str)
def test_outer_gradients_by_finite_differences(expression: Mixer) -> None:
    layer = build(expression)
    x = inputs(5)
    names = [name for name, _ in layer.named_parameters() if "persistent" in name or "norm" in name or "of_" in name]

    def run(x: Tensor, *some: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, some, strict=True)), (x[None],))[0]

    some = [dict(layer.named_parameters())[name] for name in names]
    assert torch.autograd.gradcheck(run, (x, *some), atol=1e-6, fast_mode=True)


def test_a_read_of_the_memory_is_not_seen_before_its_token() -> None:
    """A read is made with a later token's query; it stands before the segment and must yet be masked. The outputs
    before a token are bitwise blind to it, inside one segment; those of it are not."""
    layer = build(mac(deep, segment=8, persistent=2))
    x = inputs(8).detach()
    y = layer(x[None])[0]
    for t in range(1, 8):
        changed = x.clone()
        changed[t] += 1.0
        z = layer(changed[None])[0]
        torch.testing.assert_close(z[:, :t], y[:, :t], rtol=0, atol=1e-14)
        assert (z[:, t] - y[:, t]).abs().max() > 1e-3


def test_segments_meet_through_the_memory_alone() -> None:
    """Without a convolution, and with a memory that reads nothing, a segment is what it is alone."""
    layer = build(mac(exact, segment=4, persistent=2, convolution=1))
    x = inputs(12).detach()
    with torch.no_grad():
        together = layer(x[None])[1].keys
        alone = layer(x[None, 8:])[1].keys
        assert (together[:, :, 1] - alone[:, :, 1]).abs().max() < 1e-12, "the tokens' own keys"
        assert (together[:, :, 0] - alone[:, :, 0]).abs().max() > 1e-3, "what was read for them"


def test_persistent_tokens_are_seen_from_everywhere() -> None:
    """With a window of one token a query sees itself and the persistent tokens, wherever it stands."""
    layer = build(attention(window=1, convolution=1, persistent=3))
    x = inputs(1).detach().expand(9, -1)
    y = layer(x[None])[0][0]
    torch.testing.assert_close(y, y[:1].expand(9, -1), rtol=1e-12, atol=1e-12)
    without = build(attention(window=1, convolution=1))
    assert (y[0] - without(x[None])[0][0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "expression",
    [
        mag(window=8, persistent=0),
        mal(self_modifying(chunk=8), window=64),
        mac(deep, 16, 2, 1),
        mac(exact, 3),
        mag(mal(exact)),
    ],
    ids=str,
)
def test_expressions_read_back(expression: Mixer) -> None:
    assert parse(repr(expression), Mixer) == expression


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mac(attention())", r"mac reads a memory before it is written, which attention\(\) has none"),
        ("mac(segment=0)", "segment must be at least 1 token, got 0"),
        ("mac(persistent=-1)", "persistent must be at least 0 tokens, got -1"),
        ("mag(window=0)", "window must be at least 1 token, or None, got 0"),
        ("mal(persistent=-2)", "persistent must be at least 0 tokens, got -2"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_head_of_odd_width_has_no_rotary_positions() -> None:
    for expression in (mag(), mac()):
        with pytest.raises(ValueError, match="an even head width"):
            expression.build(6, 2)


def test_a_mixer_without_a_memory_says_so() -> None:
    layer = attention().build(DIM, HEADS)
    with pytest.raises(ValueError, match="SlidingAttention has no memory whose weights could be read"):
        layer.standing(layer.init_state(1))
    assert build(mac(self_modifying(matrix(), chunk=4, projection_chunk=4), segment=4))(inputs(5)[None])[0].dtype == F64
