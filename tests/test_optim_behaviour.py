"""What users of torch.optim expect of every optimizer: groups, states, schedulers, closures, scaling, refusals."""

import copy
import inspect
import io
import math

import pytest
import torch
from torch import nn

from nestling import optim
from nestling.memory import Rule, decay, every, momentum, retain
from nestling.optim import M3, OPTIMIZERS, SGD, Adam, AdamW, Muon, to_optimizer

NAMES = sorted(OPTIMIZERS)
F64 = torch.float64


def small_net(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 5, bias=False)).to(dtype)


def make(name: str, net: nn.Module, **options):
    extra = {"M3": {"precision": "weight", "periods": 2}, "Muon": {"precision": "weight"}}
    return OPTIMIZERS[name](net.parameters(), **extra.get(name, {}), **options)


def backward(net: nn.Module, optimizer, seed: int) -> torch.Tensor:
    parameter = next(net.parameters())
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=F64).to(parameter)
    seen = optimizer.capture(net) if hasattr(optimizer, "capture") else None
    optimizer.zero_grad()
    if seen is not None:
        with seen:
            loss = (net(x) - x.sin()).square().mean()
    else:
        loss = (net(x) - x.sin()).square().mean()
    loss.backward()
    return loss.detach()


def train(net: nn.Module, optimizer, seeds) -> None:
    for seed in seeds:
        backward(net, optimizer, seed)
        optimizer.step()


