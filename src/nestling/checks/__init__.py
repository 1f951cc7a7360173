"""The correctness kit: what a model must pass before anything it measures can be believed."""

from .bench import SequenceModel
from .kit import (
    CHECKS,
    causality,
    check,
    entropy_floor,
    gradient_coverage,
    gradient_exactness,
    initial_loss,
    purity,
    rows_independent,
    split_invariance,
)
from .learning import reading_invariance, reading_surprise_falls, surprise_falls
from .options import options_live
from .report import Finding, Report
from .special import named_model, special_case

__all__ = [
    "CHECKS",
    "Finding",
    "Report",
    "SequenceModel",
    "causality",
    "check",
    "entropy_floor",
    "gradient_coverage",
    "gradient_exactness",
    "initial_loss",
    "named_model",
    "options_live",
    "purity",
    "reading_invariance",
    "reading_surprise_falls",
    "rows_independent",
    "special_case",
    "split_invariance",
    "surprise_falls",
]
