"""Sequence layers: a memory run over tokens, recurrently or a chunk at a time."""

from .attention import SlidingAttention, attention
from .averaged_gates import averaged_gates
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
from .linear_mixer import LinearMixer, LinearState, linear_mixer
from .lstm import LongShortTermMemory, LstmState, lstm
from .mesa import mesa
from .miras import memora, moneta, yaad
from .mixer import Mixer, MixerModule, compile_steps
from .pair_gates import bound_gates, map_gates, unit_steps, window_gates
from .preparation import Preparation, bare, silu, silu_unit, unit_keys
from .scan import Memory, MemoryState
from .self_modifying import SelfModifying, SelfModifyingState, bounded_steps, self_modifying
from .softmax import softmax_memory
from .srwm import SelfReferential, SelfReferentialState, srwm
from .streams import (
    Streams,
    comba_streams,
    hgrn2_streams,
    mesa_streams,
    rwkv7_streams,
)
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
    "LinearMixer",
    "LinearState",
    "LongShortTermMemory",
    "LstmState",
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
    "SelfReferential",
    "SelfReferentialState",
    "SequenceMemory",
    "SequenceState",
    "ShardState",
    "Shards",
    "SlidingAttention",
    "Streams",
    "TitansState",
    "attention",
    "averaged_gates",
    "bare",
    "beside",
    "bound_gates",
    "bounded_steps",
    "caching",
    "comba",
    "comba_streams",
    "compile_steps",
    "delta_product",
    "delta_rule",
    "fixed_gates",
    "gated_delta_gates",
    "gated_delta_rule",
    "gated_linear_attention",
    "hgrn2",
    "hgrn2_streams",
    "kda",
    "kda_gates",
    "lay_out",
    "linear_attention",
    "linear_memory",
    "linear_mixer",
    "longhorn",
    "low_rank_gates",
    "lstm",
    "mac",
    "mag",
    "mal",
    "mamba2",
    "mamba2_gates",
    "map_gates",
    "memora",
    "mesa",
    "mesa_streams",
    "moneta",
    "retention",
    "rwkv7",
    "rwkv7_gates",
    "rwkv7_streams",
    "self_modifying",
    "sequence_memory",
    "shards",
    "sigmoid_gates",
    "silu",
    "silu_unit",
    "softmax_memory",
    "srwm",
    "tnt",
    "unit_keys",
    "unit_steps",
    "window_gates",
    "yaad",
]
