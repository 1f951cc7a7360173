"""Levels: memories with their own periods, how they are written while a model reads."""

from .continuum import Continuum, Level, LevelsState, Taps, begin, level, write
from .encoders import ExampleOut, ExampleReader, ExampleState, MaskedReader, MaskedState
from .evaluation import mean_surprise, surprise_by_position
from .losses import Loss, masked_tokens, next_token, seen_classes
from .neurons import neurons, spectrum
from .reading import Reader, ReadingState, ReadOut
from .stacking import StackConfig, Stacked, StackedDecoder, StackedEncoder, stack

__all__ = [
    "Continuum",
    "ExampleOut",
    "ExampleReader",
    "ExampleState",
    "Level",
    "LevelsState",
    "Loss",
    "MaskedReader",
    "MaskedState",
    "ReadOut",
    "Reader",
    "ReadingState",
    "StackConfig",
    "Stacked",
    "StackedDecoder",
    "StackedEncoder",
    "Taps",
    "begin",
    "level",
    "masked_tokens",
    "mean_surprise",
    "neurons",
    "next_token",
    "seen_classes",
    "spectrum",
    "stack",
    "surprise_by_position",
    "write",
]
