"""What `capture` notes of layers, and what becomes of it when gradients are scaled, clipped, skipped or coarser."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.optim import SGD, DeltaGradientDescent, GeneralizedGradientDescent

F64 = torch.float64
BOTH = [DeltaGradientDescent, GeneralizedGradientDescent]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(dtype: torch.dtype = F64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3, bias=False).to(dtype)


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", BOTH)
def test_a_gradient_scaler_changes_nothing(kind):
    found = []
    for scale in (None, 1024.0):
        net, scaler = linear(torch.float32), torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
        optimizer = kind(net.parameters(), lr=0.1)
        for seed in range(2):
            optimizer.zero_grad()
            with optimizer.capture(net):
                loss = (net(normal(8, 5, seed=seed, dtype=torch.float32)) - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(net.weight)
    same(*found, 1e-5)
    assert float((found[0] - linear(torch.float32).weight).detach().abs().max()) > 1e-3


def test_clipping_scales_the_pairs():
    """Against l2's gradient written out, (W x - u) x^T with u = -n times the clipped error."""
    net, x = linear(), normal(8, 5)
    optimizer = GeneralizedGradientDescent(net.parameters(), lr=0.1)
    with optimizer.capture(net):
        y = net(x)
        y.retain_grad()
        (y - 1).square().sum(-1).mean().backward()
    before = net.weight.detach().clone()
    norm = float(nn.utils.clip_grad_norm_(net.parameters(), 0.01))
    optimizer.step()
    assert norm > 0.1
    errors = 8 * y.grad * 0.01 / (norm + 1e-6)
    same(net.weight, before - 0.1 * (x @ before.T + errors).T @ x / 8, 1e-9)


@pytest.mark.parametrize("change", ["an entry", "another loss"])
def test_pairs_that_are_not_the_gradient_are_refused(change):
    net = linear()
    optimizer = GeneralizedGradientDescent(net.named_parameters(), lr=0.1)
    with optimizer.capture(net):
        loss = net(normal(8, 5)).square().mean()
    (loss + net.weight.cos().mean() if change == "another loss" else loss).backward()
    if change == "an entry":
        net.weight.grad[0, 0] *= 1.1
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match="the pairs captured for parameter 'weight' do not sum to a multiple"):
        optimizer.step()
    same(net.weight, before, 0.0)


@pytest.mark.parametrize("kind", BOTH)
def test_zero_grad_forgets_what_a_skipped_step_left(kind):
    found = []
    for skipped in (False, True):
        net = linear(torch.float32)
        optimizer, scaler = kind(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=16.0)
        for seed in range(2 if skipped else 1, 0, -1):
            with optimizer.capture(net):
                loss = net(normal(8, 5, seed=seed, dtype=torch.float32)).square().mean()
            optimizer.zero_grad()  # between the two passes, as some loops do
            scaler.scale(loss).backward()
            if seed == 2:
                net.weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
        found.append(net.weight)
    same(*found, 1e-5)


