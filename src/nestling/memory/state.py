"""States are nested NamedTuples of tensors; here is how to walk, name and rebuild them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """The same nested state with `function` applied to every tensor, and to those that stand in its place in the
    others, alike in shape; None and () stay."""
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, tuple):
        mapped = [map_tensors(function, *parts) for parts in zip(state, *others, strict=True)]
        return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)
    return state


def detach(state: Any) -> Any:
    """The state cut from the graph that made it."""
    return map_tensors(Tensor.detach, state)


def clone(state: Any) -> Any:
    """A copy that shares nothing with the state."""
    return map_tensors(torch.clone, state)


def to(state: Any, *where: Any) -> Any:
    """The state on another device or in another dtype, as `Tensor.to` spells it; whole numbers keep their dtype."""
    moved = [x for x in where if not isinstance(x, torch.dtype)]
    kinds = [x for x in where if isinstance(x, torch.dtype)]

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(*moved, *(kinds if tensor.is_floating_point() else [])) if where else tensor

    return map_tensors(move, state)


def rows(state: Any, index: int | slice | Tensor) -> Any:
    """Some rows of a state (dim 0), as a state of their own."""
    index = slice(index, index + 1 or None) if isinstance(index, int) else index
    return map_tensors(lambda tensor: tensor[index], state)


def stack(states: Sequence[Any]) -> Any:
    """The rows of several states as one state. Raises ValueError where there is none, or shapes differ."""
    if not states:
        raise ValueError("stack needs at least one state")
    first = states[0]
    if isinstance(first, Tensor):
        if any(other.shape[1:] != first.shape[1:] for other in states):
            raise ValueError(f"states of different shapes: {', '.join(str(list(x.shape)) for x in states)}")
        return torch.cat(list(states), 0)
    if isinstance(first, tuple):
        joined = [stack(parts) for parts in zip(*states, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    return first


def difference(state: Any, other: Any) -> dict[str, float]:
    """By how much two states of one shape differ, tensor by tensor: the largest absolute difference."""
    theirs = flatten(detach(other))
    return {
        name: float((tensor.double() - theirs[name].double()).abs().max()) if tensor.numel() else 0.0
        for name, tensor in flatten(detach(state)).items()
    }


def select(where: Tensor, chosen: Any, other: Any) -> Any:
    """`chosen` where `where` is true and `other` elsewhere, by the leading dims that `where` has ([b]: row by row);
    both states alike in shape."""

    def pick(one: Tensor, two: Tensor) -> Tensor:
        return torch.where(where.view(*where.shape, *[1] * (one.dim() - where.dim())), one, two)

    return map_tensors(pick, chosen, other)


def flatten(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested state by a dotted name: fields of NamedTuples by name, others by position."""
    if isinstance(state, Tensor):
        return {prefix.removesuffix("."): state}
    flat: dict[str, Tensor] = {}
    if isinstance(state, tuple):
        names = getattr(state, "_fields", range(len(state)))
        for name, part in zip(names, state, strict=True):
            flat.update(flatten(part, f"{prefix}{name}."))
    return flat


def unflatten(like: Any, flat: Mapping[str, Tensor], prefix: str = "") -> Any:
    """A state built like `like` from `flatten`'s dict; what is empty in `like` may have grown. Raises ValueError naming
    a tensor that is missing or whose shape does not fit."""
    if isinstance(like, Tensor):
        name = prefix.removesuffix(".")
        if name not in flat:
            raise ValueError(f"the state has no tensor {name!r}")
        tensor = flat[name]
        if not _fits(tensor, like):
            raise ValueError(f"state tensor {name!r} has shape {list(tensor.shape)}, needed {list(like.shape)}")
        return tensor.to(dtype=like.dtype, device=like.device)
    if isinstance(like, tuple):
        names = getattr(like, "_fields", range(len(like)))
        parts = [unflatten(part, flat, f"{prefix}{name}.") for name, part in zip(names, like, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return like


def _fits(tensor: Tensor, like: Tensor) -> bool:
    sizes = zip(tensor.shape, like.shape, strict=False)
    return tensor.dim() == like.dim() and all(size == wanted or wanted == 0 for size, wanted in sizes)
