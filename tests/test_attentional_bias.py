"""Attentional biases: their formulas, their losses under autograd, and memories that learn by them."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miras import F64, LENGTHS, assert_is_oracle, gradients, make, near, slow
from nestling.memory import (
    AttentionalBias,
    biased,
    decay,
    dot,
    gated_mlp,
    huber_coordinates,
    huber_norm,
    huber_switch,
    l2,
    lp,
    matrix,
    mlp,
    normed,
    parse,
    residual_l2,
    retain,
    value_shift,
)
from nestling.memory.naive_miras import naive_miras
from nestling.memory.structure import together
from nestling.sequence import Memory, sequence_memory
from nestling.sequence.scan import Writes

EXACT = [
    dot(),
    l2(),
    residual_l2(),
    lp(1.0, math.inf),
    lp(1.5, math.inf),
    lp(3.0, math.inf),
    huber_coordinates(0.7),
    huber_norm(1.2),
    huber_norm(math.inf),
    huber_switch(1.2, math.inf),
    value_shift(0.5),
]
SMOOTHED = [lp(), lp(1.0), lp(2.8, 4.0), huber_switch(1.2), huber_switch(0.9, 5.0)]
BOUNDED = [lp(), lp(1.5), huber_coordinates(0.7), huber_norm(1.2), huber_switch(1.5), value_shift(0.5), residual_l2()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def written_out(bias: AttentionalBias, read: Tensor, value: Tensor, key: Tensor) -> Tensor:
    """The error of one read, coordinate by coordinate, from the paper's formulas."""
    r = [float(x) for x in (read - value)]
    length = math.sqrt(sum(x * x for x in r))
    tanh = [math.tanh(getattr(bias, "smooth", 1.0) * x) if bias in SMOOTHED else math.copysign(1, x) for x in r]
    match bias:
        case dot():
            found = [-float(x) for x in value]
        case residual_l2():
            found = [float(x - (v - k)) for x, v, k in zip(read, value, key, strict=True)]
        case lp():
            soft = 1e-6 if bias in SMOOTHED else 0.0
            found = [bias.p * s * math.sqrt(x * x + soft) ** (bias.p - 1) for x, s in zip(r, tanh, strict=True)]
        case huber_coordinates():
            found = [x if abs(x) <= bias.bound else math.copysign(bias.bound, x) for x in r]
        case huber_norm():
            found = [x if length <= bias.bound else bias.bound * x / length for x in r]
        case huber_switch():
            found = r if length <= bias.bound else [bias.bound * s for s in tanh]
        case value_shift():
            found = [x + bias.bound * x / length for x in r]
        case _:
            found = r
    return torch.tensor(found, dtype=F64)


