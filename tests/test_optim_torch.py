"""Named optimizers against torch.optim, step by step, on one small net."""

import pytest
import torch
from torch import nn

from nestling import optim

STEPS = 200
CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.8}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    ("SGD", {"lr": 1e-3, "momentum": 0.5, "weight_decay": 0.05, "maximize": True}),
    ("Adagrad", {"lr": 0.05}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.02, "initial_accumulator_value": 0.1, "eps": 1e-6}),
    ("Adagrad", {"lr": 1e-3, "maximize": True}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.003, "alpha": 0.9, "weight_decay": 0.05, "momentum": 0.7, "eps": 1e-4}),
    ("RMSprop", {"lr": 0.003, "alpha": 0.9, "momentum": 0.7, "centered": True, "eps": 1e-2}),
    ("RMSprop", {"lr": 1e-3, "maximize": True, "eps": 1e-2}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "amsgrad": True}),
    ("Adam", {"lr": 0.001, "maximize": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}),
]


def small_net(dtype: torch.dtype) -> nn.Module:
    """Two layers of one shape, whose parameters are stepped together; biases; one scalar."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).to(dtype)
    net.register_parameter("gain", nn.Parameter(torch.tensor(1.0, dtype=dtype)))
    return net


def backward(net: nn.Module, step: int) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(net.gain.dtype)
    net.zero_grad()
    (net.gain * net(x) - x.sin().flip(-1)).square().mean().backward()


def vector(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [(*case, torch.float64) for case in CASES] + [(*case, torch.float32) for case in (*CASES[2::5], CASES[14])],
    ids=str,
)
def test_equals_torch(name, options, dtype):
    ours, theirs = small_net(dtype), small_net(dtype)
    start, tolerance = vector(ours), 1e-12 if dtype == torch.float64 else 1e-6
    one = getattr(optim, name)(ours.parameters(), **options)
    two = getattr(torch.optim, name)(theirs.parameters(), **options)
    for step in range(STEPS):
        backward(ours, step)
        backward(theirs, step)
        one.step()
        two.step()
        found, expected = vector(ours), vector(theirs)
        error = (found - expected).abs() / expected.abs().clamp(min=1.0)
        assert float(error.max()) < tolerance, f"step {step}"
    assert float((found - start).abs().median()) > 1e-2, "nothing was trained"


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_has_torchs_defaults_and_order_of_arguments(name):
    net = small_net(torch.float64)
    ours, theirs = (getattr(module, name)(net.parameters()).defaults for module in (optim, torch.optim))
    shared = [option for option in theirs if option in ours and option != "differentiable"]
    assert {option: ours[option] for option in shared} == {option: theirs[option] for option in shared}
    assert set(theirs) - set(ours) <= {"foreach", "fused", "capturable", "decoupled_weight_decay"}
    assert getattr(optim, name)(net.parameters(), 0.5).defaults["lr"] == 0.5


def test_pieces_are_the_whole(monkeypatch):
    """Large parameters are stepped in pieces: bit for bit as in one."""
    results = []
    for size in (7, 1 << 20):
        monkeypatch.setitem(optim.adapter.PIECE, "cpu", size)
        for name, options in CASES[3::3]:
            net = small_net(torch.float64)
            optimizer = getattr(optim, name)(net.parameters(), **options)
            for step in range(2):
                backward(net, step)
                optimizer.step()
            results.append((name, vector(net)))
    for (name, cut), (_, whole) in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        assert torch.equal(cut, whole), name


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """The quintic iteration of one matrix in float64, written out."""
    flip = update.shape[0] > update.shape[1]
    x = update.T if flip else update
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
    return x.T if flip else x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_its_equation(nesterov, adjust):
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 8), (8, 5)):
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight, buffer, expected = nn.Parameter(start.clone()), torch.zeros(shape, dtype=torch.float64), start.clone()
        options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
        optimizer = optim.Muon([weight], precision="weight", **options)
        factor = max(1, shape[0] / shape[1]) ** 0.5 if adjust == "original" else 0.2 * max(shape) ** 0.5
        for _ in range(10):
            g = torch.randn(shape, generator=generator, dtype=torch.float64)
            weight.grad = g.clone()
            optimizer.step()
            buffer = 0.9 * buffer + 0.1 * g
            update = 0.1 * g + 0.9 * buffer if nesterov else buffer
            expected = expected - 0.1 * 0.2 * expected - 0.1 * factor * orthogonal(update)
            torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (24, 48), (48, 24)], ids=str)
def test_muon_is_torchs(shape):
    """Each update within two percent of torch's, which computes in bfloat16."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.05, "weight_decay": 0.1}
    one, two = optim.Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for step in range(5):
        before = ours.detach().clone()
        with torch.no_grad():
            theirs.copy_(ours)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        two.step()
        error = (ours - theirs).norm() / (theirs - before).norm()
        assert float(error.detach()) < 0.02


def test_muon_of_a_stack_is_muon_of_each():
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    stack, each = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    stack.grad = grad.clone()
    for parameter, own in zip(each, grad, strict=True):
        parameter.grad = own.clone()
    for params in ([stack], each):
        optim.Muon(params, lr=0.1, precision="weight").step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in each]), rtol=0, atol=1e-12)
