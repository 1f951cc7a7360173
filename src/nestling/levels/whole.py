"""Every weight of a model on a clock: a life that needs no pre-training, and an outer optimizer that never stops."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.rule import Summed
from nestling.memory.structure import Weights

from .continuum import Taps, level


class DenseTaps(NamedTuple):
    """Where the gradient of weights that are not maps of a block is read off: at the weights themselves."""

    asks: tuple[Tensor, ...]
    tokens: int

    def pairs(self, errors: Sequence[Tensor], rows: bool = False) -> list[Summed]:
        """The gradient of every weight, summed over the tokens."""
        return [Summed(error, None, self.tokens) for error in errors]


class Whole:
    """A model and one level more, of all its weights that are in no level: the slowest one, which else only
    pre-training moves. A `Reader` of it learns everything.

    body: the rule, the period and the numbers of that level (its structure says nothing). A clock divides by the
    period, so a rule of fixed steps, scale(adam()), takes step_size = rate x period. Weights of one dim are columns.
    A document starts from the model's own starts of memories, not from learned ones: they get no gradient while the
    sequence state is cut from them. Oracle: `train.Trainer` with one row (tests/test_whole.py).
    """

    def __init__(self, model: nn.Module, body: level) -> None:
        if body.rule.needs_inputs:
            raise ValueError(f"{body.rule!r} needs the inputs of linear maps, and a whole model has other weights too")
        self.model, self.body = model, body
        inside = {id(weight) for maps in model.level_weights() for weight in maps}  # type: ignore[operator]
        self.names = tuple(name for name, p in model.named_parameters() if id(p) not in inside)
        self.shapes = tuple(model.get_parameter(name).shape for name in self.names)

    @property
    def levels(self) -> tuple[level, ...]:
        return (*self.model.levels, self.body)  # type: ignore[misc]

    def level_weights(self) -> tuple[Weights, ...]:
        own = tuple(self.model.get_parameter(name) for name in self.names)
        columns = tuple(p.reshape(-1, 1) if p.dim() < 2 else p for p in own)
        return (*self.model.level_weights(), columns)  # type: ignore[operator]

    def init_state(self, batch: int) -> Any:
        return self.model.init_state(batch)  # type: ignore[operator]

    def __call__(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        weights: tuple[Weights, ...] | None = None,
        taps: list[Any] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        *levels, columns = self.level_weights() if weights is None else weights
        own = {name: w.view(shape) for name, shape, w in zip(self.names, self.shapes, columns, strict=True)}
        inner: list[Taps] | None = None if taps is None else []
        keywords = {"weights": tuple(levels), "taps": inner, "valid": valid}
        logits, state = torch.func.functional_call(self.model, own, (tokens, state), keywords)
        if taps is not None and inner is not None:
            taps += [*inner, DenseTaps(columns, tokens.numel())]
        return logits, state

    def load(self, weights: tuple[Weights, ...]) -> None:
        """Write the weights of a life into the model."""
        *levels, columns = weights
        with torch.no_grad():
            for maps, learned in zip(self.model.level_weights(), levels, strict=True):  # type: ignore[operator]
                for parameter, weight in zip(maps, learned, strict=True):
                    parameter.copy_(weight)
            for name, weight in zip(self.names, columns, strict=True):
                parameter = self.model.get_parameter(name)
                parameter.copy_(weight.view_as(parameter))
