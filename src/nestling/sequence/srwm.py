"""The self-referential weight matrix: one matrix answers, makes its own keys and step sizes, and rewrites itself."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.state import select
from nestling.memory.structure import Weights

from .convolution import ShortConvolution
from .layout import lay_out
from .mixer import Mixer, MixerModule, Output, check_width, split_heads


@dataclass(frozen=True, repr=False)
class srwm(Mixer):
    """The expression of `SelfReferential`. step: what a step size is at the start, between 0 and 1. convolution: its
    width, before the matrix; 1 for none. Source: Irie et al. 2022 (2202.05780). Oracle: `naive_layers.srwm`."""

    step: float = 0.5
    convolution: int = 4
    choices = "matrix that makes its own keys and values", "l2()", "none", "gradient_descent()"

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise ValueError(f"srwm: step must be between 0 and 1, got {self.step}")

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "SelfReferential":
        return SelfReferential(dim, heads, self, generator)


class SelfReferentialState(NamedTuple):
    """The convolution's last inputs [b, width - 1, d], and the matrix as it stands [b, h, 3 k + 4, k]: rows for
    answers, queries, keys, step sizes."""

    tail: Tensor
    memory: Tensor


class SelfReferential(MixerModule):
    """y, q, k, b = W_{t-1} phi(x_t);  W_t = W_{t-1} + s(b) * (W_{t-1} phi(q) - W_{t-1} phi(k)) phi(k)^T.

    phi is a softmax over a head's channels, s a sigmoid; of the four step sizes each is for the rows of one of y, q, k
    and b. The delta rule, with a value that the matrix answers itself: y_t is read before the write. Each token's keys
    come from the matrix that the last one left, so that it runs token by token. Irie et al. 2022 (arXiv 2202.05780),
    equations 5 to 8; here the bias of a step size is a parameter of its own, and a convolution stands before it, norm,
    gate and output projection behind it, as with the other memories: without neighbours no key could be that of the
    token before. x [b, t, d] -> [b, t, d]. Oracle: `naive_layers.srwm`.
    """

    def __init__(self, dim: int, heads: int, expression: srwm, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_width(dim, heads)
        self.heads, width = heads, dim // heads
        self.rows = (width, width, width, 4)
        self.convolution = ShortConvolution(dim, expression.convolution, generator)
        start = torch.randn(heads, sum(self.rows), width, generator=generator)
        self.start = nn.Parameter(start * width**0.5)  # answers to a flat softmax have deviation 1
        self.bias = nn.Parameter(torch.logit(torch.full((heads, 4), expression.step)))
        self.output = Output(dim, heads, generator)

    def init_state(self, batch: int) -> SelfReferentialState:
        memory = self.start.expand(batch, *self.start.shape).contiguous()
        return SelfReferentialState(self.convolution.init_state(batch), memory)

    def forward(
        self,
        x: Tensor,
        state: SelfReferentialState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, SelfReferentialState]:
        state = self.init_state(x.shape[0]) if state is None else state
        found, _, state = self._through(x, state, reset, valid)
        return torch.zeros_like(x) if found is None else self.output(found, x), state

    def answering(self, state: SelfReferentialState) -> Weights:
        """What answers: the matrix's first rows [b, h, k, k]."""
        return (state.memory[..., : self.rows[0], :],)

    def answer(
        self, x: Tensor, state: SelfReferentialState, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, SelfReferentialState]:
        """What the tokens x [b, t, d] of one document are answered [b, h, t, k], what they asked with, phi(x)
        [b, h, t, k], and the state after them."""
        found, asked, state = self._through(x, state, None, valid)
        if found is None or asked is None:  # nothing but padding
            found = asked = self.start.new_zeros(len(x), self.heads, x.shape[1], self.rows[0])
        return found, asked, state

    def recall(self, weights: Weights, queries: Tensor) -> Tensor:
        """What `answering` weights [..., k, k] say to queries [..., t, k]."""
        return queries @ weights[0].mT

    def _through(
        self, x: Tensor, state: SelfReferentialState, reset: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, SelfReferentialState]:
        start = self.init_state(x.shape[0])
        phase = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        layout = lay_out(phase, x.shape[1], (1,), reset, valid)
        if not layout.pieces:  # nothing, or nothing but padding
            return None, None, state
        mixed, tail = self.convolution(layout.spread(x), state.tail, layout)
        reads, memory = [], state.memory
        with torch.autocast(x.device.type, enabled=False):
            spread = split_heads(mixed.to(self.start.dtype), self.heads).softmax(-1)  # [b, h, s, k]
            for piece, token in zip(layout.pieces, spread.unbind(2), strict=True):
                if piece.reset is not None:
                    memory = select(piece.reset, start.memory, memory)
                y, after = self._step(token, memory)
                held = layout.present(piece)
                memory = after if held is None else select(held[:, 0], after, memory)
                reads.append(y)
        y = layout.gather(torch.stack(reads, 1)).transpose(1, 2)
        asked = layout.gather(spread.transpose(1, 2)).transpose(1, 2)
        return y, asked, SelfReferentialState(tail, memory)

    def _step(self, token: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One token phi(x) [b, h, k]: what is answered [b, h, k], and the matrix after it."""
        y, q, k, raw = (memory @ token[..., None]).squeeze(-1).split(self.rows, -1)
        asked = torch.stack([q, k], -1).softmax(-2)  # [b, h, k, 2]
        wanted, found = (memory @ asked).unbind(-1)
        steps = (raw + self.bias).sigmoid()
        each = torch.cat([steps[..., i : i + 1].expand(*steps.shape[:-1], n) for i, n in enumerate(self.rows)], -1)
        return y, memory + (each * (wanted - found))[..., None] * asked[..., None, :, 1]
