"""What a night costs, by a model that counts what passes through it: no clock is read."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from nestling.levels import Growing, Reader, level
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import SeedConfig, SleepConfig, affordable, begin, live, merge, night_tokens, sleep
from nestling.sleep.schedule import Pair, Schedule, pairs

TEXT = torch.tensor(list(b"round and round the rugged rock the ragged rascal ran. " * 6))
CHEAP = SeedConfig(steps=12, prefixes=1, completions=2)


class Counting(Decoder):
    """Counts tokens: one for a pass forward, and two more where there is a way back."""

    tokens = 0

    def forward(self, tokens, *given, **told):
        logits, state = super().forward(tokens, *given, **told)
        self.tokens += tokens.numel() * (3 if logits.requires_grad else 1)
        return logits, state


def build(blocks: int = 2, slots: int = 3, periods=(16, 48, math.inf)) -> Growing:
    levels = tuple(level(p, step_size=1.0) for p in periods)
    config = ModelConfig(dim=8, heads=1, blocks=blocks, mixer=attention(window=16), levels=levels)
    return Growing(Counting(config).requires_grad_(False), slots, 2)


def lived(model: Growing):
    reader = Reader(model)
    return reader.read(reader.begin(), TEXT)[0]


def test_learning_a_token_costs_three() -> None:
    model = build()
    lived(model)
    assert model.model.tokens == 3 * (len(TEXT) - len(TEXT) % 16) + len(TEXT) % 16, "the open segment was predicted"


KINDS = {
    "default": SleepConfig(),
    "merging": SleepConfig(when_full=merge()),
    "seeding": SleepConfig(seeding=CHEAP, dreams=8),
    "off policy": SleepConfig(seeding=replace(CHEAP, on_policy=0.5), dreams=8),
    "only seeding": SleepConfig(seeding=CHEAP, dreams=8, warm_start=False, rehearsal=0.0),
}


@pytest.mark.parametrize("awake", [3_000, 12_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_night_costs_at_most_a_quarter_of_waking(kind: str, awake: int) -> None:
    model = build(slots=1 if kind == "default" else 2)
    state = lived(model)
    config = affordable(model, awake, KINDS[kind])
    assert config is not None
    model.model.tokens = 0
    _, report = sleep(model, state.levels, replace(config, least_recovered=-1e9))
    assert [pair.outcome for pair in report.pairs] == ["kept", "kept"], str(report)
    assert model.model.tokens <= night_tokens(model, config) <= 0.25 * 3 * awake
    if kind in ("default", "merging"):
        assert model.model.tokens > 0.15 * 3 * awake, "and it is spent"
    assert config.seeding.steps > 0 or config.warm_start


def test_the_context_is_a_pair_that_is_paid_for() -> None:
    model = build(blocks=1)
    state = lived(model)
    config = affordable(model, 3_000, SleepConfig(context=True))
    assert config is not None
    assert config.context
    model.model.tokens = 0
    _, report = sleep(model, state, replace(config, least_recovered=-1e9))
    assert len(report.pairs) == 3
    learned = 3 * state.segment.numel()  # what was open
    assert model.model.tokens - learned <= night_tokens(model, config) <= 0.25 * 3 * 3_000


def test_seeding_comes_in_where_a_quarter_of_the_night_pays_for_it() -> None:
    model = build()
    steps = [affordable(model, awake, KINDS["seeding"]).seeding.steps for awake in (12_000, 60_000, 120_000)]
    assert steps == [0, 0, 12]


def test_more_waking_buys_more_and_too_little_buys_nothing() -> None:
    model = build()
    assert affordable(model, 500) is None
    bought = [affordable(model, n) for n in (2_000, 20_000, 200_000, 20_000_000)]
    dreams = [each.dreams for each in bought]
    assert dreams == sorted(dreams)
    assert [each.length for each in bought] == sorted(each.length for each in bought)
    assert bought[-1] == SleepConfig(), "as much as it asks for, and no more"
    with pytest.raises(ValueError, match="share must be > 0"):
        affordable(model, 1, share=0.0)
    assert affordable(build(periods=(16,)), 10_000) is None


def test_pairs_share_what_there_is() -> None:
    model = build()
    one, _ = pairs(model.own)
    alone = affordable(model, 4_000, chosen=[one])
    assert alone == affordable(model, 8_000)
    assert night_tokens(model, alone, [one]) <= 0.25 * 3 * 4_000


@dataclass(frozen=True, repr=False)
class each_48(Schedule):
    sleeping: bool = True

    def pairs(self, levels, moment) -> tuple[Pair, ...]:
        return pairs(levels) if self.sleeping else ()

    def next(self, levels, position: int) -> int:
        return position // 48 * 48 + 48


def test_a_life_sleeps_once_it_can_pay_for_it() -> None:
    model = build(blocks=1)
    text = TEXT.repeat(6)[:1_900]
    life, _, nights = live(model, begin(model), text, each_48())
    assert nights
    apart = [b.position - a for a, b in zip([0, *(n.position for n in nights)], nights, strict=False)]
    assert all(affordable(model, size) is not None and affordable(model, size - 48) is None for size in apart)
    model.model.tokens = 0
    live(model, begin(model), text, each_48(sleeping=False))
    awake = model.model.tokens
    model.model.tokens = 0
    live(model, begin(model), text, each_48())
    assert model.model.tokens <= 1.25 * awake
    assert life.slept == nights[-1].position
