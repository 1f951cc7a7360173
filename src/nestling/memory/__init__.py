"""Memories: structure, attentional bias, retention, learning rule; and their naive oracles."""

from .attentional_bias import AttentionalBias, dot, l2
from .part import Part, all_variants, known, parse
from .retention import Retention, decay, decay_to_start
from .rule import (
    Gates,
    Gradient,
    Pairs,
    Plan,
    Rule,
    Summed,
    clip,
    dampen,
    delta_gradient_descent,
    every,
    gradient_descent,
    momentum,
    normalize,
    retain,
    scale,
    surprise,
)
from .structure import Structure, Weights, matrix, mlp, plain

__all__ = [
    "AttentionalBias",
    "Gates",
    "Gradient",
    "Pairs",
    "Part",
    "Plan",
    "Retention",
    "Rule",
    "Structure",
    "Summed",
    "Weights",
    "all_variants",
    "clip",
    "dampen",
    "decay",
    "decay_to_start",
    "delta_gradient_descent",
    "dot",
    "every",
    "gradient_descent",
    "known",
    "l2",
    "matrix",
    "mlp",
    "momentum",
    "normalize",
    "parse",
    "plain",
    "retain",
    "scale",
    "surprise",
]
