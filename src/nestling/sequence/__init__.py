"""Sequence layers: a memory run over tokens, recurrently or a chunk at a time."""

from .attention import SlidingAttention, attention
from .caching import Caching, CachingState, caching
from .context import ContextState, MemoryAsContext, mac
from .layer import SequenceMemory, SequenceState, sequence_memory
from .layout import Layout, lay_out
from .mixer import Mixer, MixerModule
from .scan import Memory, MemoryState
from .self_modifying import SelfModifying, SelfModifyingState, self_modifying
from .softmax import softmax_memory
from .titans import MemoryAsGate, MemoryAsLayer, TitansState, mag, mal
from .tnt import Beside, BesideState, Shards, ShardState, beside, shards, tnt

__all__ = [
    "Beside",
    "BesideState",
    "Caching",
    "CachingState",
    "ContextState",
    "Layout",
    "Memory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryState",
    "Mixer",
    "MixerModule",
    "SelfModifying",
    "SelfModifyingState",
    "SequenceMemory",
    "SequenceState",
    "ShardState",
    "Shards",
    "SlidingAttention",
    "TitansState",
    "attention",
    "beside",
    "caching",
    "lay_out",
    "mac",
    "mag",
    "mal",
    "self_modifying",
    "sequence_memory",
    "shards",
    "softmax_memory",
    "tnt",
]
