"""nestling: nested learning in PyTorch. Choose an objective and an optimizer, and the architecture falls out."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nestling.checks import check as check
    from nestling.learner import Guards as Guards
    from nestling.learner import Learner as Learner
    from nestling.learner import LifeConfig as LifeConfig
    from nestling.learner import load_state as load_state
    from nestling.learner import save_state as save_state
    from nestling.levels import Continuum as Continuum
    from nestling.levels import Reader as Reader
    from nestling.levels import ReadingState as ReadingState
    from nestling.levels import level as level
    from nestling.levels import mean_surprise as mean_surprise
    from nestling.levels import neurons as neurons
    from nestling.levels import spectrum as spectrum
    from nestling.levels import stack as stack
    from nestling.memory import Gates as Gates
    from nestling.memory import Pairs as Pairs
    from nestling.memory import clip as clip
    from nestling.memory import dampen as dampen
    from nestling.memory import decay as decay
    from nestling.memory import decay_to_start as decay_to_start
    from nestling.memory import delta_gradient_descent as delta_gradient_descent
    from nestling.memory import dot as dot
    from nestling.memory import every as every
    from nestling.memory import gradient_descent as gradient_descent
    from nestling.memory import l2 as l2
    from nestling.memory import matrix as matrix
    from nestling.memory import mlp as mlp
    from nestling.memory import momentum as momentum
    from nestling.memory import normalize as normalize
    from nestling.memory import parse as parse
    from nestling.memory import retain as retain
    from nestling.memory import scale as scale
    from nestling.memory import surprise as surprise
    from nestling.models import Decoder as Decoder
    from nestling.models import ModelConfig as ModelConfig
    from nestling.models import generate as generate
    from nestling.models import preset as preset
    from nestling.optim import to_optimizer as to_optimizer
    from nestling.sequence import SelfModifying as SelfModifying
    from nestling.sequence import SequenceMemory as SequenceMemory
    from nestling.sequence import attention as attention
    from nestling.sequence import self_modifying as self_modifying
    from nestling.sequence import sequence_memory as sequence_memory
    from nestling.sequence.zoo import zoo as zoo

# Names are looked up when they are first used: importing the package costs nothing, torch included.
_ROOMS = {
    "checks": ("check",),
    "learner": ("Guards", "Learner", "LifeConfig", "load_state", "save_state"),
    "levels": ("Continuum", "Reader", "ReadingState", "level", "mean_surprise", "neurons", "spectrum", "stack"),
    "memory": [
        "Gates",
        "Pairs",
        "clip",
        "dampen",
        "decay",
        "decay_to_start",
        "delta_gradient_descent",
        "dot",
        "every",
        "gradient_descent",
        "l2",
        "matrix",
        "mlp",
        "momentum",
        "normalize",
        "parse",
        "retain",
        "scale",
        "surprise",
    ],
    "models": ("Decoder", "ModelConfig", "generate", "preset"),
    "optim": ("to_optimizer",),
    "sequence.zoo": ("zoo",),
    "sequence": ("SelfModifying", "SequenceMemory", "attention", "self_modifying", "sequence_memory"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'nestling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nestling.{_ROOM_OF[name]}"), name)
