"""The same learning rules as torch optimizers."""

from .adapter import RuleOptimizer, to_optimizer

__all__ = ["RuleOptimizer", "to_optimizer"]
