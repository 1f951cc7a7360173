"""One step a chunk: against the naive loop, against a torch optimizer, and over splits, rows and padding."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import (
    clip,
    dampen,
    decay,
    decay_to_start,
    delta_gradient_descent,
    dot,
    gradient_descent,
    l2,
    matrix,
    mlp,
    momentum,
    normalize,
    retain,
)
from nestling.memory.naive import Choices, NaiveRun, naive_stepped
from nestling.memory.rule import Gates
from nestling.sequence import self_modifying, sequence_memory
from nestling.sequence.scan import Memory, Writes

F64 = torch.float64
DIM, CHUNK = 4, 8
RULES = {
    "momentum": (retain(decay(), momentum()), {}),
    "dampened, to the start": (retain(decay_to_start(), momentum(dampen())), {"dampened": True, "decay_to": "start"}),
}
BIASES = {"l2": l2(), "dot": dot()}


def stepped(structure, bias, rule, chunk: int = CHUNK) -> Memory:
    return Memory(structure, bias, rule, chunk, "chunk", "boundary", "stepped")


def make(memory: Memory, length: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Weights [1, 1, out, in]; keys, values, queries [1, 1, t, DIM]; three gates [1, 1, t]."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 1, length, *shape, dtype=F64, generator=generator)

    weights = tuple(w.to(F64).requires_grad_() for w in memory.structure.init(DIM, DIM, (1, 1), generator))
    gates = [0.2 * normal().sigmoid(), normal().sigmoid(), F.logsigmoid(normal() + 4)]
    given = [F.normalize(normal(DIM), dim=-1), normal(DIM), normal(DIM), *gates]
    return weights, [x.requires_grad_() for x in given]


def run(memory: Memory, weights: tuple[Tensor, ...], given: list[Tensor], step: int = CHUNK):
    """In pieces of at most `step` tokens, and the chunk after the last opened, so that it has been written."""
    state, reads = memory.begin(weights), []
    for first in range(0, given[0].shape[2], step):
        piece = [x[:, :, first : first + step] for x in given]
        if first % memory.chunk == 0:
            state = memory.open(state, True)
        y, state = memory.run(state, Writes(piece[0], piece[1], Gates(*piece[3:])), piece[2])
        reads.append(y)
    if given[0].shape[2] % memory.chunk == 0:
        state = memory.open(state, True)
    return torch.cat(reads, 2), state


@pytest.mark.parametrize("length", [1, 7, 16, 63])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("structure", [matrix(), mlp()], ids=str)
def test_is_the_naive_loop(structure, rule, bias, length):
    part, told = RULES[rule]
    memory = stepped(structure, BIASES[bias], part)
    choices = Choices(objective=bias, residual=isinstance(structure, mlp), chunk=CHUNK, **told)
    weights, given = make(memory, length)
    y, state = run(memory, weights, given)
    expected: NaiveRun = naive_stepped(choices, tuple(w[0, 0] for w in weights), *(x[0, 0] for x in given))
    torch.testing.assert_close(y[0, 0], expected.reads, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(state.running, expected.weights, strict=True):
        torch.testing.assert_close(mine[0, 0], theirs, rtol=1e-10, atol=1e-12)
    direction = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    leaves = [*weights, *given]
    found = torch.autograd.grad(y, leaves, direction, allow_unused=True)
    wanted = torch.autograd.grad(expected.reads, leaves, direction[0, 0], allow_unused=True)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if mine is None else mine,
            torch.zeros(()) if theirs is None else theirs,
            rtol=1e-9,
            atol=1e-11,
        )


def test_is_a_torch_optimizer_stepping_on_each_chunk():
    memory = stepped(matrix(), l2(), momentum())
    weights, given = make(memory, 3 * CHUNK)
    keys, values = given[0], given[1]
    gates = [torch.full_like(given[3], 0.1), torch.full_like(given[4], 0.9), torch.zeros_like(given[5])]
    _, state = run(memory, weights, [keys, values, keys, *gates])
    weight = torch.nn.Parameter(weights[0][0, 0].detach().clone())
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    for first in range(0, 3 * CHUNK, CHUNK):
        at = slice(first, first + CHUNK)
        optimizer.zero_grad()
        (0.5 * (keys[0, 0, at].detach() @ weight.T - values[0, 0, at].detach()).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(state.running[0][0, 0], weight.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("rule", [delta_gradient_descent(momentum(normalize(clip()))), gradient_descent()], ids=str)
def test_a_chunk_in_pieces_is_the_chunk_whole(rule, step):
    memory = stepped(mlp(), l2(), rule, 6)
    weights, given = make(memory, 24)
    y, state = run(memory, weights, given, 6)
    again, other = run(memory, weights, given, step)
    torch.testing.assert_close(y, again, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(state.running, other.running, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "mixer",
    [
        sequence_memory(mlp(), chunk=4, read="boundary", way="stepped"),
        self_modifying(mlp(), chunk=8, projection_chunk=4, read="boundary", way="stepped"),
    ],
    ids=["sequence_memory", "self_modifying"],
)
def test_rows_documents_and_padding_are_as_if_alone(mixer):
    layer = mixer.build(8, 2, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 21, 8, dtype=F64, generator=generator)
    y, _ = layer(x)
    for row in range(2):
        torch.testing.assert_close(layer(x[row : row + 1])[0], y[row : row + 1])
    half, carried = layer(x[:, :10])
    torch.testing.assert_close(torch.cat([half, layer(x[:, 10:], carried)[0]], 1), y)
    reset = torch.zeros(2, 21, dtype=torch.bool)
    reset[0, 6] = reset[1, 13] = True
    packed, _ = layer(x, reset=reset)
    torch.testing.assert_close(packed[:1, 6:], layer(x[:1, 6:])[0])
    torch.testing.assert_close(packed[1:, 13:], layer(x[1:, 13:])[0])
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, 5:9] = False
    kept = torch.cat([x[:1, :5], x[:1, 9:]], 1)
    torch.testing.assert_close(layer(x, valid=valid)[0][:1, 9:], layer(kept)[0][:, 5:])


def test_the_chunk_is_part_of_the_model():
    x = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(1))
    mixers = [sequence_memory(mlp(), chunk=chunk, read="boundary", way="stepped") for chunk in (4, 8)]
    reads = [mixer.build(8, 2, torch.Generator().manual_seed(0))(x)[0] for mixer in mixers]
    assert (reads[0] - reads[1]).abs().max() > 1e-4


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"way='stepped'.*read='boundary', got 'chunk' and 'after'"):
        Memory(way="stepped")
    with pytest.raises(ValueError, match=r"gradient_at='chunk'.*got 'token' and 'boundary'"):
        Memory(gradient_at="token", read="boundary", way="stepped")
