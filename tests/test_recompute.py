"""checkpoint=True: the same numbers, from far fewer of them kept."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nestling.memory import decay, gradient_descent, matrix, mlp, momentum, normed, retain
from nestling.memory.state import flatten
from nestling.sequence import self_modifying, sequence_memory
from nestling.sequence.recompute import recompute

CHUNK, DIM = 32, 16
MIXERS = {
    "sequence_memory": lambda **how: sequence_memory(chunk=CHUNK, **how),
    "self_modifying": lambda **how: self_modifying(chunk=CHUNK, projection_chunk=CHUNK, **how),
    "self_modifying, two sizes": lambda **how: self_modifying(chunk=2 * CHUNK, projection_chunk=CHUNK, **how),
    "normed": lambda **how: sequence_memory(normed(mlp(residual=False)), chunk=CHUNK, **how),
    "matrix": lambda **how: sequence_memory(
        matrix(), rule=retain(decay(), momentum()), chunk=CHUNK, gradient_at="token", **how
    ),
    "recurrent": lambda **how: sequence_memory(chunk=CHUNK // 2, way="recurrent", **how),
    "stepped": lambda **how: sequence_memory(chunk=CHUNK, way="stepped", read="boundary", **how),
    "window": lambda **how: sequence_memory(rule=gradient_descent(), chunk=CHUNK, window=3, **how),
}


def build(mixer: str, dtype: torch.dtype = torch.float32, **how) -> torch.nn.Module:
    return MIXERS[mixer](**how).build(DIM, 2, torch.Generator().manual_seed(0)).to(dtype)


def tokens(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def documents(length: int) -> dict[str, Tensor]:
    """The second row begins a document inside of the second chunk, and ends before the first does."""
    reset, valid = torch.zeros(2, length, dtype=torch.bool), torch.ones(2, length, dtype=torch.bool)
    reset[1, CHUNK + 5], valid[1, -7:] = True, False
    return {"reset": reset, "valid": valid}


def kept(layer: torch.nn.Module, chunks: int) -> int:
    """How many bytes the backward pass keeps over `chunks` chunks and a half."""
    x = tokens(chunks * CHUNK + CHUNK // 2)
    found: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with saved_tensors_hooks(keep, lambda saved: saved):
        y, _ = layer(x)
    del y
    return sum(found.values())


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_outputs_and_gradients_are_the_same(mixer, cut):
    found = []
    for checkpoint in (False, True):
        layer, x = build(mixer, torch.float64, checkpoint=checkpoint), tokens(2 * CHUNK + 9, torch.float64)
        y, state = layer(x, **documents(x.shape[1]) if cut else {})
        left = [part for part in flatten(state).values() if part.is_floating_point()]
        loss = y.square().sum() + sum(part.square().sum() for part in left)  # what goes on from here learns too
        found.append([y, *left, *torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", ["sequence_memory", "self_modifying"])
def test_second_gradients_are_the_same(mixer):
    found = []
    for checkpoint in (False, True):
        layer, x = build(mixer, torch.float64, checkpoint=checkpoint), tokens(CHUNK + 3, torch.float64)
        everything = [x, *layer.parameters()]
        first = torch.autograd.grad(layer(x)[0].square().sum(), everything, create_graph=True)
        found.append(torch.autograd.grad(sum(part.square().sum() for part in first), everything))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def _poison():
    """What torch leaves uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("mixer", ["sequence_memory", "self_modifying", "normed", "matrix"])
def test_no_gradient_looks_at_what_is_not_computed_again(mixer):
    layer, x = build(mixer, checkpoint=True), tokens(CHUNK + 3)
    y, state = layer(x)
    loss = y.square().sum() + sum(part.sum() for part in flatten(state).values() if part.is_floating_point())
    for grad in torch.autograd.grad(loss, [x, *layer.parameters()]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("mixer", ["sequence_memory", "self_modifying"])
def test_autocast(mixer):
    found = []
    for checkpoint in (False, True):
        layer, x = build(mixer, checkpoint=checkpoint), tokens(CHUNK + 3)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_takes_no_part():
    """Numbers and whole numbers pass through; what nobody asks for, and what nothing leads to, has no gradient."""
    x, y, count = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True), torch.tensor([4])

    def function(given, factor):
        x, y, count = given
        return x * factor, (count + 1, y.detach() * factor, x), None

    twice, (more, constant, same), none = recompute(function, (x, y, count), 2.0)
    assert (twice.item(), more.item(), constant.item(), none) == (6.0, 5, 4.0, None)
    assert torch.autograd.grad(twice + 10.0 * same, [x, y], allow_unused=True, retain_graph=True) == (12.0, None)
    assert torch.autograd.grad(constant, [x, y], allow_unused=True) == (None, None)


@pytest.mark.parametrize(("mixer", "share"), [("sequence_memory", 0.5), ("self_modifying", 0.25)])
def test_a_chunk_more_keeps_little_more(mixer, share):
    plain, again = (build(mixer, checkpoint=checkpoint) for checkpoint in (False, True))
    assert kept(again, 12) - kept(again, 6) < share * (kept(plain, 12) - kept(plain, 6))


@pytest.mark.parametrize("mixer", [sequence_memory(chunk=CHUNK), self_modifying(chunk=CHUNK, projection_chunk=CHUNK)])
def test_of_a_memory_a_chunk_more_keeps_where_it_stands_and_nothing_else(mixer):
    """Weights and momentum at the edge: what a wider memory keeps more, beside what does not know how wide it is."""
    growth, weights = [], []
    for expansion in (1.0, 4.0):
        wide = dataclasses.replace(mixer, structure=mlp(expansion=expansion), checkpoint=True)
        layer = wide.build(DIM, 2, torch.Generator().manual_seed(0))
        growth.append(kept(layer, 5) - kept(layer, 4))
        state = flatten(layer.init_state(2))
        weights.append(sum(part.nbytes for name, part in state.items() if ".running." in name))
    assert growth[1] - growth[0] == 2 * (weights[1] - weights[0]) > 0
