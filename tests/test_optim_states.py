"""States of optimizers: other dtypes, shapes and devices, options that change on the way, clocks of groups."""

import copy
import inspect
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from nestling import optim
from nestling.memory import Rule, normalize
from nestling.optim import M3, OPTIMIZERS, SGD, Adam, AdamW, Muon, to_optimizer
from nestling.optim.states import renamed

NAMES = sorted(OPTIMIZERS)
F64 = torch.float64
EXTRA = {"M3": {"precision": "weight", "periods": 2}, "Muon": {"precision": "weight"}}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def make(name: str, params, **options):
    return OPTIMIZERS[name](params, **EXTRA.get(name, {}), **options)


def run(weight: nn.Parameter, optimizer, seeds, size: float = 1.0) -> Tensor:
    for seed in seeds:
        weight.grad = (size * normal(*weight.shape, seed=seed)).to(weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("piece", [4, 1 << 17], ids=["pieces", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_float16_is_stepped_in_float32(name, piece, monkeypatch):
    """Beside the same in float32, rounded after every step: squares of such gradients are 0 in float16, as is eps."""
    monkeypatch.setitem(optim.adapter.PIECE, "cpu", piece)
    start = normal(4, 3).half()
    half, single = nn.Parameter(start.clone()), nn.Parameter(start.float())
    one, two = (make(name, [weight], lr=0.01) for weight in (half, single))
    for seed in range(4):
        run(half, one, [seed], 1e-4)
        single.grad = half.grad.float()
        two.step()
        single.data = single.data.half().float()
    assert half.dtype == torch.float16
    assert torch.equal(half.float(), single)
    states = [t for t in one.state[half].values() if t.is_floating_point()]
    assert {t.dtype for t in states} <= {torch.float32}
    again = make(name, [half], lr=0.5)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    for key, value in one.state[half].items():
        assert torch.equal(again.state[half][key], value)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_of_no_numbers_is_left_alone(name, shape):
    empty, weight = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 3))
    optimizer = make(name, [empty, weight], lr=0.1)
    empty.grad = torch.zeros(shape)
    run(weight, optimizer, range(2))
    assert not optimizer.state[empty]
    assert not torch.equal(weight, torch.ones(2, 3))


@pytest.mark.parametrize("name", [n for n in NAMES if "weight_decay" in inspect.signature(OPTIMIZERS[n]).parameters])
def test_decay_of_the_weights_may_come_and_go(name):
    """Beside a decay too small to move a number, for which the expression stays as it is."""
    found = []
    for least in (0.0, 1e-300):
        weight = nn.Parameter(normal(4, 3))
        optimizer = make(name, [weight], lr=0.02, weight_decay=0.1)
        for decay in (0.1, least, 0.2):
            optimizer.param_groups[0]["weight_decay"] = decay
            run(weight, optimizer, range(3))
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)


def test_as_torchs_does():
    ours, theirs = nn.Parameter(normal(4, 3)), nn.Parameter(normal(4, 3))
    one, two = AdamW([ours], weight_decay=0.0), torch.optim.AdamW([theirs], weight_decay=0.0)
    for decay in (0.0, 0.3, 0.0):
        for weight, optimizer in ((ours, one), (theirs, two)):
            optimizer.param_groups[0]["weight_decay"] = decay
            run(weight, optimizer, range(3))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("SGD", "dampening", (0.0, 0.3)),
        ("Adagrad", "lr_decay", (0.0, 0.1)),
        ("RMSprop", "momentum", (0.0, 0.9)),
        ("RMSprop", "centered", (False, True)),
        ("AdamW", "amsgrad", (False, True)),
        ("FullMatrixAdagrad", "beta", (0.0, 0.9)),
    ],
)
def test_a_memory_that_an_option_adds_begins_where_the_others_go_on(name, option, values):
    """What both expressions have is the same tensor, moved on by one step; what one has alone is new, or gone."""
    weight = nn.Parameter(normal(4, 3))
    base = {"momentum": 0.5} if option == "dampening" else {}
    optimizer = OPTIMIZERS[name]([weight], **base, **{option: values[0]})
    run(weight, optimizer, range(3))
    for value, more in ((values[1], 1), (values[0], -1)):
        before = dict(optimizer.state[weight])
        optimizer.param_groups[0][option] = value
        run(weight, optimizer, [7])
        after = optimizer.state[weight]
        assert (len(after) - len(before)) * more > 0
        for key, count in after.items():
            if key.endswith("steps") and len(renamed(before, after)) == min(len(before), len(after)):
                began = key not in renamed(before, after).values()
                assert int(count) == 1 if began else int(count) >= 4
    assert bool(weight.isfinite().all())


