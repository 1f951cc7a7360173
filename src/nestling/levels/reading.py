"""Reading: predict, then learn. How the levels of a model get their errors from nothing but the text itself.

The graph is cut at absolute positions of the stream: every `segment` tokens and at every level's tick. When the
token at a cut arrives, the losses of all positions before it are known; the levels are then written with the
segment's gradient, and only then is that token processed. Where calls begin and end makes no difference.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.state import detach
from nestling.memory.structure import Weights

from .continuum import Taps, level
from .judging import Accept, Own, learn
from .writing import LevelsState, backward, begin


@runtime_checkable
class LevelledModel(Protocol):
    """What reading needs of a model."""

    @property
    def levels(self) -> tuple[level, ...]: ...
    def level_weights(self) -> tuple[Weights, ...]: ...
    def init_state(self, batch: int) -> Any: ...
    def __call__(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Any]: ...


class ReadingState(NamedTuple):
    """A reader in the middle of a stream.

    levels: weights, clocks and accumulators. position: tokens that have arrived. segment: those that arrived
    since the last cut, int64 [n]. before: the sequence state at that cut; now: after the last token; logits: the
    prediction of the next token [V] (empty before the first).
    """

    levels: LevelsState
    position: Tensor
    segment: Tensor
    before: Any
    now: Any
    logits: Tensor


class ReadOut(NamedTuple):
    """What reading some tokens gave. nll: nats of each token, predicted before it was learned from [n] (the very
    first of a stream has no prediction: nan). moved: at every cut, its position and by how much each level's
    weights moved (root mean square over the weights), float64 [cuts, 1 + levels]."""

    nll: Tensor
    moved: Tensor


def read_out(levels: LevelsState, nll: list[Tensor], rows: list[Tensor]) -> ReadOut:
    """The `ReadOut` of parts: nats of tokens, and a row of `moved` for each cut. Of either there may be none."""
    table = torch.stack(rows) if rows else torch.zeros(0, 1 + len(levels.weights), dtype=torch.float64)
    return ReadOut(torch.cat(nll) if nll else levels.weights[0][0].new_zeros(0), table)


def next_cut(position: int, periods: tuple[float, ...], segment: int) -> int:
    """The first cut after `position`: the next multiple of the segment length or of a period."""
    steps = [segment, *(int(period) for period in periods if period != math.inf)]
    return min(position // step * step + step for step in steps)


_BLOCK = 2048  # tokens of one forward pass where no cut asks for less


@dataclass(frozen=True)
class Reader:
    """Reads a stream of one row with a model and, if `learning`, lets its levels learn from it.

    segment: tokens between cuts; None for the fastest period. The model itself is not changed: the levels'
    weights live in the state. Deterministic; one pass = split passes = token by token. What is read without
    learning is never learned later, nor is a segment that was still open then. accept: asked at every write whether
    it is made and what stands after it; None: all of it.
    """

    model: LevelledModel
    learning: bool = True
    segment: int | None = None
    accept: Accept | None = None

    def begin(self, levels: LevelsState | None = None) -> ReadingState:
        """The state before the first token; with given levels, or those of the model."""
        levels = begin(self.model.levels, self.model.level_weights()) if levels is None else levels
        fresh = detach(self.model.init_state(1))
        device = levels.weights[0][0].device
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        position = torch.zeros((), dtype=torch.int64)
        return ReadingState(levels, position, empty, fresh, fresh, levels.weights[0][0].new_zeros(0))

    @property
    def periods(self) -> tuple[float, ...]:
        return tuple(lvl.period for lvl in self.model.levels)

    @property
    def segment_tokens(self) -> int:
        if self.segment is not None:
            return self.segment
        fastest = min(self.periods)
        return _BLOCK if fastest == math.inf else int(fastest)

    def read(self, state: ReadingState, tokens: Tensor) -> tuple[ReadingState, ReadOut]:
        """Read `tokens` int64 [n] after what was read before. Raises ValueError for anything but one row."""
        if tokens.dim() != 1:
            raise ValueError(f"reading takes one row of tokens [n], got shape {list(tokens.shape)}")
        nll, rows, own = [], [], Own(state.levels)
        while tokens.numel() and not self.learning:
            state, losses = self._predict(state._replace(segment=tokens[:0]), tokens[:_BLOCK])
            state = state._replace(segment=tokens[:0], before=state.now)
            nll.append(losses)
            tokens = tokens[_BLOCK:]
        periods, length = self.periods, self.segment_tokens
        with constant_parameters(self.model):
            while tokens.numel():
                cut = int(state.position) - state.segment.numel()  # where the open segment began
                size = next_cut(cut, periods, length) - cut
                due = size - state.segment.numel()
                if due == 0:
                    state, change = self._close(state, tokens[0], own)
                    rows.append(change)
                elif due == size and tokens.numel() > size:
                    state, losses, change = self._whole(state, tokens[:size], tokens[size], own)
                    nll.append(losses)
                    rows.append(change)
                    tokens = tokens[size:]
                else:
                    part, tokens = tokens[:due], tokens[due:]
                    state, losses = self._predict(state, part)
                    nll.append(losses)
        return state, read_out(state.levels, nll, rows)

    def end_document(self, state: ReadingState) -> tuple[ReadingState, ReadOut]:
        """The document ends here: what is open is learned (its last token has no successor and teaches nothing),
        and the next token starts with a fresh sequence state. Levels and clocks go on."""
        rows = []
        if self.learning and state.segment.numel():
            with constant_parameters(self.model):
                state, change = self._close(state, None, Own(state.levels))
            rows.append(change)
        begun = self.begin(state.levels)
        return begun._replace(position=state.position), read_out(state.levels, [], rows)

    def settle(self, state: ReadingState) -> ReadingState:
        """What is open is learned now, and the document goes on. The prediction of its next token teaches nothing."""
        if not self.learning or not state.segment.numel():
            return state
        with constant_parameters(self.model):
            return self._close(state, None, Own(state.levels))[0]._replace(now=state.now, before=state.now)

    @torch.no_grad()
    def _predict(self, state: ReadingState, tokens: Tensor) -> tuple[ReadingState, Tensor]:
        """Go on inside an open segment; what it will learn from is kept, and nothing is written yet."""
        logits, now = self.model(tokens[None], state.now, weights=state.levels.weights)
        losses = _surprise(state.logits, logits[0, :-1], tokens)
        segment = torch.cat([state.segment, tokens])
        position = state.position + tokens.numel()
        return ReadingState(state.levels, position, segment, state.before, now, logits[0, -1]), losses

    def _close(self, state: ReadingState, following: Tensor | None, own: Own) -> tuple[ReadingState, Tensor]:
        """Write the levels with the segment, which came in pieces; the token at its end has arrived, or never will."""
        _, levels, now, squares = self._learn(state, state.segment, following, own)
        change = row_of(squares, levels, int(state.position))
        return ReadingState(levels, state.position, state.segment[:0], now, now, state.logits), change

    def _whole(
        self, state: ReadingState, tokens: Tensor, following: Tensor, own: Own
    ) -> tuple[ReadingState, Tensor, Tensor]:
        """A segment that arrives whole, with the token after it: one forward pass for prediction and learning."""
        logits, levels, now, squares = self._learn(state, tokens, following, own)
        losses = _surprise(state.logits, logits[:-1], tokens)
        position = state.position + tokens.numel()
        change = row_of(squares, levels, int(position))
        return ReadingState(levels, position, tokens[:0], now, now, logits[-1]), losses, change

    def _learn(
        self, state: ReadingState, tokens: Tensor, following: Tensor | None, own: Own
    ) -> tuple[Tensor, LevelsState, Any, list[float]]:
        """Logits of a segment [n, V], the levels after it is learned, the sequence state at its end, and by how much
        each level moved, squared and summed."""
        taps: list[Taps] = []
        with torch.enable_grad():
            weights = awake(self.model.levels, state.levels)
            logits, now = self.model(tokens[None], state.before, weights=weights, taps=taps)
            targets = tokens[1:] if following is None else torch.cat([tokens[1:], following.view(1)])
            loss = F.cross_entropy(logits[0, : targets.numel()], targets, reduction="sum")
            gradients = backward(self.model.levels, loss, taps)
        with torch.no_grad():
            given = (state.levels, gradients, loss.detach(), tokens.numel(), own, self.accept)
            levels, squares = learn(self.model.levels, *given)
        return logits[0].detach(), levels, detach(now), squares


def awake(levels: tuple[level, ...], state: LevelsState) -> tuple[Weights, ...]:
    """The levels' weights for a call that they learn from: the graph begins at the first that will ever step."""
    pairs = zip(levels, state.weights, strict=True)
    return tuple(tuple(w.detach().requires_grad_(lvl.period != math.inf) for w in maps) for lvl, maps in pairs)


