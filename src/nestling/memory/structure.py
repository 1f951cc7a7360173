"""What a memory is: a map from keys to values, made of linear maps [..., out, in]."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    linear: one map of something that is made of the key without weights, W map_keys(k); it can be written a chunk at
    once at every token's own weights. bare: the value is the last map's output. residual: the key is added to it.
    meets_keys: so many maps, the first ones, have the keys as their inputs. ends_plainly: of what the last map gives
    nothing is taken but a sum, so that no gradient asks for it.
    """

    linear: bool = False
    bare: bool = False
    residual: bool = False
    meets_keys: int = 1
    ends_plainly: bool = False

    def map_keys(self, keys: Tensor) -> Tensor:
        """The inputs of the first map, for keys [..., n, k]."""
        return keys

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
        maps is 0.3 of that, so that a deep memory starts near its residual. unit_keys: of several maps, those that
        meet keys meet keys of norm one, and take a deviation of 1, so that their outputs reach the nonlinearity."""
        shapes = self.shapes(key_dim, value_dim)
        weights = []
        for index, (rows, columns) in enumerate(shapes):
            deviation = 1.0 / math.sqrt(columns)
            if len(shapes) > 1 and index < self.meets_keys and unit_keys:
                deviation = 1.0
            elif len(shapes) > 1 and index == len(shapes) - 1:
                deviation *= 0.3
            weights.append(torch.randn(*leading, rows, columns, generator=generator) * deviation)
        return tuple(weights)


def plain(weights: Weights) -> Apply:
    """The same weights for every token; under autocast a product in its type, as torch's linear maps have it."""

    def apply(index: int, inputs: Tensor) -> Tensor:
        weight, device = weights[index], inputs.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            inputs, weight = inputs.to(dtype), weight.to(dtype)
        return _Linear.apply(inputs, weight)

    return apply


class _Linear(torch.autograd.Function):
    """x [..., n, in], W [..., out, in] -> x W^T. Inputs that stand once (a dim of size one before their matrix)
    for many maps meet them as one wide map, and nothing is repeated. Its gradients lie in memory as x and W do,
    where those of a transposed product do not, and everything after them is slower for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if not stands_for_many(x, weight):
            return x @ weight.mT
        wide = x.squeeze(-3) @ weight.flatten(-3, -2).mT
        return wide.unflatten(-1, (weight.shape[-3], -1)).transpose(-3, -2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        g = grads[0].contiguous()
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        if not stands_for_many(x, weight):
            return (g @ weight if for_x else None), (g.mT @ x if for_weight else None)
        g = g.transpose(-3, -2).flatten(-2)
        d_x = (g @ weight.flatten(-3, -2)).unsqueeze(-3) if for_x else None
        if not for_weight:
            return d_x, None
        return d_x, (g.mT @ x.squeeze(-3)).unflatten(-2, weight.shape[-3:-1])


def stands_for_many(x: Tensor, weight: Tensor) -> bool:
    """Do inputs [..., 1, n, in] meet maps [..., many, out, in], each of them all?"""
    return weight.dim() > 3 and x.shape[-3] == 1 and weight.shape[-3] > 1


@dataclass(frozen=True, repr=False)
class matrix(Structure):
    """M(k) = W k. State per head: v x k. Linear attention, the delta rule and their kin.

    A memory that is a vector, M(k) = w * k channel by channel, is this one in heads of width one. Nested Learning
    equation 64. Oracle: autograd (tests/test_structure.py).
    """

    linear = True
    bare = True
    ends_plainly = True

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
    GELU here. Without the residual, keys and values may differ in width. Oracle: autograd (tests/test_structure.py).
    """

    depth: int = 2
    expansion: float = 1.0
    residual: bool = True
    activation: Literal["gelu", "silu"] = "gelu"
    ends_plainly = True

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"mlp: depth must be at least 2 linear maps, got {self.depth}; one map is matrix()")
        if not self.expansion > 0:
            raise ValueError(f"mlp: expansion must be more than 0, got {self.expansion}")
        if self.activation not in ("gelu", "silu"):
            raise ValueError(f"mlp: activation must be 'gelu' or 'silu', got {self.activation!r}")

    @property
    def bare(self) -> bool:  # type: ignore[override]
        return not self.residual

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        check_residual(self, self.residual, key_dim, value_dim)
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
        if self.activation == "gelu":
            return GeluError.apply(error, x)
        return _silu_error(error, x)


