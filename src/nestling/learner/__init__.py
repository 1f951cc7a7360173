"""A model's life on disk: files that survive a crash."""

from .files import Generation, newest, read_generation, write_file, write_generation
from .folder import SavedModel, find_training, load_model, model_hash, open_life, save_life
from .stacked import SavedStack, is_stacked, load_levels, load_stacked, reader_of, save_levels, save_stacked
from .states import fingerprint, load_state, save_state

__all__ = [
    "Generation",
    "SavedModel",
    "SavedStack",
    "find_training",
    "fingerprint",
    "is_stacked",
    "load_levels",
    "load_model",
    "load_stacked",
    "load_state",
    "model_hash",
    "newest",
    "open_life",
    "read_generation",
    "reader_of",
    "save_levels",
    "save_life",
    "save_stacked",
    "save_state",
    "write_file",
    "write_generation",
]
