"""How knowledge moves between two levels: five wires, each against a program that knows nothing of them."""

import pytest
import torch
from torch.nn import functional as F

from nestling.levels.transfer import (
    Box,
    Context,
    Meta,
    Transfer,
    backpropagation,
    context_generation,
    direct,
    direct_context,
    generation,
    initialization,
    reptile,
    run,
)
from nestling.memory import adam, decay, dot, gradient_descent, l2, matrix, mlp, retain, scale
from nestling.memory.compound import biased
from nestling.memory.rule import Gates, Summed

F64 = torch.float64
DIM = 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def sines(tasks: int, points: int, seed: int) -> tuple[Context, Context]:
    """Sine waves of any amplitude and phase: pairs to learn, pairs to ask."""
    generator = torch.Generator().manual_seed(seed)
    amplitude, phase = (torch.rand(2, tasks, 1, 1, dtype=F64, generator=generator)).unbind(0)
    x = 4 * torch.rand(tasks, 2 * points, 1, dtype=F64, generator=generator) - 2
    y = (0.5 + amplitude) * torch.sin(2 * x + 3 * phase)
    return Context(x[:, :points], y[:, :points]), Context(x[:, points:], y[:, points:])


def sine_box(steps: int = 2) -> tuple[Box, tuple[torch.Tensor, ...]]:
    box = Box(biased(mlp(expansion=16, residual=False)), l2(), gradient_descent(), steps=steps, step_size=0.02)
    weights = box.structure.init(1, 1, generator=torch.Generator().manual_seed(1))
    return box, tuple(weight.double() for weight in weights)


@pytest.mark.parametrize("order", [1, 2])
def test_initialization_is_maml(order: int) -> None:
    box, start = sine_box()
    support, query = sines(3, 5, seed=2)
    got = initialization(order).gradient(box, start, support, query)

    def net(maps, x):
        hidden = F.gelu(F.linear(x, maps[0][:, :-1], maps[0][:, -1]))
        return F.linear(hidden, maps[1][:, :-1], maps[1][:, -1])

    leaves = [weight.clone().requires_grad_() for weight in start]
    total = 0.0
    for task in range(3):
        fast = leaves
        for _ in range(2):
            loss = 0.5 * (net(fast, support.keys[task]) - support.values[task]).square().sum()
            grads = torch.autograd.grad(loss, fast, create_graph=order == 2, retain_graph=True)
            fast = [w - 0.02 * (g if order == 2 else g.detach()) for w, g in zip(fast, grads, strict=True)]
        total = total + 0.5 * (net(fast, query.keys[task]) - query.values[task]).square().sum()
    expected = torch.autograd.grad(total, leaves)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_orders_of_initialization_differ_and_finite_differences_agree_with_the_second() -> None:
    box, start = sine_box()
    support, query = sines(2, 4, seed=3)
    first = initialization(1).gradient(box, start, support, query)
    second = initialization(2).gradient(box, start, support, query)
    assert not torch.allclose(first[0], second[0], rtol=1e-3)
    way = tuple(random(*weight.shape, seed=9) for weight in start)

    def asked(by: float) -> float:
        moved = tuple((w + by * d).expand(2, *w.shape) for w, d in zip(start, way, strict=True))
        return float(box.loss(box.learn(box.begin(moved), support).weights, query).sum())

    slope = (asked(1e-5) - asked(-1e-5)) / 2e-5
    expected = sum(float((g * d).sum()) for g, d in zip(second, way, strict=True))
    assert slope == pytest.approx(expected, rel=1e-6)


