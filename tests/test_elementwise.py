"""Gradients by hand against the plain expressions they stand for, and against finite differences of both orders."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from nestling.sequence import elementwise
from nestling.sequence.elementwise import Convolve, Gated, Heads, Unit


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def convolution(tail: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(torch.cat([tail, x], 1).mT, weight[:, None], groups=x.shape[-1]).mT


def gated(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    normed = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return torch.cat(list(normed.unbind(1)), -1) * weight * gate / (1 + torch.exp(-gate))


CASES = {
    "convolve": (Convolve, convolution, (normal(3, 3, 2, seed=0), normal(3, 6, 2, seed=1), normal(2, 4, seed=2))),
    "convolve, fewer than its taps": (
        Convolve,
        convolution,
        (normal(2, 3, 2, seed=0), normal(2, 2, 2, seed=1), normal(2, 4, seed=2)),
    ),
    "heads": (Heads, Heads.plain, (normal(3, 5, 12, seed=0), 3, 2)),
    "heads, none of norm one": (Heads, Heads.plain, (normal(3, 5, 12, seed=0), 3, 0)),
    "gated": (Gated, gated, (normal(3, 2, 5, 4, seed=0), normal(3, 5, 8, seed=1), normal(8, seed=2))),
    "unit": (Unit, lambda x: F.normalize(x, dim=-1), (normal(3, 5, seed=0),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1, elementwise.ELEMENTS], ids=["row by row", "at once"])
def test_is_the_plain_expression_with_its_gradients(name, elements, monkeypatch):
    monkeypatch.setattr(elementwise, "ELEMENTS", elements)
    function, plain, given = CASES[name]
    found, expected = function.apply(*given), plain(*given)
    torch.testing.assert_close(found, expected)
    tensors = [x for x in given if isinstance(x, Tensor)]
    g = normal(*found.shape, seed=9).detach()
    for mine, theirs in zip(
        torch.autograd.grad(found, tensors, g), torch.autograd.grad(expected, tensors, g), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert gradcheck(function.apply, given, fast_mode=True)
    assert gradgradcheck(function.apply, given, fast_mode=True)


@pytest.mark.parametrize(("function", "given"), [(Unit, (3,)), (Heads, (1, 1, 3))], ids=["unit", "heads"])
def test_a_vector_of_zeros_has_a_finite_gradient(function, given):
    x = torch.zeros(given, requires_grad=True)
    function.apply(x, *[1] * (2 * (function is Heads))).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad > 1e11).all(), "as if it had the least norm that is told from zero"
