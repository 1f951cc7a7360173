"""Sequence layers: a memory run over tokens, recurrently or a chunk at a time."""

from .attention import SlidingAttention, attention
from .layer import SequenceMemory, SequenceState, sequence_memory
from .layout import Layout, lay_out
from .miras import memora, moneta, yaad
from .mixer import Mixer, MixerModule
from .scan import Memory, MemoryState
from .self_modifying import SelfModifying, SelfModifyingState, self_modifying

__all__ = [
    "Layout",
    "Memory",
    "MemoryState",
    "Mixer",
    "MixerModule",
    "SelfModifying",
    "SelfModifyingState",
    "SequenceMemory",
    "SequenceState",
    "SlidingAttention",
    "attention",
    "lay_out",
    "memora",
    "moneta",
    "self_modifying",
    "sequence_memory",
    "yaad",
]
