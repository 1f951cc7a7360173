"""Optimizers by name: each is one function from torch's arguments to an expression of rule parts and its gates.

`expression` is the whole optimizer. Its keywords are torch's own, with torch's defaults; they are the options of a
parameter group, and are read anew at every step, so that schedulers may change any of them.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.memory.adaptive import adagrad, adam, ascent, average, hold_back, nesterov, ridge, rmsprop, slow_down
from nestling.memory.attentional_bias import AttentionalBias
from nestling.memory.gradient_memory import generalized_gradient_descent, gradient_memory
from nestling.memory.nested import add, delta_momentum, gradient_keys, remember
from nestling.memory.orthogonal import (
    QUINTIC,
    full_matrix_adagrad,
    joint_delta_gradient_descent,
    match_rms,
    match_spectrum,
    newton_schulz,
    unit_rms,
)
from nestling.memory.part import known, parse
from nestling.memory.retention import decay
from nestling.memory.rule import (
    Additive,
    Direction,
    Gates,
    Rule,
    dampen,
    delta_gradient_descent,
    every,
    gradient_descent,
    momentum,
    retain,
    scale,
    surprise,
)
from nestling.memory.structure import Structure

from .adapter import Captured, RuleOptimizer

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


def _check(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def _outer(direction: Direction, weight_decay: float, maximize: bool = False) -> Direction:
    """The gradient that the direction sees: negated to maximize, and with the weights' decay added to it."""
    _check(weight_decay=weight_decay)
    direction = ridge(direction, weight_decay) if weight_decay else direction
    return ascent(direction) if maximize else direction


def _decoupled(rule: Additive, lr: float | Tensor, weight_decay: float, momentum: float = 0.0) -> Expressed:
    """The rule inside a decay of the weights by 1 - lr * weight_decay."""
    _check(lr=lr, weight_decay=weight_decay)
    if not weight_decay:
        return rule, Gates(lr, momentum)
    kept = 1.0 - lr * weight_decay
    return retain(decay(), rule), Gates(lr, momentum, kept.log() if isinstance(kept, Tensor) else _log(kept))


def _inside(rule: Rule, outer: type[Additive]) -> Rule:
    """The rule with the direction that `outer` wraps in its place."""
    if isinstance(rule, (retain, every)):
        return replace(rule, of=_inside(rule.of, outer))  # type: ignore[arg-type]
    return rule.of if isinstance(rule, outer) else rule  # type: ignore[attr-defined]


def _log(kept: float) -> float:
    if not kept >= 0:
        raise ValueError(f"lr * weight_decay must be <= 1, got {1 - kept}")
    return math.log(kept) if kept > 0 else -math.inf


