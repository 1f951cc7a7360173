"""Keep what a function was given, and compute the rest again for its gradients.

torch.utils.checkpoint does the same for any function, by a hook on every tensor that autograd keeps; for the many small
operations of a chunk those hooks take up to a quarter of the forward pass (docs/log.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nestling.memory.state import map_tensors

_PLACE = torch.empty(0)  # where a tensor stood


def recompute(function: Callable[..., Any], *given: Any, again: Callable[..., Any] | None = None) -> Any:
    """function(*given), for which autograd keeps the tensors in `given` and nothing else.

    `given`, and what comes out: tensors, and anything else, in tuples and NamedTuples. Gradients reach the tensors in
    `given` alone: the function itself must hold none that needs one. It runs again in every backward pass, outside of
    autocast as it must be the first time; gradients of gradients are as without. again: what runs then in its place,
    and gives the same gradients; what comes out of it may hold anything.
    Oracle: the function itself (tests/test_recompute.py).
    """
    forms = [map_tensors(_place, given)]
    made = _Recomputed.apply(function, again or function, forms, *_tensors(given))
    return _filled(forms[1], made)


class _Recomputed(Function):
    """(function, its like for gradients, [the form of what it is given, to which that of what it makes is added],
    tensors) -> tensors."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], again: Callable[..., Any], forms: list[Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.form = again, forms[0]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        made = function(*_filled(ctx.form, tensors))
        forms.append(map_tensors(_place, made))
        return _tensors(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        twice, needed = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        with torch.enable_grad(), torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            # a view keeps the way to what came in, for a second gradient, and is on nobody else's
            tensors = [
                x if not need else x.view_as(x) if twice else x.detach().requires_grad_()
                for x, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            made = _tensors(ctx.function(*_filled(ctx.form, tensors)))
        asked = [(y, g) for y, g in zip(made, grads, strict=True) if g is not None and y.requires_grad]
        if not asked:
            return None, None, None, *[None] * len(needed)
        made, grads = zip(*asked, strict=True)
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(made, wanted, grads, create_graph=twice, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)


def _place(tensor: Tensor) -> Tensor:
    return _PLACE


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    """All tensors of a tree, from left to right."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return tuple(found)


def _filled(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The tree of that form, with tensors for its places."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), form)
