"""Levels: memories with their own periods, how they are written while a model reads."""

from .continuum import Continuum, Level, Taps, Wiring, chain, heads, level
from .describe import Row, System, describe
from .evaluation import mean_surprise, surprise_by_position
from .growing import Growing
from .handover import Moments, hand_over, moments_of
from .in_context import InContext, InContextState
from .neurons import neurons, spectrum
from .reading import Reader, ReadingState, ReadOut
from .slots import Slots
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
from .whole import Whole
from .writing import LevelsState, begin, write

__all__ = [
    "Box",
    "Context",
    "Continuum",
    "Growing",
    "InContext",
    "InContextState",
    "Level",
    "LevelsState",
    "Moments",
    "ReadOut",
    "Reader",
    "ReadingState",
    "Row",
    "Slots",
    "System",
    "Taps",
    "Transfer",
    "Whole",
    "Wiring",
    "backpropagation",
    "begin",
    "chain",
    "context_generation",
    "describe",
    "direct",
    "direct_context",
    "generation",
    "hand_over",
    "heads",
    "initialization",
    "level",
    "mean_surprise",
    "moments_of",
    "neurons",
    "reptile",
    "run",
    "spectrum",
    "surprise_by_position",
    "write",
]
