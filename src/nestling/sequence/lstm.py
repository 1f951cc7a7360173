"""The baseline from before attention: a state that is a vector, written by gates."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.state import select

from .layout import lay_out
from .mixer import Mixer, MixerModule


@dataclass(frozen=True, repr=False)
class lstm(Mixer):
    """A long short-term memory as wide as the model, which has no heads: the expression of `LongShortTermMemory`.
    forget_bias: of the gate that keeps the state, at the start. Source: Hochreiter and Schmidhuber 1997. Oracle:
    `naive_layers.lstm`."""

    forget_bias: float = 1.0
    choices = "vector", "none", "by channel", "gates of the token and of the last answer"

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "LongShortTermMemory":
        return LongShortTermMemory(dim, self, generator)


class LstmState(NamedTuple):
    """What it said last and what it keeps, each [b, d]."""

    hidden: Tensor
    memory: Tensor


class LongShortTermMemory(MixerModule):
    """i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of W x_t + U h_{t-1} + b;  c_t = f c_{t-1} + i g;  y_t = h_t =
    o tanh(c_t). Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, as `torch.nn.LSTM` runs it.

    Where documents begin or padding stands inside of a batch it runs token by token. x [b, t, d] -> [b, t, d].
    Oracle: `naive_layers.lstm`.
    """

    def __init__(self, dim: int, expression: lstm, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.cell = nn.LSTM(dim, dim, batch_first=True, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                parameter.uniform_(-(dim**-0.5), dim**-0.5, generator=generator)
                if name == "bias_ih_l0":
                    parameter[dim : 2 * dim] += expression.forget_bias

    def init_state(self, batch: int) -> LstmState:
        nothing = next(self.cell.parameters()).new_zeros(batch, self.dim)
        return LstmState(nothing, nothing)

    def forward(
        self,
        x: Tensor,
        state: LstmState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, LstmState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        phase = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        layout = lay_out(phase, x.shape[1], (x.shape[1],), reset, valid)
        if layout.source is not None:
            layout = lay_out(phase, x.shape[1], (1,), reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        reads = []
        with torch.autocast(x.device.type, enabled=False):
            spread = layout.spread(x).to(start.memory.dtype)
            for piece, part in zip(layout.pieces, layout.cut(spread, 1), strict=True):
                if piece.reset is not None:
                    state = select(piece.reset, start, state)
                y, after = self._run(part, state)
                held = layout.present(piece)
                state = after if held is None else select(held[:, 0], after, state)
                reads.append(y)
        return layout.gather(torch.cat(reads, 1)), state

    def _run(self, x: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        y, (hidden, memory) = self.cell(x, (state.hidden[None].contiguous(), state.memory[None].contiguous()))
        return y, LstmState(hidden[0], memory[0])
