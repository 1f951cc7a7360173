"""Where the MLPs of a pre-trained model are: found by structure, whatever the model and its modules are called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.structure import Weights

_CHOOSE = nn.Softmax | nn.Softmax2d | nn.Softmin | nn.LogSoftmax | nn.MultiheadAttention
"""Of what torch files under activations, what is not one: these look at several channels at once."""

_FUNCTIONS = {F.gelu, F.relu, F.silu, F.tanh, F.sigmoid, F.mish, F.leaky_relu, F.elu, F.selu, F.relu6, F.hardswish}


@dataclass(frozen=True)
class LinearMap:
    """A linear map inside a model: its module's path, its width, and whether its weight lies as [in, out]. start: its
    first row in a weight that holds several maps (gate and up fused); None where it is alone. every: its rows are those
    from there on, 1, or every other one, 2."""

    path: str
    rows: int  # outputs
    columns: int  # inputs
    transposed: bool
    start: int | None = None
    every: int = 1

    def read(self, model: nn.Module) -> Tensor:
        """The model's own weight, as [out, in]."""
        weight = model.get_submodule(self.path).weight
        assert isinstance(weight, Tensor)
        whole = weight.mT if self.transposed else weight
        return whole if self.start is None else whole[self.start : self.start + self.every * self.rows : self.every]

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

    @property
    def modules(self) -> tuple[tuple[LinearMap, ...], ...]:
        """The maps by the module that computes them: fused ones together."""
        paths = dict.fromkeys(each.path for each in self.maps)
        return tuple(tuple(each for each in self.maps if each.path == path) for path in paths)

    def read(self, model: nn.Module) -> Weights:
        return tuple(each.read(model) for each in self.maps)

    def place(self, weights: Weights, model: nn.Module) -> dict[str, Tensor]:
        """Weights [out, in] of its maps as the model's parameters, by name."""
        by_map = dict(zip(self.maps, weights, strict=True))
        named = {}
        for maps in self.modules:
            like = model.get_submodule(maps[0].path).weight
            assert isinstance(like, Tensor)
            parts = [each.place(by_map[each], like) for each in maps]
            named[f"{maps[0].path}.weight"] = fuse(maps, parts, 1 if maps[0].transposed else 0)
        return named


def fuse(maps: tuple[LinearMap, ...], parts: Sequence[Tensor], dim: int) -> Tensor:
    """What belongs to the rows of a module's maps, along `dim` in the module's order."""
    if len(parts) == 1:
        return parts[0]
    dim = dim % parts[0].dim()
    return torch.stack(list(parts), dim + 1).flatten(dim, dim + 1) if maps[0].every > 1 else torch.cat(list(parts), dim)


def unfuse(maps: tuple[LinearMap, ...], output: Tensor) -> tuple[Tensor, ...]:
    """A module's output [..., rows] by its maps."""
    if maps[0].every > 1:
        return output.unflatten(-1, (-1, len(maps))).unbind(-1)
    return output.split([each.rows for each in maps], -1)


def find_feedforwards(model: nn.Module) -> tuple[Feedforward, ...]:
    """The MLPs of a model's layers, in the order of the layers.

    A layer is an element of an `nn.ModuleList`; its MLP is one or two linear maps d -> h that stand beside an
    activation in one module, or one map d -> 2h that is both (in halves, or neuron by neuron: the module is asked with
    one token), and the first linear map h -> d from there on. Raises ValueError saying what was looked for, and what
    the layers hold, where there is none; and where a layer has experts of which a token meets only some.
    """
    stacks = list(_outermost(model, ""))
    for path, stack in stacks:
        for index, layer in enumerate(stack):
            _refuse_experts(model, layer, f"{path}.{index}")
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
        elif not back and (fused := _fused(layer, holder, path, wide, beside, order)):
            yield fused


def _fused(
    layer: nn.Module, holder: nn.Module, path: str, wide: LinearMap, beside: list[LinearMap], order: list[LinearMap]
) -> Feedforward | None:
    """Gate and up in one map d -> 2h, the only one beside the activation before a map h -> d."""
    half = wide.rows // 2
    back = [m for m in order[order.index(wide) + 1 :] if (m.rows, m.columns) == (wide.columns, half)]
    if wide.rows % 2 or not back or any(order.index(m) < order.index(back[0]) for m in beside[1:]):
        return None
    before, after = (layer.get_submodule(each.path.removeprefix(f"{path}.")) for each in (wide, back[0]))
    starts = _first_neuron(holder, before, after, wide.columns)
    if starts not in ((0, half), (0, 1)):
        raise ValueError(
            f"{wide.path}: looks like gate and up in one map, of which neuron 0 takes the rows 0 and {half} (in "
            f"halves) or 0 and 1 (in turn); asked with a token, it takes {starts or 'none'}"
        )
    every = 2 if starts[1] == 1 else 1
    first = tuple(replace(wide, rows=half, start=start, every=every) for start in starts)
    return Feedforward(first, back[0])


def _first_neuron(holder: nn.Module, wide: nn.Module, back: nn.Module, width: int) -> tuple[int, ...]:
    """The rows of a map that the first input of the map after it depends on, in a module that takes one tensor; none
    where it takes something else."""
    heard: dict[str, Tensor] = {}

    def answer(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, output.shape[-1]).to(output)
        heard["rows"] = ramp.expand(output.shape).clone().requires_grad_()
        return heard["rows"]

    def arrive(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        heard["neurons"] = given[0]

    handles = [wide.register_forward_hook(answer), back.register_forward_pre_hook(arrive)]
    modes = [(module, module.training) for module in holder.modules()]
    like = wide.weight
    assert isinstance(like, Tensor)
    try:
        holder.eval()  # dropout could hide it
        with torch.enable_grad():
            holder(like.new_ones(1, 1, width))
    except (TypeError, RuntimeError):
        return ()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if "neurons" not in heard:
        return ()
    (found,) = torch.autograd.grad(heard["neurons"][..., 0].sum(), heard["rows"])
    return tuple(found.flatten().nonzero().flatten().tolist())


def _refuse_experts(model: nn.Module, layer: nn.Module, path: str) -> None:
    """Which tokens an expert sees is its router's choice; levels learn from every token."""
    for name, module in layer.named_modules():
        held = {key: list(p.shape) for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
        stacked = len(held) > 1 and len({shape[0] for shape in held.values()}) == 1
        listed = isinstance(module, nn.ModuleList) and sum(any(True for _ in _in(each, name)) for each in module) > 1
        if stacked or listed:
            what = ", ".join(f"{key} {shape}" for key, shape in held.items()) or f"{len(list(module.children()))} MLPs"
            raise ValueError(
                f"{type(model).__name__}: {path}.{name} holds a mixture of experts ({what}), of which a token meets "
                "only some; levels need an MLP that every token goes through"
            )


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
        "transformers.activations) beside one or two linear maps (nn.Linear, or Conv1D with a weight [nx, nf]) d -> h "
        "or one d -> 2h, and for a linear map h -> d after them"
    )
    if not stacks:
        return f"{wanted}; there is no nn.ModuleList in it"
    path, stack = stacks[0]
    held = [f"{name} {type(part).__name__}" for name, part in stack[0].named_modules() if not any(part.children())]
    return f"{wanted}; {path}.0 holds {', '.join(held) or 'nothing'}"
