"""What a night keeps of what it did, and the steps that it takes."""

import math
from dataclasses import replace

import pytest
import torch

from nestling.levels import Growing, Reader, ReadingState, level
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import Dreams, Pair, Place, SeedConfig, SleepConfig, Views, activate, draws, reset, seed, sleep
from nestling.sleep.grow import bank, levels_of
from nestling.sleep.seed import draw, objective

F64 = torch.float64
TEXT = torch.tensor(list(b"the cat sat on the mat and the dog lay on the log. " * 4)[:192])
FAST = Pair(16, 48)
SEEDING = SeedConfig(steps=3, prefixes=2, completions=2, learning_rate=3e-2)
CONFIG = SleepConfig(seeding=SEEDING, dreams=8, held_out=8, length=6, rehearsal=0.0)


@pytest.fixture(scope="module")
def model() -> Growing:
    levels = (level(16, step_size=2.0), level(48, step_size=2.0), level(math.inf))
    config = ModelConfig(dim=8, heads=1, blocks=1, mixer=attention(window=16), levels=levels)
    return Growing(Decoder(config).double().requires_grad_(False), 2, 2)


@pytest.fixture(scope="module")
def life(model) -> ReadingState:
    reader = Reader(model)
    return reader.settle(reader.read(reader.begin(), TEXT)[0])


def test_where_seeding_loses_what_a_warm_start_knew_the_warm_start_stays(model, life) -> None:
    wild = replace(SEEDING, learning_rate=0.5, divergence_share=1.0)
    state, report = sleep(model, life, replace(CONFIG, seeding=wild), "night", only=[FAST])
    (pair,) = report.pairs
    assert pair.steps == 3
    assert pair.after == pair.started < pair.before
    bare, _ = sleep(model, life, replace(CONFIG, seeding=replace(wild, steps=0)), "night", only=[FAST])
    assert all(torch.equal(a, b) for a, b in zip(flatten(state).values(), flatten(bare).values(), strict=True))


def test_a_pair_is_kept_from_the_share_on_that_is_asked_for(model, life) -> None:
    (pair,) = sleep(model, life, CONFIG, "night", only=[FAST])[1].pairs
    assert pair.kept
    assert 0 < pair.recovered < 0.99
    for least, outcome in ((pair.recovered - 0.01, "kept"), (pair.recovered + 0.01, "no gain")):
        state, report = sleep(model, life, replace(CONFIG, least_recovered=least), "night", only=[FAST])
        assert report.pairs[0].outcome == outcome
    assert all(torch.equal(a, b) for a, b in zip(flatten(state).values(), flatten(life).values(), strict=True))


def test_without_expansion_the_slow_level_itself_learns(model, life) -> None:
    config = replace(CONFIG, seeding=replace(SEEDING, into="weights", learning_rate=3e-3, divergence_share=1.0))
    state, report = sleep(model, life, replace(config, least_recovered=-1e9), "night", only=[FAST])
    assert report.pairs[0].slot is None
    assert report.slots == {16: 0, 48: 0, math.inf: 0}
    first, before, after = model.level_weights(), life.levels.weights, state.levels.weights
    assert all(torch.equal(a, b) for a, b in zip(after[0], first[0], strict=True))
    assert not torch.equal(after[1][0], before[1][0])
    assert all(torch.equal(a, b) for a, b in zip(after[2], before[2], strict=True))


def test_seeding_is_adam_on_clipped_gradients(model, life) -> None:
    """Oracle: Adam written out; the draws and the objective have tests of their own."""
    levels, hosts = life.levels, levels_of(model, 48)
    student = activate(model, reset().of(model, levels, levels, (0,)).weights, hosts, 0, draws("slot"))
    bank(model, student, 1).up[0] += 0.1
    views, place = Views(levels.weights, student), Place(hosts, 0)
    dreams = [Dreams(TEXT[:96].view(8, 12), 1)]
    config = replace(SEEDING, clip=1e-6, learning_rate=0.2)
    done = seed(model, views, place, dreams, config, draws("seeding"))
    generator = draws("seeding")
    leaves = place.leaves(model, student)
    first, second = [torch.zeros_like(w) for w in leaves], [torch.zeros_like(w) for w in leaves]
    clipped = []
    for step in range(1, config.steps + 1):
        leaves = [w.detach().requires_grad_() for w in leaves]
        now = place.put(model, student, leaves)
        plain = place.put(model, student, [w.detach() for w in leaves])
        batch = draw(model, views, plain, dreams, config, generator)
        gradients = torch.autograd.grad(objective(model, views, now, batch, config)[0], leaves)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        clipped.append(norm > config.clip)
        gradients = [g * min(1.0, config.clip / norm) for g in gradients]
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
        second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradients, strict=True)]
        leaves = [
            w.detach() - 0.2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            for w, m, v in zip(leaves, first, second, strict=True)
        ]
    assert all(clipped)
    for got, expected in zip(bank(model, done.weights, 1)[:3], leaves, strict=True):
        torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-9)