def test_other_memories_are_refused():
    weight = nn.Parameter(normal(4, 3))
    optimizer = M3([weight], precision="weight", periods=(2,))
    run(weight, optimizer, range(3))
    before, optimizer.param_groups[0]["periods"] = weight.detach().clone(), (2, 4)
    with pytest.raises(ValueError, match="an option that changes which memories there are is set before"):
        run(weight, optimizer, [3])
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("stored", "needed", "expected"),
    [
        ("a of.b", "of.a of.of.b", {"a": "of.a", "of.b": "of.of.b"}),
        (
            "of.steps of.v of.of.steps",
            "steps v of.steps",
            {"of.steps": "steps", "of.v": "v", "of.of.steps": "of.steps"},
        ),
        ("steps v", "of.steps of.v buffer", {"steps": "of.steps", "v": "of.v"}),
        ("buffer of.v", "v", {"of.v": "v"}),
        ("buffer", "", {}),
        ("a b", "a c", None),
    ],
)
def test_names_of_another_expression(stored, needed, expected):
    assert renamed(stored.split(), needed.split()) == expected


STATELESS = ("SGD", "DeltaGradientDescent", "GeneralizedGradientDescent")  # as they are by default


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATELESS])
def test_the_state_of_another_shape_is_refused_when_it_is_loaded(name):
    weight, other = nn.Parameter(normal(4, 3)), nn.Parameter(normal(5, 3))
    one, two = make(name, [weight]), make(name, [other])
    run(weight, one, range(2))
    with pytest.raises(ValueError, match=r"parameter 0 is not of one of shape \[5, 3\]"):
        two.load_state_dict(one.state_dict())
    assert not two.state


@pytest.mark.parametrize("name", ["Adam", "M3", "SGD"])
def test_a_state_is_the_same_in_pieces_and_whole(name, monkeypatch):
    """A device with a larger cache steps whole what this one cuts: saved here, a state goes on there."""
    found = []
    for other in (4, 1 << 24):
        monkeypatch.setitem(optim.adapter.PIECE, "cpu", 4)
        weight = nn.Parameter(normal(2, 3, 4))
        one = make(name, [weight], **({"momentum": 0.9} if name == "SGD" else {}))
        run(weight, one, range(3))
        monkeypatch.setitem(optim.adapter.PIECE, "cpu", other)
        two = make(name, [weight])
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        found.append(run(weight, two, range(3, 6)).clone())
    assert torch.equal(*found)


def test_the_inputs_of_a_convolution_count_as_one_map_also_when_loaded():
    layer, x = nn.Conv1d(2, 3, 2, bias=False).double(), normal(2, 2, 5)
    one, two = (to_optimizer(normalize(), layer.parameters()) for _ in range(2))
    with one.capture(layer):
        layer(x).square().sum().backward()
    one.step()
    two.load_state_dict(one.state_dict())
    assert two.state[layer.weight]["squared_norm"].shape == ()


