"""The kit's laws of special cases: a named model is its paper's recurrence, and one expression is another."""

import dataclasses
from typing import Any

import pytest
from torch import nn

from nestling import checks
from nestling.checks import special
from nestling.memory import huber_norm, l2, lp, matrix, mlp, momentum, normalize, retain
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention, self_modifying, sequence_memory
from nestling.sequence.zoo import zoo

NAMED = {
    "deltanet": zoo["deltanet"].mixer,
    "gated_deltanet": dataclasses.replace(zoo["gated_deltanet"].mixer, chunk=16),
    "titans": dataclasses.replace(zoo["titans"].mixer, chunk=8),
    "delta_product": dataclasses.replace(zoo["delta_product"].mixer, chunk=8),
    "self_modifying_titans": self_modifying(chunk=8, projection_chunk=4),
    "sliding_window_attention": attention(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_is_its_recurrence(name: str) -> None:
    finding = checks.named_model(Decoder(ModelConfig(dim=8, heads=2, blocks=1, mixer=NAMED[name])))
    assert finding.passed, finding
    assert finding.detail.startswith(f"{name},")


def test_a_model_that_is_not_what_its_name_says_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(zoo["deltanet"], oracle=zoo["linear_attention"].oracle)
    monkeypatch.setitem(special.zoo, "deltanet", other)
    finding = checks.named_model(zoo["deltanet"].mixer)
    assert not finding.passed
    assert finding.measured > 0.1


@pytest.mark.parametrize("model", [sequence_memory(matrix(), lp(3)), self_modifying(step_bound=2.0), nn.Linear(2, 2)])
def test_what_has_no_name_is_skipped(model: Any) -> None:
    assert checks.named_model(model).skipped


def deep(**changes: Any) -> sequence_memory:
    return sequence_memory(mlp(), rule=retain(of=momentum(normalize())), chunk=16, **changes)


SAME = {
    "a bound that nothing meets": (deep(attentional_bias=huber_norm(1e9)), deep(attentional_bias=l2())),
    "a window that all fits in": (attention(window=500), attention(window=None)),
    "token by token": (deep(way="recurrent"), deep()),
    "step by step": (deep(way="recurrent", steps=2), deep(steps=2)),
    "the same memory's mixer in a model": (
        ModelConfig(vocabulary=11, dim=8, heads=2, blocks=1, mixer=deep(checkpoint=True)),
        ModelConfig(vocabulary=11, dim=8, heads=2, blocks=1, mixer=deep()),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_a_special_case_is_the_known_model(case: str) -> None:
    finding = checks.special_case(*SAME[case])
    assert finding.passed, finding


def test_two_models_that_differ_are_told_apart() -> None:
    finding = checks.special_case(deep(attentional_bias=lp(2.0)), deep(attentional_bias=l2()))
    assert not finding.passed
    assert finding.measured > 1e-3


def test_parameters_that_only_one_has() -> None:
    with pytest.raises(ValueError, match="nothing of this name"):
        checks.special_case(attention(window=None), deep())
    wider = self_modifying(mlp(expansion=2.0), chunk=8, projection_chunk=8)
    with pytest.raises(ValueError, match=r"of starts.* has \[2, 4, 4\], the other \[2, 8, 4\]"):
        checks.special_case(wider, self_modifying(chunk=8, projection_chunk=8))
