"""Sequence layers: a memory run over tokens, recurrently or a chunk at a time."""

from .attention import SlidingAttention, attention
from .layer import SequenceMemory, SequenceState, sequence_memory
from .layout import Layout, lay_out
from .linear import (
    comba,
    delta_product,
    delta_rule,
    gated_delta_rule,
    gated_linear_attention,
    hgrn2,
    kda,
    linear_attention,
    linear_memory,
    longhorn,
    mamba2,
    retention,
    rwkv7,
)
from .mesa import mesa
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
    "comba",
    "delta_product",
    "delta_rule",
    "gated_delta_rule",
    "gated_linear_attention",
    "hgrn2",
    "kda",
    "lay_out",
    "linear_attention",
    "linear_memory",
    "longhorn",
    "mamba2",
    "memora",
    "mesa",
    "moneta",
    "retention",
    "rwkv7",
    "self_modifying",
    "sequence_memory",
    "yaad",
]
