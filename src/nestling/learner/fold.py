"""A life as a fold: the state after an event is a pure function of the state before it and of the event."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.levels import LevelledModel, Reader, ReadingState, ReadOut
from nestling.memory.state import flatten
from nestling.sequence import bounded_steps

from .event import Event
from .guards import Guard, Guards, GuardState
from .machine import flushing
from .sleeping import again

PART = 4096  # tokens between two calls of `Tell`
Tell = Callable[[int], None]
"""Called as reading goes on, with the number of tokens just read."""


class LifeState(NamedTuple):
    """A life at one moment. source: of the document that is open; None between documents."""

    reading: ReadingState
    source: str | None
    guard: GuardState


class Done(NamedTuple):
    """What folding one event did. nats: of the `counted` tokens that were predicted; moved: per level, the root mean
    square changes of its weights, summed over its ticks."""

    tokens: int
    counted: int
    nats: float
    moved: tuple[float, ...]
    refused: dict[str, int]  # segments, by reason
    held: int  # ticks that would have moved a level too far
    quarantined: bool
    bounded: int = 0  # step sizes of memories within 1% of their bound; events that older code learned tell none


@dataclass(frozen=True)
class Fold:
    """How a life's state follows from its events: its model and its guards."""

    model: LevelledModel
    guards: Guards

    def begin(self, reading: ReadingState | None = None) -> LifeState:
        """The state at birth."""
        start = Reader(self.model).begin() if reading is None else reading
        return LifeState(start, None, GuardState.begin(len(self.model.levels)))

    def step(self, state: LifeState, event: Event, tokens: Tensor, tell: Tell | None = None) -> tuple[LifeState, Done]:
        """The state after an event. A document that another source had left open ends first; a document of a
        source that is in quarantine is passed over whole. Raises ValueError for an event of an unknown kind."""
        if event.kind == "release":
            record = state.guard.record(event.source)._replace(quarantined=False, trusted=True)
            return state._replace(guard=state.guard.with_record(event.source, record)), self._done(())
        if event.kind == "sleep":
            guard = self.sleeping(state)
            with flushing():
                reading, _ = again(self.model, state.reading, bytes(tokens.tolist()), guard)
            return LifeState(reading, state.source, guard.state if guard else state.guard), self._done((), guard=guard)
        if event.kind != "learn":
            raise ValueError(f"event {event.id} is a {event.kind!r}, which this version does not know")
        with flushing():
            if state.source not in (None, event.source):
                state = self._end(state)[0]
            if state.source is None and state.guard.record(event.source).quarantined:
                return state, self._done((), quarantined=True)
            return self._read(state, event, tokens, tell)

    def _read(self, state: LifeState, event: Event, tokens: Tensor, tell: Tell | None) -> tuple[LifeState, Done]:
        guard = Guard(self.guards, self.model.levels, state.guard, event.source)
        reader, reading, outs = Reader(self.model, accept=guard), state.reading, []
        for part in tokens.split(PART) if tokens.numel() else ():
            reading, out = reader.read(reading, part)
            outs.append(out)
            if tell is not None:
                tell(part.numel())
        source: str | None = event.source
        bounded = bounded_steps(reading.now) - bounded_steps(state.reading.now)
        if event.ends:
            reading, out = reader.end_document(reading)
            outs.append(out)
            source = None
        done = self._done(tuple(outs), tokens.numel(), guard, bounded=bounded)
        return LifeState(reading, source, guard.state), done

    def sleeping(self, state: LifeState) -> Guard | None:
        """What judges the write of what is open before a sleep; None where no document is."""
        if state.source is None:
            return None
        return Guard(self.guards, self.model.levels, state.guard, state.source)

    def _end(self, state: LifeState) -> tuple[LifeState, ReadOut]:
        assert state.source is not None
        guard = Guard(self.guards, self.model.levels, state.guard, state.source)
        reading, out = Reader(self.model, accept=guard).end_document(state.reading)
        return LifeState(reading, None, guard.state), out

    def _done(
        self,
        outs: tuple[ReadOut, ...],
        tokens: int = 0,
        guard: Guard | None = None,
        quarantined: bool = False,
        bounded: int = 0,
    ) -> Done:
        nats = [out.nll[out.nll.isfinite()].double() for out in outs]
        moved = torch.zeros(len(self.model.levels), dtype=torch.float64)
        for out in outs:
            moved = moved + out.moved[:, 1:].sum(0)
        refused: Counter[str] = Counter() if guard is None else guard.refused
        return Done(
            tokens,
            sum(part.numel() for part in nats),
            sum(float(part.sum()) for part in nats),
            tuple(moved.tolist()),
            dict(refused),
            0 if guard is None else guard.held.total(),
            quarantined or (guard is not None and guard.state.record(guard.source).quarantined),
            bounded,
        )


def digest(state: LifeState) -> str:
    """A hash of every bit of a life's state."""
    found = hashlib.sha256()
    for name, tensor in sorted(flatten(state.reading).items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # one element may have stride 0
        found.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    about = {"source": state.source, "guard": state.guard.to_data()}
    found.update(json.dumps(about, sort_keys=True).encode())
    return found.hexdigest()[:32]
