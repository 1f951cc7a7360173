"""torch.compile of what a mixer repeats: the step of a whole chunk. The walk over the chunks is never traced.

Traced as it stands, a walk over n chunks is n copies of the step, made anew for every length, phase and padding.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nestling.memory.state import map_tensors

from .layout import Piece


def walked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A mixer's `forward`, of which a compiler that is at work around it sees the call alone."""

    @functools.wraps(forward)
    def call(*given: Any, **more: Any) -> Any:
        return _walk(forward, given, more) if torch.compiler.is_compiling() else forward(*given, **more)

    return call


@torch._disable_dynamo  # as torch.compiler.disable, but without importing the compiler here
def _walk(forward: Callable[..., Any], given: tuple[Any, ...], more: dict[str, Any]) -> Any:
    return forward(*given, **more)


def chunk_step(step: Callable[..., Any], chunk: int, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """step(piece, ..., states), by torch.compile with these options for pieces that are a whole chunk in every row;
    `step` itself where there are none.

    Other pieces are of as many lengths as a chunk has tokens, and each would keep a compiler busy as long.
    """
    if options is None:
        return step
    compiled = torch.compile(step, **options)

    def either(piece: Piece, *given: Any) -> Any:
        if piece.stop - piece.start != chunk or not all(isinstance(rows, bool) for rows in piece.opens):
            return step(piece, *given)
        *others, states = given
        return compiled(piece, *map_tensors(Tensor.contiguous, tuple(others)), _usual(states))

    return either


def _usual(states: Any) -> Any:
    """As they are after the first chunk, which then needs no form of its own: each tensor another, and with a gradient
    where gradients are asked for."""
    seen: set[int] = set()
    asked = torch.is_grad_enabled()

    def usual(x: Tensor) -> Tensor:
        again = id(x) in seen
        seen.add(id(x))
        if x.is_floating_point() and x.requires_grad != asked:
            return x.detach().requires_grad_(asked)
        return x.view_as(x) if again else x

    return map_tensors(usual, states)
