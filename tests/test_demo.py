"""What the demo measures and claims: each claim can fail, and each arm differs in what it says."""

import copy
from typing import Any

import pytest
import torch

from nestling.levels import level, neurons, surprise_by_position
from nestling.memory import mlp
from nestling.models import Decoder, ModelConfig, preset
from nestling.sequence import attention
from nestling.tasks.demo import BITS, DemoConfig, _beyond, arm_config, claims, count, equal_transformer

BODIES = ("english", "python", "names")
HOLDS: dict[str, Any] = {
    "trained": {"hope": {"english": 2.69}, "transformer": {"english": 2.72}},
    "arms": {
        "frozen": {"held_out": {f"after {body}": dict.fromkeys(BODIES, 3.0) for body in BODIES}},
        "hope": {"held_out": {f"after {body}": dict.fromkeys(BODIES, 2.59) for body in BODIES}},
    },
    "by_position": [[0, 64, 3.0], [64, 256, 2.9], [256, 512, 2.8], [512, 1024, 2.8], [1024, 2047, 2.79]],
    "training_length": 256,
    "beyond": {"first": 1024, "on": 2.7, "afresh": 2.71},
    "seconds": {"all": 480.0},
    "peak_bytes": 3_000_000_000,
}
BROKEN = {
    "English held-out": lambda data: data["trained"]["hope"].update(english=2.71),
    "minus the Transformer": lambda data: data["trained"]["transformer"].update(english=2.68),
    "frozen model on python": lambda data: data["arms"]["hope"]["held_out"]["after python"].update(python=2.61),
    "frozen model on names": lambda data: data["arms"]["hope"]["held_out"]["after names"].update(names=2.61),
    "change at positions 1024": lambda data: data["by_position"][-1].__setitem__(2, 2.8),
    "read afresh": lambda data: data["beyond"].update(on=2.71),
    "seconds": lambda data: data["seconds"].update(all=480.1),
    "GB": lambda data: data.update(peak_bytes=3_000_000_001),
}


def test_claims_hold_where_bounds_are_met() -> None:
    found = claims(HOLDS)
    assert len(found) == len(BROKEN)
    assert all(claim["holds"] for claim in found), found


@pytest.mark.parametrize("part", BROKEN)
def test_each_claim_can_fail_alone(part: str) -> None:
    data = copy.deepcopy(HOLDS)
    BROKEN[part](data)
    failed = [claim["claim"] for claim in claims(data) if not claim["holds"]]
    assert len(failed) == 1
    assert part in failed[0]


def test_positions_that_no_text_reaches_are_not_claimed() -> None:
    data = copy.deepcopy(HOLDS) | {"beyond": {"first": 1024, "on": float("nan"), "afresh": float("nan")}}
    data["by_position"] = [[0, 64, 3.0], [64, 256, float("nan")]]
    assert len(claims(data)) == len(BROKEN) - 2


def tiny(window: int) -> Decoder:
    levels = (level(float("inf"), structure=mlp(expansion=1, residual=False)),)
    mixer = attention(window=window, convolution=1)
    return Decoder(ModelConfig(dim=16, heads=2, blocks=1, mixer=mixer, levels=levels), seed=0)


def beyond(window: int) -> dict[str, Any]:
    model, draws = tiny(window), torch.Generator().manual_seed(0)
    pieces = [bytes(torch.randint(0, 256, (128,), generator=draws).tolist()) for _ in range(3)]
    return _beyond(model, pieces, surprise_by_position(model, pieces, piece=128) * BITS, 32, 16)


def test_what_reads_one_byte_back_gains_nothing_from_a_longer_context() -> None:
    """So the two means are of the same bytes: were they one byte off, they would differ."""
    found = beyond(window=1)
    assert found["on"] == pytest.approx(found["afresh"], abs=1e-6)


def test_what_reads_far_back_differs() -> None:
    found = beyond(window=64)
    assert abs(found["on"] - found["afresh"]) > 1e-4


def test_arms_are_the_same_weights_on_other_clocks() -> None:
    config = preset("hope")
    assert [lvl.period for lvl in config.levels] == [128, 512, 2048]
    assert arm_config(config, "hope") == config
    assert arm_config(config, "frozen") == config
    assert [lvl.period for lvl in arm_config(config, "fastest").levels] == [128, 128, 128]
    rates = [lvl.step_size / lvl.period for lvl in config.levels]
    assert [lvl.step_size / lvl.period for lvl in arm_config(config, "matched").levels] == pytest.approx(rates)
    mixed = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(), levels=(neurons((level(8), level(16))),))
    with pytest.raises(ValueError, match="one level each"):
        arm_config(mixed, "fastest")


def test_the_baseline_has_as_many_parameters() -> None:
    demo = DemoConfig()
    ours, theirs = (count(Decoder(config)) for config in (demo.model, equal_transformer(demo)))
    assert theirs == pytest.approx(ours, rel=5e-3)
