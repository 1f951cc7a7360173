"""Reading with an encoder: pieces of a text with tokens masked, or examples with their classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .continuum import Taps
from .judging import Accept, Own, learn
from .losses import masked_tokens, seen_classes
from .reading import ReadOut, awake, constant, next_cut, read_out, row_of
from .stacking import StackedEncoder
from .writing import LevelsState, backward, begin


class MaskedState(NamedTuple):
    """A reader of masked tokens in the middle of a stream. position: tokens that have arrived; segment: those that
    arrived since the last cut, int64 [n], which are not learned from yet."""

    levels: LevelsState
    position: Tensor
    segment: Tensor


@dataclass(frozen=True)
class MaskedReader:
    """Reads a stream with an encoder stacked with `masked_tokens`, in pieces of `segment` tokens cut at every tick.

    A piece is looked at whole, with some tokens masked; their loss, summed, is what the levels are written with. The
    clocks count all of its tokens. One pass = split passes = token by token: cuts and masks are those of the stream.
    accept: as in `Reader`; tokens are those of the piece, and the loss is that of the masked ones, of which there are
    `masked_tokens.share`.
    """

    model: StackedEncoder
    learning: bool = True
    segment: int = 128
    accept: Accept | None = None

    def __post_init__(self) -> None:
        _check(self.model, masked_tokens)
        if self.segment < 1:
            raise ValueError(f"segment must be >= 1 token, got {self.segment}")

    @property
    def periods(self) -> tuple[float, ...]:
        return tuple(lvl.period for lvl in self.model.levels)

    def begin(self, levels: LevelsState | None = None) -> MaskedState:
        """The state before the first token; with given levels, or those of the model."""
        levels = begin(self.model.levels, self.model.level_weights()) if levels is None else levels
        empty = torch.zeros(0, dtype=torch.int64, device=levels.weights[0][0].device)
        return MaskedState(levels, torch.zeros((), dtype=torch.int64), empty)

    def read(self, state: MaskedState, tokens: Tensor) -> tuple[MaskedState, ReadOut]:
        """Read `tokens` int64 [n]. nll: of the tokens of every piece that is now whole; nan where not masked."""
        nll, rows = [], []
        tokens = torch.cat([state.segment, tokens])
        start = int(state.position) - state.segment.numel()
        levels, own = state.levels, Own(state.levels)
        while tokens.numel() >= (size := next_cut(start, self.periods, self.segment) - start):
            levels, losses, row = self._piece(levels, tokens[:size], start, own)
            nll.append(losses)
            rows.append(row)
            tokens, start = tokens[size:], start + size
        return MaskedState(levels, torch.tensor(start + tokens.numel()), tokens), read_out(levels, nll, rows)

    def end_document(self, state: MaskedState) -> tuple[MaskedState, ReadOut]:
        """The document ends here: what is open is read as a piece of its own."""
        if not state.segment.numel():
            return state, read_out(state.levels, [], [])
        start = int(state.position) - state.segment.numel()
        levels, losses, row = self._piece(state.levels, state.segment, start, Own(state.levels))
        return MaskedState(levels, state.position, state.segment[:0]), read_out(levels, [losses], [row])

    def _piece(self, levels: LevelsState, tokens: Tensor, start: int, own: Own) -> tuple[LevelsState, Tensor, Tensor]:
        told = self.model.config.loss
        assert isinstance(told, masked_tokens)
        hidden = told.hidden(tokens.numel(), start).to(tokens.device)
        shown = tokens.masked_fill(hidden, told.mask_token)

        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits[0, hidden], tokens[hidden], reduction="none")

        after, losses, squares = _learn(self, levels, shown, loss, own)
        nll = losses.new_full(tokens.shape, torch.nan)
        nll[hidden] = losses
        return after, nll, row_of(squares, after, start + tokens.numel())


class ExampleState(NamedTuple):
    """A reader of examples. position: tokens that have arrived; seen: the classes that have, bool [classes]."""

    levels: LevelsState
    position: Tensor
    seen: Tensor


class ExampleOut(NamedTuple):
    """What an example gave: nats of its class among those seen so far and it, before it was learned from; the class
    predicted among those seen before (-1 for the very first); by how much each level's weights moved."""

    nll: Tensor
    predicted: int
    moved: Tensor


@dataclass(frozen=True)
class ExampleReader:
    """Reads examples with their classes, one at a time, with a classifier stacked with `seen_classes`: predict, then
    learn. The clocks count the examples' tokens; an example longer than what is left of a period is not split, and the
    tick is taken at its end. accept: as in `Reader`, of each example and its loss."""

    model: StackedEncoder
    learning: bool = True
    accept: Accept | None = None

    def __post_init__(self) -> None:
        _check(self.model, seen_classes)
        if not self.model.classes:
            name = type(self.model.base).__name__
            raise ValueError(f"{name} gives no classes; take its ...ForSequenceClassification, with num_labels")

    def begin(self, levels: LevelsState | None = None) -> ExampleState:
        levels = begin(self.model.levels, self.model.level_weights()) if levels is None else levels
        seen = torch.zeros(self.model.classes, dtype=torch.bool, device=levels.weights[0][0].device)
        return ExampleState(levels, torch.zeros((), dtype=torch.int64), seen)

    def predict(self, state: ExampleState, tokens: Tensor) -> Tensor:
        """Logits of an example, tokens int64 [n] -> [classes]; nothing is learned."""
        with torch.no_grad():
            return self.model(tokens[None], weights=state.levels.weights)[0][0]

    def read(self, state: ExampleState, tokens: Tensor, label: int) -> tuple[ExampleState, ExampleOut]:
        """Read one example, tokens int64 [n], of the class `label`."""
        told = self.model.config.loss
        assert isinstance(told, seen_classes)
        if not 0 <= label < self.model.classes:
            raise ValueError(f"label must be in 0 .. {self.model.classes - 1}, got {label}")
        found: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            found.append(logits[0].detach())
            return told.nats(logits[0], label, state.seen)[None]

        levels, losses, squares = _learn(self, state.levels, tokens, loss, Own(state.levels))
        known = found[0].masked_fill(~state.seen, -torch.inf)
        predicted = int(known.argmax()) if bool(state.seen.any()) else -1
        seen = state.seen.clone()
        seen[label] = True
        position = state.position + tokens.numel()
        change = row_of(squares, levels, int(position))
        return ExampleState(levels, position, seen), ExampleOut(losses[0], predicted, change)


def _learn(
    reader: MaskedReader | ExampleReader,
    levels: LevelsState,
    tokens: Tensor,
    loss: Callable[[Tensor], Tensor],
    own: Own,
) -> tuple[LevelsState, Tensor, list[float]]:
    """One forward pass; the levels after it, the losses [n] before, and by how much each level moved, squared."""
    model = reader.model
    if not reader.learning:
        with torch.no_grad():
            losses = loss(model(tokens[None], weights=levels.weights)[0])
        return levels, losses, [0.0] * len(levels.weights)
    taps: list[Taps] = []
    with torch.enable_grad():
        weights = awake(model.levels, levels)
        losses = loss(constant(model)(tokens[None], weights=weights, taps=taps)[0])
        gradients = backward(model.levels, losses.sum(), taps)
    with torch.no_grad():
        losses = losses.detach()
        after, squares = learn(model.levels, levels, gradients, losses.sum(), tokens.numel(), own, reader.accept)
    return after, losses, squares


def _check(model: StackedEncoder, kind: type) -> None:
    told = model.config.loss
    if not isinstance(told, kind):
        raise ValueError(f"the model is stacked with loss={told}; this reads with {kind.__name__}")