class SGD(Named):
    """torch.optim.SGD: scale(momentum(surprise())), the simplest memory of gradients (equations 8 and 33).

    Oracle: torch.optim.SGD, 200 steps at 1e-12 (tests/test_optim_torch.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> Expressed:
        _check(lr=lr, momentum=momentum)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs a momentum and no dampening, got {momentum} and {dampening}")
        fresh: Direction = hold_back(surprise(), dampening) if dampening else surprise()
        buffered = (PARTS["nesterov"] if nesterov else PARTS["momentum"])(fresh) if momentum else surprise()
        return _outer(scale(buffered), weight_decay, maximize), Gates(lr, momentum)


PARTS = {"momentum": momentum, "nesterov": nesterov}
"""The parts that options of the same name choose."""


class Adagrad(Named):
    """torch.optim.Adagrad: scale(adagrad()), v <- v + g^2, W <- W - lr g / (sqrt(v) + eps) (105 without momentum).

    Oracles: torch.optim.Adagrad; the minimiser of 101 (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> Expressed:
        _check(lr=lr)
        direction: Direction = adagrad(eps=eps, initial=initial_accumulator_value)
        direction = slow_down(direction, lr_decay) if lr_decay else direction
        return _outer(scale(direction), weight_decay, maximize), Gates(lr)


class RMSprop(Named):
    """torch.optim.RMSprop: scale(momentum(rmsprop())), v <- alpha v + (1 - alpha) g^2 (named in appendix B).

    Oracle: torch.optim.RMSprop.
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> Expressed:
        _check(lr=lr, momentum=momentum)
        direction: Direction = rmsprop(beta=alpha, eps=eps, centered=centered)
        direction = PARTS["momentum"](direction) if momentum else direction
        return _outer(scale(direction), weight_decay, maximize), Gates(lr, momentum)


class Adam(Named):
    """torch.optim.Adam: scale(adam()), the unbiased averages m and v of g and g^2 in m / (sqrt(v) + eps) (equations 101
    to 105, whose sums are averages here).

    Oracles: torch.optim.Adam; the quadratic that it minimises, which is that of 101 where both betas are alike
    (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> Expressed:
        _check(lr=lr)
        direction = adam(surprise(), *betas, eps, amsgrad)
        return _outer(scale(direction), weight_decay, maximize), Gates(lr)


class AdamW(Named):
    """torch.optim.AdamW: retain(decay(), scale(adam())). Decay of the weights is retention.

    Oracle: torch.optim.AdamW.
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> Expressed:
        direction = adam(surprise(), *betas, eps, amsgrad)
        return _decoupled(_outer(scale(direction), 0.0, maximize), lr, weight_decay)


class Matrices(Named):
    """An optimizer of matrices [..., out, in]. Raises ValueError for a parameter of fewer than two dims."""

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        super()._check_parameter(name, parameter)
        if parameter.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} steps matrices, but {name} has {parameter.dim()} dims; "
                "give it to AdamW (nestling.optim.split_parameters tells which)"
            )


def _adjusted(direction: Direction, adjust_lr_fn: str | None) -> Direction:
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got {adjust_lr_fn!r}")
    return match_rms(direction) if adjust_lr_fn == "match_rms_adamw" else match_spectrum(direction)


class Muon(Matrices):
    """torch.optim.Muon: retain(decay(), scale(match_spectrum(newton_schulz(nesterov(dampen(surprise())))))).

    Matrices of more than two dims are orthogonalised one by one, unless the group is flat. precision: that of the
    Newton-Schulz products, "bfloat16" as in torch, or the "weight"'s own. Equations 42 to 44. Oracles: the iteration
    written out in float64; torch.optim.Muon within 2% of an update (tests/test_optim_torch.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        precision: str = "bfloat16",
        maximize: bool = False,
    ) -> Expressed:
        _check(momentum=momentum)
        buffered = PARTS["nesterov" if nesterov else "momentum"](dampen(surprise()))
        direction = newton_schulz(buffered, ns_steps, ns_coefficients, eps, precision)
        return _decoupled(_outer(scale(_adjusted(direction, adjust_lr_fn)), 0.0, maximize), lr, weight_decay, momentum)


class FullMatrixAdagrad(Named):
    """scale(full_matrix_adagrad()): H <- H + g g^T, W <- W - lr (H + eps)^(-1/2) g (equations 106 to 111).

    For vectors Adagrad as it was first written, for matrices its left half; H is [out, out], so that embeddings of many
    rows are not for it. beta: with momentum. Oracle: eigenvalues (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2, weight_decay: float = 0.0, eps: float = 1e-8, beta: float = 0.0
    ) -> Expressed:
        _check(lr=lr)
        inner: Direction = average(surprise(), beta) if beta else surprise()
        return _outer(scale(full_matrix_adagrad(inner, eps)), weight_decay), Gates(lr)


class DeltaGradientDescent(Named):
    """W <- W (I - eta' x x^T) - eta' g (equations 56, 57): for weights of layers seen by `capture`, which must be open
    around the forward pass; gradient descent for the rest.

    form="averaged": outer products of a batch added, eta' = eta / (1 + eta sum |x|^2); "exact": equation 56 solved for
    the whole batch, W (I + eta X X^T)^-1. reduction: what the loss does over rows, and so what X X^T is made to do.
    Oracle: the direct solve of equation 56 (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        form: str = "exact",
        reduction: str = "mean",
        maximize: bool = False,
    ) -> Expressed:
        if form not in ("averaged", "exact"):
            raise ValueError(f"form must be 'averaged' or 'exact', got {form!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        _check(momentum=momentum)
        inner: Direction = PARTS["momentum"](gradient_descent()) if momentum else gradient_descent()
        part = joint_delta_gradient_descent if form == "exact" else delta_gradient_descent
        return _decoupled(part(_outer(inner, 0.0, maximize)), lr, weight_decay, momentum)

    def without_inputs(self, rule: Rule) -> Rule:
        return _inside(rule, delta_gradient_descent)

    def gram(self, group: dict[str, Any], captured: Captured) -> Tensor:
        return captured.gram / captured.rows if group["reduction"] == "mean" else captured.gram


class PreconditionedMomentum(Named):
    """momentum(scale(full_matrix_adagrad())): S <- momentum S - lr P g with P = (sum g g^T + eps)^-1/2, W <- W + S
    (equations 46 and 47, which leave P open). Oracle: singular values (tests/test_nested_optimizers.py)."""

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0, eps: float = 1e-8
    ) -> Expressed:
        _check(lr=lr, momentum=momentum)
        return _outer(PARTS["momentum"](scale(full_matrix_adagrad(eps=eps))), weight_decay), Gates(lr, momentum)


class DeltaMomentum(Named):
    """S <- S (momentum I - c g^T g) - c g, W <- W + S (equations 48, 49 with P = I).

    form="literal": c = lr, which grows without bound for |g|^2 > (1 + momentum) / lr; "bounded":
    c = lr / (1 + lr |g|^2). Oracle: autograd of equation 48 (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        form: str = "bounded",
        maximize: bool = False,
    ) -> Expressed:
        if form not in ("literal", "bounded"):
            raise ValueError(f"form must be 'literal' or 'bounded', got {form!r}")
        _check(lr=lr, momentum=momentum)
        bounded = remember(gradient_keys(retain(decay(), delta_gradient_descent())), retention=momentum)
        return _outer(delta_momentum() if form == "literal" else bounded, weight_decay, maximize), Gates(lr, momentum)


class DeepMomentum(Named):
    """W <- W + m(u), m <- m_0 + momentum (m - m_0) - lr d/dm L(m(u)): deep momentum (DMGD, equation 50).

    A memory of gradients with maps of its own, m_0 their start; see `gradient_memory` for what it is asked, and what it
    answers. With `newton_schulz` around it, equation 52.

    structure, objective: of the memory, as expressions, since options are saved: "matrix()" with "dot()" is SGD with
    momentum (34), "matrix()" with "l2()" delta momentum (48). form="ones": the letter of equation 50, whose steps are
    constant along each row. Oracle: autograd of the objective, each gradient in turn (tests/test_gradient_memory.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        structure: str = "mlp(residual=False)",
        objective: str = "dot()",
        form: Literal["units", "ones"] = "units",
        seed: int = 0,
    ) -> Expressed:
        _check(lr=lr, momentum=momentum)
        parts = parse(structure, Structure), parse(objective, AttentionalBias)  # type: ignore[type-abstract]
        return _outer(gradient_memory(*parts, retention=momentum, form=form, seed=seed), weight_decay), Gates(lr)


class GeneralizedGradientDescent(Named):
    """W <- W - lr d/dW L~(W x, u), L~ an objective of one's own over the inputs and surprises of each linear layer
    (definition 5, equations 59 and 60, with weight_decay for Ret).

    For weights of layers seen by `capture`, which must be open around the forward pass, and whose inputs and errors it
    keeps until the step; gradient descent for the rest.
    objective: an expression, such as "huber_norm(bound=0.5)"; an AttentionalBias of one's own is known by its name.
    reduction: what the loss does over rows. "dot()" is gradient descent (55), "l2()" delta gradient descent by an
    explicit step (57). Oracle: autograd of L~ (tests/test_gradient_memory.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        objective: str = "l2()",
        reduction: Literal["sum", "mean"] = "mean",
    ) -> Expressed:
        _check(momentum=momentum)
        inner: Direction = PARTS["momentum"](gradient_descent()) if momentum else gradient_descent()
        bias = parse(objective, AttentionalBias)  # type: ignore[type-abstract]
        rule = generalized_gradient_descent(bias, inner, reduction)
        return _decoupled(rule, lr, weight_decay, momentum)

    def without_inputs(self, rule: Rule) -> Rule:
        return _inside(rule, generalized_gradient_descent)


class M3(Matrices):
    """Multi-scale momentum Muon (Algorithm 1, section 7.2): (NS(M1) + alpha NS(M2)) / (sqrt(V) + eps), where M1 steps
    at every gradient and M2 once in `period`, read from the step after.

    mode="paper": the letter, M1, M2 and V plain sums with weights beta1, beta3, beta2; the orthogonalisation makes the
    step blind to beta1 and beta3. mode="ema": decaying averages, V unbiased, and each matrix moved by root mean square
    lr. Further levels: `periods` of more than one entry, each with a memory of its own. Values are not in the paper.

    Five numbers are kept for one of a weight: M1, V, M2, the sum of a period's gradients, and what M2 said. Oracle: the
    algorithm written out (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        alpha: float = 0.5,
        periods: tuple[int, ...] | int = (100,),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        *,
        mode: str = "ema",
        precision: str = "bfloat16",
        maximize: bool = False,
    ) -> Expressed:
        if mode not in ("paper", "ema"):
            raise ValueError(f"mode must be 'paper' or 'ema', got {mode!r}")
        _check(alpha=alpha)
        for value in betas:
            if not 0 <= value < 1:
                raise ValueError(f"betas must be in [0, 1), got {betas}")
        fast, second, slow = betas
        paper = mode == "paper"

        def orthogonal(beta: float) -> Direction:
            """One momentum, a memory of gradients learned by descent, orthogonalised."""
            if paper:
                summed: Direction = remember(gradient_descent(), step_size=beta)
            else:
                summed = remember(retain(decay(), gradient_descent()), step_size=round(1.0 - beta, 15), retention=beta)
            return newton_schulz(summed, ns_steps, ns_coefficients, precision=precision)

        numerator = orthogonal(fast)
        for period in (periods,) if isinstance(periods, int) else periods:
            clocked = every(period, retain(decay(), orthogonal(slow)))
            numerator = add(numerator, remember(clocked, retention=0.0, read="before"), alpha)
        if paper:
            direction: Direction = adagrad(numerator, eps, share=second)
        else:
            direction = unit_rms(rmsprop(numerator, second, eps, corrected=True))
        return _decoupled(_outer(scale(direction), 0.0, maximize), lr, weight_decay)


OPTIMIZERS: dict[str, type[Named]] = {
    kind.__name__: kind
    for kind in (
        SGD,
        Adagrad,
        RMSprop,
        Adam,
        AdamW,
        Muon,
        FullMatrixAdagrad,
        DeltaGradientDescent,
        PreconditionedMomentum,
        DeltaMomentum,
        DeepMomentum,
        GeneralizedGradientDescent,
        M3,
    )
}
"""Every named optimizer, by name."""
