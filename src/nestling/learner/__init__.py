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
    "Snapshot",
    "find_training",
    "fingerprint",
    "is_life",
    "load_model",
    "load_state",
    "machine",
    "machine_differences",
    "model_hash",
    "newest",
    "open_life",
    "read_generation",
    "save_life",
    "save_state",
    "write_file",
    "write_generation",
]
