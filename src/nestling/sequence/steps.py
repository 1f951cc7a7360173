"""Several steps a token: it writes n pairs, one after the other, and is read once (DeltaProduct, 2502.10297).

What each of a token's steps has of its own stands in a leading dim, [n, b, h, t, ...], until it is laid in the order in
which it is written, [b, h, t n, ...]. From there on a step is a pair like any other. Oracle: tests/test_steps.py.
"""

import torch
from torch import Tensor

from nestling.memory.rule import Gates


def by_step(x: Tensor, steps: int) -> Tensor:
    """[b, t, n w] -> [n, b, t, w]; of one step a token, x as it is."""
    return x if steps == 1 else x.unflatten(-1, (steps, -1)).movedim(-2, 0)


def in_turn(x: Tensor) -> Tensor:
    """[n, b, h, t, ...] -> [b, h, t n, ...]: a token's steps one after the other."""
    return x.movedim(0, 3).flatten(2, 3)


def gates_in_turn(gates: Gates, steps: int) -> Gates:
    """Step size and momentum [n, b, h, t], or [b, h, t] for all steps alike, and a token's retention [b, h, t, ...] ->
    gates of every step. What a token forgets it forgets with its first step; the others keep all."""
    if steps == 1:
        return gates
    step_size, momentum, once = gates
    assert isinstance(once, Tensor)
    each = (gate.expand(steps, *once.shape[:3]) for gate in (step_size, momentum))  # type: ignore[union-attr]
    kept = torch.cat([once[None], torch.zeros_like(once).expand(steps - 1, *once.shape)])
    return Gates(*(in_turn(gate) for gate in (*each, kept)))
