"""Pre-training over contiguous streams of bytes."""

from .checkpoint import load_run, save_run
from .data import Batch, Stream, digest, named_documents, read_documents
from .loop import LevelClock, StepReport, TrainConfig, Trainer, train
from .outer import OnClocks

__all__ = [
    "Batch",
    "LevelClock",
    "OnClocks",
    "StepReport",
    "Stream",
    "TrainConfig",
    "Trainer",
    "digest",
    "load_run",
    "named_documents",
    "read_documents",
    "save_run",
    "train",
]
