"""An optimizer as a function from torch's arguments to an expression of rule parts and its gates.

`expression` is the whole optimizer. Its keywords are the options of a parameter group, and are read anew at every step,
so that schedulers may change any of them.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.memory.adaptive import ascent, nesterov, ridge
from nestling.memory.part import known
from nestling.memory.retention import decay
from nestling.memory.rule import Additive, Direction, Gates, Rule, every, momentum, retain

from .adapter import RuleOptimizer

Expressed = tuple[Rule, Gates]


TORCHS: dict[str, tuple[tuple[bool | None, ...], str]] = {
    "foreach": ((None, False, True), "parameters of one shape are stepped together"),
    "fused": ((None, False), "a rule is of ordinary operations; take torch.optim's, or torch.compile(optimizer.step)"),
    "capturable": ((None, False), "steps are counted on the host, which no CUDA graph replays; take torch.optim's"),
    "decoupled_weight_decay": ((None, False), "that is AdamW"),
}
"""What torch's optimizers are told about how to compute: the values that say what is done here, and what to do."""


class Named(RuleOptimizer):
    """An optimizer whose rule is an expression of its options. Raises ValueError for an option that it has not, or a
    value out of bounds, in a group too; beside the options: tokens, period, flat, nonfinite and differentiable as in
    `RuleOptimizer`.
    foreach, fused, capturable and decoupled_weight_decay are taken where torch's optimizer of the same name has them
    and None or False, or foreach=True, which is what is done."""

    @staticmethod
    @abstractmethod
    def expression(**options: Any) -> Expressed:
        """The rule, and its gates, that the options stand for."""

    def __init_subclass__(cls) -> None:
        told = inspect.signature(cls.expression).parameters.values()
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        cls.__signature__ = inspect.Signature([params, *told])  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Iterable[Any],
        *values: Any,
        tokens: int = 1,
        period: int = 1,
        flat: bool = False,
        nonfinite: Literal["raise", "skip"] = "raise",
        differentiable: bool = False,
        **options: Any,
    ) -> None:
        signature = inspect.signature(self.expression)
        self._take_torchs(options)
        for name in options:
            known(name, signature.parameters, f"option of {type(self).__name__}")
        bound = signature.bind(*values, **options)
        bound.apply_defaults()
        own: dict[str, Any] = {"tokens": tokens, "period": period, "flat": flat}
        own |= {"nonfinite": nonfinite, "differentiable": differentiable}
        self._begin(params, dict(bound.arguments) | own)

    def _take_torchs(self, options: dict[str, Any]) -> None:
        """Takes out what torch's optimizer of this name is told about how to compute, where that is what is done."""
        theirs = getattr(torch.optim, type(self).__name__, None)
        told = inspect.signature(theirs).parameters if theirs else {}
        for name in TORCHS.keys() & options.keys() & told.keys():
            value, (taken, instead) = options.pop(name), TORCHS[name]
            if value not in taken:
                raise ValueError(f"{type(self).__name__} has no {name}={value!r}: {instead}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._take_torchs(param_group)
        super().add_param_group(param_group)

    def express(self, group: dict[str, Any]) -> Expressed:
        return self.expression(**{name: group[name] for name in inspect.signature(self.expression).parameters})


def not_negative(**values: float | Tensor) -> None:
    """Raises ValueError that names the option which is."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def outer(direction: Direction, weight_decay: float, maximize: bool = False) -> Direction:
    """The gradient that the direction sees: negated to maximize, and with the weights' decay added to it."""
    not_negative(weight_decay=weight_decay)
    direction = ridge(direction, weight_decay) if weight_decay else direction
    return ascent(direction) if maximize else direction


def decoupled(rule: Additive, lr: float | Tensor, weight_decay: float, momentum: float = 0.0) -> Expressed:
    """The rule inside a decay of the weights by 1 - lr * weight_decay."""
    not_negative(lr=lr, weight_decay=weight_decay)
    if not weight_decay:
        return rule, Gates(lr, momentum)
    kept = 1.0 - lr * weight_decay
    return retain(decay(), rule), Gates(lr, momentum, kept.log() if isinstance(kept, Tensor) else _log(kept))


def inside(rule: Rule, wrapper: type[Additive]) -> Rule:
    """The rule with the direction that `wrapper` wraps in its place."""
    if isinstance(rule, (retain, every)):
        return replace(rule, of=inside(rule.of, wrapper))  # type: ignore[arg-type]
    return rule.of if isinstance(rule, wrapper) else rule  # type: ignore[attr-defined]


def _log(kept: float) -> float:
    if not kept >= 0:
        raise ValueError(f"lr * weight_decay must be <= 1, got {1 - kept}")
    return math.log(kept) if kept > 0 else -math.inf


PARTS = {"momentum": momentum, "nesterov": nesterov}
"""The parts that options of the same name choose."""


class Matrices(Named):
    """An optimizer of matrices [..., out, in]. Raises ValueError for a parameter of fewer than two dims."""

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        super()._check_parameter(name, parameter)
        if parameter.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} steps matrices, but {name} has {parameter.dim()} dims; "
                "give it to AdamW (nestling.optim.split_parameters tells which)"
            )
