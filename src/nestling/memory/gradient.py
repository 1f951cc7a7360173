"""What a step of a learning rule is given: gates, gradients, and what a whole chunk makes of them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Gates(NamedTuple):
    """What a token (or the user) chooses for one step: numbers, or tensors with the weight's leading dims.

    step_size: Titans' theta, the delta rule's beta, Nested Learning's eta. momentum: Titans' eta.
    log_retention: log of the fraction kept (Titans' 1 - alpha; Nested Learning's alpha); with a dim more than the
    step size, one for every channel of a map's input.
    """

    step_size: Tensor | float = 1.0
    momentum: Tensor | float = 0.0
    log_retention: Tensor | float = 0.0

    @property
    def by_channel(self) -> bool:
        """Is there a retention for every input channel?"""
        both = isinstance(self.log_retention, Tensor) and isinstance(self.step_size, Tensor)
        return both and self.log_retention.dim() > self.step_size.dim()  # type: ignore[union-attr]

    def at(self, tokens: slice | int) -> "Gates":
        """The gates [..., t] of some tokens, retention [..., t, in] by channel; numbers stand for all."""
        picked = Gates(*(gate[..., tokens] if isinstance(gate, Tensor) else gate for gate in self[:2]))
        if not isinstance(self.log_retention, Tensor):
            return picked._replace(log_retention=self.log_retention)
        where = (..., tokens, slice(None)) if self.by_channel else (..., tokens)
        return picked._replace(log_retention=self.log_retention[where])


class Pairs(NamedTuple):
    """A gradient as what it is made of: errors at a map's output and the map's inputs, n pairs at one weight."""

    error: Tensor  # [..., n, out]
    input: Tensor  # [..., n, in]

    @property
    def tokens(self) -> int:
        return self.input.shape[-2]

    def dense(self) -> Tensor:
        """sum_n error input^T [..., out, in]."""
        return self.error.mT @ self.input

    def added_to(self, total: Tensor, own: bool = False) -> Tensor:
        """total + dense(), in one pass over a total of the same kind. own: the total is the caller's alone, and is
        used up."""
        alike = total.dtype == self.error.dtype == self.input.dtype
        if not alike or total.dim() not in (2, 3) or not total.dim() == self.error.dim() == self.input.dim():
            return Summed(self.dense()).added_to(total, own)
        add = torch.addmm if total.dim() == 2 else torch.baddbmm
        return add(total, self.error.mT, self.input, out=total) if own else add(total, self.error.mT, self.input)

    def project(self, weight: Tensor) -> Tensor:
        """sum_n (W x) x^T: the part of W that lies along the inputs [..., out, in]."""
        return (self.input @ weight.mT).mT @ self.input

    def squared_norm(self) -> Tensor:
        """sum_n |x|^2 [...]."""
        return self.input.square().sum((-2, -1))

    def gram(self) -> Tensor:
        """sum_n x x^T [..., in, in]."""
        return self.input.mT @ self.input


class Summed(NamedTuple):
    """A gradient summed over `tokens` tokens; with the inputs' Gram matrix where the rule needs the inputs. For a
    timed clock: integrated over that length of time."""

    total: Tensor  # [..., out, in]
    inputs: Tensor | None = None  # [..., in, in]
    tokens: float = 1

    def dense(self) -> Tensor:
        return self.total

    def added_to(self, total: Tensor, own: bool = False) -> Tensor:
        return total.add_(self.total) if own and total.dtype == self.total.dtype else total + self.total

    def project(self, weight: Tensor) -> Tensor:
        gram = self.gram()
        return weight @ gram if weight.dtype == gram.dtype else (weight.to(gram.dtype) @ gram).to(weight.dtype)

    def squared_norm(self) -> Tensor:
        return self.gram().diagonal(dim1=-2, dim2=-1).sum(-1).to(self.total.dtype)

    def gram(self) -> Tensor:
        if self.inputs is None:
            raise ValueError(
                "this rule needs the inputs of each linear map (delta_gradient_descent and normalize do), "
                "but was given a gradient without them; capture them (Optimizer.capture) or pass Pairs"
            )
        return self.inputs


Gradient = Pairs | Summed


class SquaredNorms(Function):
    """x [..., c, k] -> |x|^2 [..., c], with its gradient in one pass over x, where torch takes four.
    Oracle: tests/test_fused.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=-1).square_()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (2.0 * grads[0])[..., None]


class Norms(NamedTuple):
    """Squared norms of a map's inputs and of the errors at its output [..., c]; the errors of a chunk are not
    known beforehand (None) where they are taken at every token's own weights."""

    input: Tensor
    error: Tensor | None


class Plan(NamedTuple):
    """The scalars of a linear rule for every token of a chunk, [..., c]; None is the neutral value.

    W_t = a_t W_{t-1} + (1 - a_t) start + read_out_t S_t - erase_t (W_{t-1} x_t) x_t^T,  a = exp(log_keep)
    S_t = momentum_t S_{t-1} - write_t e_t x_t^T        (S is `buffer` before the chunk)
    e_t = slope sight_t W_{t-1} x_t + ... where errors are taken at every token's own weights
    """

    write: Tensor
    log_keep: Tensor | None = None
    momentum: Tensor | None = None
    read_out: Tensor | None = None
    erase: Tensor | None = None
    buffer: Tensor | None = None
    start: Tensor | None = None
    sight: Tensor | None = None  # of W_{t-1} in an error that is taken at every token's own weights

    def times(self, factor: Tensor | float) -> "Plan":
        """The plan of the same rule with its update multiplied by a gate [..., c]: what is written, or, where a
        momentum stands between, what is read out of it."""
        if self.momentum is None:
            return self._replace(write=self.write * factor)
        read_out = torch.ones_like(self.momentum) if self.read_out is None else self.read_out
        return self._replace(read_out=read_out * factor)


class ChunkEnd(NamedTuple):
    """What a chunk leaves behind for a rule's state."""

    buffer: Tensor | None  # S after the chunk [..., out, in]
    squared_norm: Tensor  # sum over the chunk of |x|^2 [...]


def _wide(gate: Tensor | float) -> Tensor | float:
    """A gate [...] made to multiply a weight [..., out, in]."""
    return gate[..., None, None] if isinstance(gate, Tensor) else gate


def _per_token(gate: Tensor | float, like: Tensor) -> Tensor:
    """A gate as a tensor [..., c] that broadcasts against `like`."""
    return gate if isinstance(gate, Tensor) else torch.full_like(like, gate)
