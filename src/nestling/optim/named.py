"""The optimizers of Nested Learning by name, each one expression; and all that have a name."""

from typing import Any, Literal

from torch import Tensor

from nestling.memory.adaptive import adagrad, average, rmsprop
from nestling.memory.attentional_bias import AttentionalBias
from nestling.memory.gradient_memory import generalized_gradient_descent, gradient_memory
from nestling.memory.nested import add, delta_momentum, gradient_keys, remember
from nestling.memory.orthogonal import (
    QUINTIC,
    full_matrix_adagrad,
    joint_delta_gradient_descent,
    newton_schulz,
    unit_rms,
)
from nestling.memory.part import parse
from nestling.memory.retention import decay
from nestling.memory.rule import (
    Direction,
    Gates,
    Rule,
    delta_gradient_descent,
    every,
    gradient_descent,
    retain,
    scale,
    surprise,
)
from nestling.memory.structure import Structure

from .capture import Captured
from .options import PARTS, Expressed, Matrices, Named, decoupled, inside, not_negative, outer
from .torchs import SGD, Adagrad, Adam, AdamW, Muon, RMSprop


class FullMatrixAdagrad(Named):
    """scale(full_matrix_adagrad()): H <- H + g g^T, W <- W - lr (H + eps)^(-1/2) g (equations 106 to 111).

    For vectors Adagrad as it was first written, for matrices its left half; H is [out, out], so that embeddings of many
    rows are not for it. beta: with momentum. Oracle: eigenvalues (tests/test_nested_optimizers.py).
    """

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2, weight_decay: float = 0.0, eps: float = 1e-8, beta: float = 0.0
    ) -> Expressed:
        not_negative(lr=lr)
        inner: Direction = average(surprise(), beta) if beta else surprise()
        return outer(scale(full_matrix_adagrad(inner, eps)), weight_decay), Gates(lr)


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
        not_negative(momentum=momentum)
        inner: Direction = PARTS["momentum"](gradient_descent()) if momentum else gradient_descent()
        part = joint_delta_gradient_descent if form == "exact" else delta_gradient_descent
        return decoupled(part(outer(inner, 0.0, maximize)), lr, weight_decay, momentum)

    def without_inputs(self, rule: Rule) -> Rule:
        return inside(rule, delta_gradient_descent)

    def gram(self, group: dict[str, Any], captured: Captured) -> Tensor:
        return captured.gram / captured.rows if group["reduction"] == "mean" else captured.gram


class PreconditionedMomentum(Named):
    """momentum(scale(full_matrix_adagrad())): S <- momentum S - lr P g with P = (sum g g^T + eps)^-1/2, W <- W + S
    (equations 46 and 47, which leave P open). Oracle: singular values (tests/test_nested_optimizers.py)."""

    @staticmethod
    def expression(  # type: ignore[override]
        lr: float | Tensor = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0, eps: float = 1e-8
    ) -> Expressed:
        not_negative(lr=lr, momentum=momentum)
        return outer(PARTS["momentum"](scale(full_matrix_adagrad(eps=eps))), weight_decay), Gates(lr, momentum)


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
        not_negative(lr=lr, momentum=momentum)
        bounded = remember(gradient_keys(retain(decay(), delta_gradient_descent())), retention=momentum)
        return outer(delta_momentum() if form == "literal" else bounded, weight_decay, maximize), Gates(lr, momentum)


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
        not_negative(lr=lr, momentum=momentum)
        parts = parse(structure, Structure), parse(objective, AttentionalBias)  # type: ignore[type-abstract]
        return outer(gradient_memory(*parts, retention=momentum, form=form, seed=seed), weight_decay), Gates(lr)


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
        not_negative(momentum=momentum)
        inner: Direction = PARTS["momentum"](gradient_descent()) if momentum else gradient_descent()
        bias = parse(objective, AttentionalBias)  # type: ignore[type-abstract]
        rule = generalized_gradient_descent(bias, inner, reduction)
        return decoupled(rule, lr, weight_decay, momentum)

    def without_inputs(self, rule: Rule) -> Rule:
        return inside(rule, generalized_gradient_descent)


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
        not_negative(alpha=alpha)
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
        return decoupled(outer(scale(direction), 0.0, maximize), lr, weight_decay)


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