def test_a_group_that_is_refused_is_not_there():
    weight = nn.Parameter(normal(4, 3))
    optimizer = Muon([weight])
    with pytest.raises(ValueError, match="Muon steps matrices"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


class TestPeriod:
    def test_groups_have_clocks_of_their_own(self):
        """The slow group steps at every third gradient, by the sum and a third of the rate; the fast one at each."""
        fast, slow = nn.Parameter(normal(4, 3)), nn.Parameter(normal(4, 3))
        optimizer = AdamW([{"params": [fast]}, {"params": [slow], "period": 3}], lr=0.03, weight_decay=0.1)
        twins = [nn.Parameter(normal(4, 3)) for _ in range(2)]
        theirs = [torch.optim.AdamW([twins[0]], 0.03, weight_decay=0.1)]
        theirs.append(torch.optim.AdamW([twins[1]], 0.01, weight_decay=0.3))  # retention is not divided
        for step in range(7):
            fast.grad = slow.grad = normal(4, 3, seed=step)
            optimizer.step()
            twins[0].grad = normal(4, 3, seed=step)
            theirs[0].step()
            if step % 3 == 2:
                twins[1].grad = sum(normal(4, 3, seed=s) for s in range(step - 2, step + 1))
                theirs[1].step()
            torch.testing.assert_close(fast, twins[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(slow, twins[1], rtol=0, atol=1e-12)
        assert not torch.equal(slow, normal(4, 3))

    @pytest.mark.parametrize("name", [n for n in NAMES if n != "GeneralizedGradientDescent"])
    def test_every_optimizer_has_them(self, name):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3, bias=False).double()
        optimizer, moved = make(name, layer.parameters(), lr=0.02, period=2), []
        for seed in range(4):
            before = layer.weight.detach().clone()
            optimizer.zero_grad()
            with optimizer.capture(layer):
                layer(normal(5, 4, seed=seed)).square().sum().backward()
            optimizer.step()
            moved.append(not torch.equal(layer.weight, before))
        assert moved == [False, True] * 2

    def test_a_clock_inside_counts_ticks(self):
        """M3 on every third sum of gradients; its slow memory speaks from its own second step on."""
        found = []
        for period, size in ((3, 0.3), (1, 0.1)):
            weight = nn.Parameter(normal(4, 3))
            optimizer = M3([weight], lr=size, period=period, periods=2, precision="weight")
            for tick in range(5):
                parts = [normal(4, 3, seed=3 * tick + i) for i in range(3)]
                for gradient in parts if period == 3 else [sum(parts)]:
                    weight.grad = gradient.clone()
                    optimizer.step()
            found.append(weight.detach())
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)

    def test_what_was_not_captured_descends_on_its_clock(self):
        weight, start = nn.Parameter(normal(4, 3)), normal(4, 3)
        run(weight, optim.DeltaGradientDescent([weight], lr=0.2, weight_decay=0.5, period=2), range(2))
        expected = 0.9 * start - 0.1 * (normal(4, 3, seed=0) + normal(4, 3, seed=1))
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-13)

    def test_they_are_judged(self):
        weight = nn.Parameter(normal(4, 3))
        with pytest.raises(ValueError, match="period must be a whole number of tokens >= 1, or inf, got 0"):
            SGD([weight], period=0)
        with pytest.raises(ValueError, match="a clock keeps the sum of a period, and not its pairs"):
            optim.GeneralizedGradientDescent([weight], period=2)


def test_what_is_flat_is_one_matrix():
    """The filters of a convolution, and the same numbers as a matrix."""
    start, grads = normal(4, 3, 2, 2), [normal(4, 3, 2, 2, seed=s) for s in range(1, 6)]
    filters, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    options = {"lr": 0.1, "precision": "weight", "periods": 2}
    one, two = M3([filters], flat=True, **options), M3([matrix], **options)
    each = nn.Parameter(start.clone())
    three = M3([each], **options)
    for g in grads:
        filters.grad, matrix.grad, each.grad = g.clone(), g.flatten(1).clone(), g.clone()
        for optimizer in (one, two, three):
            optimizer.step()
    torch.testing.assert_close(filters.flatten(1), matrix, rtol=0, atol=1e-13)
    assert not torch.allclose(filters, each, atol=1e-3)
    again = M3([filters], flat=True, **options)
    again.load_state_dict(one.state_dict())


def test_a_counter_of_filters_is_one_number():
    weight = nn.Parameter(normal(4, 3, 2, 2))
    optimizer = Adam([weight])
    run(weight, optimizer, range(2))
    assert optimizer.state[weight]["steps"].shape == ()


class _tells(Rule, abstract=True):
    """Stands still, and notes in which order its functions were called."""

    told: ClassVar[list[str]] = []

    def init(self, weight):
        self.told.append("init")
        return (torch.zeros_like(weight),)

    def step(self, weight, gradient, state, gates):
        self.told.append("step")
        return weight, state


def test_states_are_begun_before_any_step():
    weights = [nn.Parameter(normal(rows, 3)) for rows in (2, 3, 4)]
    optimizer = to_optimizer(_tells(), weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    _tells.told.clear()
    optimizer.step()
    assert _tells.told.count("step") == 3
    assert _tells.told[-3:] == ["step"] * 3
