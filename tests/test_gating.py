"""Gates and what stands before a memory are the papers' formulas, and every option of them changes the numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.checks.options import options_live
from nestling.memory import Gates, decay, dot, gradient_descent, l2, matrix, mlp, momentum, parse, retain, retain_first
from nestling.sequence import (
    Gating,
    bare,
    fixed_gates,
    gated_delta_gates,
    gated_delta_rule,
    gated_linear_attention,
    kda,
    kda_gates,
    low_rank_gates,
    mamba2_gates,
    retention,
    rwkv7_gates,
    sequence_memory,
    sigmoid_gates,
    silu,
    silu_unit,
    unit_keys,
)

B, T, H, K = 2, 11, 2, 3
DIM = H * K
F64 = torch.float64


def moved(module: torch.nn.Module) -> Any:
    """The module in float64 with all its parameters off their first values."""
    module = module.to(F64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return module


def tokens() -> Tensor:
    return torch.randn(B, T, DIM, dtype=F64, generator=torch.Generator().manual_seed(6))


def heads(x: Tensor) -> Tensor:
    """[b, t, h * n] -> [b, h, t, n], head by head."""
    n = x.shape[-1] // H
    return torch.stack([x[..., h * n : h * n + n] for h in range(H)], 1)


def chosen(gating: Gating) -> tuple[Any, Gates]:
    module = moved(gating.build(DIM, H, K, torch.Generator().manual_seed(0)))
    return module, module.choose(module(tokens()), 0.7)


def check(found: Gates, step_size: Tensor, momentum: Tensor, retention: Tensor) -> None:
    expected = Gates(step_size, momentum, retention)
    for a, b, name in zip(found, expected, Gates._fields, strict=True):
        assert isinstance(a, Tensor)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


ZERO, FULL = torch.zeros(B, H, T, dtype=F64), torch.full((B, H, T), 0.7, dtype=F64)


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def test_sigmoid_gates() -> None:
    m, found = chosen(sigmoid_gates(reach=2.0))
    x = tokens() @ m.weight.T + m.bias
    check(found, 2 * 0.7 * sigma(heads(x[..., :2])[..., 0]), sigma(heads(x[..., 2:4])[..., 0]), found[2])
    torch.testing.assert_close(found.log_retention, sigma(heads(x[..., 4:])[..., 0]).log())  # type: ignore[arg-type]


def test_fixed_gates() -> None:
    _, found = chosen(fixed_gates())
    kept = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=F64).log()[:, None].expand(B, H, T)
    check(found, FULL, ZERO, kept)
    _, found = chosen(fixed_gates(slowest=3.0))
    check(found, FULL, ZERO, torch.tensor([1 - 2.0**-3, 1 - 2.0**-4], dtype=F64).log()[:, None].expand(B, H, T))


def test_low_rank_gates() -> None:
    m, found = chosen(low_rank_gates(rank=4, divisor=8.0))
    assert m.down.weight.shape == (4, DIM)
    x = tokens() @ m.down.weight.T @ m.up.weight.T + m.up.bias
    check(found, FULL, ZERO, heads(sigma(x).log() / 8))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def test_mamba2_gates() -> None:
    m, found = chosen(mamba2_gates())
    step = softplus(tokens() @ m.project.weight.T + m.bias)
    check(found, 0.7 * heads(step)[..., 0], ZERO, heads(-torch.exp(m.log_rate) * step)[..., 0])


def test_gated_delta_gates() -> None:
    m, found = chosen(gated_delta_gates(reach=2.0))
    spent = torch.exp(m.log_rate) * softplus(tokens() @ m.project.weight.T + m.bias)
    check(found, 1.4 * heads(sigma(tokens() @ m.step.weight.T))[..., 0], ZERO, heads(-spent)[..., 0])


def test_kda_gates() -> None:
    m, found = chosen(kda_gates(rank=2))
    down, up = m.project
    assert down.weight.shape == (2, DIM)
    spent = heads(softplus(tokens() @ down.weight.T @ up.weight.T + m.bias)) * torch.exp(m.log_rate)[:, None, None]
    check(found, 0.7 * heads(sigma(tokens() @ m.step.weight.T))[..., 0], ZERO, -spent)


def test_rwkv7_gates() -> None:
    m, found = chosen(rwkv7_gates(rank=2))
    raw = torch.tanh(tokens() @ m.down.weight.T) @ m.up.weight.T + m.up.bias
    kept = -0.6065306597126334 * heads(sigma(raw))
    check(found, 0.7 * heads(sigma(tokens() @ m.step.weight.T))[..., 0], ZERO, kept)


@pytest.mark.parametrize("gating", [mamba2_gates(0.01, 0.02), gated_delta_gates(0.01, 0.02), kda_gates(0.01, 0.02)])
def test_where_timed_gates_start(gating: Gating) -> None:
    m = gating.build(64, 8, 8, torch.Generator().manual_seed(0))
    steps, rates = F.softplus(m.bias), m.log_rate.exp()  # type: ignore[arg-type,operator]
    assert bool(((steps > 0.0099) & (steps < 0.0201)).all())
    assert bool(((rates >= 1) & (rates <= 16)).all())
    assert len(set(rates.tolist())) == 8


LINEAR = retain(decay(), gradient_descent())
LAYERS = {
    "retnet": (
        sequence_memory(matrix(), dot(), LINEAR, 4, "token", gating=fixed_gates(), preparation=bare()),
        retention,
    ),
    "gla": (sequence_memory(matrix(), dot(), LINEAR, 4, "token", gating=low_rank_gates()), gated_linear_attention),
    "gdn": (sequence_memory(matrix(), l2(), retain_first(), 4, "token", gating=gated_delta_gates()), gated_delta_rule),
    "kda": (sequence_memory(matrix(), l2(), retain_first(), 4, "token", gating=kda_gates()), kda),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_function_between_its_projections(name: str) -> None:
    expression, function = LAYERS[name]
    layer, x = moved(expression.build(DIM, H, torch.Generator().manual_seed(0))), tokens()
    padded = F.pad(layer.qkv(x), (0, 0, 3, 0))
    mixed = sum(padded[:, shift : shift + T] * layer.convolution.weight[:, shift] for shift in range(4))
    q, k, v = (part.unflatten(-1, (H, K)) for part in mixed.chunk(3, -1))
    if name != "retnet":
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    gates = layer.gates.choose(layer.gates(x), 1.0)
    asked = {"retnet": (), "gla": (2,), "gdn": (0, 2), "kda": (0, 2)}[name]
    start = layer.start[0].expand(B, H, K, K)
    y, _ = function(q, k, v, *(gates[i].transpose(1, 2) for i in asked), initial_state=start, scale=1.0)
    expected = layer.output(y.transpose(1, 2), x)
    parameters = list(layer.parameters())
    for cut in (T, 5):
        first, state = layer(x[:, :cut])
        found = torch.cat([first, layer(x[:, cut:], state)[0]], 1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        mine, theirs = (torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (found, expected))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gla", "kda"])
def test_padding_and_document_starts_by_channel(name: str) -> None:
    layer, x = moved(LAYERS[name][0].build(DIM, H, torch.Generator().manual_seed(0))), tokens()
    valid, reset = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    valid[0, 4:6], reset[0, 7], reset[1, 3] = False, True, True
    found, _ = layer(x, reset=reset, valid=valid)
    torch.testing.assert_close(found[:1, 7:], layer(x[:1, 7:])[0])
    torch.testing.assert_close(found[1:, 3:], layer(x[1:, 3:])[0])
    torch.testing.assert_close(found[:1, [0, 1, 2, 3, 6]], layer(x[:1, [0, 1, 2, 3, 6]])[0])


@pytest.mark.parametrize(
    "expression",
    [
        LAYERS["kda"][0],
        sequence_memory(matrix(), l2(), LINEAR, 4, "token", gating=gated_delta_gates(), preparation=unit_keys()),
        sequence_memory(matrix(), l2(), LINEAR, 4, "token", gating=rwkv7_gates()),
    ],
    ids=str,
)
def test_every_option_changes_the_numbers(expression: sequence_memory) -> None:
    finding = options_live(expression)
    assert finding.passed, finding


def test_preparations() -> None:
    mixed = torch.randn(B, T, 3 * DIM, dtype=F64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    streams = torch.stack([mixed[..., i * K : i * K + K] for i in range(3 * H)], 1)
    soft = streams * sigma(streams)

    def unit(x: Tensor) -> Tensor:
        return torch.cat([x[:, : 2 * H] / x[:, : 2 * H].norm(dim=-1, keepdim=True), x[:, 2 * H :]], 1)

    weight = torch.randn(streams.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    for part, expected in ((silu_unit(), unit(soft)), (silu(), soft), (unit_keys(), unit(streams)), (bare(), streams)):
        found = part.streams(mixed, H)
        torch.testing.assert_close(found, expected)
        mine, theirs = (torch.autograd.grad((y * weight).sum(), mixed, retain_graph=True)[0] for y in (found, expected))
        torch.testing.assert_close(mine, theirs)


def test_prints_as_the_line_that_builds_it() -> None:
    for gating in (sigmoid_gates(2.0), fixed_gates(), low_rank_gates(divisor=4.0), kda_gates(rank=4), rwkv7_gates()):
        assert parse(str(gating)) == gating
    for expression, _ in LAYERS.values():
        assert parse(str(expression)) == expression


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sigmoid_gates(0.0), "reach must be > 0"),
        (lambda: fixed_gates(-1.0), "slowest must be > 0"),
        (lambda: low_rank_gates(rank=0), "rank must be > 0"),
        (lambda: low_rank_gates(divisor=-math.inf), "divisor must be > 0"),
        (lambda: mamba2_gates(0.0), "least must be > 0"),
        (lambda: mamba2_gates(0.2), "most must be >= least"),
        (lambda: kda_gates(rank=0), "rank must be > 0"),
        (lambda: rwkv7_gates(rank=0), "rank must be > 0"),
        (lambda: sequence_memory(mlp(), rule=LINEAR, gating=kda_gates()), "is for matrix"),
        (lambda: sequence_memory(matrix(), rule=LINEAR, gating=kda_gates()), "gradient_at='token'"),
        (
            lambda: sequence_memory(matrix(), l2(), retain(decay(), momentum()), 4, "token", gating=fixed_gates()),
            "no gate for the momentum",
        ),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