def row_of(squares: Sequence[float], levels: LevelsState, position: int) -> Tensor:
    """A row of `ReadOut.moved`, from the squares of each level's changes."""
    sizes = [sum(weight.numel() for weight in maps) for maps in levels.weights]
    means = [math.sqrt(square / size) for square, size in zip(squares, sizes, strict=True)]
    return torch.tensor([float(position), *means], dtype=torch.float64)


def constant(model: LevelledModel) -> Callable[..., tuple[Tensor, Any]]:
    """The model with its own parameters as constants: no graph before the first level, none of its weights in it."""

    def called(*given: Any, **options: Any) -> tuple[Tensor, Any]:
        with constant_parameters(model):
            return model(*given, **options)

    return called


@contextmanager
def constant_parameters(model: LevelledModel) -> Iterator[None]:
    """While inside, no parameter of the model asks for a gradient: no other thread may train it meanwhile."""
    asking = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _surprise(first: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of tokens [n], predicted by `first` [V] and logits [n - 1, V]; nan where there is no prediction."""
    if first.numel() == 0:
        unknown = logits.new_full((1,), math.nan)
        return torch.cat([unknown, F.cross_entropy(logits, tokens[1:], reduction="none")])
    return F.cross_entropy(torch.cat([first[None], logits]), tokens, reduction="none")
