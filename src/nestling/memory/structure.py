"""What a memory is: a map from keys to values, made of linear maps [..., out, in]."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .part import Part

Weights = tuple[Tensor, ...]
Apply = Callable[[int, Tensor], Tensor]
"""(index of a linear map, its inputs [..., n, in]) -> its outputs [..., n, out]."""


class Structure(Part, family=True):
    """A function of keys built from linear maps.

    The function is written once, in `forward`, over an `apply` that says what a linear map does: multiply by
    one weight for all tokens, or give every token its own (the coefficient form). `backward` carries an error
    at the value back to an error at the output of every map, by hand, so that writes are ordinary operations
    in the autograd graph and can be checkpointed. Oracle: autograd (tests/test_structure.py).
    """

    @property
    def lead(self) -> tuple[int, ...]:
        """How many dims each linear map has between the heads and its matrix: 1 where memories that run
        `together` each have their own inputs."""
        return (0,) * len(self.shapes(1, 1))

    @abstractmethod
    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        """(out, in) of every linear map, from the key's side to the value's."""

    @abstractmethod
    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Values [..., n, v] of keys [..., n, k]; beside them each map's inputs and each map's outputs."""

    @abstractmethod
    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        """The error at the output of every map, given that at the value [..., n, v]."""

    def init(
        self,
        key_dim: int,
        value_dim: int,
        leading: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
        *,
        unit_keys: bool = False,
    ) -> Weights:
        """Initial weights [*leading, out, in]: normal, of standard deviation 1/sqrt(in); the last of several
        maps is 0.3 of that, so that a deep memory starts near its residual. unit_keys: the first of several maps
        meets keys of norm one, and takes a deviation of 1, so that its outputs reach the nonlinearity."""
        shapes = self.shapes(key_dim, value_dim)
        weights = []
        for index, (rows, columns) in enumerate(shapes):
            deviation = 1.0 / math.sqrt(columns)
            if len(shapes) > 1 and index == 0 and unit_keys:
                deviation = 1.0
            elif len(shapes) > 1 and index == len(shapes) - 1:
                deviation *= 0.3
            weights.append(torch.randn(*leading, rows, columns, generator=generator) * deviation)
        return tuple(weights)


def plain(weights: Weights) -> Apply:
    """The same weights for every token."""
    return lambda index, inputs: inputs @ weights[index].mT


@dataclass(frozen=True, repr=False)
class matrix(Structure):
    """M(k) = W k. State per head: v x k. Linear attention, the delta rule and their kin."""

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return ((value_dim, key_dim),)

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        values = apply(0, keys)
        return values, (keys,), (values,)

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        return (error,)


@dataclass(frozen=True, repr=False)
class mlp(Structure):
    """M(k) = k + W_L s(W_{L-1} ... s(W_1 k)), L = `depth` linear maps, hidden width `expansion` x value dim.

    Nested Learning equations 89 and 91 (two maps, no biases, residual); the nonlinearity s is not given there:
    GELU here. Without the residual, keys and values may differ in width.
    """

    depth: int = 2
    expansion: float = 1.0
    residual: bool = True
    activation: Literal["gelu", "silu"] = "gelu"

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"mlp: depth must be at least 2 linear maps, got {self.depth}; one map is matrix()")
        if not self.expansion > 0:
            raise ValueError(f"mlp: expansion must be more than 0, got {self.expansion}")
        if self.activation not in ("gelu", "silu"):
            raise ValueError(f"mlp: activation must be 'gelu' or 'silu', got {self.activation!r}")

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        if self.residual and key_dim != value_dim:
            raise ValueError(
                f"{self}: a residual memory needs keys as wide as values, got {key_dim} and {value_dim}; "
                "set residual=False"
            )
        hidden = max(1, round(self.expansion * max(key_dim, value_dim)))
        widths = [key_dim, *[hidden] * (self.depth - 1), value_dim]
        return tuple(zip(widths[1:], widths[:-1], strict=True))

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        inputs, outputs = [keys], [apply(0, keys)]
        for index in range(1, self.depth):
            inputs.append(self.activate(outputs[-1]))
            outputs.append(apply(index, inputs[-1]))
        values = keys + outputs[-1] if self.residual else outputs[-1]
        return values, tuple(inputs), tuple(outputs)

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        errors = [error]
        for index in range(self.depth - 1, 0, -1):
            errors.append(self.activation_backward(errors[-1] @ weights[index], outputs[index - 1]))
        return tuple(reversed(errors))

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.activation == "gelu" else F.silu(x)

    def activation_backward(self, error: Tensor, x: Tensor) -> Tensor:
        if self.activation == "gelu":  # the fused derivative; twice differentiable, unlike a custom Function
            return torch.ops.aten.gelu_backward(error, x)
        gate = x.sigmoid()  # silu's fused derivative has none of its own
        return error * gate * (1.0 + x * (1.0 - gate))


