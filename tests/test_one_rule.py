"""The idea that everything hangs on: an optimizer, stepping token by token under plain autograd, is the layer."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory import (
    AttentionalBias,
    Gates,
    Pairs,
    Retention,
    Rule,
    Structure,
    adagrad,
    adam,
    add,
    ascent,
    average,
    clip,
    dampen,
    decay,
    decay_to_start,
    delta_gradient_descent,
    delta_momentum,
    dot,
    every,
    full_matrix_adagrad,
    gradient_descent,
    gradient_keys,
    gradient_memory,
    hold_back,
    joint_delta_gradient_descent,
    l2,
    match_rms,
    match_spectrum,
    matrix,
    mlp,
    momentum,
    nesterov,
    newton_schulz,
    normalize,
    remember,
    retain,
    ridge,
    rmsprop,
    scale,
    slow_down,
    surprise,
    unit_rms,
)
from nestling.memory.rule import Direction
from nestling.optim import RuleOptimizer, to_optimizer
from nestling.sequence import Memory
from nestling.sequence.scan import Writes

TOKENS, WIDTH = 23, 6
RULES = [
    gradient_descent(),
    momentum(),
    scale(momentum(surprise())),
    retain(decay(), momentum()),
    retain(decay(), momentum(dampen(normalize()))),
    delta_gradient_descent(),
    retain(decay_to_start(), delta_gradient_descent(momentum(dampen(clip(bound=0.5))))),
    every(5, retain(decay(), delta_gradient_descent(momentum()))),
]
NONLINEAR = [
    ridge(scale(nesterov()), 0.1),
    ascent(scale(slow_down(hold_back(surprise(), 0.3), 0.1))),
    scale(momentum(adagrad(eps=1e-3))),
    scale(rmsprop(momentum(surprise()), eps=1e-3, centered=True)),
    retain(decay(), scale(adam(eps=1e-3))),
    retain(decay_to_start(), scale(adam(momentum(surprise()), 0.8, 0.9, 1e-3, amsgrad=True))),
    scale(match_spectrum(newton_schulz(nesterov(dampen(surprise()))))),
    scale(unit_rms(newton_schulz(average(beta=0.7), steps=3, coefficients=(1.5, -0.5, 0.0)))),
    scale(match_rms(newton_schulz(), 0.1)),
    scale(full_matrix_adagrad(average(), eps=1e-2)),
    every(4, scale(full_matrix_adagrad(eps=1e-2))),
    retain(decay(), joint_delta_gradient_descent(momentum())),
    every(3, joint_delta_gradient_descent()),
    delta_momentum(),
    scale(remember(gradient_keys(retain(decay(), delta_gradient_descent())), step_size=1.0)),
    scale(
        adagrad(
            add(
                newton_schulz(remember(gradient_descent(), step_size=0.9)),
                remember(every(4, retain(decay(), newton_schulz(average()))), retention=0.0, read="before"),
                0.5,
            ),
            1e-3,
        )
    ),
]

WITH_ARGUMENTS: dict[str, Rule] = {
    "every": every(5),
    "scale": scale(momentum(surprise())),
    "gradient_memory": gradient_memory(step_size=1e-3, retention=0.9),
}
NOT_OPTIMIZERS = {
    "retain_first": "takes its gradient at decayed weights, torch took it before",
    "retain(kl)": "steps an accumulator, and a parameter is the weight itself",
    "retain(sigmoid)": "steps an accumulator, and a parameter is the weight itself",
    "retain(lq)": "steps an accumulator, and a parameter is the weight itself",
    "retain(elastic_net_ftrl)": "steps an accumulator, and a parameter is the weight itself",
    "retain(decay_to_anchor)": "acts where a chunk opens, and an optimizer has no chunks",
}
"""Rules that cannot be optimizers, and why, in the words in which they are refused; each is tried, and must fail."""


def listed() -> dict[str, Rule]:
    """Every rule of the family, and `retain` of every retention gate: a new one takes part by being listed."""
    rules = {name: WITH_ARGUMENTS.get(name) or kind() for name, kind in Rule.variants.items()}
    gates = {f"retain({name})": retain(kind(), gradient_descent()) for name, kind in Retention.variants.items()}
    return {name: with_step_size(rule) for name, rule in (rules | gates).items() if not name.startswith("_")}


def with_step_size(rule: Rule) -> Rule:
    """The rule scaled, if its steps have no size of their own."""
    weight = torch.ones(2, 2)
    pair = Pairs(torch.ones(1, 2), torch.ones(1, 2))
    moved = rule.step(weight, pair, rule.init(weight), Gates(0.0))[0]
    return rule if torch.equal(moved, weight) or rule.exposes or not isinstance(rule, Direction) else scale(rule)


class Net(nn.Module):
    """The same function as mlp(), the way torch users write it."""

    def __init__(self, maps: tuple[Tensor, ...], residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in maps)
        self.residual = residual
        with torch.no_grad():
            for layer, weight in zip(self.layers, maps, strict=True):
                layer.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            h = layer(F.gelu(h))
        return x + h if self.residual else h


def objective(bias: AttentionalBias, read: Tensor, value: Tensor) -> Tensor:
    return 0.5 * (read - value).square().sum() if bias == l2() else -(read * value).sum()


def optimizer_outputs(
    net: Net, optimizer: RuleOptimizer, bias: AttentionalBias, data: tuple[Tensor, ...], gates: Gates
):
    outputs = []
    for t, (key, value, query) in enumerate(zip(*data, strict=True)):
        group = optimizer.param_groups[0]
        group["lr"] = float(gates.step_size[t])
        group["momentum"] = float(gates.momentum[t])
        group["retention"] = float(gates.log_retention[t].exp())
        optimizer.zero_grad()
        with optimizer.capture(net):
            loss = objective(bias, net(key), value)
        loss.backward()
        optimizer.step()
        outputs.append(net(query).detach())
    return torch.stack(outputs)


@pytest.mark.parametrize("bias", [l2(), dot()], ids=repr)
@pytest.mark.parametrize(
    ("rule", "structure"),
    [(rule, structure) for rule in RULES for structure in (matrix(), mlp(), mlp(depth=3, expansion=1.5))]
    + [(rule, structure) for rule in NONLINEAR for structure in (matrix(), mlp(expansion=1.5))],
    ids=repr,
)
def test_optimizer_is_layer(rule: Rule, structure: Structure, bias: AttentionalBias) -> None:
    compare(rule, structure, bias)


@pytest.mark.parametrize("structure", [matrix(), mlp(expansion=1.5)], ids=repr)
@pytest.mark.parametrize("name", [name for name in listed() if name not in NOT_OPTIMIZERS])
def test_every_listed_rule_is_both(name: str, structure: Structure) -> None:
    compare(listed()[name], structure, l2())


@pytest.mark.parametrize("name", NOT_OPTIMIZERS)
def test_what_is_excused_does_fail(name: str) -> None:
    with pytest.raises(ValueError, match=NOT_OPTIMIZERS[name]):
        to_optimizer(listed()[name], [nn.Parameter(torch.zeros(2, 2))])


def compare(rule: Rule, structure: Structure, bias: AttentionalBias) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values, queries = torch.randn(3, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    raw = torch.rand(3, TOKENS, generator=generator, dtype=torch.float64)
    gates = Gates(0.03 * raw[0], 0.9 * raw[1], -0.2 * raw[2])
    start = tuple(w.double() for w in structure.init(WIDTH, WIDTH, generator=generator))

    memory = Memory(structure, bias, rule, gradient_at="token", way="recurrent")
    lifted = memory.begin(tuple(w[None, None] for w in start))
    shaped = Writes(keys[None, None], values[None, None], Gates(*(gate[None, None] for gate in gates)))
    layer, state = memory.run(lifted, shaped, queries[None, None])

    net = Net(start, isinstance(structure, mlp))
    optimizer = to_optimizer(rule, net.parameters())
    torch.testing.assert_close(
        optimizer_outputs(net, optimizer, bias, (keys, values, queries), gates), layer[0, 0], rtol=0, atol=1e-10
    )
    for trained, running in zip(net.parameters(), state.running, strict=True):
        torch.testing.assert_close(trained.detach(), running[0, 0], rtol=0, atol=1e-10)


def test_chunked_layer_is_optimizer_too() -> None:
    """The fast path of the same identity: a matrix memory, chunk 8, against the optimizer."""
    generator = torch.Generator().manual_seed(2)
    keys, values, queries = torch.randn(3, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    raw = torch.rand(3, TOKENS, generator=generator, dtype=torch.float64)
    gates = Gates(0.03 * raw[0], 0.9 * raw[1], -0.2 * raw[2])
    start = tuple(w.double() for w in matrix().init(WIDTH, WIDTH, generator=generator))
    rule = retain(decay(), delta_gradient_descent(momentum(dampen())))
    memory = Memory(matrix(), l2(), rule, gradient_at="token")
    lifted = memory.begin(tuple(w[None, None] for w in start))
    shaped = Writes(keys[None, None], values[None, None], Gates(*(gate[None, None] for gate in gates)))
    layer, _ = memory.run(lifted, shaped, queries[None, None])
    net = Net(start, residual=False)
    outputs = optimizer_outputs(net, to_optimizer(rule, net.parameters()), l2(), (keys, values, queries), gates)
    torch.testing.assert_close(outputs, layer[0, 0], rtol=0, atol=1e-10)


def test_equals_torch_sgd() -> None:
    """scale(momentum(surprise())) is torch's SGD with momentum; retain adds its decoupled weight decay."""
    first, second = (nn.Linear(4, 3, dtype=torch.float64) for _ in range(2))
    second.load_state_dict(first.state_dict())
    ours = to_optimizer(scale(momentum(surprise())), first.parameters(), step_size=0.1, momentum=0.8)
    theirs = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.8)
    for step in range(50):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for net, optimizer in ((first, ours), (second, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(first.weight, second.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(first.bias, second.bias, rtol=0, atol=1e-12)


def test_state_dict_round_trip() -> None:
    net = nn.Linear(4, 3, dtype=torch.float64)
    twin = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = every(3, retain(decay(), momentum()))
    one = to_optimizer(rule, net.parameters(), retention=0.9)

    def step(module: nn.Module, optimizer: RuleOptimizer) -> None:
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    for _ in range(4):
        step(net, one)
    twin.load_state_dict(net.state_dict())
    two = to_optimizer(rule, twin.parameters(), retention=0.9)
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        step(net, one)
        step(twin, two)
    assert torch.equal(net.weight, twin.weight)


@pytest.mark.parametrize("gates", [{"step_size": -1.0}, {"momentum": 1.5}, {"retention": -0.1}, {"tokens": 0}], ids=str)
def test_bad_gates_are_named(gates: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(gates))):
        to_optimizer(momentum(), nn.Linear(2, 2).parameters(), **gates)
