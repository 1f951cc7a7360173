"""The Omega rule: against the naive loop, and over splits, rows, documents and padding."""

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
    retain,
)
from nestling.memory.naive import Choices, naive_stepped, naive_window
from nestling.memory.rule import Gates
from nestling.sequence import self_modifying, sequence_memory
from nestling.sequence.scan import Memory, MemoryState, Writes

F64 = torch.float64
DIM, WINDOW = 4, 3
RULES = {
    "descent": (retain(decay(), gradient_descent()), {}),
    "momentum": (retain(decay(), momentum()), {}),
    "dampened, to the start": (retain(decay_to_start(), momentum(dampen())), {"dampened": True, "decay_to": "start"}),
}
BIASES = {"l2": l2(), "dot": dot()}


def make(memory: Memory, length: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Weights [1, 1, out, in]; keys, values, queries [1, 1, t, DIM]; three gates [1, 1, t]."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 1, length, *shape, dtype=F64, generator=generator)

    weights = tuple(w.to(F64).requires_grad_() for w in memory.structure.init(DIM, DIM, (1, 1), generator))
    step_size = (0.1 if memory.exact else 0.03) * normal().sigmoid()
    momenta = normal().sigmoid() if "momentum" in str(memory.rule) else torch.zeros(1, 1, length, dtype=F64)
    given = [F.normalize(normal(DIM), dim=-1), normal(DIM), normal(DIM), step_size, momenta, F.logsigmoid(normal() + 4)]
    return weights, [x.requires_grad_() for x in given]


def run(
    memory: Memory, weights: tuple[Tensor, ...], given: list[Tensor], step: int, shares: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    state, reads = memory.begin(weights), []
    for first in range(0, given[0].shape[2], step):
        piece = [x[:, :, first : first + step] for x in given]
        own = None if shares is None else shares[:, :, first : first + step]
        if first % memory.chunk == 0:
            state = memory.open(state, True)
        y, state = memory.run(state, Writes(piece[0], piece[1], Gates(*piece[3:]), shares=own), piece[2])
        reads.append(y)
    return torch.cat(reads, 2), state


MEMORIES = [
    *((structure, 8, "chunk", "chunked", read) for structure in (matrix(), mlp()) for read in ("after", "before")),
    (mlp(), 8, "chunk", "chunked", "boundary"),
    (mlp(), 8, "chunk", "recurrent", "after"),
    (matrix(), 1, "token", "recurrent", "after"),
]
STEPPED = (mlp(), 8, "chunk", "stepped", "boundary")


@pytest.mark.parametrize("length", [1, 7, 30])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("structure", "chunk", "gradient_at", "way", "read"), MEMORIES)
def test_is_the_naive_loop(structure, chunk, gradient_at, way, read, bias, rule, length):
    part, told = RULES[rule]
    memory = Memory(structure, BIASES[bias], part, chunk, gradient_at, read, way, window=WINDOW)
    choices = Choices(objective=bias, residual=isinstance(structure, mlp), chunk=chunk, read=read, **told)
    weights, given = make(memory, length)
    y, state = run(memory, weights, given, chunk)
    expected = naive_window(choices, tuple(w[0, 0] for w in weights), *(x[0, 0] for x in given), WINDOW)
    torch.testing.assert_close(y[0, 0], expected.reads, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(state.running, expected.weights, strict=True):
        torch.testing.assert_close(mine[0, 0], theirs, rtol=1e-10, atol=1e-12)
    direction = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    used = given if bool(given[4].any()) else [*given[:4], given[5]]  # descent has no momentum to learn
    leaves = [*weights, *used]
    found = torch.autograd.grad(y, leaves, direction, allow_unused=True)
    wanted = torch.autograd.grad(expected.reads, leaves, direction[0, 0], allow_unused=True)
    for mine, theirs in zip(found, wanted, strict=True):
        mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(mine + 0 * theirs.sum(), theirs + 0 * mine, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 30])
@pytest.mark.parametrize(("structure", "chunk", "gradient_at", "way", "read"), [*MEMORIES, STEPPED])
def test_every_pair_counts_as_the_token_says(structure, chunk, gradient_at, way, read, length):
    memory = Memory(structure, l2(), RULES["momentum"][0], chunk, gradient_at, read, way, window=WINDOW)
    choices = Choices(residual=isinstance(structure, mlp), chunk=chunk, read=read)
    weights, given = make(memory, length)
    shares = torch.rand(1, 1, length, WINDOW, dtype=F64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y, state = run(memory, weights, given, chunk, shares)
    oracle = naive_stepped if way == "stepped" else naive_window
    expected = oracle(
        *(choices, tuple(w[0, 0] for w in weights), *(x[0, 0] for x in given)), window=WINDOW, shares=shares[0, 0]
    )
    torch.testing.assert_close(y[0, 0], expected.reads, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(state.running, expected.weights, strict=True):
        torch.testing.assert_close(mine[0, 0], theirs, rtol=1e-10, atol=1e-12)
    direction = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    leaves = [*weights, *given, shares]
    found = torch.autograd.grad(y, leaves, direction, allow_unused=True)
    wanted = torch.autograd.grad(expected.reads, leaves, direction[0, 0], allow_unused=True)
    for mine, theirs in zip(found, wanted, strict=True):
        mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(mine + 0 * theirs.sum(), theirs + 0 * mine, rtol=1e-9, atol=1e-11)
    if length > WINDOW and read == "after":
        assert found[-1].abs().max() > 1e-6


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_chunk_in_pieces_is_the_chunk_whole(way, step):
    memory = Memory(mlp(), l2(), RULES["momentum"][0], 6, "chunk", way=way, window=4)
    weights, given = make(memory, 24)
    y, state = run(memory, weights, given, 6)
    again, other = run(memory, weights, given, step)
    torch.testing.assert_close(y, again, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip((*state.running, *state.recent), (*other.running, *other.recent), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_window_of_one_is_no_window():
    weights, given = make(Memory(rule=RULES["momentum"][0]), 20)
    one, none = (
        run(Memory(mlp(), l2(), RULES["momentum"][0], 8, window=window), weights, given, 8)[0] for window in (1, 2)
    )
    same = run(Memory(mlp(), l2(), RULES["momentum"][0], 8), weights, given, 8)[0]
    assert torch.equal(one, same)
    assert (none - same).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
def test_rows_documents_and_padding_are_as_if_alone(way):
    mixer = sequence_memory(mlp(), rule=RULES["momentum"][0], chunk=4, way=way, window=6)
    layer = mixer.build(8, 2, torch.Generator().manual_seed(0)).double()
    x = torch.randn(2, 21, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
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
    valid[0, 5:9] = valid[1, :3] = False
    padded, after = layer(x, valid=valid)
    kept = torch.cat([x[:1, :5], x[:1, 9:]], 1)
    torch.testing.assert_close(padded[:1, 9:], layer(kept)[0][:, 5:])
    torch.testing.assert_close(padded[1:, 3:], layer(x[1:, 3:])[0])
    more = torch.randn(2, 3, 8, dtype=F64, generator=torch.Generator().manual_seed(2))
    following = layer(more, after)[0][1:]
    torch.testing.assert_close(following, layer(more[1:], layer(x[1:, 3:])[1])[0])


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"window=2 has a chunked form .* not for retain.*use way='recurrent'"):
        Memory(rule=retain(decay(), momentum(clip())), window=2)
    with pytest.raises(ValueError, match=r"not for delta_gradient_descent\(\) at 'token'"):
        Memory(matrix(), rule=delta_gradient_descent(), gradient_at="token", window=2)
    memory = Memory(mlp(), l2(), gradient_descent(), 8, window=2)
    weights, given = make(memory, 4)
    pairs = Writes(given[0], given[1], Gates(given[3]), bound=given[3])
    with pytest.raises(ValueError, match="steps on one pair, not for window=2"):
        memory.run(memory.begin(weights), pairs)
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        Memory(window=0)
    with pytest.raises(ValueError, match="window must be 1, got 2"):
        self_modifying(rule=gradient_descent(), window=2)
