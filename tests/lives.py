"""Small lives for tests: a model that learns in milliseconds, and texts from seeds."""

import functools
import random

import torch

from nestling.learner import Learner, LifeConfig
from nestling.levels import level
from nestling.memory import clip, decay, delta_gradient_descent, momentum, retain
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.train import Stream, TrainConfig, Trainer

RULE = retain(decay(), delta_gradient_descent(momentum(clip())))
CONFIG = ModelConfig(
    dim=16,
    heads=2,
    blocks=1,
    mixer=attention(window=8),
    levels=(level(24, rule=RULE, retention=0.9), level(60, rule=RULE, retention=0.8)),
)
MODEL = Decoder(CONFIG, seed=1)
KEEP = LifeConfig(snapshot_tokens=150, event_bytes=64)


def text(seed: int, size: int = 90) -> bytes:
    return bytes(random.Random(seed).choices(b"abcdefgh \n", k=size))


def crash(life: Learner) -> None:
    """Let go of a life as a killed process does: nothing more is written."""
    life.journal._pending.clear()
    life.held.let_go()


def same(one: Learner, two: Learner) -> None:
    """Equal in every bit of weights, clocks, accumulators and sequence states."""
    theirs = flatten(two.state.reading)
    for name, tensor in flatten(one.state.reading).items():
        assert torch.equal(tensor, theirs[name]), name
    assert one.digest == two.digest


@functools.cache
def trained() -> Decoder:
    """The model once it knows what `text` looks like."""
    model = Decoder(CONFIG, seed=1)
    config = TrainConfig(steps=80, rows=4, length=48, learning_rate=2e-2, warmup_steps=4)
    stream = Stream.of([text(number, 2000) for number in range(4)], rows=4, length=48)
    trainer = Trainer(model, config)
    while trainer.step < config.steps:
        trainer.run_step(stream)
    return model.requires_grad_(False)
