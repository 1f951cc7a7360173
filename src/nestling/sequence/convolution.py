"""The short causal depthwise convolution that stands before keys, values and queries."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layout import Layout


class Convolve(torch.autograd.Function):
    """x [b, back + t, d], w [d, back + 1] -> sum_s w_s * x[s : s + t], [b, t, d]: what conv1d with a group a
    channel computes, without its change of layout; on a CPU its backward takes a third of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight.t().contiguous()
        y = _shift(x, 0, taps) * taps[0]
        for shift in range(1, len(taps)):
            y.addcmul_(_shift(x, shift, taps), taps[shift])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (g,) = grads
        taps = weight.t().contiguous()
        d_x, d_taps = g.new_zeros(x.shape), []
        for shift in range(len(taps)):
            _shift(d_x, shift, taps).addcmul_(g, taps[shift])
            d_taps.append((g * _shift(x, shift, taps)).sum((0, 1)))
        return d_x, torch.stack(d_taps, -1)


def _shift(x: Tensor, shift: int, taps: Tensor) -> Tensor:
    return x[:, shift : shift + x.shape[1] - len(taps) + 1]


class ShortConvolution(nn.Module):
    """y_t = sum_{s<width} w_s * x_{t-s}, channel by channel, inside one document.

    Input and output [b, t, d]; the state is the last width - 1 inputs of the document [b, width - 1, d].
    Starts uniform in +-1/sqrt(width): started as the identity, a byte model had to learn first that there are
    neighbours, and was 0.6 bits per byte behind after 150,000 tokens (docs/log.md). Source: Titans 4.4 (width
    4), Nested Learning 8.3.
    """

    def __init__(self, dim: int, width: int = 4, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"convolution width must be at least 1 token, got {width}")
        weight = torch.rand(dim, width, generator=generator) * 2 - 1
        self.weight = nn.Parameter(weight / width**0.5)  # the last column meets the current token

    def init_state(self, batch: int) -> Tensor:
        dim, width = self.weight.shape
        return self.weight.new_zeros(batch, width - 1, dim)

    def forward(self, x: Tensor, tail: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """`x` by slot [b, s, d] and the tail; the output by slot and the tail after the call."""
        back = self.weight.shape[1] - 1
        if back == 0 or x.shape[1] == 0:
            return (x * self.weight[:, 0] if back == 0 else x), tail
        if layout.document is None:
            if layout.begins is not None:
                tail = torch.where(layout.begins[:, None, None], 0.0, tail)
            extended = torch.cat([tail.to(x.dtype), x], 1)
            return Convolve.apply(extended, self.weight), extended[:, -back:]
        return self._by_document(x, tail, layout, back)

    def _by_document(self, x: Tensor, tail: Tensor, layout: Layout, back: int) -> tuple[Tensor, Tensor]:
        assert layout.document is not None
        assert layout.first is not None
        assert layout.stop is not None
        b, slots, _ = x.shape
        rows = torch.arange(b, device=x.device)[:, None]
        steps = torch.arange(back, device=x.device)
        extended = torch.cat([torch.zeros_like(tail, dtype=x.dtype), x], 1)
        extended = extended.index_put((rows, layout.first[:, None] + steps), tail.to(x.dtype))
        document = F.pad(layout.document, (back, 0))
        y = torch.zeros_like(x)
        for shift in range(back + 1):
            at = slice(back - shift, back - shift + slots)
            same = (document[:, at] == layout.document)[..., None]
            y = y + torch.where(same, extended[:, at], 0.0) * self.weight[:, back - shift]
        behind = layout.stop[:, None] + steps
        current = document.gather(1, layout.stop[:, None] + back - 1)
        same = (document.gather(1, behind) == current)[..., None]
        return y, torch.where(same, extended[rows, behind], 0.0)
