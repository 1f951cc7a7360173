"""How the blocks of a continuum are wired: in a chain, side by side, and as levels that start again."""

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import Reader, backpropagation, chain, heads, initialization, level, reptile
from nestling.memory import gradient_descent, momentum
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention

TEXT = torch.randint(0, 256, (101,), generator=torch.Generator().manual_seed(5))
F64 = torch.float64


def build(*levels: level, **told) -> Decoder:
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=24), levels=levels, **told)
    return Decoder(config).double()


def after(model: Decoder, text: torch.Tensor):
    reader = Reader(model)
    return reader.read(reader.begin(), text)[0].levels


def test_heads_are_a_weighted_sum_of_blocks_that_see_the_same() -> None:
    model = build(level(16), level(48), level(96), wiring=heads())
    continuum = model.blocks[0].continuum
    with torch.no_grad():
        continuum.shares.copy_(torch.tensor([0.5, -1.0, 2.0]))
    x, expected = torch.randn(2, 5, 16, dtype=F64), 0.0
    for share, norm, (first, second) in zip(continuum.shares, continuum.norms, continuum.level_weights(), strict=True):
        expected = expected + share * (F.gelu(F.rms_norm(x, (16,), norm, eps=1e-6) @ first.mT) @ second.mT)
    torch.testing.assert_close(continuum(x), x + expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(model(TEXT[None])[0].logsumexp(-1).sum(), [continuum.shares, *continuum.norms])
    assert all(gradient.any() for gradient in gradients)


def test_one_head_is_a_chain() -> None:
    side, line = build(level(16), wiring=heads()), build(level(16), wiring=chain())
    torch.testing.assert_close(side(TEXT[None])[0], line(TEXT[None])[0], rtol=0, atol=1e-12)


def test_heads_learn_while_reading() -> None:
    model = build(level(16, step_size=0.5), level(48, step_size=0.5), wiring=heads())
    before, learned = flatten(model.level_weights()), flatten(after(model, TEXT).weights)
    assert not any(torch.equal(before[name], learned[name]) for name in before)


@pytest.mark.parametrize("transfer", [initialization(order=1), reptile()], ids=repr)
def test_a_level_starts_again_from_what_the_slower_one_learned(transfer) -> None:
    """Equation 72 by hand: gradients of every segment at the weights that stand, two clocks, and at the slow tick the
    slow level's step on the start, from which the fast level goes on."""
    fast, slow = level(16, step_size=0.8, transfer=transfer), level(48, step_size=0.5)
    model = build(fast, slow)
    own = model.level_weights()
    weights = [[w.detach() for w in maps] for maps in own]
    starts, restarts = {i: list(weights[i]) for i in (0, 2)}, 0
    sums = [[torch.zeros_like(w) for w in maps] for maps in weights]
    since = {i: [torch.zeros_like(w) for w in weights[i]] for i in starts}
    state = None
    for first in range(0, 96, 16):
        leaves = tuple(tuple(w.clone().requires_grad_() for w in maps) for maps in weights)
        logits, state = model(TEXT[None, first : first + 16], state, weights=leaves)
        loss = F.cross_entropy(logits[0], TEXT[first + 1 : first + 17], reduction="sum")
        found = iter(torch.autograd.grad(loss, [w for maps in leaves for w in maps]))
        state = type(state)(tuple(type(b)(*(x.detach() for x in b)) for b in state.blocks))
        for i, maps in enumerate(weights):
            gradients = [next(found) for _ in maps]
            sums[i] = [a + g for a, g in zip(sums[i], gradients, strict=True)]
            if i in starts:
                since[i] = [a + g for a, g in zip(since[i], gradients, strict=True)]
        for i, lvl in enumerate(model.levels):
            if (first + 16) % lvl.period == 0:
                weights[i] = [w - lvl.step_size / lvl.period * g for w, g in zip(weights[i], sums[i], strict=True)]
                sums[i] = [torch.zeros_like(g) for g in sums[i]]
        if (first + 16) % 48 == 0:
            restarts += 1
            for i in starts:
                if transfer == reptile():
                    toward = [s + 0.5 * (w - s) for s, w in zip(starts[i], weights[i], strict=True)]
                else:
                    toward = [s - 0.5 / 48 * g for s, g in zip(starts[i], since[i], strict=True)]
                starts[i], weights[i] = toward, list(toward)
                since[i] = [torch.zeros_like(g) for g in since[i]]
    assert restarts == 2
    got = after(model, TEXT[:97])
    for ours, theirs in zip(got.weights, weights, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert got.starts[1] is None
    assert all(torch.equal(a, b) for a, b in zip(got.weights[0], got.starts[0].weights, strict=True))


def test_a_start_that_never_moves_only_forgets() -> None:
    """With a slower level of step 0 the fast one falls back to the model's own weights at every slow tick."""
    model = build(level(16, transfer=initialization(order=1)), level(48, step_size=0.0))
    learned = after(model, TEXT[:49])
    assert all(torch.equal(a, b) for a, b in zip(learned.weights[0], model.level_weights()[0], strict=True))
    plain = after(build(level(16), level(48, step_size=0.0)), TEXT[:49])
    assert not torch.equal(plain.weights[0][0], learned.weights[0][0])


class Holding:
    """Takes every segment and makes no tick of the first level."""

    def takes(self, before, gradients, loss, tokens) -> bool:  # type: ignore[no-untyped-def]
        return True

    def moves(self, index: int, square: float) -> bool:
        return index != 0


def test_a_level_that_may_not_move_starts_again_nowhere() -> None:
    """Neither its own ticks nor those of its start move it, nor what its rule remembers; the start learns on."""
    fast = level(16, rule=momentum(), transfer=initialization(order=1))
    model = build(fast, level(40, rule=momentum()))
    reader = Reader(model, accept=Holding())
    held = reader.read(reader.begin(), TEXT[:97])[0].levels
    assert all(torch.equal(a, b) for a, b in zip(held.weights[0], model.level_weights()[0], strict=True))
    assert not any(rule.of.buffer.any() for rule in held.rules[0])
    assert not torch.equal(held.starts[0].weights[0], held.weights[0][0])
    free = after(model, TEXT[:97])
    assert [int(rules[0].elapsed) for rules in held.rules] == [int(rules[0].elapsed) for rules in free.rules]
    assert not torch.equal(free.weights[0][0], held.weights[0][0])


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"level\(48.*no slower level that learns a start"):
        build(level(16), level(48, transfer=reptile()))
    with pytest.raises(ValueError, match="no slower level"):
        build(level(16, transfer=reptile()), level(float("inf")))
    with pytest.raises(ValueError, match=r"got initialization\(\); second order"):
        level(16, transfer=initialization())
    assert level(16) == level(16, rule=gradient_descent(), transfer=backpropagation())
