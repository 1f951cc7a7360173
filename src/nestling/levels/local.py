"""A level with an objective of its own: an associative memory of what its block is given, blind to the task."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import functional as F

from nestling.memory.attentional_bias import AttentionalBias, l2
from nestling.memory.state import detach
from nestling.memory.structure import Structure, Weights

from .continuum import Level, Pass, Taps, level


@dataclass(frozen=True, repr=False)
class local(Level):
    """A level that is written with a local associative objective in place of the task's loss: its block is to answer
    what it is given at one position with what it is given at the next.

    error_t = d bias(M(k_t), k_{t+1}) / d M(k_t), k the block's normed inputs; a segment's last position, whose
    successor is not there yet, teaches nothing. Other levels, and pre-training, have the task's loss as before; a
    continuum of local levels alone learns without a backward pass. step_size means another thing than with the task's
    loss: the sum is over channels. Nested Learning leaves the error open (spec decision 1); the task's is the default.
    Oracle: autograd on the objective (tests/test_local.py).
    """

    of: level
    attentional_bias: AttentionalBias = l2()

    def __post_init__(self) -> None:
        if not isinstance(self.of, level):
            raise ValueError(f"local: takes one level, such as local(level(128)), got {self.of!r}")
        if self.of.period < 2:
            raise ValueError(f"local: a period must hold a position and the next, >= 2 tokens, got {self.of.period}")
        self.attentional_bias.fits(self.structure)

    @property
    def structure(self) -> Structure:  # type: ignore[override]
        return self.of.structure

    @property
    def levels(self) -> tuple[level, ...]:
        return (self.of,)

    def split(self, weights: Weights) -> tuple[Weights, ...]:
        return self.of.split(weights)

    def join(self, levels: Sequence[Weights]) -> Weights:
        return self.of.join(levels)

    @property
    def objective(self) -> str:
        return f"local: {self.attentional_bias}, the block's next input"

    def taps(self, levels: Sequence[Weights], seen: Pass) -> list[Taps]:
        (weights,) = levels
        if not any(weight.requires_grad for weight in weights):  # else an outer gradient flows through the write
            seen = detach(seen)
        keys, read, inputs, outputs = seen
        bias, now = self.attentional_bias, slice(None, -1)
        error = bias.error(read[..., now, :], bias.target(keys[..., now, :], keys[..., 1:, :]))
        errors = self.structure.backward(weights, outputs, F.pad(error, (0, 0, 0, 1)))
        return [Taps(inputs, outputs, errors=errors)]
