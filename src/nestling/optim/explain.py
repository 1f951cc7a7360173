"""An optimizer told as the nested memories that it is."""

import dataclasses
import math
from typing import NamedTuple

import torch

from nestling.memory.adaptive import adagrad, adam, average, nesterov, rmsprop
from nestling.memory.attend import attend
from nestling.memory.gradient_memory import generalized_gradient_descent, gradient_memory
from nestling.memory.nested import delta_momentum, gradient_keys, remember
from nestling.memory.orthogonal import full_matrix_adagrad, joint_delta_gradient_descent
from nestling.memory.part import Part
from nestling.memory.rule import Rule, delta_gradient_descent, every, momentum

from .adapter import RuleOptimizer


class Told(NamedTuple):
    """One memory: what it is, what it maps from and to, and what it minimises."""

    memory: str
    keys: str
    values: str
    objective: str
    period: float  # steps

    def __str__(self) -> str:
        period = {1.0: "every step", math.inf: "never"}.get(self.period, f"every {self.period:g} steps")
        return f"{self.memory}: {self.keys} -> {self.values}; {self.objective}; {period}"


_DOT = "minimise <M k, v>"
_SPREAD = "minimise sum |m * g - spread|^2 (equation 101), in closed form"
_MEMORIES: dict[type[Part], tuple[str, str, str, str]] = {
    momentum: ("momentum S", "layer inputs", "surprises", f"{_DOT} + retention (33, 34)"),
    nesterov: ("momentum S, read one step ahead", "layer inputs", "surprises", f"{_DOT} + retention (33, 34)"),
    average: ("first moment m, unbiased", "layer inputs", "surprises", f"{_DOT} + retention (33, 34)"),
    adagrad: ("sum of squares v", "gradients", "their spread", _SPREAD),
    rmsprop: ("second moment v", "gradients", "their spread", _SPREAD),
    full_matrix_adagrad: (
        "sum of outer products H",
        "gradients",
        "their spread",
        "the same of matrices (106 to 111)",
    ),
    delta_momentum: ("delta momentum S", "gradients", "minus one", "minimise |S g^T + I|^2 / 2 (48)"),
}


def memories(rule: Part, period: float = 1.0, keys: str = "layer inputs") -> list[Told]:
    """The memories of gradients in a rule, from the outside in."""
    if isinstance(rule, adam):
        return memories(rule.moments, period, keys)
    found = []
    if isinstance(rule, every):
        period *= rule.period
    if isinstance(rule, gradient_keys):
        keys = "gradients"
    if isinstance(rule, remember):
        objective = f"{_DOT}, learned by {rule.rule!r}"
        clock = rule.rule.period if isinstance(rule.rule, every) else 1
        told = "gradients" if isinstance(rule.rule, gradient_keys) else keys
        found.append(Told("memory M", told, "surprises", objective, period * clock))
    elif isinstance(rule, gradient_memory):
        objective = f"minimise {rule.attentional_bias!r}, learned by {rule.rule!r} (50)"
        clock = rule.rule.period if isinstance(rule.rule, every) else 1
        values = "minus the unit vectors" if rule.form == "units" else "minus ones"
        found.append(Told(f"memory m, {rule.structure!r}", "gradients", values, objective, period * clock))
    elif isinstance(rule, attend):
        pairs = f"the last {rule.window} updates"
        found.append(Told(pairs, "their directions", "themselves", "weighted l2, no parameters (63)", period))
    elif type(rule) in _MEMORIES:
        memory, on, values, objective = _MEMORIES[type(rule)]
        found.append(Told(memory, on, values, objective, period))
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        inner = getattr(rule, field.name)
        if isinstance(inner, Rule):
            found.extend(memories(inner, period, keys))
    return found


def explain(optimizer: torch.optim.Optimizer) -> str:
    """For each group the rule, and line by line its memories: memory, keys -> values, objective, period.

    The weights themselves come first: backpropagation writes (layer input, local surprise) into them, equations 8, 9.
    Raises ValueError for an optimizer that is not one of rules.
    """
    if not isinstance(optimizer, RuleOptimizer):
        raise ValueError(f"explain tells optimizers made of rules (nestling.optim), not {type(optimizer).__name__}")
    lines = [type(optimizer).__name__]
    for index, group in enumerate(optimizer.param_groups):
        rule, _ = optimizer.express(group)
        size = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"group {index}: {size:,} numbers, step size {float(group['lr']):g}")
        lines.append(f"  rule: {rule!r}")
        period = rule.period if isinstance(rule, every) else 1.0
        lines.append(f"  {Told('weights W', 'layer inputs', 'surprises', _objective(rule), period)}")
        lines.extend(f"  {told}" for told in memories(rule))
    return "\n".join(lines)


def _objective(rule: Part) -> str:
    """What the weights minimise beside staying where they are."""
    inner: object = rule
    while isinstance(inner, Rule):
        if isinstance(inner, joint_delta_gradient_descent):
            return "minimise |W x - u|^2 / 2 over the step's pairs (56)"
        if isinstance(inner, delta_gradient_descent):
            return "minimise |W x - u|^2 / 2 (56)"
        if isinstance(inner, generalized_gradient_descent):
            return f"minimise {inner.attentional_bias!r} of W x and u (59)"
        inner = getattr(inner, "of", None)
    return "minimise <W x, u> (9)"
