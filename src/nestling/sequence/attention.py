"""Softmax attention over a sliding window, or over all tokens: the memory without parameters, and the baseline."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import ShortConvolution
from .layout import lay_out
from .mixer import Mixer, MixerModule, check_width, linear, merge_heads, split_heads


@dataclass(frozen=True, repr=False)
class attention(Mixer):
    """Causal softmax attention over the last `window` tokens with rotary positions: the expression of
    `SlidingAttention`. window=None: over all tokens of the document, with a state that grows with it, as no other's
    does. convolution: width of the short convolution on q, k, v; 1 for none. persistent: learned tokens that every
    query sees, whatever the window. Source: Nested Learning equations 62, 63. Oracle: `naive_layers.windowed`."""

    window: int | None = 256
    convolution: int = 4
    persistent: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention: window must be at least 1 token, or None, got {self.window}")
        if self.persistent < 0:
            raise ValueError(f"attention: persistent must be at least 0 tokens, got {self.persistent}")

    @property
    def choices(self) -> tuple[str, str, str, str]:  # type: ignore[override]
        held = "all pairs" if self.window is None else f"the last {self.window} pairs"
        return held, "weighted l2", "none", "solved without parameters"

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "SlidingAttention":
        return SlidingAttention(dim, heads, self, generator)


class AttentionState(NamedTuple):
    """The last window - 1 keys (not yet rotated) and values [b, h, w, k], which of them exist [b, w]. Without a window
    w is the length of the longest row's document so far."""

    tail: Tensor
    keys: Tensor
    values: Tensor
    exists: Tensor


class SlidingAttention(MixerModule):
    """y_t = sum_i softmax_i(q_t . k_i / sqrt k) v_i over the last `window` tokens of the document (equation 62,
    63), and over the persistent tokens p: k_p = W_k p, v_p = W_v p, without the convolution and without a position
    (Titans 3.3). x [b, t, d] -> [b, t, d]."""

    def __init__(
        self, dim: int, heads: int, expression: attention = attention(), generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_width(dim, heads)
        check_turns(dim, heads)
        self.heads, self.window = heads, expression.window
        self.qkv = linear(3 * dim, dim, generator)
        self.convolution = ShortConvolution(3 * dim, expression.convolution, generator)
        self.project = linear(dim, dim, generator)
        self.persistent: nn.Parameter | None = None
        if expression.persistent:
            self.persistent = nn.Parameter(torch.randn(expression.persistent, dim, generator=generator))

    def init_state(self, batch: int) -> AttentionState:
        weight = self.project.weight
        back = 0 if self.window is None else self.window - 1
        empty = weight.new_zeros(batch, self.heads, back, weight.shape[0] // self.heads)
        exists = torch.zeros(batch, back, dtype=torch.bool, device=weight.device)
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
        always = None if self.persistent is None else prefix(self.persistent, self.qkv.weight, self.heads)
        y, cache = [], (state.keys, state.values, exists)
        block = self.window or _BLOCK
        for first in range(0, q.shape[2], block):
            at = slice(first, first + block)
            here, cache = self._block(
                q[:, :, at], k[:, :, at], v[:, :, at], cache, always, layout.valid, layout.document, at
            )
            y.append(here)
        out = layout.gather(merge_heads(torch.cat(y, 2)))
        return self.project(out), AttentionState(tail, *cache)

    def _block(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor, Tensor],
        always: tuple[Tensor, Tensor] | None,
        valid: Tensor | None,
        document: Tensor | None,
        at: slice,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One block of slots, at most a window, against the cache and itself."""
        back, n = cache[0].shape[2], q.shape[2]
        keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        here = torch.ones(q.shape[0], n, dtype=torch.bool, device=q.device) if valid is None else valid[:, at]
        exists = torch.cat([cache[2], here], 1)
        position = torch.arange(-back, n, device=q.device)
        rows, columns = position[back:, None], position[None, :]
        allowed = (columns <= rows) & (rows - columns < (self.window or back + n))
        mask = allowed & exists[:, None]
        if document is not None:
            inside = document[:, at]
            # the cache belongs to the document that the slot before this block is in
            before = document[:, at.start - 1, None] if at.start else torch.zeros_like(inside[:, :1])
            behind = torch.cat([before.expand(-1, back), inside], 1)
            mask = mask & (inside[:, :, None] == behind[:, None, :])
            exists = exists & (behind == behind[:, -1:])
        mask = mask | (columns == rows)  # an empty slot reads itself, so that no row of the softmax is empty
        alone = self.window is None and not back and valid is None and document is None and always is None
        y = attend(q, keys, values, (position[back:], position), None if alone else mask[:, None], always)
        return y, self._kept((keys, values, exists), back, None if valid is None else here)

    def _kept(
        self, cache: tuple[Tensor, Tensor, Tensor], back: int, here: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is remembered of the `back` tokens before a block and its own, `here` [b, n] or all of them: the last
        window - 1, or all that exist in any row."""
        keys, values, exists = cache
        size = exists.shape[1]
        keep = size if self.window is None else self.window - 1
        if here is not None:  # rows end at their own last token
            last = back + here.sum(1, keepdim=True) - keep + torch.arange(keep, device=exists.device)
            each = torch.arange(len(last), device=last.device)[:, None]
            exists = exists[each, last.clamp(min=0)] & (last >= 0)
            last = last.clamp(min=0)
            keys, values = (part.transpose(1, 2)[each, last].transpose(1, 2) for part in (keys, values))
        if self.window is None:
            keep = int(exists.any(0).long().cummax(0).values.sum())
        first = exists.shape[1] - keep
        return keys[:, :, first:], values[:, :, first:], exists[:, first:]


_BLOCK = 1024  # slots of a document without a window that are attended from at once


def prefix(tokens: Tensor, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, h, p, k] of persistent tokens [p, d] by a projection to q, k and v [3 d, d]."""
    k, v = F.linear(tokens, qkv[tokens.shape[1] :])[None].chunk(2, -1)
    return split_heads(k, heads), split_heads(v, heads)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    always: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of queries [b, h, n, k] at positions [n] over keys and values [b, h, m, k] at positions [m],
    where the mask [..., n, m] says so (None: where m <= n); and over keys and values [1, h, p, k] that every query sees
    `always`."""
    turned, keys = _rotate(q, positions[0]), _rotate(keys, positions[1])
    if always is None or mask is None:
        return F.scaled_dot_product_attention(turned, keys, values, attn_mask=mask, is_causal=mask is None)
    # a key without a position meets the query as it was before its turn, in channels of their own
    first, stands = (part.expand(len(q), -1, -1, -1) for part in always)
    keys = torch.cat([F.pad(first, (q.shape[-1], 0)), F.pad(keys, (0, q.shape[-1]))], 2)
    values, mask = torch.cat([stands, values], 2), F.pad(mask, (first.shape[2], 0), value=True)
    queries = torch.cat([turned, q], -1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=q.shape[-1] ** -0.5)


def check_turns(dim: int, heads: int) -> None:
    if (dim // heads) % 2:
        raise ValueError(f"attention needs an even head width for rotary positions, got {dim} / {heads}")


def _rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary positions: the pairs (x_i, x_{i + k/2}) turned by position * 10000^(-2i/k)."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = position.to(torch.float64)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
