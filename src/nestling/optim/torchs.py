"""torch.optim's optimizers by their names, arguments and defaults, as expressions of rule parts."""

from torch import Tensor

from nestling.memory.adaptive import adagrad, adam, hold_back, rmsprop, slow_down
from nestling.memory.orthogonal import QUINTIC, match_rms, match_spectrum, newton_schulz
from nestling.memory.rule import Direction, Gates, dampen, scale, surprise

from .options import PARTS, Expressed, Matrices, Named, decoupled, not_negative, outer


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
        not_negative(lr=lr, momentum=momentum)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs a momentum and no dampening, got {momentum} and {dampening}")
        fresh: Direction = hold_back(surprise(), dampening) if dampening else surprise()
        buffered = (PARTS["nesterov"] if nesterov else PARTS["momentum"])(fresh) if momentum else surprise()
        return outer(scale(buffered), weight_decay, maximize), Gates(lr, momentum)


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
        not_negative(lr=lr)
        direction: Direction = adagrad(eps=eps, initial=initial_accumulator_value)
        direction = slow_down(direction, lr_decay) if lr_decay else direction
        return outer(scale(direction), weight_decay, maximize), Gates(lr)


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
        not_negative(lr=lr, momentum=momentum)
        direction: Direction = rmsprop(beta=alpha, eps=eps, centered=centered)
        direction = PARTS["momentum"](direction) if momentum else direction
        return outer(scale(direction), weight_decay, maximize), Gates(lr, momentum)


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
        not_negative(lr=lr)
        direction = adam(surprise(), *betas, eps, amsgrad)
        return outer(scale(direction), weight_decay, maximize), Gates(lr)


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
        return decoupled(outer(scale(direction), 0.0, maximize), lr, weight_decay)


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
        not_negative(momentum=momentum)
        buffered = PARTS["nesterov" if nesterov else "momentum"](dampen(surprise()))
        direction = newton_schulz(buffered, ns_steps, ns_coefficients, eps, precision)
        return decoupled(outer(scale(_adjusted(direction, adjust_lr_fn)), 0.0, maximize), lr, weight_decay, momentum)
