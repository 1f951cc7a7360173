"""Several optimizers as one, and which parameter of a model goes to which."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nestling import optim
from nestling.optim import (
    M3,
    SGD,
    Adam,
    AdamW,
    DeltaGradientDescent,
    Joined,
    Muon,
    explain,
    for_model,
    split_parameters,
)


def tied_model() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "up": nn.Linear(4, 6), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    model["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    return model


def test_a_model_is_split_into_matrices_and_the_rest():
    matrices, rest = split_parameters(tied_model())
    assert [name for name, _ in matrices] == ["up.weight"]
    assert [name for name, _ in rest] == ["embedding.weight", "up.bias"]


def test_joined_optimizers_step_save_and_are_scheduled_as_one():
    models = [tied_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    joined = [for_model(model, functools.partial(Muon, lr=0.1)) for model in models]
    scheduler = torch.optim.lr_scheduler.StepLR(joined[0], 1, gamma=0.5)

    def step(model, optimizer):
        optimizer.zero_grad()
        model["up"](model["embedding"](torch.arange(7))).square().sum().backward()
        optimizer.step()

    step(models[0], joined[0])
    scheduler.step()
    assert [group["lr"] for group in joined[0].param_groups] == [0.05, 0.0005]
    assert [type(o) for o in joined[0].optimizers] == [Muon, torch.optim.AdamW]
    models[1].load_state_dict(models[0].state_dict())
    joined[1].load_state_dict(copy.deepcopy(joined[0].state_dict()))
    for model, optimizer in zip(models, joined, strict=True):
        step(model, optimizer)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="in two of the optimizers"):
        Joined([SGD(models[0].parameters()), SGD(models[0].parameters())])


def pair_of_joined() -> tuple[list[nn.Module], list[Joined]]:
    """Two models alike; the optimizer of the first has stepped, the model of the second has its weights."""
    models = [nn.ModuleDict({"embedding": nn.Embedding(7, 4), "up": nn.Linear(4, 6)}) for _ in range(2)]
    joined = [for_model(model, functools.partial(Muon, lr=0.1)) for model in models]
    for _ in range(2):
        step_joined(models[0], joined[0])
    models[1].load_state_dict(models[0].state_dict())
    return models, joined


def step_joined(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model["up"](model["embedding"](torch.arange(7))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("way", ["torch's layout", "a list", "deepcopy", "distributed checkpoint"])
def test_joined_optimizers_are_handed_on(way):
    models, (one, two) = pair_of_joined()
    if way == "torch's layout":
        saved = one.state_dict()
        assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2]]
        assert set(saved["state"]) == {0, 1, 2}
        two.load_state_dict(copy.deepcopy(saved))
    elif way == "a list":
        two.load_state_dict({"optimizers": [copy.deepcopy(own.state_dict()) for own in one.optimizers]})
    elif way == "deepcopy":
        models[1], two = copy.deepcopy((models[0], one))
        assert two.param_groups[0] is two.optimizers[0].param_groups[0]
    else:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        saved = get_optimizer_state_dict(models[0], one)
        assert set(saved["state"]) >= {"up.weight", "up.bias"}
        set_optimizer_state_dict(models[1], two, copy.deepcopy(saved))  # what is saved is live, as torch's is
    for model, optimizer in zip(models, (one, two), strict=True):
        step_joined(model, optimizer)
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)


def test_joined_optimizers_have_their_members_states_and_take_no_group():
    models, (one, two) = pair_of_joined()
    weight = models[0]["up"].weight
    assert one.state[weight] is one.optimizers[0].state[weight]
    assert len(one.state) == 3
    del one.state[weight]
    assert weight not in one.optimizers[0].state
    with pytest.raises(KeyError):
        one.state[models[1]["up"].weight]
    with pytest.raises(ValueError, match="which optimizer is to step the group"):
        two.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="the state has 1 parameter groups, needed 2"):
        two.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    with pytest.raises(ValueError, match="at least one optimizer"):
        Joined([])


def test_the_rest_is_fused_where_torch_can():
    groups = [for_model(tied_model().to(dtype)).param_groups[1] for dtype in (torch.float32, torch.bfloat16)]
    assert [group["fused"] for group in groups] == [True, True]
    complex_one = optim.groups._adamw([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])
    assert complex_one.param_groups[0]["foreach"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7))


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(torch.arange(7)), torch.arange(7).flip(0)).backward()


@pytest.mark.parametrize("wrong", ["0.weight", "1.bias", "3.weight"])
def test_a_gradient_that_is_not_finite_stops_all_of_them(wrong):
    """Torch's AdamW has the embedding and the biases, and would take it."""
    model = small_model()
    optimizer = for_model(model)
    backward(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    model.get_parameter(wrong).grad.flatten()[0] = math.nan
    with pytest.raises(FloatingPointError, match=f"gradient of parameter '{wrong}' is not finite; nothing was changed"):
        optimizer.step()
    skipping = for_model(model, functools.partial(M3, nonfinite="skip"))
    skipping.step()
    assert (skipping.skipped, len(skipping.state)) == (1, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    backward(model, skipping)
    skipping.step()
    assert len(skipping.state) == 5


def test_sparse_gradients_are_judged_too():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4, sparse=True), "up": nn.Linear(4, 6, bias=False)})
    sparse = lambda rest: torch.optim.SparseAdam([p for _, p in rest])  # noqa: E731
    optimizer = for_model(model, rest=sparse)
    step_joined(model, optimizer)
    assert len(optimizer.state) == 2
    optimizer.zero_grad()
    (model["up"](model["embedding"](torch.arange(3))) * math.inf).sum().backward()
    with pytest.raises(FloatingPointError):
        optimizer.step()


