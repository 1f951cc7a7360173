"""A model's life on disk: files that survive a crash."""

from .files import Generation, newest, read_generation, write_file, write_generation
from .folder import SavedModel, find_training, load_model, model_hash, open_life, save_life

__all__ = [
    "Generation",
    "SavedModel",
    "find_training",
    "load_model",
    "model_hash",
    "newest",
    "open_life",
    "read_generation",
    "save_life",
    "write_file",
    "write_generation",
]
