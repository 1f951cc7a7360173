"""Levels: memories with their own periods, how they are written while a model reads."""

from .continuum import Continuum, Level, LevelsState, Taps, begin, level, write
from .evaluation import mean_surprise, surprise_by_position
from .reading import Accept, LevelledModel, Reader, ReadingState, ReadOut

__all__ = [
    "Accept",
    "Continuum",
    "Level",
    "LevelledModel",
    "LevelsState",
    "ReadOut",
    "Reader",
    "ReadingState",
    "Taps",
    "begin",
    "level",
    "mean_surprise",
    "surprise_by_position",
    "write",
]
