"""Lives that sleep on a schedule."""

import math

import pytest
import torch

from nestling.levels import Growing, Reader, level
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import (
    Pair,
    SeedConfig,
    SleepConfig,
    any_token,
    at_ticks,
    begin,
    by_hand,
    live,
    merge,
    own_samples,
    prefixes,
    reservoir,
    when_slots_fill,
    when_surprised,
)

TEXT = torch.tensor(list(b"round and round the rugged rock the ragged rascal ran. " * 6))
SEEDING = SeedConfig(steps=2, prefixes=2, completions=2, learning_rate=2e-2)
CONFIG = SleepConfig(seeding=SEEDING, source=any_token(), dreams=8, held_out=8, length=6, rehearsal=0.0)
FAST, SLOW = Pair(32, 96), Pair(96, math.inf)


def build(slots: int = 4) -> Growing:
    levels = (level(32, step_size=2.0), level(96, step_size=1.0), level(math.inf))
    config = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=24), levels=levels)
    return Growing(Decoder(config).double().requires_grad_(False), slots, 4)


def test_it_sleeps_where_the_schedule_says() -> None:
    model = build()
    life, nats, nights = live(model, begin(model), TEXT[:200], at_ticks(), CONFIG, "life")
    assert [night.position for night in nights] == [32, 64, 96, 128, 160, 192]
    told = [[(pair.fast, pair.slow) for pair in night.report.pairs] for night in nights]
    assert told[2] == told[5] == [SLOW, FAST]
    assert told[0] == [FAST]
    assert len(nats) == 200
    assert life.slept == 192
    assert life.reservoir.bytes_stored == 0


def test_without_sleep_it_reads() -> None:
    model = build()
    life, nats, nights = live(model, begin(model), TEXT[:120], by_hand(), CONFIG, "life")
    reader = Reader(model)
    expected, out = reader.read(reader.begin(), TEXT[:120])
    assert nights == []
    torch.testing.assert_close(nats, out.nll, rtol=0, atol=0, equal_nan=True)
    for name, tensor in flatten(expected).items():
        assert torch.equal(flatten(life.reading)[name], tensor)


@pytest.mark.parametrize("pieces", [[50, 1, 13, 36], [96, 4], [97, 3]], ids=str)
def test_one_pass_is_split_passes(pieces: list[int]) -> None:
    model, told = build(), (at_ticks(at_least=32), CONFIG, "life")
    whole, nats, nights = live(model, begin(model, reservoir(3, 8)), TEXT[:100], *told)
    life, found, slept = begin(model, reservoir(3, 8)), [], []
    for part in TEXT[:100].split(pieces):
        life, losses, more = live(model, life, part, *told)
        found.append(losses)
        slept += more
    torch.testing.assert_close(torch.cat(found), nats, rtol=0, atol=1e-10, equal_nan=True)
    assert [night.position for night in slept] == [night.position for night in nights] == [32, 64, 96]
    for name, tensor in flatten(whole.reading).items():
        torch.testing.assert_close(flatten(life.reading)[name], tensor, rtol=0, atol=1e-9, msg=name)
    assert torch.equal(whole.reservoir.pieces, life.reservoir.pieces)


def test_slots_and_surprise_can_ask_for_a_sleep() -> None:
    model = build(slots=1)
    life, _, nights = live(model, begin(model), TEXT[:64], at_ticks(), CONFIG, "life")
    assert nights[0].report.slots[96] == 1
    _, _, nights = live(model, life, TEXT[64:130], when_slots_fill(1.0, each=64), CONFIG, "life")
    assert [(night.position, len(night.report.pairs)) for night in nights] == [(128, 1)]
    changed = torch.cat([TEXT[:128], torch.randint(128, 256, (64,), generator=torch.Generator().manual_seed(0))])
    _, _, nights = live(model, begin(model), changed, when_surprised(0.02, at_least=64, over=64), CONFIG, "life")
    assert [night.position for night in nights] == [192]


@pytest.mark.slow
def test_a_long_life_stays_within_its_slots() -> None:
    """Fifty sleeps: shapes, active slots and the numbers in a state are bounded, and all stays finite."""
    model = build(slots=2)
    config = SleepConfig(
        seeding=SeedConfig(steps=1, prefixes=1, completions=2),
        source=any_token(),
        dreams=4,
        held_out=4,
        length=4,
        rehearsal=0.5,
        when_full=merge(),
    )
    text = TEXT.repeat(6)[: 32 * 50]
    before = {name: tensor.shape for name, tensor in flatten(begin(model).reading.levels).items()}
    life, nats, nights = live(model, begin(model), text, at_ticks(), config, "life")
    assert len(nights) == 50
    assert {name: tensor.shape for name, tensor in flatten(life.reading.levels).items()} == before
    assert max(max(night.report.slots.values()) for night in nights) == 2
    assert any("merged slots 0 and 1" in pair.room for night in nights for pair in night.report.pairs)
    assert all(tensor.isfinite().all() for tensor in flatten(life.reading.levels).values())
    assert nats[1:].isfinite().all()


def test_dreams_of_what_was_kept() -> None:
    model = build()
    config = SleepConfig(seeding=SEEDING, source=prefixes(4), dreams=8, held_out=8, length=6, rehearsal=0.0)
    _, _, nights = live(model, begin(model, reservoir(3, 8)), TEXT[:40], at_ticks(), config, "life")
    assert nights[0].report.bytes_stored == 24
    assert own_samples() != prefixes(4)
