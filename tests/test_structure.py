"""Structures: the hand-written backward against autograd, memories side by side, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling.memory.structure import Structure, Weights, matrix, mlp, plain, side_by_side, together

F64 = torch.float64
KEY, VALUE, TOKENS, LEADING = 4, 3, 5, (2, 2)
BARE = [
    matrix(),
    mlp(residual=False),
    mlp(residual=False, activation="silu"),
    mlp(depth=3, expansion=1.5, residual=False),
    mlp(depth=3, residual=False, activation="silu"),
]
RESIDUAL = [mlp(), mlp(depth=3, activation="silu"), mlp(expansion=2.0, activation="silu")]
SEVERAL = [together(one) for one in (*BARE[:4], *RESIDUAL[:2])]
MEMBERS = 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def make(structure: Structure) -> tuple[Weights, torch.Tensor]:
    """Weights that need a gradient, and keys."""
    value = VALUE if structure in BARE else KEY
    generator = torch.Generator().manual_seed(0)
    if isinstance(structure, together):
        members = [structure.of.init(KEY, value, LEADING, generator) for _ in range(MEMBERS)]
        weights = side_by_side(members)
    else:
        weights = structure.init(KEY, value, LEADING, generator)
    return tuple(w.to(F64).requires_grad_() for w in weights), normal(*LEADING, TOKENS, KEY, seed=1).requires_grad_()


def by_hand(structure: Structure, weights: Weights, keys: torch.Tensor) -> torch.Tensor:
    """The structure written out for plain weights."""
    if isinstance(structure, together):
        members = [tuple(weight[..., i, :, :] for weight in weights) for i in range(MEMBERS)]
        return torch.stack([by_hand(structure.of, member, keys) for member in members], -3)
    x = keys
    for index, weight in enumerate(weights):
        if index:
            x = F.gelu(x) if structure.activation == "gelu" else F.silu(x)
        x = torch.einsum("...oi,...ni->...no", weight, x)
    return keys + x if getattr(structure, "residual", False) else x


@pytest.mark.parametrize("structure", BARE + RESIDUAL + SEVERAL, ids=str)
class TestStructure:
    def test_forward_is_the_function_written_out(self, structure):
        weights, keys = make(structure)
        values, inputs, outputs = structure.forward(plain(weights), keys)
        torch.testing.assert_close(values, by_hand(structure, weights, keys))
        assert len(inputs) == len(outputs) == len(weights)
        torch.testing.assert_close(inputs[0].view_as(keys), keys)
        for weight, x, output in zip(weights, inputs, outputs, strict=True):
            torch.testing.assert_close(x @ weight.mT, output)

    def test_backward_is_autograds(self, structure):
        weights, keys = make(structure)
        values, inputs, outputs = structure.forward(plain(weights), keys)
        error = normal(*values.shape, seed=3)
        found = structure.backward(weights, outputs, error)
        expected = torch.autograd.grad(values, outputs, error, retain_graph=True)
        dense = torch.autograd.grad(values, weights, error)
        for mine, theirs, x, weight in zip(found, expected, inputs, dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(mine.mT @ x, weight, rtol=1e-12, atol=1e-12)

    def test_the_backward_has_a_gradient_of_its_own(self, structure):
        weights, keys = make(structure)
        error = normal(*structure.forward(plain(weights), keys)[0].shape, seed=3).requires_grad_()

        def errors(keys, error, *weights):
            outputs = structure.forward(plain(weights), keys)[2]
            return structure.backward(weights, outputs, error)

        assert torch.autograd.gradcheck(errors, (keys, error, *weights), fast_mode=True)


def test_init_scales_with_the_fan_in_and_repeats_with_the_seed():
    weights = mlp(depth=3).init(64, 64, (8,), torch.Generator().manual_seed(3))
    again = mlp(depth=3).init(64, 64, (8,), torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert [tuple(w.shape) for w in weights] == [(8, 64, 64)] * 3
    for weight, gain in zip(weights, (1.0, 1.0, 0.3), strict=True):
        assert weight.std().item() == pytest.approx(gain / math.sqrt(64), rel=0.03)
    (only,) = matrix().init(64, 32, (8,), torch.Generator().manual_seed(3))
    assert only.shape == (8, 32, 64)
    assert only.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.03)
    assert mlp(expansion=1.5, residual=False, depth=3).shapes(6, 4) == ((9, 6), (9, 9), (4, 9))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mlp(depth=1), r"depth must be at least 2.*got 1"),
        (lambda: mlp(expansion=0.0), r"expansion must be more than 0, got 0.0"),
        (lambda: mlp(activation="relu"), r"'gelu' or 'silu', got 'relu'"),
        (lambda: mlp().shapes(4, 3), r"mlp\(\).*got 4 and 3.*residual=False"),
        (lambda: together(together(matrix())), r"needs one memory's structure, such as matrix\(\) or mlp"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_under_autocast_products_are_narrow_and_gradients_are_not():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((2, 5, 8), (2, 3, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        y = plain((weight,))(0, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ weight.mT, rtol=0.02, atol=0.05)
    found = torch.autograd.grad(y.float().square().sum(), (x, weight))
    expected = torch.autograd.grad((x @ weight.mT).square().sum(), (x, weight))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.5)