def test_capture_is_that_of_the_members():
    """Beside delta gradient descent with a capture of its own."""
    found = []
    for together in (True, False):
        model = small_model().double()
        joined = for_model(model, functools.partial(DeltaGradientDescent, lr=0.5))
        for _ in range(2):
            joined.zero_grad()
            with (joined if together else joined.optimizers[0]).capture(model):
                loss = F.cross_entropy(model(torch.arange(7)), torch.arange(7).flip(0))
            loss.backward()
            assert len(joined.optimizers[0].captured) == 2
            joined.step()
        found.append(model[1].weight.detach())
    assert torch.equal(*found)


def test_a_cycle_of_momenta_reaches_all_of_them():
    model = small_model()
    optimizer = for_model(model)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.01], total_steps=10)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.95, 0.95]
    backward(model, optimizer)
    optimizer.step()
    cycle.step()
    assert all(group["betas"][0] < 0.95 for group in optimizer.param_groups)
    assert len(optimizer.param_groups[0]["betas"]) == 3
    assert "betas" not in for_model(model, Muon).defaults


def test_filters_are_matrices_and_grouped_ones_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3))
    matrices, rest = split_parameters(model)
    assert [name for name, _ in matrices] == ["0.weight", "3.weight"]
    assert [name for name, _ in rest] == ["0.bias", "1.weight", "1.bias", "3.bias"]
    optimizer = for_model(model, functools.partial(Muon, weight_decay=0.0, precision="weight"))
    assert [group["flat"] for group in optimizer.param_groups[:2]] == [False, True]
    before = model[0].weight.detach().clone()
    model(torch.randn(2, 2, 6, 6)).square().mean().backward()
    optimizer.step()
    moved = torch.linalg.svdvals((before - model[0].weight).detach().flatten(1)) / 1e-3
    assert bool(((moved > 0.5) & (moved < 1.5)).all()), "one matrix of four rows, its singular values near one"


def test_all_of_them_are_told():
    model = small_model()
    told = explain(for_model(model))
    assert told.index("M3\n") < told.index("answer A") < told.index("AdamW\n") < told.index("rule: scale(adam())")
    for theirs, ours in ((torch.optim.AdamW, AdamW), (torch.optim.Adam, Adam), (torch.optim.SGD, SGD)):
        options = {"weight_decay": 0.1, "lr": 0.01}
        assert explain(theirs(model.parameters(), **options)) == explain(ours(model.parameters(), **options))
    decoupled = torch.optim.Adam(model.parameters(), decoupled_weight_decay=True, weight_decay=0.1)
    assert "kept by decay()" in explain(decoupled)
    muon = [torch.zeros(2, 2)]
    assert explain(torch.optim.Muon(muon)) == explain(Muon(muon))
