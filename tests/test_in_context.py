"""Levels of its own for every sequence of a batch, and the gradient that reaches their starts."""

import math

import pytest
import torch

from nestling.levels import InContext, Reader, initialization, level, reptile
from nestling.memory import decay, delta_gradient_descent, momentum, retain
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention, self_modifying

TEXT = torch.randint(0, 256, (3, 97), generator=torch.Generator().manual_seed(5))
MIXERS = {"attention": attention(window=24), "self_modifying": self_modifying(chunk=8, projection_chunk=8)}
FIRST, SECOND = (0, math.inf)


def build(mixer: str = "attention", rule=momentum(), step_size: float = 0.6, periods=(16, 48), **told) -> Decoder:
    fast, slow = periods
    levels = (level(fast, rule=rule, step_size=step_size, **told), level(slow, rule=rule, step_size=step_size))
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=MIXERS[mixer], levels=levels)
    return Decoder(config).double()


def pieces(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(
    ("mixer", "depth", "told"),
    [
        ("attention", 0, {}),
        ("attention", 1, {}),
        ("attention", (0, math.inf, 2, 0), {}),
        ("attention", 0, {"transfer": initialization(order=1)}),
        ("attention", math.inf, {"transfer": initialization(order=1)}),
        ("attention", 0, {"transfer": reptile()}),
        ("self_modifying", 0, {}),
        ("self_modifying", math.inf, {}),
    ],
    ids=str,
)
def test_every_row_is_a_reader_of_its_own(mixer: str, depth, told: dict) -> None:
    model = build(mixer, retain(decay(), delta_gradient_descent(momentum())), retention=0.9, **told)
    text = TEXT if mixer == "attention" else TEXT[:, :49]
    state, losses = InContext(model, depth).read(InContext(model, depth).begin(3), *pieces(text))
    for row in (0, 2):
        reader = Reader(model)
        lived, out = reader.read(reader.begin(), text[row])
        torch.testing.assert_close(losses[row], out.nll[1:], rtol=0, atol=1e-10)
        alone = flatten(lived.levels)
        for name, tensor in flatten(state.levels).items():
            torch.testing.assert_close(tensor[row], alone[name], rtol=0, atol=1e-9, msg=name)


def test_two_calls_are_one() -> None:
    model = build("self_modifying")
    reader = InContext(model)
    tokens, targets = pieces(TEXT)
    whole, losses = reader.read(reader.begin(3), tokens, targets)
    state, first = reader.read(reader.begin(3), tokens[:, :32], targets[:, :32])
    state, second = reader.read(state, tokens[:, 32:], targets[:, 32:])
    torch.testing.assert_close(torch.cat([first, second], 1), losses, rtol=0, atol=1e-10)
    for name, tensor in flatten(whole.levels).items():
        torch.testing.assert_close(flatten(state.levels)[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert state.position == 96
    assert state.updates == whole.updates == (6, 2, 6, 2)


def starts(model: Decoder) -> list[torch.Tensor]:
    return [weight for maps in model.level_weights() for weight in maps]


def outer_gradient(model: Decoder, depth, text: torch.Tensor = TEXT) -> list[torch.Tensor]:
    model.zero_grad()
    InContext(model, depth).accumulate(InContext(model, depth).begin(3), *pieces(text))
    return [weight.grad.clone() for weight in starts(model)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_second_order_is_the_slope_of_the_whole(mixer: str) -> None:
    """Central differences along a random direction of all starts, through five updates of one level and two of the
    other; what first order gives differs."""
    model, text = build(mixer, periods=(8, 16)), TEXT[:, :41]
    way = [torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(7)) for w in starts(model)]
    gradients = {depth: outer_gradient(model, depth, text) for depth in (FIRST, 2, SECOND)}

    def mean(by: float) -> float:
        moved = build(mixer, periods=(8, 16))
        with torch.no_grad():
            for weight, direction in zip(starts(moved), way, strict=True):
                weight.add_(by * direction)
        return float(InContext(moved).read(InContext(moved).begin(3), *pieces(text))[1].detach().mean())

    slope = (mean(1e-5) - mean(-1e-5)) / 2e-5
    found = {depth: sum(float((g * d).sum()) for g, d in zip(gs, way, strict=True)) for depth, gs in gradients.items()}
    assert found[SECOND] == pytest.approx(slope, rel=1e-6)
    assert abs(found[FIRST] / slope - 1) > 1e-3
    assert abs(found[2] / slope - 1) > 1e-4
    assert found[2] != found[FIRST]


def test_first_order_is_the_sum_of_gradients_at_the_fast_weights() -> None:
    """By another way: each segment alone, with the weights and the sequence state that stood before it."""
    model = build("self_modifying")
    expected = [torch.zeros_like(w) for w in starts(model)]
    reader, (tokens, targets) = InContext(model), pieces(TEXT)
    state = reader.begin(3)
    for first in range(0, 96, 16):
        part = slice(first, first + 16)
        leaves = tuple(tuple(w.detach().requires_grad_() for w in maps) for maps in state.levels.weights)
        logits, _ = model(tokens[:, part], state.sequence, weights=leaves)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, part], reduction="sum") / 288
        found = torch.autograd.grad(loss, [w for maps in leaves for w in maps])
        expected = [e + f.sum(0) for e, f in zip(expected, found, strict=True)]
        state, _ = reader.read(state, tokens[:, part], targets[:, part])
    for ours, theirs in zip(outer_gradient(model, FIRST), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, math.inf], ids=str)
