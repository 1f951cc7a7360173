"""What pre-training remembered goes on in life."""

import math

import pytest
import torch

from nestling.learner import load_model, open_life
from nestling.levels import Reader, Whole, hand_over, level, moments_of
from nestling.memory import adam, dampen, decay, momentum, retain, scale
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.train import Stream, Trainer, save_run
from test_whole import LENGTH, PLAIN, TEXT, adamw


def build(*levels: level) -> Decoder:
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=24), levels=levels)
    return Decoder(config).double()


def trained(model: Decoder, steps: int) -> Trainer:
    trainer, stream = Trainer(model, PLAIN), Stream.of([TEXT], rows=1, length=LENGTH)
    for _ in range(steps):
        trainer.run_step(stream)
    return trainer


def test_life_goes_on_where_training_stopped() -> None:
    """12 steps of training, then everything learned while reading 8 more of them = 20 steps of training; without the
    moments it is not."""
    levels = (adamw(LENGTH), adamw(LENGTH))
    reference = build(*levels)
    trained(reference, 20)
    model = build(*levels)
    trainer = trained(model, 12)
    whole = Whole(model, adamw(LENGTH))
    reader = Reader(whole)
    start = reader.begin()
    weights = [*whole.model.level_weights(), [model.get_parameter(name) for name in whole.names]]
    columns = [
        [m._replace(mean=m.mean.view_as(w), square=m.square.view_as(w)) for m, w in zip(found, maps, strict=True)]
        for found, maps in zip(moments_of(trainer.optimizer, weights), start.levels.weights, strict=True)
    ]
    begun = {"with": hand_over(whole.levels, start.levels, columns), "without": start.levels}
    text = torch.tensor(list(TEXT[12 * LENGTH : 20 * LENGTH + 1]))
    far = {}
    for name, levels_state in begun.items():
        state = start._replace(levels=levels_state, before=trainer.states[0], now=trainer.states[0])
        lived, _ = reader.read(state, text)
        pairs = zip(lived.levels.weights[0], reference.level_weights()[0], strict=True)
        far[name] = max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)
    assert far["with"] < 1e-9
    assert far["without"] > 1e-4


@pytest.mark.parametrize(
    ("rule", "share"), [(momentum(), 1.0), (momentum(dampen()), 0.2), (retain(decay(), momentum()), 1.0)]
)
def test_momentum_is_filled_as_if_the_mean_had_been_its_gradient(rule, share: float) -> None:
    lvl = level(64, rule=rule, step_size=0.4, momentum=0.8)
    model = build(lvl, level(128))
    trainer = trained(model, 12)
    begun = Reader(model).begin().levels
    found = moments_of(trainer.optimizer, model.level_weights())
    state = hand_over(model.levels, begun, found).rules[0][0].of
    buffer = state.of.buffer if hasattr(state, "start") else state.buffer
    mean = found[0][0].mean / (1 - 0.9 ** found[0][0].steps)
    torch.testing.assert_close(buffer, -share * 0.4 * mean / (1 - 0.8), rtol=1e-9, atol=0)
    assert buffer.any()


def test_what_has_no_place_is_let_go() -> None:
    model = build(level(64), level(math.inf, rule=scale(adam())))
    trainer = trained(model, 4)
    begun = Reader(model).begin().levels
    after = hand_over(model.levels, begun, moments_of(trainer.optimizer, model.level_weights()))
    assert after.rules[0] == begun.rules[0] or not after.rules[0][0].gradient.any()
    assert int(after.rules[1][0].of.steps) == 0
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert moments_of(plain, model.level_weights())[0] == [None, None]


def test_half_a_period_is_handed_on(tmp_path) -> None:
    """A period of a step and a half, and a bit: after a tick the clock counts tokens of a step that is spent."""
    period = 3 * LENGTH // 2 + 2
    model = build(level(period), level(math.inf)).float()
    trainer = trained(model, 3)
    save_run(tmp_path, trainer, {})
    saved = load_model(tmp_path)
    clock = trainer.clocks[0]
    state = open_life(tmp_path, saved, Reader(saved.model)).levels.rules[0][0]
    assert (clock.steps, clock.elapsed) == (1, 3 * LENGTH - period)
    assert int(state.elapsed) == clock.elapsed
    torch.testing.assert_close(state.gradient, clock.gradients[0] * LENGTH)


def test_a_life_in_a_folder_gets_them(tmp_path) -> None:
    """Training saved to disk, a life begun from it: the rule's buffers are those that `hand_over` fills."""
    model = build(level(64, rule=momentum(), step_size=0.4), level(128)).float()
    trainer = trained(model, 12)
    save_run(tmp_path, trainer, {})
    saved = load_model(tmp_path)
    begun = open_life(tmp_path, saved, Reader(saved.model)).levels
    plain = Reader(model).begin().levels
    expected = hand_over(model.levels, plain, moments_of(trainer.optimizer, model.level_weights()))
    assert torch.equal(begun.rules[0][0].of.buffer, expected.rules[0][0].of.buffer)
    assert begun.rules[0][0].of.buffer.any()
