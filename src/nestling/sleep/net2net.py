"""Wider and deeper levels that compute what they computed before (Net2Net, Chen et al. 2016)."""

import torch
from torch import Tensor

from nestling.memory.structure import Weights


def widen(weights: Weights, hidden: int, generator: torch.Generator | None = None, *, noise: float = 0.0) -> Weights:
    """The maps (W_1 [h, k], W_2 [v, h]) of a level with one hidden layer as those of one with `hidden` neurons.

    Each new neuron is a copy of a random old one, and the copies of a neuron share what led on from it. noise: of the
    copies' rows, as a share of their deviation, so that they can part; 0 keeps the function to rounding. Gated levels
    (several maps that lead to the hidden layer) are widened alike. Raises ValueError for fewer neurons than there are.
    """
    *first, last = weights
    old = last.shape[-1]
    if hidden < old:
        raise ValueError(f"widen: hidden must be >= the {old} neurons that there are, got {hidden}")
    copied = torch.randint(0, old, (hidden - old,), generator=generator)
    of = torch.cat([torch.arange(old), copied]).to(last.device)
    shares = torch.bincount(of, minlength=old).to(last)
    grown = [weight[of] for weight in first]
    if noise:
        grown = [_stirred(weight, old, noise, generator) for weight in grown]
    return (*grown, (last / shares)[:, of])


def _stirred(weight: Tensor, old: int, noise: float, generator: torch.Generator | None) -> Tensor:
    drawn = torch.randn(weight[old:].shape, generator=generator, dtype=torch.float64).to(weight)
    return torch.cat([weight[:old], weight[old:] + noise * weight.std() * drawn])


def deepen(weights: Weights) -> Weights:
    """The maps (W_1 [h, k], W_2 [v, h]) of a level mlp(activation="gelu") as those of mlp(depth=3), of 2 h neurons in
    both hidden layers, which computes the same.

    gelu(x) - gelu(-x) = x: the new layer holds every old neuron and its negative. The first layer's neurons are doubled
    (see `widen`) where the structure has one width for all layers.
    """
    if len(weights) != 2:
        raise ValueError(f"deepen: takes the two maps of a level with one hidden layer, got {len(weights)}")
    first, last = weights
    one = torch.eye(len(first), dtype=first.dtype, device=first.device)
    middle = torch.cat([one, -one])  # [2h, h]
    return torch.cat([first, first]), torch.cat([middle, middle], 1) / 2, torch.cat([last, -last], 1)


def one_more_block(like: Weights) -> Weights:
    """The maps of a block for the end of a chain that adds nothing to the stream, and learns: those of `like`, with
    the last one zero. Exact, whatever the structure."""
    *first, last = like
    return (*(weight.clone() for weight in first), torch.zeros_like(last))
