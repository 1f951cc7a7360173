"""Where the MLPs of a pre-trained model are: found by structure, whatever the model and its modules are called."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.structure import Weights

_CHOOSE = nn.Softmax | nn.Softmax2d | nn.Softmin | nn.LogSoftmax | nn.MultiheadAttention
"""Of what torch files under activations, what is not one: these look at several channels at once."""

_FUNCTIONS = {F.gelu, F.relu, F.silu, F.tanh, F.sigmoid, F.mish, F.leaky_relu, F.elu, F.selu, F.relu6, F.hardswish}


@dataclass(frozen=True)
class LinearMap:
    """A linear map inside a model: its module's path, its width, and whether its weight lies as [in, out]."""

    path: str
    rows: int  # outputs
    columns: int  # inputs
    transposed: bool

    def read(self, model: nn.Module) -> Tensor:
        """The model's own weight, as [out, in]."""
        weight = model.get_submodule(self.path).weight
        assert isinstance(weight, Tensor)
        return weight.mT if self.transposed else weight

    def place(self, weight: Tensor, like: Tensor) -> Tensor:
        """A weight [out, in] as the model keeps it: transposed where it is, and in memory as that lies."""
        weight = weight.to(dtype=like.dtype, device=like.device)
        return weight.mT.contiguous() if self.transposed else weight.contiguous()


@dataclass(frozen=True)
class Feedforward:
    """The MLP of one layer: one map d -> h, or two (gate and up), before the activation; one map h -> d after it."""

    first: tuple[LinearMap, ...]
    last: LinearMap

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        return (*self.first, self.last)

    def read(self, model: nn.Module) -> Weights:
        return tuple(each.read(model) for each in self.maps)


def find_feedforwards(model: nn.Module) -> tuple[Feedforward, ...]:
    """The MLPs of a model's layers, in the order of the layers.

    A layer is an element of an `nn.ModuleList`; its MLP is one or two linear maps d -> h that stand beside an
    activation in one module, and the first linear map h -> d from there on. Raises ValueError saying what was looked
    for, and what the layers hold, where there is none.
    """
    stacks = list(_outermost(model, ""))
    layers = [(layer, f"{path}.{index}") for path, stack in stacks for index, layer in enumerate(stack)]
    found = [mlp for layer, path in layers for mlp in _in(layer, path)]
    if not found:
        raise ValueError(f"{type(model).__name__}: no MLP found. {_looked_for(model, stacks)}")
    return tuple(found)


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of layers that are inside of no other list."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield below, child
        else:
            yield from _outermost(child, below)


def _in(layer: nn.Module, path: str) -> Iterator[Feedforward]:
    """The MLPs of a layer, by where their activations stand."""
    maps = {name: found for name, module in layer.named_modules() if (found := _linear(module, f"{path}.{name}"))}
    order = list(maps.values())
    for name, holder in layer.named_modules():
        inside = [f"{name}.{child}" if name else child for child, _ in holder.named_children()]
        beside = [maps[child] for child in inside if child in maps]
        if not beside or not _holds_activation(holder):
            continue
        wide = beside[0]
        back = [m for m in order[order.index(wide) + 1 :] if (m.rows, m.columns) == (wide.columns, wide.rows)]
        if wide.rows == wide.columns and len(beside) > 1:  # all look alike: the last one leads on
            back = beside[-1:]
        first = [m for m in beside if back and order.index(m) < order.index(back[0])]
        if first and len(first) <= 2 and all((m.rows, m.columns) == (wide.rows, wide.columns) for m in first):
            yield Feedforward(tuple(first), back[0])


def _linear(module: nn.Module, path: str) -> LinearMap | None:
    """`nn.Linear`, or a map like GPT-2's Conv1D, whose weight is [nx, nf]."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return LinearMap(path, weight.shape[0], weight.shape[1], False)
    if tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None)):
        return LinearMap(path, weight.shape[1], weight.shape[0], True)
    return None


def _holds_activation(module: nn.Module) -> bool:
    """Is there an activation among a module's own members: a module of torch or transformers, or torch's function?"""
    homes = ("torch.nn.modules.activation", "transformers.activations")
    members = [child for child in module.children() if not isinstance(child, _CHOOSE)]
    return any(type(child).__module__ in homes for child in members) or any(
        callable(value) and value in _FUNCTIONS for value in vars(module).values() if callable(value)
    )


def _looked_for(model: nn.Module, stacks: list[tuple[str, nn.ModuleList]]) -> str:
    wanted = (
        "Looked, in every element of every nn.ModuleList, for a module with an activation (of torch.nn or "
        "transformers.activations) beside one or two linear maps (nn.Linear, or Conv1D with a weight [nx, nf]) d -> h, "
        "and for a linear map h -> d after them"
    )
    if not stacks:
        return f"{wanted}; there is no nn.ModuleList in it"
    path, stack = stacks[0]
    held = [f"{name} {type(part).__name__}" for name, part in stack[0].named_modules() if not any(part.children())]
    return f"{wanted}; {path}.0 holds {', '.join(held) or 'nothing'}"