def _silu_error(error: Tensor, x: Tensor) -> Tensor:
    """error * silu'(x); silu's fused derivative has none of its own."""
    gate = x.sigmoid()
    return error * gate * (1.0 + x * (1.0 - gate))


def check_residual(structure: Structure, residual: bool, key_dim: int, value_dim: int) -> None:
    if residual and key_dim != value_dim:
        raise ValueError(
            f"{structure}: a residual memory needs keys as wide as values, got {key_dim} and {value_dim}; "
            "set residual=False"
        )


class GeluError(torch.autograd.Function):
    """error * gelu'(x), whose own gradient takes one pass more where torch's composed one takes a dozen:
    gelu''(x) = phi(x) (2 - x^2), phi the normal density."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(error, x)
        return torch.ops.aten.gelu_backward(error, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        error, x = ctx.saved_tensors
        (g,) = grads
        rest = torch.addcmul(x.new_tensor(2.0), x, x, value=-1.0)  # 2 - x^2
        log_density = torch.add(x.new_tensor(-1.0 - 0.5 * math.log(2.0 * math.pi)), rest, alpha=0.5)
        if torch.is_grad_enabled():
            return GeluError.apply(g, x), log_density.exp() * rest * (g * error)
        return torch.ops.aten.gelu_backward(g, x), log_density.exp_().mul_(rest).mul_(g).mul_(error)


@dataclass(frozen=True, repr=False)
class gated_mlp(Structure):
    """M(k) = W_1 (silu(W_0 k) * (W_2 k)), and k + that with `residual`. Hidden width `expansion` x the wider side.

    LaCT's memory (SwiGLU); with the residual, that of ATLAS++. The maps in order: W_0, W_2, W_1. Oracle: autograd
    (tests/test_compound.py).
    """

    expansion: float = 1.0
    residual: bool = False
    meets_keys = 2
    ends_plainly = True

    def __post_init__(self) -> None:
        if not self.expansion > 0:
            raise ValueError(f"gated_mlp: expansion must be more than 0, got {self.expansion}")

    @property
    def bare(self) -> bool:  # type: ignore[override]
        return not self.residual

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        check_residual(self, self.residual, key_dim, value_dim)
        hidden = max(1, round(self.expansion * max(key_dim, value_dim)))
        return (hidden, key_dim), (hidden, key_dim), (value_dim, hidden)

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        gate, up = apply(0, keys), apply(1, keys)
        hidden = F.silu(gate) * up
        last = apply(2, hidden)
        return (keys + last if self.residual else last), (keys, keys, hidden), (gate, up, last)

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        gate, up, _ = outputs
        hidden = error @ weights[2]
        return _silu_error(hidden * up, gate), hidden * F.silu(gate), error


@dataclass(frozen=True, repr=False)
class together(Structure):
    """Several memories of one shape that share their keys, run as one.

    Weights stand side by side, [..., n, out, in]; values are [..., n, t, v]. The keys are the same for all, and
    so is what is computed of them. Source: this library, for the generators of Nested Learning equation 83. Oracle:
    each alone (tests/test_structure.py).
    """

    of: Structure

    @property
    def residual(self) -> bool:  # type: ignore[override]
        return self.of.residual

    def __post_init__(self) -> None:
        if isinstance(self.of, together) or not isinstance(self.of, Structure):
            raise ValueError(f"together({self.of!r}): needs one memory's structure, such as matrix() or mlp()")

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return self.of.shapes(key_dim, value_dim)

    def forward(self, apply: Apply, keys: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.of.forward(apply, keys.unsqueeze(-3))

    def backward(self, weights: Weights, outputs: tuple[Tensor, ...], error: Tensor) -> tuple[Tensor, ...]:
        return self.of.backward(weights, outputs, error)


def side_by_side(members: list[Weights]) -> Weights:
    """The weights of memories of one shape [h, out, in] as those of the whole [h, n, out, in]."""
    return tuple(torch.stack(maps, -3) for maps in zip(*members, strict=True))