@pytest.mark.parametrize("bias", EXACT + SMOOTHED, ids=str)
class TestErrors:
    def test_error_is_the_formula(self, bias):
        read, value, key = normal(3, 40, 3).mul(torch.linspace(0.1, 2.0, 40, dtype=F64)[:, None]).unbind()
        found = bias.error(read, bias.target(key, value))
        for one, *pair in zip(found, read, value, key, strict=True):
            torch.testing.assert_close(one, written_out(bias, *pair), rtol=1e-9, atol=1e-9)

    def test_errors_have_gradients(self, bias):
        read, value = (normal(6, 3, seed=seed).requires_grad_() for seed in (1, 2))
        assert torch.autograd.gradcheck(bias.error, (read, value), fast_mode=True)

    def test_a_perfect_read_has_finite_errors_and_gradients(self, bias):
        read = normal(5, 3).requires_grad_()
        value = read.detach().clone().requires_grad_()
        error = bias.error(read, value)
        for gradient in torch.autograd.grad(error.square().sum() + error.sum(), (read, value), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()
        if bias != dot():
            torch.testing.assert_close(error, torch.zeros_like(error))

    def test_prints_and_parses(self, bias):
        assert parse(repr(bias)) == bias


@pytest.mark.parametrize("bias", EXACT, ids=str)
def test_error_is_the_losss_derivative(bias):
    read, value = normal(2, 40, 3).unbind()
    read.requires_grad_()
    loss = bias.loss(read, value)
    assert loss.shape == (40,)
    (expected,) = torch.autograd.grad(loss.sum(), read)
    torch.testing.assert_close(bias.error(read, value), expected)


@pytest.mark.parametrize("bias", SMOOTHED, ids=str)
def test_a_smoothed_error_is_the_losss_derivative_far_from_zero(bias):
    """And nowhere more than one sign away from it."""
    read = 3.0 * normal(200, 3)
    value = torch.zeros_like(read)
    exact = dataclasses.replace(bias, smooth=math.inf).error(read, value)
    apart = (bias.error(read, value) - exact).abs()
    assert apart[read.abs() > 2.0].max() < 1e-4 * exact.abs().max()
    assert (apart <= 1.001 * exact.abs() + 1e-2).all()
    assert apart.max() > 1e-3


@given(st.integers(0, 10**6), st.floats(1e-3, 10.0))
def test_laws(seed, size):
    read, value = (size * normal(2, 4, 3, seed=seed)).unbind()
    squared = l2().error(read, value)
    for bias in (huber_coordinates(math.inf), huber_norm(math.inf), huber_switch(math.inf)):
        torch.testing.assert_close(bias.error(read, value), squared, rtol=0, atol=0)
        torch.testing.assert_close(bias.loss(read, value), l2().loss(read, value))
    torch.testing.assert_close(lp(2.0, math.inf).error(read, value), 2 * squared)
    torch.testing.assert_close(lp(2.0, math.inf).loss(read, value), 2 * l2().loss(read, value))
    bound = 0.5 * size
    assert (huber_coordinates(bound).error(read, value).abs() <= bound).all()
    assert (huber_norm(bound).error(read, value).norm(dim=-1) <= bound * (1 + 1e-12)).all()
    torch.testing.assert_close(value_shift(bound).error(read, value), squared + bound * squared / norm(squared))


def test_an_endless_bound_has_the_gradients_of_l2():
    for bias in (huber_switch(math.inf), huber_norm(math.inf), huber_coordinates(math.inf)):
        read, value = (normal(4, 3, seed=seed).requires_grad_() for seed in (1, 2))
        found, expected = (
            torch.autograd.grad(b.error(read, value).square().sum(), (read, value)) for b in (bias, l2())
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def test_value_shift_is_the_worst_case():
    """No shift of the value within the bound costs more, and one costs as much."""
    read, value = normal(2, 3).unbind()
    worst = value_shift(0.5).loss(read, value)
    shifts = 0.5 * torch.nn.functional.normalize(normal(2000, 3, seed=5), dim=-1)
    found = l2().loss(read, value + shifts)
    assert found.max() <= worst
    assert found.max() > 0.995 * worst


def test_residual_is_l2_with_the_key_added():
    read, value, key = normal(3, 5, 4).unbind()
    bias = residual_l2()
    torch.testing.assert_close(bias.error(read, bias.target(key, value)), l2().error(key + read, value))


def function(weights, key):
    return weights[1] @ torch.nn.functional.gelu(weights[0] @ key) if len(weights) == 2 else weights[0] @ key


def slope(bias, bound=None):
    """The bias's derivative for one token, by its formula, with a graph."""
    bound = getattr(bias, "bound", None) if bound is None else bound

    def found(read: Tensor, value: Tensor, key: Tensor) -> Tensor:
        r = read - value
        length = (r @ r).sqrt()
        match bias:
            case residual_l2():
                return read + key - value
            case lp():
                return bias.p * torch.tanh(bias.smooth * r) * (r * r + 1e-6) ** ((bias.p - 1) / 2)
            case huber_coordinates():
                return torch.stack([x if x.abs() <= bound else x.sign() * bound for x in r])
            case huber_norm():
                return r if length <= bound else bound * r / length
            case huber_switch():
                return r if length <= bound else bound * torch.tanh(bias.smooth * r)
        return r + bound * r / length

    return found


@pytest.mark.parametrize(("way", "length"), [("chunked", n) for n in LENGTHS] + [("recurrent", 19)])
@pytest.mark.parametrize("bias", BOUNDED, ids=str)
def test_a_memory_learns_by_it(bias, way, length):
    structure = matrix() if bias == lp(1.5) else mlp(residual=False)
    memory = Memory(structure, bias, retain(decay()), 16, "chunk", "after", way)
    data = make(memory, length, step_size=0.03)
    assert_is_oracle(memory, data, lambda starts, flow: naive_miras(function, slope(bias), starts, flow, chunk=16))


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
@pytest.mark.parametrize("bias", BOUNDED[2:6], ids=str)
def test_a_bound_for_every_token(bias, way):
    """The oracle finds each token's bound behind its value."""
    memory = Memory(mlp(residual=False), bias, retain(decay()), 16, "chunk", "after", way)
    data = make(memory, 21, value=3, step_size=0.03)
    bound = (0.3 + 2.0 * normal(*data.values.shape[:3], seed=4).sigmoid()).requires_grad_()
    state, reads = memory.begin(data.starts), []
    for opens in (0, 16):
        at = slice(opens, opens + 16)
        keys, values, queries = (x[..., at, :] for x in (data.keys, data.values, data.queries))
        writes = Writes(keys, values, data.gates.at(at), bound=bound[..., at])
        y, state = memory.run(memory.open(state, True), writes, queries)
        reads.append(y)

    def own(read: Tensor, value: Tensor, key: Tensor) -> Tensor:
        return slope(bias, value[-1])(read, value[:-1], key)

    def oracle(starts, flow):
        return naive_miras(function, own, starts, flow, chunk=16)

    given = dataclasses.replace(data, values=torch.cat([data.values, bound[..., None]], -1))
    found, expected = [torch.cat(reads, 2), *state.running], slow(given, oracle)
    for mine, theirs in zip(found, expected, strict=True):
        near(mine, theirs)
    leaves = [*data.leaves, bound]
    wanted = gradients(expected, leaves)
    assert wanted[-1].any()
    for mine, theirs in zip(gradients(found, leaves), wanted, strict=True):
        near(mine, theirs)


def test_a_bound_where_there_is_none_is_refused():
    memory = Memory(matrix(), l2(), retain(decay()), 16)
    data = make(memory, 3)
    writes = Writes(data.keys, data.values, data.gates, bound=data.gates.step_size)
    with pytest.raises(ValueError, match=r"huber_switch\(\) and its kin, not for l2\(\)"):
        memory.run(memory.open(memory.begin(data.starts), True), writes)


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
def test_the_residual_target_at_every_token(way):
    memory = Memory(matrix(), residual_l2(), retain(decay()), 16, "token", "after", way)
    data = make(memory, 37, step_size=0.5)
    assert_is_oracle(memory, data, lambda starts, flow: naive_miras(function, slope(residual_l2()), starts, flow))


def test_other_biases_at_every_token_run_recurrently():
    with pytest.raises(ValueError, match=r"gradient_at='token'.*huber_norm\(\).*way='recurrent'"):
        Memory(matrix(), huber_norm(), retain(decay()), 16, "token")
    memory = Memory(matrix(), huber_norm(1.2), retain(decay()), 16, "token", "before", "recurrent")
    data = make(memory, 21, step_size=0.5)
    oracle = lambda starts, flow: naive_miras(function, slope(huber_norm(1.2)), starts, flow, read="before")  # noqa: E731
    assert_is_oracle(memory, data, oracle)


@pytest.mark.parametrize(
    "structure", [mlp(), normed(), gated_mlp(residual=True), together(mlp()), biased(mlp())], ids=str
)
def test_the_key_is_not_taken_from_the_value_twice(structure):
    for build in (lambda: Memory(structure, residual_l2()), lambda: sequence_memory(structure, residual_l2())):
        with pytest.raises(ValueError, match=rf"residual_l2\(\) takes .* {re.escape(str(structure))} adds it"):
            build()
    assert Memory(structure, l2()).structure == structure


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lp(0.5), "lp: p must be at least 1 and finite, got 0.5"),
        (lambda: lp(math.inf), "lp: p must be at least 1 and finite, got inf"),
        (lambda: lp(3.0, 0.0), r"lp: smooth must be > 0 \(inf: not smoothed\), got 0.0"),
        (lambda: huber_switch(1.0, -1.0), "huber_switch: smooth must be > 0"),
        (lambda: huber_norm(0.0), "huber_norm: bound must be > 0, got 0.0"),
        (lambda: value_shift(math.inf), "value_shift: bound must be finite, got inf"),
        (lambda: residual_l2().target(normal(2, 3), normal(2, 4)), r"residual_l2\(\).*got 3 and 4; use l2\(\)"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
