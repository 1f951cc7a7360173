"""A model's life on disk: files that survive a crash."""

from .files import Generation, newest, read_generation, write_file, write_generation
from .folder import SavedModel, find_training, load_model, model_hash, open_life, save_life
from .states import fingerprint, load_state, save_state

__all__ = [
    "Generation",
    "SavedModel",
    "find_training",
    "fingerprint",
    "load_model",
    "load_state",
    "model_hash",
    "newest",
    "open_life",
    "read_generation",
    "save_life",
    "save_state",
    "write_file",
    "write_generation",
]