def test_every_parameter_gets_the_gradient_of_read(depth) -> None:
    """One pass (or two) that adds up gradients = backpropagation from the mean of all losses."""
    model = build("attention")
    _, losses = InContext(model, depth).read(InContext(model, depth).begin(3), *pieces(TEXT))
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
    model.zero_grad()
    _, again = InContext(model, depth).accumulate(InContext(model, depth).begin(3), *pieces(TEXT))
    torch.testing.assert_close(again, losses.detach(), rtol=0, atol=1e-12)
    if depth == 0:  # `accumulate` cuts the sequence state at every segment, and so does `read` in first order
        assert not again.requires_grad
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11)


def test_what_does_not_count_is_not_learned() -> None:
    model = build()
    tokens, targets = pieces(TEXT)
    counts = torch.ones_like(tokens, dtype=torch.bool)
    counts[1, 20:] = False
    changed = targets.clone()
    changed[1, 20:] = 0
    reader = InContext(model)
    state, losses = reader.read(reader.begin(3), tokens, targets, counts)
    other, again = reader.read(reader.begin(3), tokens, changed, counts)
    assert torch.equal(losses, again)
    assert not losses[1, 20:].any()
    assert all(
        torch.equal(a, b) for a, b in zip(flatten(state.levels).values(), flatten(other.levels).values(), strict=True)
    )


def test_starts_learn_to_learn() -> None:
    """Contexts with a rule of their own (each byte is followed by another, drawn for the context): meta-learned, the
    levels gain more from the same updates than they did."""

    def contexts(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        successor = torch.stack([torch.randperm(8, generator=generator) for _ in range(8)])
        tokens = [torch.randint(0, 8, (8,), generator=generator)]
        for _ in range(128):
            jump = torch.randint(0, 8, (8,), generator=generator)
            follow = successor.gather(1, tokens[-1][:, None])[:, 0]
            tokens.append(torch.where(torch.rand(8, generator=generator) < 0.2, jump, follow))
        return torch.stack(tokens, 1)

    config = ModelConfig(
        vocabulary=8, dim=16, heads=2, blocks=1, mixer=attention(window=2), levels=(level(16, step_size=1.0),)
    )
    model = Decoder(config)
    reader, optimizer = InContext(model), torch.optim.Adam(model.parameters(), lr=3e-3)

    def gain() -> float:
        _, losses = reader.read(reader.begin(8), *pieces(contexts(10_000)))
        return float((losses[:, :16].mean() - losses[:, 64:].mean()).detach())

    before = gain()
    for number in range(60):
        optimizer.zero_grad()
        reader.accumulate(reader.begin(8), *pieces(contexts(number)))
        optimizer.step()
    assert gain() > before + 0.3, (before, gain())


def test_what_is_wrong_is_named() -> None:
    model = build()
    with pytest.raises(ValueError, match="depth has 2 entries, the model has 4 levels"):
        InContext(model, (0, 1))
    with pytest.raises(ValueError, match="depth must be a whole number >= 0, or inf, got -1"):
        InContext(model, -1)
    reader = InContext(model)
    with pytest.raises(ValueError, match="90 tokens after 0 end inside of a segment; give 80 or 96"):
        reader.read(reader.begin(3), TEXT[:, :90], TEXT[:, 1:91])
