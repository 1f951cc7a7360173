"""Softmax attention over a sliding window: the memory without parameters, and the baseline."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import ShortConvolution
from .layout import lay_out
from .mixer import Mixer, MixerModule, check_width, linear, merge_heads, split_heads


@dataclass(frozen=True, repr=False)
class attention(Mixer):
    """Causal softmax attention over the last `window` tokens with rotary positions: the expression of
    `SlidingAttention`. convolution: width of the short convolution on q, k, v; 1 for none."""

    window: int = 256
    convolution: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"attention: window must be at least 1 token, got {self.window}")

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "SlidingAttention":
        return SlidingAttention(dim, heads, self, generator)


class AttentionState(NamedTuple):
    """The last window - 1 keys (not yet rotated) and values [b, h, w, k], which of them exist [b, w]."""

    tail: Tensor
    keys: Tensor
    values: Tensor
    exists: Tensor


class SlidingAttention(MixerModule):
    """y_t = sum_i softmax_i(q_t . k_i / sqrt k) v_i over the last `window` tokens of the document (equation 62,
    63). x [b, t, d] -> [b, t, d]."""

    def __init__(
        self, dim: int, heads: int, expression: attention = attention(), generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_width(dim, heads)
        if (dim // heads) % 2:
            raise ValueError(f"attention needs an even head width for rotary positions, got {dim} / {heads}")
        self.heads, self.window = heads, expression.window
        self.qkv = linear(3 * dim, dim, generator)
        self.convolution = ShortConvolution(3 * dim, expression.convolution, generator)
        self.project = linear(dim, dim, generator)

    def init_state(self, batch: int) -> AttentionState:
        weight = self.project.weight
        empty = weight.new_zeros(batch, self.heads, self.window - 1, weight.shape[0] // self.heads)
        exists = torch.zeros(batch, self.window - 1, dtype=torch.bool, device=weight.device)
        return AttentionState(self.convolution.init_state(batch), empty, empty, exists)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        state = self.init_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, state
        phase = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        layout = lay_out(phase, x.shape[1], (1,), reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        mixed, tail = self.convolution(layout.spread(self.qkv(x)), state.tail, layout)
        q, k, v = (split_heads(part, self.heads) for part in mixed.chunk(3, -1))
        exists = state.exists
        if layout.begins is not None:
            exists = exists & ~layout.begins[:, None]
        y, cache = [], (state.keys, state.values, exists)
        for first in range(0, q.shape[2], self.window):
            at = slice(first, first + self.window)
            here, cache = self._block(q[:, :, at], k[:, :, at], v[:, :, at], cache, layout.valid, layout.document, at)
            y.append(here)
        out = layout.gather(merge_heads(torch.cat(y, 2)))
        return self.project(out), AttentionState(tail, *cache)

    def _block(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor, Tensor],
        valid: Tensor | None,
        document: Tensor | None,
        at: slice,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One block of at most `window` slots against the cache and itself."""
        back, n = self.window - 1, q.shape[2]
        keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        here = torch.ones(q.shape[0], n, dtype=torch.bool, device=q.device) if valid is None else valid[:, at]
        exists = torch.cat([cache[2], here], 1)
        position = torch.arange(-back, n, device=q.device)
        rows, columns = position[back:, None], position[None, :]
        allowed = (columns <= rows) & (rows - columns < self.window)
        mask = allowed & exists[:, None]
        if document is not None:
            inside = document[:, at]
            # the cache belongs to the document that the slot before this block is in
            before = document[:, at.start - 1, None] if at.start else torch.zeros_like(inside[:, :1])
            behind = torch.cat([before.expand(-1, back), inside], 1)
            mask = mask & (inside[:, :, None] == behind[:, None, :])
            exists = exists & (behind == behind[:, -1:])
        mask = mask | (columns == rows)  # an empty slot reads itself, so that no row of the softmax is empty
        y = F.scaled_dot_product_attention(
            _rotate(q, position[back:]), _rotate(keys, position), values, attn_mask=mask[:, None]
        )
        if valid is None:
            return y, (keys[:, :, n:], values[:, :, n:], exists[:, n:])
        # rows end at their own last token
        last = valid[:, at].sum(1, keepdim=True) + torch.arange(back, device=q.device)
        each = torch.arange(q.shape[0], device=q.device)[:, None]
        kept = [part.transpose(1, 2)[each, last].transpose(1, 2) for part in (keys, values)]
        return y, (kept[0], kept[1], exists[each, last])


def _rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary positions: the pairs (x_i, x_{i + k/2}) turned by position * 10000^(-2i/k)."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = position.to(torch.float64)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
