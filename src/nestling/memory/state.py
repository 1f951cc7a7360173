"""States are nested NamedTuples of tensors; here is how to walk, name and rebuild them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The same nested state with `function` applied to every tensor; None and () stay."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        mapped = [map_tensors(function, part) for part in state]
        return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)
    return state


def detach(state: Any) -> Any:
    """The state cut from the graph that made it."""
    return map_tensors(Tensor.detach, state)


def clone(state: Any) -> Any:
    """A copy that shares nothing with the state."""
    return map_tensors(torch.clone, state)


def select(where: Tensor, chosen: Any, other: Any) -> Any:
    """`chosen` where `where` is true and `other` elsewhere, by the leading dims that `where` has ([b]: row by row);
    both states alike in shape."""
    if isinstance(chosen, Tensor):
        return torch.where(where.view(*where.shape, *[1] * (chosen.dim() - where.dim())), chosen, other)
    if isinstance(chosen, tuple):
        picked = [select(where, a, b) for a, b in zip(chosen, other, strict=True)]
        return type(chosen)(*picked) if hasattr(chosen, "_fields") else tuple(picked)
    return chosen


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
    """A state built like `like` from `flatten`'s dict. Raises ValueError naming a tensor that is missing or
    whose shape does not fit."""
    if isinstance(like, Tensor):
        name = prefix.removesuffix(".")
        if name not in flat:
            raise ValueError(f"the state has no tensor {name!r}")
        tensor = flat[name]
        if tensor.shape != like.shape:
            raise ValueError(f"state tensor {name!r} has shape {list(tensor.shape)}, needed {list(like.shape)}")
        return tensor.to(dtype=like.dtype, device=like.device)
    if isinstance(like, tuple):
        names = getattr(like, "_fields", range(len(like)))
        parts = [unflatten(part, flat, f"{prefix}{name}.") for name, part in zip(names, like, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return like
