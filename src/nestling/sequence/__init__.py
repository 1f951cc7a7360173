"""Sequence layers: a memory run over tokens, recurrently or a chunk at a time."""

from .attention import SlidingAttention, attention
from .gating import (
    Gating,
    fixed_gates,
    gated_delta_gates,
    kda_gates,
    low_rank_gates,
    mamba2_gates,
    rwkv7_gates,
    sigmoid_gates,
)
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
from .mixer import Mixer, MixerModule
from .preparation import Preparation, bare, silu, silu_unit, unit_keys
from .scan import Memory, MemoryState
from .self_modifying import SelfModifying, SelfModifyingState, self_modifying

__all__ = [
    "Gating",
    "Layout",
    "Memory",
    "MemoryState",
    "Mixer",
    "MixerModule",
    "Preparation",
    "SelfModifying",
    "SelfModifyingState",
    "SequenceMemory",
    "SequenceState",
    "SlidingAttention",
    "attention",
    "bare",
    "comba",
    "delta_product",
    "delta_rule",
    "fixed_gates",
    "gated_delta_gates",
    "gated_delta_rule",
    "gated_linear_attention",
    "hgrn2",
    "kda",
    "kda_gates",
    "lay_out",
    "linear_attention",
    "linear_memory",
    "longhorn",
    "low_rank_gates",
    "mamba2",
    "mamba2_gates",
    "mesa",
    "retention",
    "rwkv7",
    "rwkv7_gates",
    "self_modifying",
    "sequence_memory",
    "sigmoid_gates",
    "silu",
    "silu_unit",
    "unit_keys",
]
