"""Memory beside, before and in the context of attention: Titans' equations written out, forward, state, gradients."""

import pytest
import torch
from torch import Tensor

from nestling.memory import decay, elastic_net_ftrl, kl, l2, lq, matrix, mlp, momentum, parse, retain, sigmoid
from nestling.memory.structure import plain
from nestling.sequence import Mixer, attention, mac, mag, mal, naive_blocks, self_modifying, sequence_memory
from oracles import DEEP, EXACT, F64, assert_is, moved, normal

DIM, HEADS = 8, 2
deep = sequence_memory(mlp(), chunk=4)
exact = sequence_memory(matrix(), rule=retain(decay(), momentum()), chunk=4, gradient_at="token")
MEMORIES = {"deep": (deep, DEEP), "exact": (exact, EXACT)}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def inputs(length: int) -> Tensor:
    return normal(length, DIM, seed=length).requires_grad_()


BLOCKS = {
    "mag": (lambda memory, length: mag(memory, window=5, persistent=3), naive_blocks.mag),
    "mal": (lambda memory, length: mal(memory, window=5, persistent=3), naive_blocks.mal),
    "mac": (lambda memory, length: mac(memory, segment=24 if length > 7 else 3, persistent=2), naive_blocks.mac),
}


@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_its_papers_equations(block: str, kind: str, length: int) -> None:
    (memory, choices), (expression, oracle) = MEMORIES[kind], BLOCKS[block]
    mixer = expression(memory, length)
    assert_is(oracle(choices), build(mixer), mixer, inputs(length), HEADS)


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
