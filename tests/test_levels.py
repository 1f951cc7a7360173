"""The continuum: clocks, ticks, and learning while reading."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import LevelsState, Reader, level
from nestling.levels.judging import learn
from nestling.levels.reading import next_cut
from nestling.memory import clip, decay, decay_to_start, delta_gradient_descent, momentum, retain
from nestling.memory.rule import Change
from nestling.memory.state import clone, flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention, self_modifying

TEXT = torch.randint(0, 256, (151,), generator=torch.Generator().manual_seed(5))


def build(*levels: level, mixer=None, seed: int = 0) -> Decoder:
    mixer = mixer or self_modifying(chunk=8, projection_chunk=8)
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=mixer, levels=levels)
    return Decoder(config, seed=seed).double()


def weights_after(model: Decoder, text: torch.Tensor) -> dict[str, torch.Tensor]:
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), text)
    return flatten(state.levels.weights)


@pytest.mark.parametrize(
    "rule",
    [momentum(), retain(decay(), momentum()), retain(decay(), delta_gradient_descent(momentum(clip())))],
    ids=repr,
)
@pytest.mark.parametrize("pieces", [[1] * 83, [7, 50, 1, 25], [16, 16, 16, 35]], ids=lambda p: str(p[:4]))
def test_one_pass_is_split_passes_with_learning(rule, pieces: list[int]) -> None:
    model = build(level(16, rule=rule, retention=0.9), level(40, rule=rule, retention=0.8))  # 40 is no multiple of 16
    reader, text = Reader(model), TEXT[:83]
    whole, out = reader.read(reader.begin(), text)
    state, nll, moved = reader.begin(), [], []
    for part in text.split(pieces):
        state, got = reader.read(state, part)
        nll.append(got.nll)
        moved.append(got.moved)
    torch.testing.assert_close(torch.cat(nll), out.nll, rtol=0, atol=1e-10, equal_nan=True)
    # the last cut may still be open in one and closed in the other only if its token has not arrived
    torch.testing.assert_close(torch.cat(moved), out.moved, rtol=0, atol=1e-10)
    for name, tensor in flatten(whole.levels).items():
        torch.testing.assert_close(flatten(state.levels)[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert int(state.position) == int(whole.position) == 83


def test_cuts_are_absolute_and_split_at_ticks() -> None:
    cuts, position = [], 0
    while position < 120:
        position = next_cut(position, (16, 40, math.inf), 16)
        cuts.append(position)
    assert cuts == [16, 32, 40, 48, 64, 80, 96, 112, 120]


def test_off_the_clock_nothing_changes() -> None:
    model = build(
        level(16, retention=0.5, rule=retain(decay(), momentum())),
        level(48, retention=0.5, rule=retain(decay(), momentum())),
    )
    before = flatten(model.level_weights())
    after = weights_after(model, TEXT[:48])  # token 48 has not arrived
    slow = [name for name in before if int(name.split(".")[0]) % 2 == 1]
    fast = [name for name in before if int(name.split(".")[0]) % 2 == 0]
    assert slow
    assert all(torch.equal(before[name], after[name]) for name in slow)
    assert not any(torch.equal(before[name], after[name]) for name in fast)
    ticked = weights_after(model, TEXT[:49])  # now it has
    assert not any(torch.equal(before[name], ticked[name]) for name in slow)


def test_tick_is_the_sum_of_per_token_gradients() -> None:
    """At the tick: minus step_size / period times the sum of per-token gradients at the period's first weights,
    with the sequence state carried over the cuts and the graph cut there; token by token, by plain autograd."""
    period, segment = 32, 16
    model = build(level(period, step_size=0.7), level(math.inf))
    own = model.level_weights()
    after = flatten(
        Reader(model, segment=segment)
        .read(Reader(model, segment=segment).begin(), TEXT[: period + 1])[0]
        .levels.weights
    )
    total = {name: torch.zeros_like(w) for name, w in flatten(own).items()}
    state = None
    for first in range(0, period, segment):
        tokens, targets = TEXT[first : first + segment], TEXT[first + 1 : first + segment + 1]
        for t in range(segment):
            leaves = tuple(tuple(w.detach().requires_grad_() for w in maps) for maps in own)
            logits, _ = model(tokens[None], state, weights=leaves)
            loss = F.cross_entropy(logits[0, t], targets[t])
            named = flatten(leaves)
            for name, gradient in zip(
                named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True
            ):
                total[name] += 0 if gradient is None else gradient
        with torch.no_grad():
            _, state = model(tokens[None], state, weights=own)
    for name, start in flatten(own).items():
        step = 0.7 / period if int(name.split(".")[0]) % 2 == 0 else 0.0
        torch.testing.assert_close(after[name], start.detach() - step * total[name], rtol=0, atol=1e-10, msg=name)


def test_infinite_period_is_a_frozen_mlp() -> None:
    model = build(level(math.inf), level(math.inf))
    learning, frozen = Reader(model), Reader(model, learning=False)
    state, out = learning.read(learning.begin(), TEXT)
    _, still = frozen.read(frozen.begin(), TEXT)
    torch.testing.assert_close(out.nll, still.nll, rtol=0, atol=1e-10, equal_nan=True)
    for name, weight in flatten(model.level_weights()).items():
        assert torch.equal(flatten(state.levels.weights)[name], weight)


def test_step_size_zero_is_frozen() -> None:
    model = build(level(16, step_size=0.0), level(48, step_size=0.0))
    before = flatten(model.level_weights())
    after = weights_after(model, TEXT)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_level_is_a_transformer_mlp() -> None:
    """k = 1: the block is x + W2 gelu(W1 norm x), trained by ordinary backpropagation."""
    model = build(level(math.inf), mixer=attention(window=32))
    block = model.blocks[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    first, second = block.continuum.level_weights()[0]
    by_hand = x + F.gelu(F.rms_norm(x, (16,), block.continuum.norms[0], eps=1e-6) @ first.mT) @ second.mT
    torch.testing.assert_close(block.continuum(x), by_hand, rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(block.continuum(x).sum(), [first, second])
    expected = torch.autograd.grad(by_hand.sum(), [first, second])
    torch.testing.assert_close(gradient, expected)


def test_reading_leaves_the_model_alone() -> None:
    model = build(level(16), level(48))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reader = Reader(model)
    start = reader.begin()
    kept = {name: tensor.clone() for name, tensor in flatten(start).items()}
    reader.read(start, TEXT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in flatten(start).items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Refusing:
    """Refuses the segments with these numbers, and the ticks of these levels; keeps what it was asked of."""

    def __init__(self, *refused: int, still: tuple[int, ...] = ()) -> None:
        self.refused, self.still, self.asked = refused, still, 0
        self.seen: list[LevelsState] = []  # before each segment

    def takes(self, before, gradients, loss, tokens) -> bool:  # type: ignore[no-untyped-def]
        self.asked += 1
        self.seen.append(clone(before))
        return self.asked - 1 not in self.refused

    def moves(self, index: int, square: float) -> bool:
        return index not in self.still


@pytest.mark.parametrize("asked", [None, Refusing()], ids=["free", "judged"])
def test_a_call_writes_over_what_it_owns_and_nothing_else(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """One accumulator for the segments of a call and one place for a level's weights after its first tick, guarded or
    not; and never those of a state which somebody holds."""
    model = build(level(16, rule=momentum()), level(16), level(80), mixer=attention(window=32))
    sums, weights = [], []

    def watched(levels, before, *given):  # type: ignore[no-untyped-def]
        sums.append([rules[0].gradient.data_ptr() for rules in before.rules])
        weights.append([maps[0].data_ptr() for maps in before.weights])
        return learn(levels, before, *given)

    monkeypatch.setattr("nestling.levels.reading.learn", watched)
    reader = Reader(model, accept=asked)
    middle, _ = reader.read(reader.begin(), TEXT[:49])
    held = {name: tensor.clone() for name, tensor in flatten(middle).items()}
    assert len(sums) == 3
    assert len({place[2] for place in sums[1:]}) == 1
    for fast in (0, 1):
        assert weights[0][fast] != weights[1][fast] == weights[2][fast] == middle.levels.weights[fast][0].data_ptr()
    end, _ = reader.read(middle, TEXT[49:])
    assert sums[3][2] == middle.levels.rules[2][0].gradient.data_ptr() not in [place[2] for place in sums[4:]]
    assert weights[3][1] not in [place[1] for place in weights[4:]]
    assert all(torch.equal(tensor, held[name]) for name, tensor in flatten(middle).items())
    whole, _ = reader.read(reader.begin(), TEXT)
    for name, tensor in flatten(whole.levels).items():
        torch.testing.assert_close(flatten(end.levels)[name], tensor, rtol=0, atol=1e-10, msg=name)


def test_a_refused_write_leaves_every_bit_as_it_was() -> None:
    """Refused before it is made, in the middle of a call that adds in place: weights and sums stay, clocks go on."""
    model = build(level(16, rule=momentum()), level(80), mixer=attention(window=32))
    asked = Refusing(1, 2)
    reader = Reader(model, accept=asked, segment=8)
    reader.read(reader.begin(), TEXT[:49])
    assert len(asked.seen) == 6
    for segment in (1, 2, 3):  # at the fast level's tick, between ticks, and one that is taken
        before, after = (flatten(state) for state in asked.seen[segment : segment + 2])
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        clocks = {name for name in before if name.endswith("elapsed")}
        if segment == 2:
            assert changed == clocks
        slow = [name for name in before if name.startswith(("weights.1.", "rules.1.")) and name not in clocks]
        assert bool(changed & set(slow)) == (segment == 3)


@pytest.mark.parametrize("rule", [momentum(), retain(decay(), momentum())], ids=repr)
def test_a_tick_that_is_not_made_leaves_its_level_and_no_other(rule) -> None:
    """The weights and the momentum of the level stay; its sum is gone and its clock goes on, as if it had been made."""
    model = build(level(16, rule=rule, retention=0.9), level(32), mixer=attention(window=32))
    asked = Refusing(still=(0, 2))
    reader = Reader(model, accept=asked)
    start = flatten(reader.begin().levels)
    after = flatten(reader.read(reader.begin(), TEXT[:40])[0].levels)
    free = flatten(Reader(model).read(Reader(model).begin(), TEXT[:40])[0].levels)
    for name, tensor in after.items():
        still = name.split(".")[1] in "02"
        if name.startswith("weights") or "buffer" in name:
            assert torch.equal(tensor, start[name]) == still, name
        elif name.endswith("elapsed"):
            assert int(tensor) == int(free[name])
        elif name.endswith("gradient"):
            assert not tensor.any(), name


def test_what_a_rule_keeps_is_never_written_over() -> None:
    """A weight that is part of the rule's state, as a retention's start is, stays what it was."""
    model = build(level(16, rule=retain(decay_to_start(), momentum()), retention=0.5), mixer=attention(window=32))
    start = [w.detach().clone() for maps in model.level_weights() for w in maps]
    state, _ = Reader(model).read(Reader(model).begin(), TEXT)
    found = [kept.of.start for rules in state.levels.rules for kept in rules]
    assert all(torch.equal(a, b) for a, b in zip(found, start, strict=True))
    weight, added = torch.ones(2, 3), torch.full((2, 3), 4.0)
    elsewhere = Change(weight, 0.5, added, (weight[:1],)).made_in_place()
    assert torch.equal(weight, torch.ones(2, 3))
    there = Change(weight, 0.5, added, ()).made_in_place()
    assert there is weight
    assert torch.equal(there, elsewhere)


def test_a_judged_call_is_a_free_one_where_nothing_is_refused() -> None:
    """To the last bit; what the weights moved by is the same but for rounding."""
    model = build(level(16, rule=momentum()), level(32), level(80), mixer=attention(window=32))
    found = [Reader(model, accept=accept).read(Reader(model).begin(), TEXT) for accept in (None, Refusing())]
    (free, out), (judged, told) = found
    assert all(torch.equal(tensor, flatten(judged.levels)[name]) for name, tensor in flatten(free.levels).items())
    torch.testing.assert_close(out.moved, told.moved, rtol=1e-9, atol=1e-14)
    assert bool((out.moved[-1, 1:] >= 0).all())


def test_what_moved_is_the_distance_of_the_weights() -> None:
    """In pieces of rows, for a level that only adds and for one that forgets; by the weights before and after."""
    for rule in (momentum(), retain(decay(), momentum())):
        model = build(level(16, rule=rule, retention=0.9), level(32, rule=rule), mixer=attention(window=32))
        reader = Reader(model, accept=Refusing())
        middle, _ = reader.read(reader.begin(), TEXT[:32])
        after, out = reader.read(middle, TEXT[32:33])
        for index, (old, new) in enumerate(zip(middle.levels.weights, after.levels.weights, strict=True)):
            change = torch.cat([(b - a).flatten() for a, b in zip(old, new, strict=True)])
            torch.testing.assert_close(out.moved[0, 1 + index], change.square().mean().sqrt())


def test_learning_does_not_stop_in_eval_mode() -> None:
    model = build(level(16), level(48))
    trained = weights_after(model.train(), TEXT)
    evaluated = weights_after(model.eval(), TEXT)
    assert all(torch.equal(trained[name], evaluated[name]) for name in trained)


def test_document_end_closes_the_segment_and_starts_afresh() -> None:
    model = build(level(16), level(48))
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), TEXT[:21])
    closed, out = reader.end_document(state)
    assert int(closed.position) == 21
    assert out.moved.shape[0] == 1
    fresh = flatten(reader.begin().now)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in flatten(closed.now).items())
    elapsed = closed.levels.rules[0][0].elapsed
    assert int(elapsed) == 21 % 16  # the clocks counted every token
    _, following = reader.read(closed, TEXT[21:30])
    assert math.isnan(following.nll[0])


def test_surprise_falls_when_a_text_comes_back() -> None:
    model = build(*(level(period, step_size=0.5) for period in (16, 48)))
    reader, state, means = Reader(model), None, []
    for _ in range(4):
        state, out = reader.read(reader.begin() if state is None else state, TEXT[:64])
        means.append(float(out.nll[1:].mean()))
    assert means[0] > means[1] > means[2] > means[3]


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"period": 0}, "period"),
        ({"period": 2.5}, "period"),
        ({"step_size": -1.0}, "step_size"),
        ({"momentum": 2.0}, "momentum"),
        ({"retention": -1.0}, "retention"),
    ],
    ids=str,
)
def test_bad_levels_are_named(broken: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(level(16), **broken)


def test_levels_are_listed_fast_to_slow() -> None:
    with pytest.raises(ValueError, match="fast to slow"):
        build(level(48), level(16))
