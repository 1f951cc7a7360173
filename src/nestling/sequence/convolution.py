"""The short causal depthwise convolution that stands before keys, values and queries."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .elementwise import Convolve
from .layout import Layout


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
            tail = tail.to(x.dtype)
            after = x[:, -back:] if x.shape[1] >= back else torch.cat([tail, x], 1)[:, -back:]
            return Convolve.apply(tail, x, self.weight.to(x.dtype)), after
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
