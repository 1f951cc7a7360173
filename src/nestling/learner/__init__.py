"""A model's life on disk: durable, inspectable, reversible. Files that survive a crash."""

from .about import LifeConfig, is_life
from .conversation import Conversation
from .files import Generation, newest, read_generation, write_file, write_generation
from .folder import SavedModel, find_training, load_model, model_hash, open_life, save_life
from .guards import Guards
from .learner import Learner
from .lock import Busy
from .machine import machine, machine_differences
from .snapshot import Snapshot
from .stacked import SavedStack, is_stacked, load_levels, load_stacked, reader_of, save_levels, save_stacked
from .states import fingerprint, load_state, save_state
from .telling import Learned

__all__ = [
    "Busy",
    "Conversation",
    "Generation",
    "Guards",
    "Learned",
    "Learner",
    "LifeConfig",
    "SavedModel",
    "SavedStack",
    "Snapshot",
    "find_training",
    "fingerprint",
    "is_life",
    "is_stacked",
    "load_levels",
    "load_model",
    "load_stacked",
    "load_state",
    "machine",
    "machine_differences",
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
