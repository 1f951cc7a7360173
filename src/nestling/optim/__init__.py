"""The same learning rules as torch optimizers."""

from .adapter import RuleOptimizer, to_optimizer
from .named import (
    M3,
    OPTIMIZERS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    DeltaGradientDescent,
    DeltaMomentum,
    FullMatrixAdagrad,
    Muon,
    PreconditionedMomentum,
    RMSprop,
)

__all__ = [
    "M3",
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "FullMatrixAdagrad",
    "Muon",
    "PreconditionedMomentum",
    "RMSprop",
    "RuleOptimizer",
    "to_optimizer",
]
