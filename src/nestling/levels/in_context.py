"""The continuum in context: every sequence of a batch has levels of its own, and their starts are meta-learned."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestling.memory.state import detach, map_tensors
from nestling.memory.structure import Weights

from .continuum import Taps
from .reading import LevelledModel, next_cut
from .transfer import straight_through
from .writing import LevelsState, Start, begin, errors_of, step, tapped


class InContextState(NamedTuple):
    """levels: weights [b, out, in] of every row; updates: of each level so far; position: tokens read by each row;
    sequence: the model's sequence state."""

    levels: LevelsState
    updates: tuple[int, ...]
    position: int
    sequence: Any


@dataclass(frozen=True)
class InContext:
    """Reads a batch of sequences, each with fast weights that start from the model's level weights and learn as a
    `Reader` does; the gradient of the outer loss reaches those starts.

    depth: through how many updates of a level in a row the outer gradient flows, one number or one a level: 0, none
    (first order: an update is a constant that was added to the start); n, truncated: every (n+1)-th update is such a
    constant; inf, all (second order: MAML through the whole sequence). segment: as in `Reader`.
    Rows are independent. Oracles: `Reader` row by row, finite differences (tests/test_in_context.py).
    """

    model: nn.Module
    depth: float | tuple[float, ...] = 0
    segment: int | None = None

    def __post_init__(self) -> None:
        levels = self._model.levels
        if isinstance(self.depth, tuple) and len(self.depth) != len(levels):
            raise ValueError(f"depth has {len(self.depth)} entries, the model has {len(levels)} levels")
        for depth in self.depths:
            if not depth >= 0 or (depth != math.inf and depth != int(depth)):
                raise ValueError(f"depth must be a whole number >= 0, or inf, got {depth}")

    @property
    def _model(self) -> LevelledModel:
        return self.model  # type: ignore[return-value]

    @property
    def depths(self) -> tuple[float, ...]:
        """One for each level."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,) * len(self._model.levels)

    @property
    def first_order(self) -> bool:
        """Does no gradient flow through any update?"""
        return not any(self.depths)

    def begin(self, batch: int) -> InContextState:
        """Every row at the start of its sequence."""
        starts = self._model.level_weights()
        own = tuple(tuple(w.detach().expand(batch, *w.shape).clone() for w in maps) for maps in starts)
        levels = begin(self._model.levels, own)
        return InContextState(levels, (0,) * len(starts), 0, detach(self._model.init_state(batch)))

    def read(
        self,
        state: InContextState,
        tokens: Int[Tensor, "b t"],
        targets: Int[Tensor, "b t"],
        counts: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[InContextState, Float[Tensor, "b t"]]:
        """The losses of targets (the tokens that follow), each predicted before it was learned, with the graph from
        which an outer gradient can be taken; what does not count is neither lost nor learned.

        The graph goes back to this call's beginning. A call ends where a segment does: ValueError elsewhere.
        """
        losses: list[Tensor] = []
        state = self._attach(state)
        for part in self._segments(state.position, tokens, targets, counts):
            state, loss, _ = self._segment(state, *part, outer=(), own=bool(losses))
            losses.append(loss)
        return state, torch.cat(losses, 1)

    def accumulate(
        self,
        state: InContextState,
        tokens: Int[Tensor, "b t"],
        targets: Int[Tensor, "b t"],
        counts: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[InContextState, Float[Tensor, "b t"]]:
        """Adds the gradient of the mean loss to every parameter's `grad`. Returns the losses, without a graph.

        In first order one backward pass a segment serves the outer gradient and the levels' own, and no graph
        outlives its segment; else the outer gradient is a second pass over all of them.
        """
        number = max(1, int(tokens.numel() if counts is None else counts.sum()))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.first_order:
            state, losses = self.read(state, tokens, targets, counts)
            with _differentiable_attention():
                found = torch.autograd.grad(losses.sum() / number, parameters, allow_unused=True)
            _add(parameters, found, 1.0)
            return map_tensors(Tensor.detach, state), losses.detach()
        parts: list[Tensor] = []
        for part in self._segments(state.position, tokens, targets, counts):
            own = bool(parts)  # the first segment's state is the caller's
            state, loss, gradients = self._segment(self._attach(state), *part, outer=tuple(parameters), own=own)
            _add(parameters, gradients, 1.0 / number)
            state = map_tensors(Tensor.detach, state)
            parts.append(loss.detach())
        return state, torch.cat(parts, 1)

    def _segments(
        self, position: int, tokens: Tensor, targets: Tensor, counts: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        counted = torch.ones_like(tokens, dtype=torch.bool) if counts is None else counts
        periods = tuple(lvl.period for lvl in self._model.levels)
        length = self.segment or (int(min(periods)) if min(periods) != math.inf else tokens.shape[1])
        first = 0
        while first < tokens.shape[1]:
            size = next_cut(position + first, periods, length) - position - first
            if first + size > tokens.shape[1]:
                raise ValueError(
                    f"{tokens.shape[1]} tokens after {position} end inside of a segment; "
                    f"give {first} or {first + size}, where one ends"
                )
            yield tuple(x[:, first : first + size] for x in (tokens, targets, counted))  # type: ignore[misc]
            first += size

    def _segment(
        self,
        state: InContextState,
        tokens: Tensor,
        targets: Tensor,
        counts: Tensor,
        outer: tuple[Tensor, ...],
        own: bool,
    ) -> tuple[InContextState, Tensor, tuple[Tensor | None, ...]]:
        """One segment: its losses, the levels after it, and the gradient of the losses' sum for `outer`. own: nobody
        else holds what the levels accumulated."""
        through = not self.first_order
        taps: list[Taps] = []
        with torch.enable_grad(), _differentiable_attention() if through else contextlib.nullcontext():
            logits, sequence = self._model(tokens, state.sequence, weights=state.levels.weights, taps=taps)
            if any(tap.errors is not None for tap in taps) and not bool(counts.all()):
                raise ValueError("a local level learns from every position; counts leaves some out")
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * counts
            outputs = tapped(self._model.levels, taps)
            wanted = [*outputs, *outer]
            found: tuple[Tensor | None, ...] = ()
            if wanted:
                found = torch.autograd.grad(
                    losses.sum(), wanted, create_graph=through, retain_graph=through or not outer, allow_unused=True
                )
            errors = [
                torch.zeros_like(x) if e is None else e for x, e in zip(outputs, found[: len(outputs)], strict=True)
            ]
        with torch.set_grad_enabled(through):
            levels = step(self._model.levels, state.levels, errors_of(outputs, errors), taps, rows=True, own=own)
        return self._cut(state, levels, sequence, tokens.shape[1]), losses, found[len(outputs) :]

    def _attach(self, state: InContextState) -> InContextState:
        """Everything as constants, the levels' weights, and those that they start again from, as constants added to the
        model's own."""
        state = map_tensors(Tensor.detach, state._replace(updates=(), position=0))._replace(
            updates=state.updates, position=state.position
        )
        own = self._model.level_weights()
        weights = tuple(
            straight_through(maps, learned) for maps, learned in zip(own, state.levels.weights, strict=True)
        )
        starts = tuple(
            None if start is None else start._replace(weights=straight_through(maps, start.weights))
            for maps, start in zip(own, state.levels.starts, strict=True)
        )
        return state._replace(levels=state.levels._replace(weights=weights, starts=starts))

    def _cut(self, state: InContextState, levels: LevelsState, sequence: Any, tokens: int) -> InContextState:
        """The state after a segment, with the graph cut at the updates that are to be constants."""
        weights, rules, starts = list(levels.weights), list(levels.rules), list(levels.starts)
        own, position, updates = self._model.level_weights(), state.position + tokens, list(state.updates)
        all_levels = self._model.levels
        for i, (lvl, depth) in enumerate(zip(all_levels, self.depths, strict=True)):
            start = starts[i]
            if start is not None and position % (slower := int(all_levels[i + 1].period)) == 0:
                if depth != math.inf and position // slower % (int(depth) + 1) == 0:
                    start = Start(straight_through(own[i], start.weights), detach(start.rules))
                starts[i], weights[i] = start, start.weights  # where the level has just started again
            if lvl.period == math.inf or position % lvl.period:
                continue
            updates[i] += 1
            if depth != math.inf and updates[i] % (int(depth) + 1) == 0:
                weights[i], rules[i] = straight_through(own[i], weights[i]), detach(rules[i])
        levels = LevelsState(tuple(weights), tuple(rules), tuple(starts))
        return InContextState(levels, tuple(updates), position, detach(sequence) if self.first_order else sequence)


def _add(parameters: list[nn.Parameter], gradients: tuple[Tensor | None, ...], share: float) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient * share if parameter.grad is None else parameter.grad + gradient * share


def _differentiable_attention() -> Any:
    """Attention in its composed form: the fused ones have no second derivative."""
    return sdpa_kernel([SDPBackend.MATH])


def weights_of(state: InContextState, row: int) -> tuple[Weights, ...]:
    """The level weights of one row, as a `Reader` or a model takes them."""
    return tuple(tuple(w[row].detach() for w in maps) for maps in state.levels.weights)
