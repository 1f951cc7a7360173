"""The linear recurrences that are no steps of one rule on pairs, as a mixer."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nestling.memory.part import check_families
from nestling.memory.state import select

from .convolution import ShortConvolution
from .layout import Layout, lay_out
from .linear import WAYS
from .mixer import Mixer, MixerModule, Output, check_width, linear
from .streams import Given, Streams, mesa_streams


@dataclass(frozen=True, repr=False)
class linear_mixer(Mixer):
    """A linear recurrence with its paper's streams and gates: the expression of `LinearMixer`. Exact at every chunk
    size: `chunk` only says how many tokens are taken at once. way: as of `linear.How`, in float32. convolution: its
    width; 1 for none. Sources: those of its streams. Oracles: `naive_layers`, one for each."""

    streams: Streams
    chunk: int = 64
    convolution: int = 4
    way: Literal["chunked", "recurrent", "kernels"] = "chunked"

    exact = True

    @property
    def choices(self) -> tuple[str, str, str, str]:  # type: ignore[override]
        return self.streams.choices

    def __post_init__(self) -> None:
        check_families(self)
        if not isinstance(self.streams, Streams):
            raise ValueError(
                f"linear_mixer: streams must be one of Streams, such as comba_streams(), got {self.streams!r}"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
        if self.way not in WAYS:
            raise ValueError(f"way must be one of {WAYS}, got {self.way!r}")
        if self.way == "kernels" and isinstance(self.streams, mesa_streams):
            raise ValueError(f"way='kernels' is for one recurrence, {self.streams} solves a system at every token")

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "LinearMixer":
        return LinearMixer(dim, heads, self, generator)


class LinearState(NamedTuple):
    """The convolution's last inputs [b, width - 1, n d], and the matrices of the memory, each [b, h, ., k]."""

    tail: Tensor
    memory: Any


class LinearMixer(MixerModule):
    """One recurrence a head. Streams are convolutions of projections, as `streams` prepares them; y = what is read for
    q, through norm, gate and output projection. A document begins with an empty memory. x [b, t, d] -> [b, t, d].
    Oracles: `sequence.naive_layers`, one for each of the streams. Raises ValueError when heads do not divide dim.
    """

    def __init__(
        self, dim: int, heads: int, expression: linear_mixer, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_width(dim, heads)
        self.expression, width = expression, expression.streams.widths * dim
        self.project = linear(width, dim, generator)
        self.convolution = ShortConvolution(width, expression.convolution, generator)
        self.streams = expression.streams.build(dim, heads, dim // heads, generator)
        self.output = Output(dim, heads, generator)

    def init_state(self, batch: int) -> LinearState:
        return LinearState(self.convolution.init_state(batch), self.streams.begin(batch))

    def forward(
        self,
        x: Tensor,
        state: LinearState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, LinearState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        layout = self._layout(x, reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        given, tail = self.given(x, state.tail, layout)
        with torch.autocast(x.device.type, enabled=False):
            y, memory = self._pieces(layout, given, state.memory, start.memory)
        return self.output(layout.gather(y).transpose(1, 2), x), LinearState(tail, memory)

    def given(self, x: Tensor, tail: Tensor, layout: Layout) -> tuple[Given, Tensor]:
        """What the recurrence is given of the tokens x [b, t, d], by slot, and the convolution's tail after them."""
        mixed, tail = self.convolution(layout.spread(self.project(x)), tail, layout)
        raw = layout.spread(self.streams(x))
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.convolution.weight.dtype
            return self.streams.prepare(mixed.to(dtype), raw.to(dtype)), tail

    def run(self, parts: Given, memory: Any, held: Tensor | None) -> tuple[Tensor, Any]:
        """What the slots of a piece read [b, c, h, v], and the memory after them; held [b, c]: which hold a token."""
        if held is not None:
            parts = tuple(part * held.view(*held.shape, *[1] * (part.dim() - 2)) for part in parts)
        return self.streams.run(parts, memory, self.expression.chunk, self.expression.way)

    def _layout(self, x: Tensor, reset: Tensor | None, valid: Tensor | None) -> Layout:
        """One piece for all tokens where the rows agree: there are no chunks to line up."""
        phase = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        whole = lay_out(phase, x.shape[1], (x.shape[1],), reset, valid)
        return whole if whole.source is None else lay_out(phase, x.shape[1], (self.expression.chunk,), reset, valid)

    def _pieces(self, layout: Layout, given: Given, memory: Any, start: Any) -> tuple[Tensor, Any]:
        reads = []
        for piece, *parts in zip(layout.pieces, *(layout.cut(part, 1) for part in given), strict=True):
            if piece.reset is not None:
                memory = select(piece.reset, start, memory)
            y, memory = self.run(tuple(parts), memory, layout.present(piece))
            reads.append(y)
        return torch.cat(reads, 1), memory