@dataclass(frozen=True, repr=False)
class together(Structure):
    """Several memories of one shape that share their keys, run as one.

    Their first maps are one map [n * out, in]; later maps stand side by side [n, out, in]. Values are
    [..., n, t, v]. `residual` says for each memory whether its key is added to its answer. Only for structures
    without a residual of their own.
    """

    of: Structure
    residual: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.of, matrix) or (isinstance(self.of, mlp) and not self.of.residual)):
            raise ValueError(f"together({self.of!r}, ...): needs matrix() or mlp(residual=False)")

    @property
    def copies(self) -> int:
        return len(self.residual)

    @property
    def lead(self) -> tuple[int, ...]:
        return (0, *[1] * (len(self.of.lead) - 1))

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return self.of.shapes(key_dim, value_dim)

    def join(self, members: list[Weights]) -> Weights:
        """The weights of the members [h, out, in] as those of the whole; narrower answers are padded with rows
        of zeros, which stay zero as long as their errors are."""
        joined = []
        for index, maps in enumerate(zip(*members, strict=True)):
            rows = max(weight.shape[-2] for weight in maps)
            padded = [F.pad(weight, (0, 0, 0, rows - weight.shape[-2])) for weight in maps]
            joined.append(torch.stack(padded, -3) if index else torch.cat(padded, -2))
        return tuple(joined)

    def take(self, members: slice) -> "together":
        """The structure of some of the members."""
        return together(self.of, self.residual[members])

    def member_weights(self, weights: Weights, members: slice) -> Weights:
        """The weights [b, h, ...] of some of the members."""
        first = weights[0].unflatten(-2, (self.copies, -1))[..., members, :, :].flatten(-3, -2)
        return (first, *(weight[..., members, :, :] for weight in weights[1:]))

    def side_by_side(self, x: Tensor) -> Tensor:
        """[..., t, n * r] -> [..., n, t, r]."""
        return x.unflatten(-1, (self.copies, -1)).transpose(-2, -3)

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        first = apply(0, keys)
        inputs, outputs, last = [keys], [first], self.side_by_side(first)
        if isinstance(self.of, mlp):
            hidden = self.side_by_side(self.of.activate(first))
            for index in range(1, self.of.depth):
                inputs.append(hidden)
                outputs.append(apply(index, hidden))
                last = outputs[-1]
                hidden = self.of.activate(last) if index < self.of.depth - 1 else last
        added = [keys if kept else torch.zeros_like(keys) for kept in self.residual]
        return last + torch.stack(added, -3), tuple(inputs), tuple(outputs)

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        errors = [error]
        for index in range(len(outputs) - 1, 0, -1):
            assert isinstance(self.of, mlp)
            below = outputs[index - 1] if index > 1 else self.side_by_side(outputs[0])
            errors.append(self.of.activation_backward(errors[-1] @ weights[index], below))
        errors[-1] = errors[-1].transpose(-2, -3).flatten(-2)
        return tuple(reversed(errors))
