"""Levels: memories with their own periods, how they are written while a model reads."""

from .continuum import Continuum, Level, Taps, Wiring, chain, heads, level
from .describe import Row, System, describe
from .encoders import ExampleOut, ExampleReader, ExampleState, MaskedReader, MaskedState
from .evaluation import mean_surprise, surprise_by_position
from .growing import Growing
from .handover import Moments, hand_over, moments_of
from .in_context import InContext, InContextState
from .judging import Accept
from .local import local
from .losses import Loss, masked_tokens, next_token, seen_classes
from .neurons import neurons, spectrum
from .reading import LevelledModel, Reader, ReadingState, ReadOut
from .slots import Slots
from .stacking import StackConfig, Stacked, StackedDecoder, StackedEncoder, stack
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
    "Accept",
    "Box",
    "Context",
    "Continuum",
    "ExampleOut",
    "ExampleReader",
    "ExampleState",
    "Growing",
    "InContext",
    "InContextState",
    "Level",
    "LevelledModel",
    "LevelsState",
    "Loss",
    "MaskedReader",
    "MaskedState",
    "Moments",
    "ReadOut",
    "Reader",
    "ReadingState",
    "Row",
    "Slots",
    "StackConfig",
    "Stacked",
    "StackedDecoder",
    "StackedEncoder",
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
    "local",
    "masked_tokens",
    "mean_surprise",
    "moments_of",
    "neurons",
    "next_token",
    "reptile",
    "run",
    "seen_classes",
    "spectrum",
    "stack",
    "surprise_by_position",
    "write",
]
