"""Writing: one token from logits."""

import math

import pytest
import torch

from nestling.models.generate import sample


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_that_are_not_finite_are_no_choice(wrong: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([0.0, wrong]), temperature, torch.Generator())


def test_the_likeliest() -> None:
    assert sample(torch.tensor([0.0, 2.0, 1.0]), 0.0, torch.Generator()) == 1
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        sample(torch.tensor([0.0, 1.0]), -1.0, torch.Generator())
