"""An optimizer told as the nested memories that it is."""

import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from nestling.memory.adaptive import adagrad, adam, average, nesterov, rmsprop
from nestling.memory.attend import attend
from nestling.memory.gradient_memory import generalized_gradient_descent, gradient_memory
from nestling.memory.nested import delta_momentum, gradient_keys, remember
from nestling.memory.orthogonal import full_matrix_adagrad, joint_delta_gradient_descent, newton_schulz
from nestling.memory.part import Part
from nestling.memory.rule import Rule, delta_gradient_descent, every, momentum, retain

from .adapter import RuleOptimizer
from .groups import Joined
from .named import OPTIMIZERS


class Told(NamedTuple):
    """One memory: what it is, what it maps from and to, and what it minimises."""

    memory: str
    keys: str
    values: str
    objective: str
    period: float  # steps

    @property
    def when(self) -> str:
        return {1.0: "every step", math.inf: "never"}.get(self.period, f"every {self.period:g} steps")

    def __str__(self) -> str:
        return f"{self.memory}: {self.keys} -> {self.values}; {self.objective}; {self.when}"


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
    if isinstance(rule, newton_schulz):
        found = memories(rule.of, period, keys)
        return [told._replace(memory=f"{told.memory}, orthogonalised") for told in found[:1]] + found[1:]
    if isinstance(rule, remember):
        clock = rule.rule.period if isinstance(rule.rule, every) else 1
        if rule.retention == 0 and clock > 1:
            found.append(
                Told("answer A", "the memory below", "what it said", "held until it speaks again", clock * period)
            )
        else:
            objective, values = f"{_DOT}, learned by {rule.rule!r}", "surprises"
            told = "gradients" if isinstance(rule.rule, gradient_keys) else keys
            if isinstance(rule.rule, gradient_keys):
                objective, values = f"minimise |M g^T + I|^2 / 2 (48), learned by {rule.rule.of!r}", "minus one"
            found.append(Told("memory M", told, values, objective, period * clock))
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


def told_of(rule: Rule) -> list[Told]:
    """The weights that a rule steps, then its memories of gradients."""
    period = rule.period if isinstance(rule, every) else 1.0
    return [Told("weights W", "layer inputs", "surprises", _objective(rule), period), *memories(rule)]


def explain(optimizer: torch.optim.Optimizer) -> str:
    """For each group the rule, and line by line its memories: memory, keys -> values, objective, period.

    The weights themselves come first: backpropagation writes (layer input, local surprise) into them, equations 8, 9.
    Of what `for_model` gives each optimizer is told, and one of torch.optim's as ours of the same name, whose steps it
    takes. Raises ValueError for any other. Oracle: the table of docs/optimizers.md, read by people.
    """
    if isinstance(optimizer, Joined):
        return "\n".join(map(explain, optimizer.optimizers))
    lines = [type(optimizer).__name__]
    for index, group in enumerate(optimizer.param_groups):
        rule = _rule(optimizer, group)
        size = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"group {index}: {size:,} numbers, step size {float(group['lr']):g}")
        lines.append(f"  rule: {rule!r}")
        lines.extend(f"  {told}" for told in told_of(rule))
    return "\n".join(lines)


def explain_all() -> str:
    """Every named optimizer, with its default options, as the memories that it is: a table in Markdown."""
    lines = ["| optimizer | memory | keys -> values | what it minimises | written |", "|---|---|---|---|---|"]
    for name, kind in OPTIMIZERS.items():
        optimizer = kind([nn.Parameter(torch.zeros(2, 3))])
        for row, told in enumerate(told_of(_rule(optimizer, optimizer.param_groups[0]))):
            cells = (f"`{name}`" if row == 0 else "", told.memory, f"{told.keys} -> {told.values}")
            lines.append("| " + " | ".join((*cells, told.objective.replace("|", "\\|"), told.when)) + " |")
    return "\n".join(lines)


def _rule(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Rule:
    """The rule by which an optimizer steps a group."""
    if isinstance(optimizer, RuleOptimizer):
        return optimizer.clocked(group)[0]
    name = type(optimizer).__name__
    if name not in OPTIMIZERS or type(optimizer) is not getattr(torch.optim, name, None):
        raise ValueError(
            f"explain tells optimizers made of rules (nestling.optim) and torch.optim's of the same names, not {name}"
        )
    kind = OPTIMIZERS["AdamW" if group.get("decoupled_weight_decay") else name]
    options = {option: group[option] for option in inspect.signature(kind.expression).parameters if option in group}
    return kind.expression(**options)[0]


def _objective(rule: Part) -> str:
    """What the weights minimise beside staying where they are, and what is kept of them."""
    inner: object = rule
    while isinstance(inner, Rule):
        if isinstance(inner, retain):
            return f"{_objective(inner.of)}; kept by {inner.retention!r}"
        if isinstance(inner, joint_delta_gradient_descent):
            return "minimise |W x - u|^2 / 2 over the step's pairs (56)"
        if isinstance(inner, delta_gradient_descent):
            return "minimise |W x - u|^2 / 2 (56)"
        if isinstance(inner, generalized_gradient_descent):
            return f"minimise {inner.attentional_bias!r} of W x and u (59)"
        inner = getattr(inner, "of", None)
    return "minimise <W x, u> (9)"
