"""Levels: memories with their own periods, how they are written while a model reads."""

from .continuum import Continuum, Level, LevelsState, Taps, begin, level, write
from .evaluation import mean_surprise, surprise_by_position
from .neurons import neurons, spectrum
from .reading import Reader, ReadingState, ReadOut

__all__ = [
    "Continuum",
    "Level",
    "LevelsState",
    "ReadOut",
    "Reader",
    "ReadingState",
    "Taps",
    "begin",
    "level",
    "mean_surprise",
    "neurons",
    "spectrum",
    "surprise_by_position",
    "write",
]