def test_reptile_moves_toward_where_learning_ends() -> None:
    box, start = sine_box()
    support, query = sines(3, 4, seed=4)
    got = reptile().gradient(box, start, support, query)
    expected = [torch.zeros_like(weight) for weight in start]
    for task in range(3):
        pairs = Context(*(torch.cat([a[task], b[task]]) for a, b in zip(support, query, strict=True)))
        learned = box.learn(box.begin(start), pairs).weights
        expected = [e + (s - w) for e, s, w in zip(expected, start, learned, strict=True)]
    torch.testing.assert_close(list(got), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("transfer", [initialization(2), initialization(1), reptile()], ids=repr)
def test_initialization_abstracts(transfer: Meta) -> None:
    """The error on contexts that were never seen falls with the number of contexts that were."""
    box, start = sine_box(steps=4)
    rule, fresh = scale(adam()), sines(64, 6, seed=1000)
    gates = Gates(step_size=0.02)
    states = [rule.init(weight) for weight in start]

    def error() -> float:
        wide = tuple(weight.expand(64, *weight.shape) for weight in start)
        return float(box.loss(box.learn(box.begin(wide), fresh[0]).weights, fresh[1]).mean())

    errors = [error()]
    for block in range(3):
        for step in range(60 * 3**block):
            gradient = transfer.gradient(box, start, *sines(8, 6, seed=1000 * (block + 1) + step + 1))
            after = [rule.step(w, Summed(g / 8), s, gates) for w, g, s in zip(start, gradient, states, strict=True)]
            start, states = tuple(w for w, _ in after), [s for _, s in after]
        errors.append(error())
    assert errors[0] > errors[1] > errors[3], errors
    assert errors[3] < 0.6 * errors[0], errors


def test_direct_is_a_fast_weight_rnn() -> None:
    """h_t = tanh(W x_t + M_t h_{t-1}), M_t = a M_{t-1} + b h_{t-1} h_{t-1}^T (Ba et al. 2016), no gradient to M."""
    slow, x = random(DIM, DIM).requires_grad_(), random(6, DIM, seed=1)
    keep, rate = torch.tensor(0.9, dtype=F64), 0.3
    fast = Box(matrix(), dot(), retain(decay(), gradient_descent()), step_size=rate, log_retention=float(keep.log()))

    def last(h):
        return torch.zeros(DIM, dtype=F64) if h is None else h

    outputs, end = run(
        fast,
        direct(),
        (torch.zeros(DIM, DIM, dtype=F64),),
        list(x),
        write=lambda x, h: Context(last(h)[None], last(h)[None]),
        read=lambda x, h, weights: torch.tanh(slow @ x + weights[0] @ last(h)),
    )
    leaf = slow.detach().clone().requires_grad_()
    h, memory, expected = torch.zeros(DIM, dtype=F64), torch.zeros(DIM, DIM, dtype=F64), []
    for now in x:
        memory = keep * memory + rate * torch.outer(h, h).detach()
        h = torch.tanh(leaf @ now + memory @ h)
        expected.append(h)
    torch.testing.assert_close(torch.stack(outputs), torch.stack(expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(end.weights[0], memory, rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad(torch.stack(outputs).sum(), slow)[0]
    theirs = torch.autograd.grad(torch.stack(expected).sum(), leaf)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_direct_context_is_softmax_attention() -> None:
    x, maps = random(7, DIM), random(3, DIM, DIM, seed=2)
    outputs, _ = run(
        Box(matrix()),
        direct_context(),
        (torch.zeros(DIM, DIM, dtype=F64),),
        list(x),
        write=lambda x, _: Context((maps[0] @ x)[None], (maps[1] @ x)[None]),
        read=lambda x, _, seen: ((maps[2] @ x) @ seen.keys.mT / DIM**0.5).softmax(-1) @ seen.values,
    )
    k, v, q = (x @ one.mT for one in maps)
    expected = F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], is_causal=True)[0, 0]
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-12, atol=1e-14)


def test_generation_is_a_hypernetwork() -> None:
    """y = f(x; g(z)), trained end to end through g: forward and gradient; then one step of learning on top."""
    maker, z, x = random(2 * DIM * DIM, 3).requires_grad_(), random(5, 3, seed=1), random(5, 6, DIM, seed=2)
    fast, wire = Box(mlp(residual=False), step_size=0.05), generation()
    start = wire.start(tuple((z @ maker.mT).view(5, 2, DIM, DIM).unbind(1)))
    got = fast.read(wire.hand(start, start, Context(x, x)), x)
    leaf = maker.detach().clone().requires_grad_()
    made = torch.einsum("ij,bj->bi", leaf, z).view(5, 2, DIM, DIM)
    expected = torch.einsum("boh,bth->bto", made[:, 1], F.gelu(torch.einsum("bhd,btd->bth", made[:, 0], x)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad(got.square().sum(), maker, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected.square().sum(), leaf)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    learned = fast.learn(fast.begin(start), Context(x, x.roll(1, 0))).weights
    assert torch.autograd.grad(fast.read(learned, x).sum(), maker)[0].abs().min() > 0


WIRES: dict[str, tuple[Transfer, bool]] = {  # and does a gradient reach the slow box's map through what was learned?
    "direct": (direct(), False),
    "direct_context": (direct_context(), False),
    "backpropagation": (backpropagation(), True),
    "context_generation": (context_generation(), True),
}


@pytest.mark.parametrize("name", WIRES)
def test_information_arrives_and_gradients_where_they_should(name: str) -> None:
    wire, flows = WIRES[name]
    maker, start = random(DIM, DIM).requires_grad_(), (random(DIM, DIM, seed=3).requires_grad_(),)

    def last_output(x: torch.Tensor) -> torch.Tensor:
        def read(x, _, handed):
            if isinstance(handed, Context):
                return (x @ handed.keys.mT).softmax(-1) @ handed.values
            return handed[0] @ x

        outputs, _ = run(
            Box(matrix(), step_size=0.2),
            wire,
            start,
            list(x),
            write=lambda x, _: Context(x[None], (maker @ x)[None]),
            read=read,
        )
        return outputs[-1]

    x = random(5, DIM, seed=4)
    changed = x.clone()
    changed[0] += 1.0
    assert not torch.allclose(last_output(x), last_output(changed)), "what came first is known at the end"
    found = torch.autograd.grad(
        last_output(x.requires_grad_()).sum(), [x, maker, start[0]], allow_unused=True, materialize_grads=True
    )
    assert bool(found[1].any()) == flows
    assert bool(found[0][0].any()) == flows, "to the first input"
    assert bool(found[2].any()) == (name == "backpropagation")
    assert found[0][-1].any()


def test_every_transfer_is_tested() -> None:
    here = {type(wire).__name__ for wire, _ in WIRES.values()} | {"initialization", "reptile", "generation"}
    assert here == set(Transfer.variants)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        initialization(3)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        Box(steps=0)
