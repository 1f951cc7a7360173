"""The states of parameters that are stepped together, or in pieces; and states that another expression began."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nestling.memory.state import map_tensors


def apart(state: Any) -> Any:
    """A state whose tensors share no memory: what comes a second time, or is part of a larger one, is copied."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor = tensor if alone and tensor.data_ptr() not in seen else tensor.clone()
        seen.add(tensor.data_ptr())
        return tensor

    return map_tensors(own, state)


def leaves(state: Any) -> list[Tensor]:
    """Every tensor of a nested state, in order."""
    if isinstance(state, tuple):
        return [tensor for part in state for tensor in leaves(part)]
    return [state] if isinstance(state, Tensor) else []


def stack(states: list[Any]) -> Any:
    """States of one form, side by side along a new first dim; one count for all, where all have come as far."""
    first = states[0]
    if isinstance(first, Tensor):
        counts = first.dim() == 0 and first.dtype == torch.int64 and first.device.type == "cpu"
        return first if counts and len(set(map(int, states))) == 1 else torch.stack(states)
    if isinstance(first, tuple):
        parts = [stack(list(parts)) for parts in zip(*states, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first


def unstack(state: Any, count: int) -> list[Any]:
    """The inverse of `stack`; each part a tensor of its own."""

    def own(tensor: Tensor, index: int) -> Tensor:
        return (tensor[index] if tensor.dim() else tensor).clone()

    return [map_tensors(partial(own, index=index), state) for index in range(count)]


def joined(whole: Any, last: Any, dim: int) -> Any:
    """The state after all pieces: tensors of the weight's dims were written in place, others are the last's."""
    return map_tensors(lambda one, other: one if one.dim() == dim else other, whole, last)


def renamed(stored: Iterable[str], needed: Iterable[str]) -> dict[str, str] | None:
    """Of tensors stored under flat names the names that another expression of the same memories has for them; None if
    it is no such expression.

    A part put around others, or taken away, adds or takes "of." in front of all their names; a memory may come or go
    with it, but not both at once.
    """
    stored, needed = set(stored), set(needed)
    for depth in (0, 1, -1, 2, -2):
        front = "of." * abs(depth)
        if depth < 0:
            names = {name: name.removeprefix(front) for name in stored if name.startswith(front)}
        else:
            names = {name: front + name for name in stored}
        found = {name: new for name, new in names.items() if new in needed}
        if found and (len(found) == len(stored) or len(found) == len(needed)):
            return found
    return {} if not stored or not needed else None
