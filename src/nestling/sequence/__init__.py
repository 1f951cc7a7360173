"""Sequence layers: a memory run over tokens, recurrently or a chunk at a time."""

from .attention import SlidingAttention, attention
from .caching import Caching, CachingState, caching
from .context import ContextState, MemoryAsContext, mac
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
from .miras import memora, moneta, yaad
from .mixer import Mixer, MixerModule
from .preparation import Preparation, bare, silu, silu_unit, unit_keys
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
    "Gating",
    "Layout",
    "Memory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryState",
    "Mixer",
    "MixerModule",
    "Preparation",
    "SelfModifying",
    "SelfModifyingState",
    "SequenceMemory",
    "SequenceState",
    "ShardState",
    "Shards",
    "SlidingAttention",
    "TitansState",
    "attention",
    "bare",
    "beside",
    "caching",
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
    "mac",
    "mag",
    "mal",
    "mamba2",
    "mamba2_gates",
    "memora",
    "mesa",
    "moneta",
    "retention",
    "rwkv7",
    "rwkv7_gates",
    "self_modifying",
    "sequence_memory",
    "shards",
    "sigmoid_gates",
    "silu",
    "silu_unit",
    "softmax_memory",
    "tnt",
    "unit_keys",
    "yaad",
]
