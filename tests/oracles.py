"""What stands around a memory, written out one token at a time in float64: for the tests of blocks."""

import torch
from torch import Tensor, nn

from nestling.memory.naive import Choices
from nestling.memory.state import flatten

F64 = torch.float64
EXACT = Choices(objective="l2", decay_to="zero")
"""Of a memory with gradients at every token's own weights and the rule retain(decay(), momentum())."""
DEEP = Choices(objective="l2", residual=True, decay_to="start", normalized=True, clip=1.0, dampened=True, chunk=4)
"""Of mlp() with chunk=4 and the rule that sequence_memory has by default."""


def moved(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64, none of whose parameters is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.to(F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def convolved(weight: Tensor, rows: list[Tensor]) -> Tensor:
    """sum_s w_s x_{t-s} for the last t of `rows`; w_0 is the last column."""
    y = torch.zeros_like(rows[-1])
    for s in range(min(len(rows), weight.shape[1])):
        y = y + weight[:, -1 - s] * rows[-1 - s]
    return y


def normed(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary positions, as complex numbers."""
    half = len(x) // 2
    angles = torch.tensor([position * 10_000.0 ** (-i / half) for i in range(half)], dtype=F64)
    turn = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turn.real, turn.imag])


def assert_is(oracle, layer, expression, x: Tensor, heads: int) -> None:
    """One row x [t, d] through the layer and through its oracle (`sequence.naive_blocks`): outputs, what is remembered
    after it, and the gradients of x and of every parameter."""
    y, state = layer(x[None])
    expected, kept = oracle(expression, dict(layer.named_parameters()), x, heads)
    torch.testing.assert_close(y[0], expected, rtol=1e-10, atol=1e-10)
    told = flatten(state)
    assert kept
    for name, tensor in kept.items():
        torch.testing.assert_close(
            told[name][0], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert_same(gradients(y[0], layer, x), gradients(expected, layer, x))


def gradients(y: Tensor, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed random combination of y, for every parameter and x."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((y * normal(*y.shape, seed=7)).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-10, atol=1e-10 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
