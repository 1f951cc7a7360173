"""What a sleep takes of memory, as the allocator counts it, against a step of training in their default sizes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from nestling.levels import Growing, Reader, level
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import (
    DreamConfig,
    Dreams,
    Pair,
    Place,
    SeedConfig,
    SleepConfig,
    Views,
    activate,
    distance,
    draws,
    keep,
    merge,
    prefixes,
    prune_slots,
    reservoir,
    reset,
    sleep,
    warm_start,
)
from nestling.sleep.grow import levels_of
from nestling.sleep.prune import importance, merged
from nestling.sleep.seed import Rehearsal
from nestling.train import TrainConfig

CONFIG = SleepConfig()
TEXT = torch.randint(97, 123, (200,), generator=torch.Generator().manual_seed(0))


def peak(run: Callable[[], object]) -> int:
    """Bytes that were held at once, above what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(scope="module")
def model() -> Growing:
    levels = (level(64, step_size=1.0), level(512, step_size=1.0), level(math.inf))
    config = ModelConfig(dim=32, heads=2, blocks=1, mixer=attention(window=64), levels=levels)
    return Growing(Decoder(config).requires_grad_(False), 3, 8)


@pytest.fixture(scope="module")
def allowed(model) -> float:
    told = TrainConfig()
    text = torch.randint(97, 123, (told.rows, told.length + 1), generator=draws("text"))
    trained = Decoder(model.model.config)

    def a_step() -> None:
        logits, _ = trained(text[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()

    return 1.15 * peak(a_step)


@pytest.fixture(scope="module")
def levels(model):
    reader = Reader(model)
    return reader.settle(reader.read(reader.begin(), TEXT)[0]).levels


def some_dreams(key: str) -> list[Dreams]:
    return [Dreams(torch.randint(97, 123, (CONFIG.dreams, CONFIG.length + 1), generator=draws(key)), 1)]


STAGES: dict[str, Callable] = {
    "warm start": lambda model, views, place, dreams: warm_start(
        model, views, place, (0,), dreams, model.rank, Rehearsal(views.student, tuple(some_dreams("own")))
    ),
    "divergence": lambda model, views, place, dreams: distance(model, views, dreams),
    "importance": lambda model, views, place, dreams: importance(model, views.student, place.hosts, dreams),
    "merging": lambda model, views, place, dreams: merged(model, views.student, place.hosts, (0, 1), dreams),
    "pruning": lambda model, views, place, dreams: prune_slots(model, views.student, place.hosts, 0.5, dreams),
}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_takes_more_than_a_training_step(model, levels, allowed: float, stage: str) -> None:
    student = reset().of(model, levels, levels, levels_of(model, 64)).weights
    hosts = levels_of(model, 512)
    student = activate(model, activate(model, student, hosts, 0, draws("slot")), hosts, 1, draws("other"))
    dreams = some_dreams("dreams")
    assert peak(lambda: STAGES[stage](model, Views(levels.weights, student), Place(hosts, 0), dreams)) <= allowed


def test_nor_does_a_whole_sleep(model, levels, allowed: float) -> None:
    """Dreams of the default size, most of which is given to them, so that they are written fast."""
    held = keep(reservoir(8, 80), torch.randint(97, 123, (640,), generator=draws("kept")), "life")
    config = SleepConfig(
        source=prefixes(CONFIG.length - 1),
        length=2,
        seeding=SeedConfig(steps=1),
        when_full=merge(),
        dreaming=DreamConfig(rounds=1, trial_steps=1, steps=1),
    )
    weights = levels.weights
    for slot in range(3):
        weights = activate(model, weights, (1,), slot, draws("full", slot))
    told = {"reservoir": held, "only": [Pair(64, 512)]}
    reports = []
    assert peak(lambda: reports.append(sleep(model, levels._replace(weights=weights), config, **told)[1])) <= allowed
    (report,) = reports
    assert report.pairs[0].outcome in ("kept", "no gain")
    assert "merged slots" in report.pairs[0].room
    assert report.dreamt is not None
