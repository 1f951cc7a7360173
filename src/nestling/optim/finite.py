"""Are the gradients of a step finite? Asked before anything has changed."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .sharded import everywhere, local


def with_names(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a group, each with words to tell it by."""
    told = group.get("param_names")
    for index, parameter in enumerate(group["params"]):
        name = f"{told[index]!r}" if told else f"{index} of a group, of shape {list(parameter.shape)}"
        yield f"parameter {name}", parameter


def finite(groups: Iterable[dict[str, Any]], otherwise: str = "raise") -> bool:
    """Is every gradient of the groups finite, on all ranks? Of one that is not FloatingPointError is raised, with the
    parameter's name, where its group says nonfinite="raise"; `otherwise` is for groups that say nothing. Raises
    ValueError for a sparse gradient of a group of rules."""
    for group in groups:
        gradients = [(name, _entries(name, p.grad, group)) for name, p in with_names(group) if p.grad is not None]
        sums = [entries.sum(dtype=torch.float32) for _, entries in gradients]
        # a sum that is finite has finite terms; one that is not may have overflowed
        fine = torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all() if sums else torch.tensor(True)
        if bool(everywhere(fine, group["params"])):
            continue
        each = torch.stack([entries.isfinite().all().to(fine.device) for _, entries in gradients])
        right = everywhere(each, group["params"]).tolist()
        wrong = [name for (name, _), own in zip(gradients, right, strict=True) if not own]
        if wrong and group.get("nonfinite", otherwise) == "raise":
            raise FloatingPointError(f"the gradient of {wrong[0]} is not finite; nothing was changed")
        if wrong:
            return False
    return True


def _entries(name: str, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    if gradient.layout == torch.strided:
        entries = local(gradient.detach())
        return torch.view_as_real(entries) if entries.is_complex() else entries
    if "nonfinite" in group:
        raise ValueError(f"the gradient of {name} is sparse; a rule acts on dense ones: use sparse=False")
    return gradient.detach().coalesce().values()
