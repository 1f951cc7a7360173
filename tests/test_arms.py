"""Ways to spend a night, all with one interface: what each keeps, what it moves, what it costs."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import Growing, Reader, level
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import SeedConfig, SleepConfig, any_token, mixture, own_samples, prefixes
from nestling.sleep.arms import (
    Anchor,
    Arm,
    ewc,
    extra_passes,
    fall_back,
    fisher,
    no_sleep,
    off_policy,
    pull,
    replay,
    sleeping,
)

F64 = torch.float64
TEXT = torch.tensor(list(b"a stitch in time saves nine, and so on and so forth. " * 6))
PLAIN = {"source": any_token(), "warm_start": False, "rehearsal": 0.0}
SEEDING = SeedConfig(steps=3, prefixes=2, completions=2, learning_rate=2e-2)
CONFIG = SleepConfig(
    seeding=SEEDING, source=any_token(), dreams=8, held_out=8, length=8, warm_start=False, rehearsal=0.0
)
MIXED = replace(CONFIG, source=mixture((own_samples(), prefixes(4)), (0.5, 0.5)))
ARMS: dict[str, Arm] = {
    "none": no_sleep(),
    "sleep": sleeping(CONFIG),
    "sleep, reservoir": sleeping(MIXED, 6, 10),
    "off policy": off_policy(CONFIG),
    "replay": replay(6, 10, 40),
    "extra passes": extra_passes(2, 40),
    "fall back": fall_back(0.5),
    "ewc": ewc(1.0, 4, 8),
}
STORED = {"sleep, reservoir": 60, "replay": 60, "extra passes": 40}  # at most, and the rest of a piece


@pytest.fixture(scope="module")
def model() -> Growing:
    levels = (level(16, step_size=1.0), level(48, step_size=1.0), level(math.inf))
    config = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=24), levels=levels)
    return Growing(Decoder(config).double().requires_grad_(False), 3, 4)


def two_days(model: Growing, arm: Arm):
    reader, kept, rests = Reader(model), arm.begin(), []
    state = reader.begin()
    for day in (0, 1):
        part = TEXT[day * 150 : day * 150 + 150]
        state, _ = reader.read(state, part)
        kept = arm.awake(kept, part, "life")
        before = state
        state, kept, rest = arm.rest(model, state, kept, ("life", day))
        rests.append(rest)
    return before, state, kept, rests


@pytest.mark.parametrize("name", ARMS)
def test_every_arm(model, name: str) -> None:
    arm = ARMS[name]
    before, state, kept, rests = two_days(model, arm)
    again = two_days(model, arm)[1]
    now, then, repeated = flatten(state), flatten(before), flatten(again)
    assert all(torch.equal(now[key], repeated[key]) for key in now)
    assert all(tensor.isfinite().all() for tensor in now.values() if tensor.is_floating_point())
    assert int(state.position) == int(before.position) == 300
    for key in then:  # the document goes on, and clocks stand where they would have
        if key.startswith(("now", "logits")):
            assert torch.equal(now[key], then[key])
    settled = flatten(Reader(model).settle(before).levels)
    clocks = [key for key in settled if key.endswith("elapsed")]
    expected = flatten(before.levels) if name == "none" else settled
    assert all(torch.equal(flatten(state.levels)[key], expected[key]) for key in clocks)
    moved = any(not torch.equal(now[key], then[key]) for key in now if key.startswith("levels.weights"))
    assert moved == (name != "none")
    assert rests[1].bytes_stored == kept.bytes_stored
    limit = STORED.get(name, 0)
    assert limit <= rests[1].bytes_stored < limit + 10 if limit else rests[1].bytes_stored == 0
    assert (rests[1].tokens > 0) == (name not in ("none", "fall back"))
    assert (rests[1].report is None) == (not isinstance(arm, sleeping))


def test_extra_passes_are_reading_again(model) -> None:
    arm = extra_passes(2, 40)
    before, state, _, _ = two_days(model, arm)
    reader, levels = Reader(model), Reader(model).settle(before).levels
    for _ in range(2):
        levels = reader.end_document(reader.read(reader.begin(levels), TEXT[260:300])[0])[0].levels
    for ours, theirs in zip(state.levels.weights, levels.weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_falling_back_is_a_share_of_the_way(model) -> None:
    before, state, _, _ = two_days(model, fall_back(0.25))
    learned, first = Reader(model).settle(before).levels.weights, model.level_weights()
    for w, old, start in zip(state.levels.weights[0], learned[0], first[0], strict=True):
        torch.testing.assert_close(w, 0.75 * old + 0.25 * start, rtol=0, atol=1e-12)


def test_the_pull_is_the_minimum_of_its_objective(model) -> None:
    weights = Reader(model).begin().levels.weights
    drawn = [torch.randn(4, *weights[0][0].shape, generator=torch.Generator().manual_seed(0), dtype=F64)][0]
    w, a, f = drawn[0], drawn[1], drawn[2].abs()
    found = pull(((w,),), Anchor(((a,),), ((f,),)), 0.7)[0][0].requires_grad_()
    objective = (found - w).square().sum() + 0.7 * (f * (found - a).square()).sum()
    (gradient,) = torch.autograd.grad(objective, found)
    assert gradient.abs().max() < 1e-12


def test_the_fisher_is_the_mean_square_of_gradients_over_own_text(model) -> None:
    weights = Reader(model).begin().levels.weights
    found = fisher(model, weights, 3, 6, "night")
    texts = _own_texts(model, weights)
    total = [torch.zeros_like(w) for maps in weights[:3] for w in maps]
    for text in texts:
        leaves = [[w.clone().requires_grad_() for w in maps] for maps in weights[:3]]
        logits, _ = model(text[None], weights=(*(tuple(maps) for maps in leaves), *weights[3:]))
        loss = sum(F.cross_entropy(logits[0, t], text[t + 1]) for t in range(6))
        flat = [w for maps in leaves for w in maps]
        total = [t + g.square() for t, g in zip(total, torch.autograd.grad(loss, flat), strict=True)]
    mean = torch.cat([t.flatten() for t in total]).mean()
    for got, expected in zip([w for maps in found for w in maps], total, strict=True):
        torch.testing.assert_close(got, expected / mean, rtol=1e-10, atol=1e-12)


def _own_texts(model, weights) -> torch.Tensor:
    from nestling.sleep import draws, dream, no_reservoir

    return dream(model, weights, any_token(), 3, 6, draws("night", "fisher"), reservoir=no_reservoir())[0].tokens
