"""The same learning rules as torch optimizers."""

from .adapter import RuleOptimizer, to_optimizer
from .explain import explain, explain_all
from .groups import Joined, for_model, split_parameters
from .named import (
    M3,
    OPTIMIZERS,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    FullMatrixAdagrad,
    GeneralizedGradientDescent,
    PreconditionedMomentum,
)
from .torchs import SGD, Adagrad, Adam, AdamW, Muon, RMSprop

__all__ = [
    "M3",
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "FullMatrixAdagrad",
    "GeneralizedGradientDescent",
    "Joined",
    "Muon",
    "PreconditionedMomentum",
    "RMSprop",
    "RuleOptimizer",
    "explain",
    "explain_all",
    "for_model",
    "split_parameters",
    "to_optimizer",
]
