"""Sliding-window softmax attention as a momentum."""

import pytest
import torch
from torch.nn import functional as F

from nestling.memory import Gates, Summed, attend, decay, momentum, retain, surprise
from nestling.optim import explain, to_optimizer

F64 = torch.float64


def gradients(steps: int, *shape: int) -> torch.Tensor:
    return torch.randn(steps, *shape, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_it_is_attention_over_the_last_gradients(leading) -> None:
    window, temperature, steps = 4, 0.3, 9
    rule, seen = attend(surprise(), window, temperature), -gradients(steps, *leading, 3, 5)
    weight, state = torch.zeros(*leading, 3, 5, dtype=F64), rule.init(torch.zeros(*leading, 3, 5, dtype=F64))
    found = []
    for past in seen:
        after, state = rule.step(weight, Summed(-past), state, Gates())
        found.append(after - weight)
        weight = after
    values = seen.flatten(-2).movedim(0, -2)  # [..., steps, 15]
    keys = F.normalize(values, dim=-1)
    apart = torch.arange(steps)[:, None] - torch.arange(steps)
    mask = (apart >= 0) & (apart < window)
    expected = F.scaled_dot_product_attention(keys, keys, values, attn_mask=mask, scale=1 / temperature)
    torch.testing.assert_close(torch.stack(found).flatten(-2).movedim(0, -2), expected, rtol=1e-9, atol=1e-11)


def test_a_hot_one_is_the_mean_of_the_window_and_a_cold_one_the_last() -> None:
    seen = gradients(6, 3, 5)
    for temperature, expected in ((1e9, seen[2:].mean(0)), (1e-4, seen[-1])):
        rule = attend(surprise(), 4, temperature)
        state = rule.init(seen[0])
        for gradient in seen:
            update, state = rule.update(seen[0], Summed(gradient), state, Gates())
        torch.testing.assert_close(update, -expected, rtol=1e-6, atol=1e-8)


def test_it_trains_as_an_optimizer_and_is_told() -> None:
    """Least squares whose rows alternate between two tasks: it descends, with retention and clocks around it."""
    x, goal = gradients(16, 4), gradients(1, 3, 4)[0]
    weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=F64))
    optimizer = to_optimizer(retain(decay(), attend(momentum(), window=3)), [weight], step_size=0.01, momentum=0.5)
    losses = []
    for step in range(80):
        optimizer.zero_grad()
        loss = ((weight - goal) @ x[step % 2 :: 2].T).square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert "the last 3 updates" in explain(optimizer)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="window must be >= 1 step, got 0"):
        attend(window=0)
    with pytest.raises(ValueError, match=r"temperature must be > 0, got 0"):
        attend(temperature=0.0)
