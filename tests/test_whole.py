"""A life that learns everything, beside the trainer that does the same in batches of one row."""

import math

import numpy as np
import pytest
import torch

from nestling.levels import Reader, Whole, level
from nestling.memory import adam, delta_gradient_descent, scale
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig, preset
from nestling.sequence import attention
from nestling.train import Stream, TrainConfig, Trainer

LENGTH, RATE = 32, 2e-3
TEXT = bytes(np.random.default_rng(0).choice(np.frombuffer(b"the cat sat on a mat. ", np.uint8), 4096))
PLAIN = TrainConfig(
    rows=1,
    length=LENGTH,
    learning_rate=RATE,
    final_rate=1.0,
    warmup_steps=0,
    weight_decay=0.0,
    clip=1e9,
    reset_share=0.0,
)


def adamw(period: int) -> level:
    rule = scale(adam(beta1=0.9, beta2=0.95, eps=1e-8 * LENGTH))  # of the sum over tokens, where training has the mean
    return level(period, rule=rule, step_size=RATE * period)


def test_learning_everything_is_training_with_one_row() -> None:
    """Same rule, same clock, same text: the same weights, token for token."""
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=24), levels=(adamw(LENGTH), adamw(LENGTH)))
    trained, lived = Decoder(config).double(), Decoder(config).double()
    trainer, stream = Trainer(trained, PLAIN), Stream.of([TEXT], rows=1, length=LENGTH)
    losses = [trainer.run_step(stream).loss for _ in range(20)]
    whole = Whole(lived, adamw(LENGTH))
    reader = Reader(whole)
    state, out = reader.read(reader.begin(), torch.tensor(list(TEXT[: 20 * LENGTH + 1])))
    lived_losses = out.nll[1:].view(20, LENGTH).mean(1)
    torch.testing.assert_close(lived_losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=0)
    whole.load(state.levels.weights)
    for (name, ours), theirs in zip(lived.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)


def test_from_random_weights_learning_reaches_the_loss_of_training() -> None:
    """With memories too, whose starts training alone moves, and with levels on clocks of their own."""
    config = preset("tiny", levels=(adamw(32), adamw(64)))
    trainer = Trainer(Decoder(config), PLAIN)
    stream = Stream.of([TEXT], rows=1, length=LENGTH)
    trained = np.mean([trainer.run_step(stream).loss for _ in range(48)][-16:])
    reader = Reader(Whole(Decoder(config), adamw(LENGTH)))
    _, out = reader.read(reader.begin(), torch.tensor(list(TEXT[: 48 * LENGTH + 1])))
    lived = float(out.nll[-16 * LENGTH :].mean())
    assert lived < 0.65 * math.log(256)
    assert lived == pytest.approx(trained, rel=1e-3)


def test_split_passes_are_one_pass() -> None:
    config = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=24), levels=(adamw(16), adamw(48)))
    reader = Reader(Whole(Decoder(config).double(), adamw(40)))
    text = torch.tensor(list(TEXT[:150]))
    whole, _ = reader.read(reader.begin(), text)
    state = reader.begin()
    for part in text.split([1, 39, 7, 60, 43]):
        state, _ = reader.read(state, part)
    for name, tensor in flatten(whole.levels).items():
        torch.testing.assert_close(flatten(state.levels)[name], tensor, rtol=0, atol=1e-9, msg=name)
    moved = flatten(whole.levels.weights[-1])
    start = flatten(reader.begin().levels.weights[-1])
    assert all(not torch.equal(moved[name], start[name]) for name in moved)


def test_rules_that_need_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"delta_gradient_descent.*inputs"):
        Whole(Decoder(preset("tiny")), level(64, rule=delta_gradient_descent()))
