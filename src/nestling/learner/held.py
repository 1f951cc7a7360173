"""A life's folder in the hands of one object: its lock, its journal, and the state that they come to."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nestling.levels import Reader, ReadingState

from .about import about_seal, broken_seal, check_format, read_about
from .event import Event
from .fold import Done, Fold, LifeState, Tell
from .forgetting import scrub
from .intake import read_back
from .journal import Entry, Journal
from .kinds import read_model
from .lock import take
from .recovery import check_witness, clean, newest_state
from .snapshot import Snapshot, write_snapshot


class Place(NamedTuple):
    """A state and the event that it is the state after. They change in one assignment: an interruption between two
    would let a snapshot say that an event was not learned which was."""

    state: LifeState
    at: int


class Held:
    """A life's folder, opened. `Learner` says what can be done with it.

    stands_on: the newest snapshot on the way to the state; notes: what a person should know of how it was opened.
    """

    stands_on: Snapshot
    notes: list[str]
    _place: Place
    _tokens_since: int  # learned since the last snapshot
    _damaged: set[int]  # snapshots that cannot be read

    def __init__(self, folder: Path, *, write: bool, tell: Tell | None = None) -> None:
        self.folder, self.write = folder, write
        self._lock: int | None = None
        self._journal: Journal | None = None
        self._broken = ""  # why it cannot be used any more
        check_format(folder)
        if write:
            self._lock = take(folder / "lock", str(folder))
        try:
            about = read_about(folder, write=write)
            self.model, self.tokens, self.model_hash = read_model(folder / "model")
            if self.model_hash != about.model:
                raise ValueError(f"{folder}: a life of model {about.model}, but model/ is {self.model_hash}")
            self.fold = Fold(self.model, about.config.guards)
            self.like: ReadingState = Reader(self.model).begin()
            self._journal = Journal(folder, write=write)
            self.config = replace(about.config, **self.journal.facts().get("keeping", {}))
            self._wake(tell)
        except BaseException:
            self.let_go()
            raise

    def _wake(self, tell: Tell | None) -> None:
        seal = self.journal.facts().get("about")
        broken, notes = broken_seal(self.folder, seal), []
        if self.write:
            check_witness(self.journal)
            scrub(self.journal)
            if broken is None and seal != (now := about_seal(self.folder)):
                with self.journal.transaction():
                    self.journal.set_fact("about", now)
        else:
            try:
                check_witness(self.journal)
            except ValueError as error:
                notes.append(str(error))
        self.ordinals: Counter[str] = self.journal.ordinals()
        self.go_to(None)
        self.notes += notes + ([broken] if broken else [])
        if self.write:
            base, again = self.at, len(self.catch_up(tell))
            if again:
                self.notes.append(f"{again} events after event {base} were learned again")
            self.clean()
            self.tell_of_traces()

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            raise ValueError(self._broken or f"{self.folder}: this life was closed")
        return self._journal

    @property
    def state(self) -> LifeState:
        if self._broken:
            raise ValueError(self._broken)
        return self._place.state

    @property
    def at(self) -> int:
        return self._place.at

    def close(self) -> None:
        """Write a snapshot where something was learned since the last one, and let go."""
        try:
            if self.write and self._journal is not None and self._tokens_since:
                self.snapshot()
        finally:
            self.let_go()

    def let_go(self) -> None:
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            self._journal = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @contextlib.contextmanager
    def all_the_way(self, step: str) -> Iterator[None]:
        """Where a step back is cut short, what this object holds may be what was left behind: it is of no use then."""
        try:
            yield
        except BaseException as error:
            self._broken = f"{self.folder}: {step} was cut short ({error!r}); open the life again"
            with contextlib.suppress(OSError, ValueError):
                self.let_go()
            raise

    def writing(self) -> None:
        """Raises ValueError where nothing may be written."""
        if not self.write:
            raise ValueError(f"{self.folder}: opened for reading; open it with write=True to change it")
        self.journal  # noqa: B018  (raises where it was closed)

    def append(self, entries: Sequence[Entry]) -> list[Event]:
        """Journal entries: when this returns they cannot be lost."""
        self.writing()
        return self.journal.append(entries, self.ordinals)

    def stand(self, state: LifeState, event: int, tokens: int) -> None:
        """Take what was found to be the state after an event, which took so many tokens to learn."""
        self._tokens_since += max(1, tokens)
        self._place = Place(state, event)

    def catch_up(self, tell: Tell | None = None) -> list[Done]:
        """Learn what was journaled and not yet learned; what each event did."""
        self.writing()
        head, _ = self.journal.head
        chain, done = self.journal.chain_of(self.at) or "", []
        for event in self.journal.path_events(head, self.at):
            chain = event.link(chain)
            if chain != event.chain:
                raise ValueError(f"{self.journal.path}: damaged: event {event.id} is not what was journaled")
            tokens = read_back(self.journal.content(event), event, self.tokens)
            state, found = self.fold.step(self.state, event, tokens, tell)
            self.journal.record(event.id, found._asdict(), found.tokens)
            self.stand(state, event.id, event.tokens)
            done.append(found)
            if self._tokens_since >= self.config.snapshot_tokens:
                self.snapshot()
        return done

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Write the state as it stands."""
        with self.journal.transaction():  # what is done is in the journal before the snapshot can be seen
            if name is not None:
                self.journal.note("snapshot", self.journal.last(), name=name, event=self.at)
        chain = self.journal.chain_of(self.at)
        assert chain is not None
        written = write_snapshot(self.folder / "snapshots", self.state, self.at, chain, name)
        self._tokens_since, self.stands_on = 0, written
        self.clean()
        return written

    def go_to(self, event: int | None) -> None:
        """Take the newest good snapshot on the way to an event; None: to the head."""
        found = newest_state(self.folder, self.journal, self.like, event)
        self._place, self.stands_on = Place(found.state, found.snapshot.event), found.snapshot
        self.notes = found.notes
        self._damaged = found.damaged
        self._tokens_since = 0

    def keep(self, changes: dict[str, Any]) -> None:
        """From now on keep what the configuration with these changes says. They stand in the journal: they are there
        or not, and a copy takes them along."""
        config = replace(self.config, **changes)  # raises for what is out of bounds
        with self.journal.transaction():
            self.journal.set_fact("keeping", self.journal.facts().get("keeping", {}) | changes)
            self.journal.note("keep", self.journal.last(), **changes)
        self.config = config
        self.clean()

    def turn_back(self, tell: Tell | None) -> None:
        """Go to where the head is now, and leave a snapshot there."""
        self.ordinals = self.journal.ordinals()
        self.clean()
        self.go_to(None)
        self.catch_up(tell)
        self.snapshot()

    def clean(self) -> None:
        """Remove what is kept no longer."""
        clean(self.folder, self.journal, self.config, self._damaged)

    def tell_of_traces(self) -> None:
        """Note where what was forgotten could not be wiped out of the journal's files."""
        if self.journal.facts()["scrub"]:
            self.notes.append(
                f"{self.journal.path}: a reader holds it open: what was forgotten is still to be found in its files, "
                "until the life is opened for writing without that reader"
            )