def vector(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_file(name):
    net = small_net()
    one = make(name, net, lr=0.01)
    train(net, one, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": one.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = small_net()
    two = make(name, twin, lr=0.5)
    twin.load_state_dict(saved["net"])
    two.load_state_dict(saved["optimizer"])
    copied_net, copied = copy.deepcopy((net, one))
    assert two.param_groups[0]["lr"] == 0.01
    for own, optimizer in ((net, one), (twin, two), (copied_net, copied)):
        train(own, optimizer, range(3, 6))
    assert torch.equal(vector(net), vector(twin))
    assert torch.equal(vector(net), vector(copied_net))


@pytest.mark.parametrize("name", NAMES)
def test_states_are_written_where_they_lie(name):
    """As torch's optimizers do: no fresh tensors at every step, and none that two names share."""
    net = small_net()
    optimizer = make(name, net, lr=0.01)

    def places() -> list[int]:
        return [t.data_ptr() for parameter in net.parameters() for t in optimizer.state[parameter].values()]

    train(net, optimizer, [0])
    begun = places()
    assert len(set(begun)) == len(begun)
    train(net, optimizer, [1, 2, 3])
    assert places() == begun


def test_counters_are_not_rounded_on_loading():
    """bfloat16 has no 301; torch casts what it loads to the parameter's dtype."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    one, two = (Adam([weight], lr=0.0) for _ in range(2))
    for _ in range(301):
        one.step()
    two.load_state_dict(one.state_dict())
    steps = [value for value in two.state[weight].values() if not value.is_floating_point()]
    assert [int(value) for value in steps] == [301, 301]


@pytest.mark.parametrize("name", NAMES)
def test_trains(name):
    net = small_net()
    optimizer = make(
        name, net, lr=0.2 if name in ("SGD", "DeltaGradientDescent", "GeneralizedGradientDescent") else 0.02
    )
    first = float(backward(net, optimizer, 0))
    train(net, optimizer, [0] * 60)
    assert float(backward(net, optimizer, 0)) < 0.9 * first


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_changes_the_rate(name):
    net, scheduled = small_net(), small_net()
    one, two = make(name, net, lr=0.02), make(name, scheduled, lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(two, 1, gamma=0.5)
    for seed in range(3):
        one.param_groups[0]["lr"] = 0.02 * 0.5**seed
        train(net, one, [seed])
        train(scheduled, two, [seed])
        scheduler.step()
    assert torch.equal(vector(net), vector(scheduled))


def test_a_scheduler_may_change_betas_and_momentum_too():
    net = small_net()
    optimizer = AdamW(net.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    train(net, optimizer, [0])
    cycle.step()
    theirs = small_net()
    twin = torch.optim.AdamW(theirs.parameters())
    other = torch.optim.lr_scheduler.OneCycleLR(twin, 0.1, total_steps=10)
    train(theirs, twin, [0])
    other.step()
    train(net, optimizer, [1])
    train(theirs, twin, [1])
    torch.testing.assert_close(vector(net), vector(theirs), rtol=0, atol=1e-12)


def test_groups_have_options_of_their_own():
    nets, results = [small_net() for _ in range(2)], []
    for module, net in zip((optim, torch.optim), nets, strict=True):
        groups = [{"params": net[0].parameters(), "lr": 0.1, "betas": (0.5, 0.9)}, {"params": net[2].parameters()}]
        optimizer = module.Adam(groups, lr=0.01, weight_decay=0.1)
        train(net, optimizer, range(5))
        results.append(vector(net))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_a_group_added_later_is_stepped():
    net = small_net()
    optimizer = SGD(net[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.2})
    before = net[2].weight.detach().clone()
    backward(net, optimizer, 0)
    optimizer.step()
    torch.testing.assert_close(net[2].weight.detach(), before - 0.2 * net[2].weight.grad)


def test_a_closure_gives_its_loss():
    net = small_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    before = vector(net)
    loss = optimizer.step(lambda: backward(net, optimizer, 0))
    assert float(loss) > 0
    assert not torch.equal(vector(net), before)


def test_a_parameter_without_a_gradient_stays_and_keeps_no_count():
    net = small_net()
    optimizer = Adam(net.parameters(), lr=0.1)
    backward(net, optimizer, 0)
    before, net[2].weight.grad = net[2].weight.detach().clone(), None
    optimizer.step()
    assert torch.equal(net[2].weight, before)
    assert not optimizer.state[net[2].weight]
    train(net, optimizer, [1])  # steps of the two now differ in number
    theirs, twin = nn.Parameter(before.clone()), None
    twin = torch.optim.Adam([theirs], lr=0.1)
    theirs.grad = net[2].weight.grad.clone()
    twin.step()
    torch.testing.assert_close(net[2].weight.detach(), theirs.detach(), rtol=0, atol=1e-12)


def test_gradients_accumulate():
    whole, parts = small_net(), small_net()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    for net, pieces in ((whole, 1), (parts, 4)):
        optimizer = AdamW(net.parameters(), lr=0.1)
        for part in x.chunk(pieces):
            (net(part).square().sum(-1).sum() / 8).backward()
        optimizer.step()
    torch.testing.assert_close(vector(whole), vector(parts), rtol=0, atol=1e-12)


def test_a_gradient_scaler_unscales_and_skips():
    plain, scaled = small_net(torch.float32), small_net(torch.float32)
    one, two = AdamW(plain.parameters(), lr=0.1), AdamW(scaled.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    plain(x).square().mean().backward()
    one.step()
    scaler.scale(scaled(x).square().mean()).backward()
    scaler.step(two)
    scaler.update()
    torch.testing.assert_close(vector(plain), vector(scaled), rtol=1e-6, atol=1e-6)
    before = vector(scaled)
    scaled[0].weight.grad = torch.full_like(scaled[0].weight, math.inf)
    scaler.step(two)
    scaler.update()
    assert torch.equal(vector(scaled), before)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(wrong):
    net = small_net()
    optimizer = AdamW(net.named_parameters())
    backward(net, optimizer, 0)
    before = vector(net)
    net[2].weight.grad[1, 1] = wrong
    with pytest.raises(FloatingPointError, match=r"gradient of parameter '2\.weight' is not finite"):
        optimizer.step()
    assert torch.equal(vector(net), before)
    net[0].weight.grad[0, 0] = wrong
    with pytest.raises(FloatingPointError, match=r"parameter 0 of a group, of shape \[4, 5\]"):
        AdamW(net.parameters()).step()


def test_a_gradient_that_is_not_finite_is_skipped_on_request():
    net = small_net()
    optimizer = AdamW(net.parameters(), nonfinite="skip")
    backward(net, optimizer, 0)
    before = vector(net)
    net[2].weight.grad[1, 1] = math.nan
    optimizer.step()
    assert torch.equal(vector(net), before)
    assert optimizer.skipped == 1
    assert not optimizer.state
    train(net, optimizer, [1])
    assert not torch.equal(vector(net), before)


def test_large_gradients_are_finite():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), 3e38)
    SGD([weight], lr=1e-38).step()
    assert bool(weight.detach().isfinite().all())


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match="parameter 'w' is complex"):
        SGD([("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient of parameter 'weight' is sparse"):
        Adam(embedding.named_parameters()).step()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: SGD(p, lr=-1.0), "lr must be >= 0, got -1.0"),
        (lambda p: SGD(p, nesterov=True), "nesterov needs a momentum and no dampening"),
        (lambda p: Adam(p, betas=(1.0, 0.9)), "beta must be in"),
        (lambda p: Adam(p, epsilon=1e-3), "unknown option of Adam 'epsilon'; known: .*eps"),
        (lambda p: AdamW(p, weight_decay=-0.1), "weight_decay must be >= 0"),
        (lambda p: AdamW(p, lr=2.0, weight_decay=0.6), r"lr \* weight_decay must be <= 1"),
        (lambda p: AdamW(p, tokens=0), "tokens must be >= 1, got 0"),
        (lambda p: AdamW(p, nonfinite="ignore"), "nonfinite must be 'raise' or 'skip', got 'ignore'"),
        (lambda p: Muon(p, adjust_lr_fn="none"), "adjust_lr_fn must be None, 'original'"),
        (lambda p: Muon([nn.Parameter(torch.zeros(3))]), "Muon steps matrices, but .* has 1 dims"),
        (lambda p: Muon(p, ns_steps=0), "steps must be from 1 to 99, got 0"),
        (lambda p: M3(p, mode="letter"), "mode must be 'paper' or 'ema'"),
        (lambda p: M3(p, periods=0), "period must be a whole number"),
        (lambda p: optim.DeltaGradientDescent(p, form="both"), "form must be 'averaged' or 'exact'"),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build(list(small_net().parameters()))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"momentumm": 0.5}, "unknown option of a group of SGD 'momentumm'.*momentum"),
        ({"nonfinite": "ignore"}, "nonfinite must be 'raise' or 'skip', got 'ignore'"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"tokens": 0}, "tokens must be >= 1, got 0"),
        ({"nesterov": True}, "nesterov needs a momentum and no dampening"),
    ],
    ids=str,
)
def test_bad_options_of_a_group_are_named(option, message):
    first, second = small_net().parameters()
    with pytest.raises(ValueError, match=message):
        SGD([{"params": [first], **option}], lr=0.1)
    optimizer = SGD([{"params": [first], "initial_lr": 0.1, "foreach": None}], lr=0.1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "foreach": None})
    assert "foreach" not in optimizer.param_groups.pop()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [second], **option})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 2"):
        to_optimizer(momentum(), [{"params": [first], "momentum": 2.0}])


def test_a_state_is_judged_when_it_is_loaded():
    ours, theirs = small_net(), small_net()
    one, two = AdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.1)
    train(ours, one, [0])
    train(theirs, two, [0])
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match=r"the saved state of parameter 0 has .*exp_avg.*it is of another optimizer"):
        one.load_state_dict(two.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr must be >= 0, got -1\.0"):
        one.load_state_dict(wrong)
    assert one.param_groups[0]["lr"] == 0.1
    for option in ("maximize", "tokens", "nonfinite"):
        del before["param_groups"][0][option]
    one.load_state_dict(before)
    train(ours, one, [1])
    assert one.param_groups[0]["tokens"] == 1


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_what_torch_is_told_about_computing_is_taken_or_refused(name):
    net = small_net()
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    for option in {"foreach", "fused", "capturable", "decoupled_weight_decay"} & set(theirs):
        for value in (None, False):
            assert option not in OPTIMIZERS[name](net.parameters(), **{option: value}).param_groups[0]
        if option == "foreach":
            OPTIMIZERS[name](net.parameters(), foreach=True)
        else:
            with pytest.raises(ValueError, match=f"{name} has no {option}=True"):
                OPTIMIZERS[name](net.parameters(), **{option: True})
    with pytest.raises(ValueError, match="unknown option of Muon 'foreach'"):
        Muon(net.parameters(), foreach=None)


OTHERWISE = {
    "lr": 0.03,
    "momentum": 0.6,
    "dampening": 0.4,
    "weight_decay": 0.3,
    "nesterov": lambda default: not default,
    "maximize": True,
    "lr_decay": 0.5,
    "initial_accumulator_value": 0.5,
    "eps": 0.1,
    "alpha": 0.2,
    "beta": 0.5,
    "betas": lambda default: (0.5, 0.6, 0.4)[: len(default)],
    "centered": True,
    "amsgrad": True,
    "ns_coefficients": (1.5, -0.5, 0.0),
    "ns_steps": 2,
    "adjust_lr_fn": "match_rms_adamw",
    "precision": "weight",
    "form": {"exact": "averaged", "bounded": "literal", "units": "ones"}.get,
    "reduction": "sum",
    "structure": "matrix()",
    "objective": "huber_norm(bound=0.01)",
    "seed": 1,
    "mode": "paper",
    "periods": 1,
}
"""A value that is no default, or what makes one of the default."""
NEEDED = {"dampening": {"momentum": 0.5}, "nesterov": {"momentum": 0.5}, "amsgrad": {"betas": (0.5, 0.2)}}
"""What else an option needs in order to mean anything."""


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in NAMES for option in inspect.signature(OPTIMIZERS[name].expression).parameters],
)
def test_every_option_is_alive(name, option):
    base, value = {"periods": 2} if name == "M3" else {}, OTHERWISE[option]
    base |= NEEDED.get(option, {})
    default = inspect.signature(OPTIMIZERS[name].expression).parameters[option].default
    found = []
    for more in ({}, {option: value(default) if callable(value) else value}):
        net = small_net()
        train(net, OPTIMIZERS[name](net.parameters(), **base | more), range(6))
        found.append(vector(net))
    assert (found[0] - found[1]).abs().max() > 1e-9


@pytest.mark.parametrize("name", ["Muon", "M3", "DeltaGradientDescent", "DeltaMomentum", "SGD", "AdamW"])
def test_to_maximize_is_to_minimize_minus_it(name):
    found = []
    for sign in (1, -1):
        net = small_net()
        optimizer = make(name, net, lr=0.02, weight_decay=0.1, maximize=sign < 0)
        for seed in range(3):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
            optimizer.zero_grad()
            with optimizer.capture(net):
                loss = sign * (net(x) - x.sin()).square().mean()
            loss.backward()
            optimizer.step()
        found.append(vector(net))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_in_the_learning_rate_and_the_start(name):
    def after(rate: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        weight = start.clone()
        extra = {"M3": {"precision": "weight", "periods": 2}, "Muon": {"precision": "weight"}}.get(name, {})
        optimizer = OPTIMIZERS[name]([weight.detach()], lr=rate, differentiable=True, **extra)
        optimizer.param_groups[0]["params"] = [weight]
        for _ in range(3):
            at = weight.clone()  # a step is in place
            (weight.grad,) = torch.autograd.grad(at.sin().square().sum(), at, create_graph=True)
            optimizer.step()
        return weight

    rate = torch.tensor(0.05, dtype=F64, requires_grad=True)
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (rate, start), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_is_kept(name):
    net = small_net(torch.bfloat16)
    optimizer = make(name, net, lr=0.02)
    before = vector(net)
    train(net, optimizer, range(2))
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    states = [t for p in net.parameters() for t in optimizer.state[p].values() if t.is_floating_point()]
    assert {t.dtype for t in states} <= {torch.bfloat16}
    assert not torch.equal(vector(net), before)
    assert bool(vector(net).isfinite().all())


def test_steps_count_tokens():
    """A clock of 6 tokens ticks at every second gradient that sums 3."""
    net = small_net()
    optimizer = to_optimizer(every(6, retain(decay(), momentum())), net.parameters(), tokens=3)
    moved = []
    for seed in range(6):
        before = vector(net)
        train(net, optimizer, [seed])
        moved.append(not torch.equal(vector(net), before))
    assert moved == [False, True] * 3


class _remembers_the_weight(Rule, abstract=True):
    """Descends, and remembers the weight that it stepped from."""

    elementwise = True

    def init(self, weight):
        return (torch.zeros_like(weight),)

    def step(self, weight, gradient, state, gates):
        return weight - gates.step_size * gradient.dense(), (weight,)


@pytest.mark.parametrize("size", [4, 1000], ids=["pieces", "whole"])
def test_a_rule_may_remember_the_weight_itself(size, monkeypatch):
    monkeypatch.setitem(optim.adapter.PIECE, "cpu", size)
    net = small_net()
    optimizer = to_optimizer(_remembers_the_weight(), net.parameters())
    for seed in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, [seed])
        for parameter, old in zip(net.parameters(), before, strict=True):
            assert torch.equal(optimizer.state[parameter]["0"], old)
            assert not torch.equal(parameter, old)
