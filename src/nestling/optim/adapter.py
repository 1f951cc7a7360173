"""Any learning rule as a torch optimizer: one step of the rule on every weight matrix."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nestling.memory.rule import Gates, Rule, Summed
from nestling.memory.state import flatten, unflatten


class RuleOptimizer(torch.optim.Optimizer):
    """Steps parameters by a `Rule`: weight, state <- rule.step(weight, gradient, state, gates).

    Each group holds its gates: step_size, momentum, retention (the fraction kept), and tokens: how many tokens
    (or steps) one gradient sums, which is what `every` counts. Parameters of fewer than two dims are stepped as
    a column. Rules that need the inputs of a linear layer (delta_gradient_descent, normalize) learn them from
    `capture(module)`. Oracle: a sequence memory with the same rule (tests/test_one_rule.py).
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule,
        *,
        step_size: float = 1e-2,
        momentum: float = 0.9,
        retention: float = 1.0,
        tokens: int = 1,
    ) -> None:
        if not step_size >= 0:
            raise ValueError(f"step_size must be >= 0, got {step_size}")
        for name, value in (("momentum", momentum), ("retention", retention)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if rule.exposes:
            raise ValueError(f"{rule} steps an accumulator, and a parameter is the weight itself; use decay() for it")
        if rule.reopens:
            raise ValueError(f"{rule} changes weights where a chunk opens, and an optimizer has no chunks")
        if tokens < 1:
            raise ValueError(f"tokens must be >= 1, got {tokens}")
        self.rule = rule
        self.grams: dict[nn.Parameter, Tensor] = {}
        defaults = {"step_size": step_size, "momentum": momentum, "retention": retention, "tokens": tokens}
        super().__init__(params, defaults)

    @contextmanager
    def capture(self, module: nn.Module) -> Iterator[None]:
        """While open, sums x x^T over the inputs of every nn.Linear of the module, until the next step."""

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            gram = x.mT @ x
            self.grams[weight] = self.grams[weight] + gram if weight in self.grams else gram

        linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        hooks = [layer.register_forward_pre_hook(note) for layer in linears]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the rule on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kept = group["retention"]
            gates = Gates(group["step_size"], group["momentum"], math.log(kept) if kept > 0 else -math.inf)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, gates, group["tokens"])
        self.grams.clear()
        return loss

    def _step_one(self, parameter: Tensor, gates: Gates, tokens: int) -> None:
        weight = parameter.unsqueeze(-1) if parameter.dim() < 2 else parameter
        total = parameter.grad
        assert total is not None
        gram = self.grams.get(parameter)  # type: ignore[call-overload]
        gradient = Summed(total.view_as(weight), gram, tokens)
        start = self.rule.init(weight.clone())
        state = unflatten(start, self.state[parameter]) if self.state[parameter] else start
        weight, state = self.rule.step(weight, gradient, self.rule.anchor(state), gates)
        parameter.copy_(weight.view_as(parameter))
        self.state[parameter] = flatten(state)


def to_optimizer(rule: Rule, params: Iterable[Any], **gates: Any) -> RuleOptimizer:
    """The rule as a torch optimizer over `params`: `to_optimizer(retain(decay(), momentum()), model.parameters())`."""
    return RuleOptimizer(params, rule, **gates)