def test_only_what_has_a_gradient_counts_and_checkpoints_once():
    net, x = linear(), normal(8, 5)
    optimizer = DeltaGradientDescent(net.parameters(), lr=0.1)
    with optimizer.capture(net):
        net(normal(3, 5, seed=1))
        with torch.no_grad():
            net(normal(3, 5, seed=2))
        checkpoint(net, x.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
    (known,) = optimizer.captured.values()
    assert known.rows == 8
    same(known.gram, x.T @ x)


def test_rules_that_look_at_no_inputs_note_none():
    net = linear()
    optimizer = SGD(net.parameters(), lr=0.1)
    with optimizer.capture(net):
        net(normal(8, 5)).square().sum().backward()
    assert not optimizer.captured


@pytest.mark.parametrize("kind", BOTH)
def test_under_autocast(kind):
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        optimizer = kind(net.parameters(), lr=0.1)
        for seed in range(3):
            x = normal(8, 5, seed=seed, dtype=torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), optimizer.capture(net):
                loss = (net(x).float() - x).square().sum(-1).mean()
            loss.backward()
            optimizer.step()
        found.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert found[1].dtype == torch.float32
    same(*found, 0.01)


@pytest.mark.parametrize("form", ["exact", "averaged"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_in_bfloat16_is_near_that_in_float64(form, count):
    found = []
    for dtype in (torch.bfloat16, F64):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(count)]).to(torch.bfloat16).to(dtype)
        optimizer, x = DeltaGradientDescent(net.parameters(), lr=0.5, form=form), normal(8, 5).bfloat16().to(dtype)
        with optimizer.capture(net):
            (net(x) - x).square().sum(-1).mean().backward()
        optimizer.step()
        assert {p.dtype for p in net.parameters()} == {dtype}
        found.append(torch.cat([p.detach().flatten().double() for p in net.parameters()]))
    same(*found, 0.03)


CONVOLUTIONS = {
    "1d": (nn.Conv1d, (3, 4, 3), {"stride": 2, "padding": 1}, (2, 3, 9)),
    "2d": (nn.Conv2d, (3, 4, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}, (2, 3, 7, 6)),
    "same": (nn.Conv2d, (3, 4, (2, 3)), {"padding": "same"}, (2, 3, 5, 5)),
    "reflect": (nn.Conv2d, (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 5, 5)),
    "unbatched": (nn.Conv1d, (3, 4, 2), {}, (3, 6)),
    "3d": (nn.Conv3d, (2, 3, 2), {"padding": 1}, (2, 2, 3, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_linear_map_of_patches(name, kind):
    """The patches as the convolution's own derivative tells them: row p, entry j of the input matrix is the answer at p
    to a weight that is one at entry j."""
    layer, sizes, options, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    net, x = layer(*sizes, bias=False, **options).double(), normal(*shape)
    width = net.weight[0].numel()
    units = torch.eye(width, dtype=F64).view(width, *net.weight.shape[1:])
    twin = layer(sizes[0], width, sizes[2], bias=False, **options).double()
    twin.weight.data.copy_(units)
    channels = 0 if name == "unbatched" else 1
    patches = twin(x).movedim(channels, -1).reshape(-1, width).detach()
    flat = nn.Linear(width, sizes[1], bias=False).double()
    flat.weight.data.copy_(net.weight.flatten(1))
    for own, given in ((net, x), (flat, patches)):
        optimizer = kind(own.parameters(), lr=0.3, momentum=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.capture(own):
                y = own(given)
            (y.square().sum() / len(patches)).backward()
            optimizer.step()
    same(net.weight.flatten(1), flat.weight, 1e-10)


def test_a_grouped_convolution_descends():
    net, x = nn.Conv1d(4, 4, 3, groups=2, bias=False).double(), normal(2, 4, 9)
    before, optimizer = net.weight.detach().clone(), DeltaGradientDescent(net.parameters(), lr=0.3)
    with optimizer.capture(net):
        net(x).square().mean().backward()
    optimizer.step()
    same(net.weight, before - 0.3 * net.weight.grad)


def test_layers_of_one_shape_may_see_different_numbers_of_rows():
    """Beside each layer stepped by an optimizer of its own."""
    found = []
    for together in (True, False):
        torch.manual_seed(0)
        one, two = (nn.Linear(4, 4, bias=False).double() for _ in range(2))
        groups = [[one.weight, two.weight]] if together else [[one.weight], [two.weight]]
        optimizers = [GeneralizedGradientDescent(group, lr=0.1) for group in groups]
        with contextlib.ExitStack() as captures:
            for optimizer in optimizers:
                captures.enter_context(optimizer.capture(nn.ModuleList([one, two])))
            loss = two(one(normal(6, 4)).tanh()[:2]).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append(torch.stack([one.weight, two.weight]))
    same(*found, 1e-13)
