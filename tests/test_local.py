"""Levels with a local associative objective: written with what their block is given, whatever the task says."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling.checks import options_live
from nestling.levels import InContext, Reader, StackConfig, initialization, level, local, neurons
from nestling.memory import decay, dot, gated_mlp, huber_norm, l2, mlp, momentum, parse, residual_l2, retain
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data
from nestling.sequence import attention

TEXT = torch.randint(0, 256, (97,), generator=torch.Generator().manual_seed(5))
BIASES = {"l2": l2(), "dot": dot(), "huber_norm": huber_norm(0.1), "residual_l2": residual_l2()}


def build(*levels) -> Decoder:
    config = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=8), levels=levels)
    return Decoder(config).double()


def read(model: Decoder, text: torch.Tensor):
    reader = Reader(model)
    return reader.read(reader.begin(), text)


def block_inputs(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """What the first level is given, by hand, and read from a fresh state."""
    x = model.embedding[tokens][None] / 0.02
    block = model.blocks[0]
    x = x + block.mixer(F.rms_norm(x, (16,), block.norm, eps=1e-6))[0]
    return F.rms_norm(x, (16,), block.continuum.norms[0], eps=1e-6)[0].detach()


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_a_tick_is_a_step_on_the_objective(bias) -> None:
    """Plain autograd on sum_t bias(M(k_t), k_{t+1}), the positions of one segment, MLP by hand."""
    model = build(local(level(16, step_size=0.3), bias), level(32))
    after = read(model, TEXT[:17])[0].levels.weights[0]
    keys = block_inputs(model, TEXT[:16])
    first, second = (w.detach().clone().requires_grad_() for w in model.level_weights()[0])
    answers = F.gelu(keys @ first.mT) @ second.mT
    target = bias.target(keys[:-1], keys[1:])
    bias.loss(answers[:-1], target).sum().backward()
    for weight, found in zip((first, second), after, strict=True):
        torch.testing.assert_close(found, weight.detach() - 0.3 / 16 * weight.grad, rtol=0, atol=1e-12)


def test_a_local_level_is_blind_to_the_task_and_the_others_are_not() -> None:
    """Other targets after the same tokens: the task's level learns something else, the local one does not."""
    model = build(local(level(16)), level(16))
    one, other = TEXT[:17], TEXT[:17].clone()
    other[16] = (other[16] + 1) % 256
    first, second = read(model, one)[0].levels.weights, read(model, other)[0].levels.weights
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert not torch.equal(first[1][0], second[1][0])
    plain = build(level(16), level(16))
    task = read(plain, one)[0].levels.weights
    assert not torch.equal(task[0][0], first[0][0])
    torch.testing.assert_close(task[1], first[1], rtol=0, atol=1e-12)


def test_local_levels_alone_need_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(local(level(16)), local(level(32)))

    def refused(*given, **options):  # type: ignore[no-untyped-def]
        raise AssertionError("a backward pass was taken")

    monkeypatch.setattr(torch.autograd, "grad", refused)
    before, after = model.level_weights(), read(model, TEXT[:33])[0].levels.weights
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True))


def test_a_local_level_learns_what_comes_next() -> None:
    """Of a text that repeats, its block comes to answer what it is given next."""
    model = build(local(level(16, step_size=0.1)))
    text = TEXT[:8].repeat(20)

    def wrong(weights) -> float:  # type: ignore[no-untyped-def]
        keys = block_inputs(model, text)
        answers = F.gelu(keys @ weights[0].mT) @ weights[1].mT
        return float((answers[:-1] - keys[1:]).square().mean())

    learned = read(model, text)[0].levels.weights[0]
    assert wrong(learned) < 0.7 * wrong([w.detach() for w in model.level_weights()[0]])


@pytest.mark.parametrize("depth", [0, math.inf], ids=["first order", "second order"])
def test_in_context_rows_are_readers_and_the_outer_gradient_is_a_slope(depth: float) -> None:
    rule = retain(decay(), momentum())
    texts = torch.stack([TEXT[:33], TEXT.flip(0)[:33]])

    def made() -> Decoder:
        return build(local(level(8, gated_mlp(), rule, step_size=0.1, retention=0.9)), level(16, rule=rule))

    model = made()
    reader = InContext(model, depth)
    state, losses = reader.read(reader.begin(2), texts[:, :-1], texts[:, 1:])
    for row in (0, 1):
        lived, out = read(model, texts[row])
        torch.testing.assert_close(losses[row], out.nll[1:], rtol=0, atol=1e-10)
        alone = flatten(lived.levels)
        for name, tensor in flatten(state.levels).items():
            torch.testing.assert_close(tensor[row], alone[name], rtol=0, atol=1e-10, msg=name)
    start = model.level_weights()[0]
    way = [torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(7)) for w in start]
    gradients = torch.autograd.grad(losses.mean(), start)
    found = sum(float((g * d).sum()) for g, d in zip(gradients, way, strict=True))

    def mean(by: float) -> float:
        moved = made()
        with torch.no_grad():
            for weight, direction in zip(moved.level_weights()[0], way, strict=True):
                weight.add_(by * direction)
        inner = InContext(moved)
        return float(inner.read(inner.begin(2), texts[:, :-1], texts[:, 1:])[1].detach().mean())

    slope = (mean(1e-5) - mean(-1e-5)) / 2e-5
    assert (found == pytest.approx(slope, rel=1e-6)) == (depth == math.inf)


def test_options_and_configurations() -> None:
    config = ModelConfig(dim=16, heads=2, levels=(local(level(8), dot()), level(64)))
    assert from_data(ModelConfig, to_data(config)) == config
    assert parse(repr(config.levels[0])) == config.levels[0]
    finding = options_live(ModelConfig(blocks=1, mixer=attention(), levels=(local(level(4)), level(8))))
    assert finding.passed, finding.detail


@pytest.mark.parametrize(
    ("build_it", "said"),
    [
        (lambda: local(level(1)), ">= 2 tokens, got 1"),
        (lambda: local(neurons((level(8), level(16)))), "takes one level"),
        (lambda: local(level(8, mlp()), residual_l2()), "use l2"),
        (lambda: StackConfig(levels=(local(level(8)),)), "a stack learns the task"),
        (lambda: build(local(level(8, transfer=initialization(order=1)))), "no slower level"),
    ],
    ids=lambda told: told if isinstance(told, str) else "",
)
def test_what_is_refused(build_it, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_it()


def test_what_does_not_count_cannot_be_left_out() -> None:
    reader = InContext(build(local(level(8))))
    counts = torch.ones(1, 16, dtype=torch.bool)
    counts[0, 3] = False
    with pytest.raises(ValueError, match="learns from every position"):
        reader.read(reader.begin(1), TEXT[None, :16], TEXT[None, 1:17], counts)
