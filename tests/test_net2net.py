"""Growth that keeps the function: wider, deeper, one block more."""

import pytest
import torch

from nestling.memory import gated_mlp, mlp
from nestling.memory.structure import plain
from nestling.sleep.net2net import deepen, one_more_block, widen

F64 = torch.float64
H = torch.randn(7, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
SMALL, WIDE = 2.0, 3.5  # 12 and 21 neurons


def made(structure) -> tuple[torch.Tensor, ...]:
    return tuple(w.double() for w in structure.init(6, 6, generator=torch.Generator().manual_seed(1)))


def read(structure, weights) -> torch.Tensor:
    assert tuple(tuple(w.shape) for w in weights) == structure.shapes(6, 6)
    return structure.forward(plain(weights), H)[0]


@pytest.mark.parametrize("kind", [lambda e: mlp(expansion=e, residual=False), lambda e: gated_mlp(expansion=e)])
def test_a_wider_level_is_the_same(kind) -> None:
    weights = made(kind(SMALL))
    wide = widen(weights, kind(WIDE).shapes(6, 6)[-1][1], torch.Generator().manual_seed(2))
    torch.testing.assert_close(read(kind(WIDE), wide), read(kind(SMALL), weights), rtol=0, atol=1e-12)
    assert torch.equal(wide[0][:12], weights[0])
    stirred = widen(weights, wide[-1].shape[-1], torch.Generator().manual_seed(2), noise=0.01)
    assert torch.equal(stirred[0][:12], weights[0])
    assert not any(torch.equal(row, other) for row in stirred[0][12:] for other in weights[0])
    apart = (read(kind(WIDE), stirred) - read(kind(SMALL), weights)).norm() / read(kind(SMALL), weights).norm()
    assert 0 < apart < 0.02


def test_a_deeper_level_is_the_same() -> None:
    before, after = mlp(expansion=SMALL, residual=False), mlp(depth=3, expansion=2 * SMALL, residual=False)
    weights = made(before)
    torch.testing.assert_close(read(after, deepen(weights)), read(before, weights), rtol=0, atol=1e-12)


def test_a_new_block_adds_nothing() -> None:
    structure = mlp(expansion=SMALL, residual=False)
    fresh = one_more_block(made(structure))
    assert not read(structure, fresh).any()
    leaves = tuple(w.requires_grad_() for w in fresh)
    (gradient,) = torch.autograd.grad(structure.forward(plain(leaves), H)[0].square().sum() + 0, leaves[-1:])
    assert not gradient.any()  # of a square at zero
    (gradient,) = torch.autograd.grad(structure.forward(plain(leaves), H)[0].sum(), leaves[-1:])
    assert gradient.any()


def test_what_does_not_fit_is_said() -> None:
    weights = made(mlp(expansion=SMALL, residual=False))
    with pytest.raises(ValueError, match="hidden must be >= the 12 neurons that there are, got 11"):
        widen(weights, 11)
    with pytest.raises(ValueError, match="takes the two maps of a level with one hidden layer, got 3"):
        deepen((*weights, weights[0]))
