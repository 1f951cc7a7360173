"""Optimizers as the inner rule of a sequence memory, against their equations one token at a time in float64."""

import pytest
import torch
from torch import Tensor

from nestling.memory import (
    Gates,
    Summed,
    adagrad,
    adam,
    add,
    decay,
    delta_gradient_descent,
    delta_momentum,
    every,
    full_matrix_adagrad,
    gradient_descent,
    gradient_keys,
    l2,
    matrix,
    nesterov,
    newton_schulz,
    remember,
    retain,
    rmsprop,
    scale,
    surprise,
    unit_rms,
)
from nestling.sequence import Memory
from nestling.sequence.scan import Writes

F64 = torch.float64
ROWS, HEADS, WIDTH = 2, 2, 4


def quintic(x: Tensor, steps: int) -> Tensor:
    x = x / (x * x).sum().sqrt()
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.775 * a @ x + 2.0315 * a @ a @ x
    return x


def inverse_root(a: Tensor) -> Tensor:
    """a^(-1/2) by the Denman-Beavers iteration."""
    y, z = a, torch.eye(len(a), dtype=a.dtype)
    for _ in range(30):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return z


def naive_adam(t, g, s, eta, mu, a):
    s["m"] = 0.8 * s.get("m", 0.0) + 0.2 * g
    s["v"] = 0.9 * s.get("v", 0.0) + 0.1 * g * g
    return lambda w: a * w - eta * (s["m"] / (1 - 0.8**t)) / ((s["v"] / (1 - 0.9**t)).sqrt() + 0.01)


def naive_centered(t, g, s, eta, mu, a):
    s["b"] = mu * s.get("b", 0.0) + g
    s["v"] = 0.9 * s.get("v", 0.0) + 0.1 * g * g
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    return lambda w: w - eta * (mu * s["b"] + g) / ((s["v"] - s["m"] ** 2).sqrt() + 0.01)


def naive_adagrad(t, g, s, eta, mu, a):
    s["v"] = s.get("v", 0.3) + g * g
    return lambda w: w - eta * g / (s["v"].sqrt() + 0.01)


def naive_muon(t, g, s, eta, mu, a):
    s["b"] = mu * s.get("b", 0.0) + g
    return lambda w: a * w - eta * quintic(g + mu * s["b"], 3)


def naive_full(t, g, s, eta, mu, a):
    s["h"] = s.get("h", 0.1 * torch.eye(WIDTH, dtype=F64)) + g @ g.T
    return lambda w: w - eta * inverse_root(s["h"]) @ g


def naive_delta_momentum(t, g, s, eta, mu, a):
    old = s.get("b", torch.zeros(WIDTH, WIDTH, dtype=F64))
    s["b"] = old @ (mu * torch.eye(WIDTH, dtype=F64) - eta * g.T @ g) - eta * g
    return lambda w: w + s["b"]


def naive_bounded_erase(t, g, s, eta, mu, a):
    old = s.get("b", torch.zeros(WIDTH, WIDTH, dtype=F64))
    s["b"] = mu * old - eta / (1 + eta * (g * g).sum()) * old @ g.T @ g - eta * g
    return lambda w: w + s["b"]


def naive_bounded_delta_momentum(t, g, s, eta, mu, a):
    old = s.get("b", torch.zeros(WIDTH, WIDTH, dtype=F64))
    c = eta / (1 + eta * (g * g).sum())
    s["b"] = a * old - c * old @ g.T @ g - c * g
    return lambda w: w + s["b"]


def naive_m3(t, g, s, eta, mu, a):
    """Algorithm 1 of Nested Learning, f = 3, beta = (0.9, 0.5, 0.7), alpha = 0.6."""
    s["m1"] = s.get("m1", 0.0) + 0.9 * g
    s["v"] = s.get("v", 0.0) + 0.5 * g * g
    slow = s.get("o2", 0.0)
    s["since"] = s.get("since", 0.0) + g
    if t % 3 == 0:
        s["m2"] = s.get("m2", 0.0) + 0.7 * s.pop("since")
        s["o2"] = quintic(s["m2"], 2)
    return lambda w: w - eta * (quintic(s["m1"], 2) + 0.6 * slow) / (s["v"].sqrt() + 0.1)


def naive_unit_rms(t, g, s, eta, mu, a):
    return lambda w: w - eta * g / (g * g).mean().sqrt()


