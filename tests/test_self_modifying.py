"""Self-modifying Titans: output, final memories and every parameter's gradient against the naive oracle."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.attentional_bias import dot, l2
from nestling.memory.naive import Choices, naive_self_modifying
from nestling.memory.retention import decay
from nestling.memory.rule import momentum, normalize, retain
from nestling.memory.structure import matrix, mlp, together
from nestling.models import Decoder, ModelConfig
from nestling.sequence import SelfModifying, attention, bounded_steps, mal, self_modifying

F64 = torch.float64
DIM, HEADS, LENGTH = 8, 2, 20
plain_titans = retain(decay(), momentum(normalize()))

CASES = [
    (self_modifying(chunk=8, projection_chunk=8), {}),
    (self_modifying(chunk=8, projection_chunk=2), {}),
    (self_modifying(chunk=2, projection_chunk=8), {}),
    (self_modifying(chunk=1, projection_chunk=1), {}),
    (self_modifying(matrix(), chunk=8, projection_chunk=8), {"residual": False}),
    (self_modifying(mlp(depth=3, activation="silu"), chunk=4, projection_chunk=8), {"activation": F.silu}),
    (self_modifying(mlp(residual=False), dot(), chunk=8, projection_chunk=4), {"residual": False, "objective": "dot"}),
    (self_modifying(chunk=8, projection_chunk=8, read="before"), {"read": "before"}),
    (self_modifying(chunk=8, projection_chunk=4, read="boundary"), {"read": "boundary"}),
    (
        self_modifying(mlp(), l2(), plain_titans, chunk=4, projection_chunk=8),
        {"delta": False, "dampened": False, "clip": math.inf, "normalized": True, "decay_to": "zero"},
    ),
    (self_modifying(chunk=8, projection_chunk=4, way="recurrent"), {}),
    (self_modifying(chunk=8, projection_chunk=4, generators=("query", "key", "value", "step_size", "retention")), {}),
    (self_modifying(chunk=8, projection_chunk=4, generators=("value", "query", "retention"), step_bound=0.5), {}),
    (self_modifying(matrix(), chunk=8, projection_chunk=8, generators=("step_size",)), {"residual": False}),
    (self_modifying(chunk=4, projection_chunk=8, generators=("key",)), {}),
    (self_modifying(chunk=8, projection_chunk=4, gate_structure=matrix()), {}),
    (self_modifying(chunk=4, projection_chunk=4, gate_structure=mlp(depth=3, expansion=0.5)), {}),
]


def make(
    expression: self_modifying, seed: int = 0, *, dim: int = DIM, heads: int = HEADS, length: int = LENGTH
) -> tuple[SelfModifying, Tensor]:
    """A layer none of whose parameters is at its neutral start, and its input [1, t, d]."""
    generator = torch.Generator().manual_seed(seed)
    layer = expression.build(dim, heads, generator).to(F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return layer, torch.randn(1, length, dim, dtype=F64, generator=generator)


class Expected(NamedTuple):
    y: Tensor  # [1, t, d]
    weights: list[list[Tensor]]  # of each memory each map [1, h, out, in]
    step_sizes: Tensor  # [h, t], as a share of the bound


def by_the_oracle(layer: SelfModifying, x: Tensor, changes: dict) -> Expected:
    choices = Choices(**{"residual": True, "decay_to": "start", "delta": True, "clip": 1.0, "dampened": True} | changes)
    (_, length, dim), heads = x.shape, layer.heads
    mixed = F.pad(layer.mix(x), (0, 0, 3, 0))
    mixed = F.silu(sum(mixed[:, shift : shift + length] * layer.convolution.weight[:, shift] for shift in range(4)))
    streams = mixed.view(length, -1, heads, dim // heads)
    streams = dict(zip(("u", *layer.projected), (streams / streams.norm(dim=-1, keepdim=True)).unbind(1), strict=True))
    gates = [name for name in ("step_size", "retention") if name not in layer.generated]
    raw = dict(zip(("momentum", *gates), layer.gates(x)[0].view(length, -1, heads).unbind(1), strict=True))
    kept = raw.pop("momentum").sigmoid()
    u, projected = streams.pop("u"), streams | raw
    queries = projected.pop("query", u)
    starts = dict(zip((*layer.generated, "main"), layer.starts, strict=True))
    runs = [
        naive_self_modifying(
            u[:, head],
            queries[:, head],
            kept[:, head],
            {name: tuple(weight[head] for weight in start) for name, start in starts.items()},
            layer.gate_bias[head],
            layer.value_scale[head],
            layer.step_bound,
            layer.expression.chunk,
            layer.expression.projection_chunk,
            choices,
            {name: values[:, head] for name, values in projected.items()},
        )
        for head in range(heads)
    ]
    reads = torch.stack([run.reads for run in runs], 1)  # [t, h, k]
    normed = reads / (reads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    joined = normed.reshape(1, length, dim) * layer.output.norm * F.silu(layer.output.gate(x))
    weights = [
        [torch.stack(maps)[None] for maps in zip(*of, strict=True)]
        for of in zip(*(run.weights.values() for run in runs), strict=True)
    ]
    step_sizes = torch.stack([run.step_sizes for run in runs]) / layer.step_bound
    return Expected(layer.output.project(joined), weights, step_sizes)


def memories(layer: SelfModifying, state) -> list[list[Tensor]]:
    """The final weights of every memory, map by map."""
    *generators, main = (at.running for at in state.memories)
    found = [
        [weight[:, :, member] for weight in running]
        for group, running in zip(layer.groups, generators, strict=True)
        for member in range(len(group))
    ]
    return [*found, list(main)]


def assert_near(found: Tensor, expected: Tensor, name: str, rtol: float = 1e-10) -> None:
    atol = rtol * expected.abs().max().item()
    found = found.to(expected.dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("expression", "changes"), CASES, ids=[str(expression) for expression, _ in CASES])
def test_the_layer_is_the_papers_equations(expression, changes):
    assert_is_the_oracle(*make(expression), changes)


def assert_is_the_oracle(
    layer: SelfModifying, x: Tensor, changes: dict, dtype: torch.dtype = F64, rtol: float = 1e-10
) -> None:
    """Output, final memories and the gradient of every parameter and of x, of the layer in `dtype`."""
    fast, given = copy.deepcopy(layer).to(dtype), x.to(dtype).detach().requires_grad_()
    x.requires_grad_()
    y, state = fast(given)
    expected = by_the_oracle(layer, x, changes)
    assert_near(y, expected.y, "output", rtol)
    outer, outer_expected = 0.0, 0.0
    generator = torch.Generator().manual_seed(5)
    for i, (mine, theirs) in enumerate(zip(memories(fast, state), expected.weights, strict=True)):
        for j, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_near(a, b, f"map {j} of memory {i}", rtol)
            weight = torch.randn(a.shape, dtype=F64, generator=generator)
            outer, outer_expected = outer + (weight * a).sum(), outer_expected + (weight * b).sum()
    weight = torch.randn(y.shape, dtype=F64, generator=generator)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad(outer + (weight * y).sum(), [given, *fast.parameters()])
    wanted = torch.autograd.grad(outer_expected + (weight * expected.y).sum(), [x, *layer.parameters()])
    for name, mine, theirs in zip(names, found, wanted, strict=True):
        assert_near(mine, theirs, f"gradient of {name}", rtol)


class Extreme(nn.Module):
    """Raw gates of which every third or so is so far out that its sigmoid is exactly 0 or 1."""

    def __init__(self, of: nn.Module, rows: int) -> None:
        super().__init__()
        self.of, self.rows = of, rows

    def forward(self, x: Tensor) -> Tensor:
        offsets = torch.zeros(x.shape[1], self.rows, dtype=F64)
        for row in range(self.rows):
            offsets[3 + row :: 7, row], offsets[5 + row :: 7, row], offsets[13:15, row] = -1000.0, 1000.0, -1000.0
        return self.of(x) + offsets.to(x.dtype)


LONG = [  # with a length that ends inside of a chunk beyond the first
    (self_modifying(chunk=1, projection_chunk=1, generators=("key", "value")), 23, {}),
    (self_modifying(chunk=16, projection_chunk=1, generators=("value",)), 23, {}),
    (self_modifying(chunk=16, projection_chunk=64, generators=("key", "retention")), 70, {}),
    (self_modifying(matrix(), chunk=64, projection_chunk=16, generators=("key", "value")), 70, {"residual": False}),
    (self_modifying(matrix(), chunk=1, projection_chunk=64, generators=("value",)), 66, {"residual": False}),
    (self_modifying(matrix(), chunk=256, projection_chunk=64, generators=("value",)), 258, {"residual": False}),
    (self_modifying(chunk=64, projection_chunk=256, generators=("key",)), 258, {}),
]


@pytest.mark.parametrize(("expression", "length", "changes"), LONG, ids=[f"{e}, {length}" for e, length, _ in LONG])
def test_at_other_chunk_sizes_with_gates_at_exactly_zero_and_one(expression, length, changes):
    layer, x = make(expression, dim=4, heads=1, length=length)
    layer.gates = Extreme(layer.gates, layer.gates.out_features)
    assert_is_the_oracle(layer, x, changes)


def test_in_float32():
    expression, length, changes = LONG[3]
    layer, x = make(expression, dim=4, heads=1, length=length)
    layer.gates = Extreme(layer.gates, layer.gates.out_features)
    assert_is_the_oracle(layer, x, changes, torch.float32, 2e-5)


def test_gates_made_by_memories_at_exactly_zero_and_one():
    layer, x = make(self_modifying(chunk=16, projection_chunk=16), dim=12, heads=3, length=18)
    with torch.no_grad():
        layer.gate_bias += torch.tensor([[1000.0, 1000.0], [-1000.0, 0.0], [0.0, -1000.0]])
    step_sizes = by_the_oracle(layer, x, {}).step_sizes
    assert (step_sizes[0] == 1).all()
    assert (step_sizes[1] == 0).all()
    assert_is_the_oracle(layer, x, {})


@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4)])
def test_every_parameter_learns_over_three_chunks(sizes):
    layer, x = make(self_modifying(chunk=sizes[0], projection_chunk=sizes[1]))
    y, _ = layer(x[:, : 3 * max(sizes)])
    (y * torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(3))).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name


def test_steps_at_their_bound_are_counted():
    layer, x = make(self_modifying(chunk=16, projection_chunk=8))
    assert layer(x)[1].bounded.tolist() == [0]
    with torch.no_grad():
        layer.gate_bias[0, 0] = 4.6
    share = by_the_oracle(layer, x, {}).step_sizes
    near = (share > 0.99).sum().item()
    assert 0 < near < share.numel()
    _, state = layer(x)
    assert state.bounded.tolist() == [near]
    assert layer(x, state)[1].bounded.item() > near, "counting goes on over calls"
    with torch.no_grad():
        layer.gate_bias[:, 0] = 50.0
    reset, valid = torch.zeros(1, LENGTH, dtype=torch.bool), torch.ones(1, LENGTH, dtype=torch.bool)
    reset[0, 11], valid[0, 14:17] = True, False
    assert layer(x)[1].bounded.item() == HEADS * LENGTH
    assert layer(x, state, reset=reset, valid=valid)[1].bounded.item() == HEADS * (LENGTH - 11 - 3)
    rows = torch.cat([valid, torch.ones_like(valid)])
    assert layer(x.repeat(2, 1, 1), valid=rows)[1].bounded.tolist() == [HEADS * (LENGTH - 3), HEADS * LENGTH]


def test_steps_at_their_bound_are_added_up_over_a_model():
    mixer = self_modifying(chunk=4, projection_chunk=4)
    for around, counted in ((mixer, True), (mal(mixer, window=4), True), (attention(window=4), False)):
        model = Decoder(ModelConfig(dim=8, heads=2, blocks=2, vocabulary=7, mixer=around))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate_bias"):
                    parameter[:, 0] = 50.0
            state = model(torch.zeros(3, 5, dtype=torch.int64))[1]
        assert bounded_steps(state) == (3 * 5 * 2 * 2 if counted else 0)
        assert bounded_steps(model.init_state(3)) == 0


def test_at_its_bound_the_step_does_not_diverge():
    expression = self_modifying(chunk=16, projection_chunk=4)
    layer = expression.build(DIM, HEADS, torch.Generator().manual_seed(0))
    assert layer.step_bound == pytest.approx(1.5 / (1 + 16 / 4 + 2 * (16 / 4) ** 0.5))
    x = torch.randn(1, 8, DIM, generator=torch.Generator().manual_seed(1)).repeat(1, 60, 1)
    with torch.no_grad():
        layer.gate_bias[:, 0] = 100.0
        _, state = layer(x)
    assert state.bounded.item() == HEADS * 480
    assert all(weight.abs().max() < 2 for maps in memories(layer, state) for weight in maps)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: self_modifying(matrix(), gradient_at="token"), "self_modifying needs gradient_at='chunk'"),
        (lambda: self_modifying(chunk=16, projection_chunk=24), "chunk 16 and projection_chunk 24: one must divide"),
        (lambda: self_modifying(projection_chunk=0), "projection_chunk 0"),
        (lambda: self_modifying(generators=()), "at least one of"),
        (lambda: self_modifying(gate_structure="matrix"), "gate_structure must be a structure.*'matrix'"),  # type: ignore[arg-type]
        (lambda: self_modifying(generators=("key", "key")), "each once"),
        (lambda: self_modifying(generators=("keys",)), r"generators must name.*'keys'"),
        (lambda: self_modifying(step_bound=0.0), "step_bound must be > 0, got 0.0"),
        (lambda: self_modifying(together(matrix())).build(8, 2), r"matrix\(\) and mlp\(\).*not together"),
        (lambda: self_modifying().build(8, 3), "dim 8 is not a multiple of heads 3"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_gates_of_a_structure_of_their_own() -> None:
    """One map a gate, and nothing else is another: the same numbers of all other memories."""
    deep, linear = (self_modifying(gate_structure=of).build(DIM, HEADS) for of in (None, matrix()))
    shapes = [[tuple(maps.shape) for maps in start] for start in linear.starts]
    assert shapes[2] == shapes[3] == [(HEADS, 1, DIM // HEADS)]
    assert shapes[:2] + shapes[4:] == [[tuple(m.shape) for m in deep.starts[i]] for i in (0, 1, 4)]
