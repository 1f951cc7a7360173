"""Memory Caching: what is kept of earlier segments and how it is read, by memory.naive run again for every end."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nestling.memory import decay, elastic_net_ftrl, kl, l2, lq, matrix, mlp, momentum, parse, retain, row_norm, sigmoid
from nestling.sequence import Mixer, caching, naive_blocks, sequence_memory
from oracles import DEEP, EXACT, assert_is, assert_same, gradients, moved, normal

DIM, HEADS = 8, 2
deep = sequence_memory(mlp(), chunk=4)
exact = sequence_memory(matrix(), rule=retain(decay(), momentum()), chunk=4, gradient_at="token")
RETENTIONS = [decay(), kl(), lq(), sigmoid(), elastic_net_ftrl(), row_norm(each="chunk")]
MEMORIES = {"deep": (deep, DEEP), "exact": (exact, EXACT)}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def inputs(length: int) -> Tensor:
    return normal(length, DIM, seed=length).requires_grad_()


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
    expression = caching(memory, segment=12 if length == 63 else 4, read=read, slots=3, top=2)
    layer, x = build(expression), inputs(length)
    assert_is(naive_blocks.caching(choices), layer, expression, x, HEADS)
    assert layer(x[None])[1].exists.sum() == min(3, (length - 1) // expression.segment)


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
        (
            "caching(linear_mixer(comba_streams()), read='soup')",
            r"averages the weights of a memory, not the matrices of linear_mixer",
        ),
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