FAMILIES = {
    "adam": (retain(decay(), scale(adam(beta1=0.8, beta2=0.9, eps=0.01))), naive_adam),
    "centered": (scale(rmsprop(nesterov(), 0.9, 0.01, centered=True)), naive_centered),
    "adagrad": (scale(adagrad(eps=0.01, initial=0.3)), naive_adagrad),
    "muon": (retain(decay(), scale(newton_schulz(nesterov(), steps=3))), naive_muon),
    "full": (scale(full_matrix_adagrad(eps=0.1)), naive_full),
    "unit": (scale(unit_rms(surprise())), naive_unit_rms),
    "delta momentum": (delta_momentum(), naive_delta_momentum),
    "bounded erase": (delta_momentum(bounded_erase=True), naive_bounded_erase),
    "bounded": (remember(gradient_keys(retain(decay(), delta_gradient_descent()))), naive_bounded_delta_momentum),
    "m3": (
        scale(
            adagrad(
                add(
                    newton_schulz(remember(gradient_descent(), step_size=0.9), steps=2),
                    remember(
                        every(3, retain(decay(), newton_schulz(remember(gradient_descent(), step_size=0.7), steps=2))),
                        retention=0.0,
                        read="before",
                    ),
                    0.6,
                ),
                eps=0.1,
                share=0.5,
            )
        ),
        naive_m3,
    ),
}


def naive(law, start: Tensor, keys: Tensor, values: Tensor, queries: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """Reads [t, v] and final weight of one head of one row: L2, gradients at every token's own weights."""
    weight, state, reads = start, {}, []
    for t in range(len(keys)):
        g = torch.outer(weight @ keys[t] - values[t], keys[t])
        step_size, kept, log_retention = (gate[t] for gate in gates)
        weight = law(t + 1, g, state, step_size, kept, log_retention.exp())(weight)
        reads.append(weight @ queries[t])
    return torch.stack(reads), weight


@pytest.mark.parametrize("tokens", [1, 7, 63])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_learns_by_the_optimizer(family, tokens):
    rule, law = FAMILIES[family]
    generator = torch.Generator().manual_seed(tokens)
    start = torch.randn(ROWS, HEADS, WIDTH, WIDTH, generator=generator, dtype=F64) * 0.5
    keys, values, queries = torch.randn(3, ROWS, HEADS, tokens, WIDTH, generator=generator, dtype=F64) * 0.7
    raw = torch.rand(3, ROWS, HEADS, tokens, generator=generator, dtype=F64)
    gates = Gates(0.02 + 0.05 * raw[0], 0.1 + 0.8 * raw[1], -0.2 * raw[2])
    leaves = [x.requires_grad_() for x in (start, keys, values, queries, *gates)]

    memory = Memory(matrix(), l2(), rule, gradient_at="token", way="recurrent")
    found, state = memory.run(memory.begin((start,)), Writes(keys, values, gates), queries)

    rows = [
        [
            naive(law, start[b, h], keys[b, h], values[b, h], queries[b, h], Gates(*(g[b, h] for g in gates)))
            for h in range(HEADS)
        ]
        for b in range(ROWS)
    ]
    expected = torch.stack([torch.stack([reads for reads, _ in row]) for row in rows])
    weights = torch.stack([torch.stack([weight for _, weight in row]) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.running[0], weights, rtol=1e-10, atol=1e-12)
    probe = torch.randn(found.shape, generator=generator, dtype=F64)
    ends = torch.randn(weights.shape, generator=generator, dtype=F64)
    one = torch.autograd.grad((found * probe).sum() + (state.running[0] * ends).sum(), leaves, allow_unused=True)
    two = torch.autograd.grad((expected * probe).sum() + (weights * ends).sum(), leaves, allow_unused=True)
    for ours, theirs in zip(one, two, strict=True):
        ours, theirs = (torch.zeros(()) if g is None or not g.any() else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11 * max(1.0, float(theirs.abs().max())))


def test_what_has_seen_no_gradient_has_no_endless_one():
    """The root of a sum of squares has no derivative at zero, and an update of zero a finite one."""
    weight, gradient = torch.ones(2, 3, dtype=F64), torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, 0.5]], dtype=F64)
    for rule in (adagrad(eps=0.01), adam(eps=0.01), rmsprop(eps=0.01)):
        g = gradient.clone().requires_grad_()
        update, _ = rule.update(weight, Summed(g), rule.init(weight), Gates())
        (slope,) = torch.autograd.grad(update.sum(), g)
        assert slope.isfinite().all()
        torch.testing.assert_close(update == 0, gradient == 0)
