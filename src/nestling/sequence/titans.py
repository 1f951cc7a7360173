"""Memory beside attention (as a gate) and before it (as a layer): the block forms of Titans but for its context form,
which is in `context`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.part import check_families

from .attention import AttentionState, attention
from .layer import sequence_memory
from .mixer import Mixer, MixerModule


@dataclass(frozen=True, repr=False)
class _beside_attention(Mixer, abstract=True):
    memory: Mixer = sequence_memory()
    window: int = 256
    persistent: int = 16

    def __post_init__(self) -> None:
        check_families(self)
        self.attention()  # says what is wrong with its own numbers

    def attention(self) -> attention:
        return attention(window=self.window, persistent=self.persistent)


@dataclass(frozen=True, repr=False)
class mag(_beside_attention):
    """Memory as a gate: attention over the last `window` tokens and a memory side by side, multiplied. persistent:
    learned tokens that every query of the attention sees. The expression of `MemoryAsGate`. Source: Titans 26 to 28.
    Oracle: `naive_blocks.mag`."""

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "MemoryAsGate":
        return MemoryAsGate(dim, heads, self, generator)


@dataclass(frozen=True, repr=False)
class mal(_beside_attention):
    """Memory as a layer: what the memory reads is what attention over the last `window` tokens attends to.
    persistent: learned tokens that every query of the attention sees. The expression of `MemoryAsLayer`. Source: Titans
    29 to 31. Oracle: `naive_blocks.mal`."""

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "MemoryAsLayer":
        return MemoryAsLayer(dim, heads, self, generator)


class MemoryGate(nn.Module):
    """y (x) m = norm(y) * SiLU(norm(m)), each RMS norm with learned weights (Titans 4.1, 4.2).

    The paper says "normalise, then a non-linearity"; here that is on the memory's side alone, which is the gate: on
    both sides the product of two positive parts could hardly be negative. [b, t, d] each -> [b, t, d].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_attention = nn.Parameter(torch.ones(dim))
        self.of_memory = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return rms_norm(y, self.of_attention) * F.silu(rms_norm(m, self.of_memory))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x over the root of its mean square, times the weight, in the weight's precision."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps=1e-6)


class TitansState(NamedTuple):
    """What the memory and the attention remember, each in its own way."""

    memory: Any
    attention: AttentionState


class _MemoryAndAttention(MixerModule):
    def __init__(self, dim: int, heads: int, expression: Any, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.memory = expression.memory.build(dim, heads, generator)
        self.attention = expression.attention().build(dim, heads, generator)

    def init_state(self, batch: int) -> TitansState:
        return TitansState(self.memory.init_state(batch), self.attention.init_state(batch))


class MemoryAsGate(_MemoryAndAttention):
    """o_t = attention(x)_t (x) memory(x)_t, (x) the gate of `MemoryGate` (Titans equations 26 to 28).

    In the paper persistent tokens stand before the sequence for both branches. A memory would write them before the
    first token, which makes its state there a function of parameters alone; that state is a parameter here (the
    learned start), so the memory meets x only, and only the attention has them, as a prefix that it always sees.
    x [b, t, d] -> [b, t, d]. Oracle: `naive_blocks.mag`.
    """

    def __init__(self, dim: int, heads: int, expression: mag = mag(), generator: torch.Generator | None = None) -> None:
        super().__init__(dim, heads, expression, generator)
        self.gate = MemoryGate(dim)

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, TitansState]:
        state = self.init_state(x.shape[0]) if state is None else state
        m, memory = self.memory(x, state.memory, reset=reset, valid=valid)
        y, attended = self.attention(x, state.attention, reset=reset, valid=valid)
        return self.gate(y, m), TitansState(memory, attended)


class MemoryAsLayer(_MemoryAndAttention):
    """o = attention(norm(memory(x))), the RMS norm with learned weights (Titans equations 29 to 31).

    What a memory would read for persistent tokens before the first token is a function of parameters alone: they are
    learned here as what the attention sees, behind the memory. The norm between the two is this library's: softmax
    is sensitive to the scale that a memory reads at. x [b, t, d] -> [b, t, d]. Oracle: `naive_blocks.mal`.
    """

    def __init__(self, dim: int, heads: int, expression: mal = mal(), generator: torch.Generator | None = None) -> None:
        super().__init__(dim, heads, expression, generator)
        self.norm = nn.Parameter(torch.ones(dim))

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, TitansState]:
        state = self.init_state(x.shape[0]) if state is None else state
        m, memory = self.memory(x, state.memory, reset=reset, valid=valid)
        y, attended = self.attention(rms_norm(m, self.norm), state.attention, reset=reset, valid=valid)
        return y, TitansState(memory, attended)
