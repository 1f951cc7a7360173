"""Levels: memories with their own periods, how they are written while a model reads."""

from .continuum import Continuum, Level, LevelsState, Taps, begin, level, write
from .describe import Row, System, describe
from .evaluation import mean_surprise, surprise_by_position
from .reading import Reader, ReadingState, ReadOut
from .transfer import (
    Box,
    Context,
    Transfer,
    backpropagation,
    context_generation,
    direct,
    direct_context,
    generation,
    initialization,
    reptile,
    run,
)

__all__ = [
    "Box",
    "Context",
    "Continuum",
    "Level",
    "LevelsState",
    "ReadOut",
    "Reader",
    "ReadingState",
    "Row",
    "System",
    "Taps",
    "Transfer",
    "backpropagation",
    "begin",
    "context_generation",
    "describe",
    "direct",
    "direct_context",
    "generation",
    "initialization",
    "level",
    "mean_surprise",
    "reptile",
    "run",
    "surprise_by_position",
    "write",
]
