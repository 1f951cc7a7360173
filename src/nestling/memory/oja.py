"""Oja's rule: a write that forgets along the value, where the delta rule forgets along the key."""

from dataclasses import dataclass

from torch import Tensor

from .rule import Direction, Gates, Gradient, Pairs, State, _passing, _wide, gradient_descent


@dataclass(frozen=True, repr=False)
class oja(_passing):
    """W <- W - eta e e^T W + (update of `of`): with dot(), whose error e is -v, W + eta v (k - W^T v)^T.

    Nested Learning equations 66 and 67, half the loss -2<W k, v> + |W^T v|^2. No attentional bias can say this: the
    erase multiplies the weight from the left, and is no error at the value read. Of several pairs at one weight the
    outer products add. Needs the errors themselves, not their sum; no chunked form. Oracle: tests/test_oja.py.
    Raises ValueError for a gradient that is given as a sum.
    """

    of: Direction = gradient_descent()
    needs_pairs = True

    def __post_init__(self) -> None:
        if not isinstance(self.of, Direction):
            raise ValueError(f"oja({self.of!r}): oja wraps a direction, as in oja(momentum())")

    def update(self, weight: Tensor, gradient: Gradient, state: State, gates: Gates) -> tuple[Tensor, State]:
        if not isinstance(gradient, Pairs):
            raise ValueError(f"{self} needs the error of every token, and was given their sum")
        added, state = self.of.update(weight, gradient, state, gates)
        return added - _wide(gates.step_size) * (gradient.error.mT @ (gradient.error @ weight)), state
