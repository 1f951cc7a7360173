"""The journal of a life: an SQLite database of events and the texts that they read.

Every write is one transaction that is on the disk when the call returns. Texts are stored once, under their hash, and
go with the last event that refers to them. Nothing here depends on the time of day.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .event import BIRTH, Event, event_key
from .seals import check_done, check_facts, check_history, done_seal, line_seal, seal_all, write_fact
from .witness import Witness

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE events (
  id INTEGER PRIMARY KEY AUTOINCREMENT, parent INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
  chain TEXT NOT NULL, source TEXT NOT NULL, blob TEXT NOT NULL, encoding TEXT NOT NULL, tokens INTEGER NOT NULL,
  ends INTEGER NOT NULL, derived INTEGER, done INTEGER NOT NULL DEFAULT 0,
  pruned INTEGER NOT NULL DEFAULT 0, statistics TEXT NOT NULL DEFAULT '{}',
  seal TEXT NOT NULL DEFAULT '');
CREATE INDEX events_source ON events (source);
CREATE TABLE blobs (hash TEXT PRIMARY KEY, content BLOB NOT NULL, refs INTEGER NOT NULL);
CREATE TABLE history (
  id INTEGER PRIMARY KEY AUTOINCREMENT, after INTEGER NOT NULL, action TEXT NOT NULL, detail TEXT NOT NULL,
  seal TEXT NOT NULL DEFAULT '');
"""
FORMAT = 2  # PRAGMA user_version; 1, and 0 before it was set, are journals without seals
COLUMNS = "id, parent, kind, key, chain, source, blob, encoding, tokens, ends, derived, done, pruned"
PATH = """WITH RECURSIVE path(id) AS (
  SELECT id FROM events WHERE id = ? AND id <> ? UNION ALL
  SELECT e.parent FROM events e JOIN path p ON e.id = p.id WHERE e.parent <> ? AND e.parent <> 0)"""


class Entry(NamedTuple):
    """What is to be journaled as one event."""

    source: str
    content: bytes
    tokens: int
    ends: bool = True
    encoding: str = "bytes"
    kind: str = "learn"
    derived: int | None = None


class Journal:
    """The journal in a life's folder. `write=False` opens it to look only, beside a writer too."""

    def __init__(self, folder: Path, *, write: bool = True) -> None:
        self.path = folder / "journal.sqlite"
        self.witness = Witness(folder / "witness")
        self._pending: list[tuple[int, str, int]] = []
        if not self.path.is_file():
            raise ValueError(f"{self.path}: missing; a life without its journal cannot be opened")
        with _clear(self.path):
            self.db = _connect(self.path, write)
            self.facts()  # a file that is no database says so here
            found = int(self.ask("PRAGMA user_version")[0][0])
        if found > FORMAT:
            self.db.close()
            raise ValueError(f"{self.path}: format {found}; this version reads up to {FORMAT}: use a newer one")
        self.sealed = found == FORMAT
        if write and not self.sealed:
            with self._transaction():
                seal_all(self.db)
            self.sealed = True

    @classmethod
    def create(cls, folder: Path, chain: str) -> "Journal":
        """A new journal, at birth."""
        path = folder / "journal.sqlite"
        with _clear(path):
            db = sqlite3.connect(path, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(SCHEMA)
            db.execute(f"PRAGMA user_version={FORMAT}")
            facts = {"head": [BIRTH, chain], "birth": chain, "steps": 0, "scrub": 0, "void": 0, "history": ""}
            for name, value in facts.items():
                write_fact(db, name, value)
            db.close()
        Witness(folder / "witness").write(0, chain)
        return cls(folder)

    def close(self) -> None:
        try:
            if self._pending:
                with self.transaction():
                    pass
        finally:
            self.db.close()
            self.witness.close()

    @contextlib.contextmanager
    def transaction(
        self, *, acknowledged: bool = False, written: Callable[[], None] = lambda: None
    ) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, on the disk at the end; what events have done is written along. acknowledged: the
        step may never be lost: it is counted, and the witness is told. written: called once it is on the disk, even
        where the witness cannot be told."""
        with self._transaction():
            self.db.executemany(
                "UPDATE events SET done = ?, statistics = ?, seal = ? WHERE id = ?",
                [(done, text, done_seal(event, done, text), event) for event, text, done in self._pending],
            )
            yield self.db
            if acknowledged:
                self.set_fact("steps", self.facts()["steps"] + 1)
        self._pending.clear()
        written()
        if acknowledged:
            facts = self.facts()
            try:
                self.witness.write(facts["steps"], facts["head"][1])
            except OSError as error:
                raise OSError(f"{self.witness.path}: {error}; the step itself is in the journal") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _clear(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """What is asked inside is answered from one moment, whatever another process does meanwhile."""
        if self.db.in_transaction:
            yield
            return
        with _clear(self.path):
            self.db.execute("BEGIN")
        try:
            yield
        finally:
            with _clear(self.path):
                self.db.execute("COMMIT")

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with _clear(self.path):
            return self.db.execute(query, values).fetchall()

    def facts(self) -> dict[str, Any]:
        """Raises ValueError where they are not those that were written."""
        rows = dict(self.ask("SELECT name, value FROM facts"))
        with self._named():
            check_facts(rows)
        return {name: json.loads(value) for name, value in rows.items()}

    def set_fact(self, name: str, value: Any) -> None:
        """Within a transaction."""
        write_fact(self.db, name, value)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong inside names this file."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @property
    def head(self) -> tuple[int, str]:
        """The event that the life has come to, and its chain hash. Raises ValueError where the two do not agree."""
        with self.still():
            event, chain = self.facts()["head"]
            if self.chain_of(event) != chain:
                raise ValueError(f"{self.path}: damaged: its head is not an event of its tree")
        return event, chain

    def last(self) -> int:
        """The newest event that was ever journaled, whether it is still there or not."""
        found = self.ask("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
        return int(found[0][0]) if found else BIRTH

    def chain_of(self, event: int) -> str | None:
        """The chain hash of an event; None where it is not in the tree."""
        if event == BIRTH:
            return str(self.facts()["birth"])
        found = self.ask("SELECT chain FROM events WHERE id = ?", event)
        return str(found[0][0]) if found else None

    def event(self, event: int) -> Event:
        found = self.ask(f"SELECT {COLUMNS} FROM events WHERE id = ?", event)
        if not found:
            raise ValueError(f"{self.path}: there is no event {event}")
        return _event(found[0])

    def path_ids(self, event: int, after: int = BIRTH) -> list[int]:
        """The ids from `after` (not included) to `event`, oldest first. Raises ValueError where `after` is not on
        the path, and where there is no such event: it may have been forgotten."""
        with self.still():
            ids = [int(row[0]) for row in self.ask(f"{PATH} SELECT id FROM path", event, after, after)][::-1]
            for each in {event, after} - {BIRTH}:
                self.event(each)  # says where there is none
            if event != after and (not ids or self.event(ids[0]).parent != after):
                raise ValueError(f"{self.path}: event {after} is not on the way to event {event}")
        return ids

    def path_events(self, event: int, after: int = BIRTH) -> list[Event]:
        """The events of `path_ids`."""
        rows: list[tuple[Any, ...]] = []
        with self.still():
            chosen = self.path_ids(event, after)
            for start in range(0, len(chosen), 500):
                some = chosen[start : start + 500]
                rows += self.ask(f"SELECT {COLUMNS} FROM events WHERE id IN ({','.join('?' * len(some))})", *some)
        found = {row[0]: _event(row) for row in rows}
        return [found[i] for i in chosen]

    def all_events(self) -> list[Event]:
        """Every event of the tree, oldest first, those of abandoned paths too."""
        return [_event(row) for row in self.ask(f"SELECT {COLUMNS} FROM events ORDER BY id")]

    def has_source(self, source: str) -> bool:
        """Whether anything in the tree was read from a source."""
        return bool(self.ask("SELECT 1 FROM events WHERE source = ? LIMIT 1", source))

    def ordinals(self) -> Counter[str]:
        """How many events each source has on the way to the head."""
        event = self.head[0]
        query = f"{PATH} SELECT source, COUNT(*) FROM events WHERE id IN path GROUP BY source"
        return Counter(dict(self.ask(query, event, BIRTH, BIRTH)))

    def append(self, entries: Sequence[Entry], ordinals: Counter[str]) -> list[Event]:
        """Journal entries after the head, all in one transaction; `ordinals` are counted on. When this returns,
        they are acknowledged."""
        parent, chain = self.head
        counted, events = Counter(ordinals), []

        def count_on() -> None:
            ordinals.clear()
            ordinals.update(counted)

        with self.transaction(acknowledged=True, written=count_on) as db:
            for entry in entries:
                blob = hashlib.sha256(entry.content).hexdigest() if entry.content else ""
                if blob:
                    db.execute(
                        "INSERT INTO blobs VALUES (?, ?, 1) ON CONFLICT (hash) DO UPDATE SET refs = refs + 1",
                        (blob, entry.content),
                    )
                key = event_key(entry.source, counted[entry.source], entry.kind, blob, entry.ends)
                counted[entry.source] += 1
                about = (entry.source, blob, entry.encoding, entry.tokens, entry.ends, entry.derived)
                event = Event(0, parent, entry.kind, key, "", *about, done=0)
                chain = event.link(chain)
                inserted = db.execute(
                    "INSERT INTO events (parent, kind, key, chain, source, blob, encoding, tokens, ends, derived)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (parent, entry.kind, key, chain, *about),
                )
                parent = int(inserted.lastrowid or 0)
                events.append(event._replace(id=parent, chain=chain))
            self.set_fact("head", [parent, chain])
        return events

    def record(self, event: int, statistics: dict[str, Any], done: int) -> None:
        """What an event has done; on the disk with the next transaction (a replay would find the same again)."""
        self._pending.append((event, json.dumps(statistics), done))

    def path_statistics(self, event: int) -> list[tuple[Event, dict[str, Any]]]:
        """The events on the way to an event, with what each has done. Raises ValueError where that is not what was
        written."""
        with self.still():
            way = self.path_events(event)
            rows = {row[0]: row for row in self._done_rows()}
        with self._named():
            check_done([rows[found.id] for found in way if self.sealed])
        texts = {number: text for number, _, text, _ in rows.values()}
        texts.update({number: text for number, text, _ in self._pending})
        return [(found, json.loads(texts[found.id])) for found in way]

    def _done_rows(self) -> list[tuple[int, int, str, str]]:
        seal = "seal" if self.sealed else "''"
        return [row[:4] for row in self.ask(f"SELECT id, done, statistics, {seal} FROM events ORDER BY id")]

    def day(self, event: int) -> list[tuple[Event, dict[str, Any]]]:
        """The events on the way to an event since the last sleep, with what each has done."""
        query = f"""WITH RECURSIVE day(id) AS (
          SELECT id FROM events WHERE id = ? AND kind <> 'sleep' UNION ALL
          SELECT e.id FROM day d JOIN events later ON later.id = d.id JOIN events e ON e.id = later.parent
          WHERE e.kind <> 'sleep') SELECT {COLUMNS}, statistics FROM events WHERE id IN day ORDER BY id"""
        late = {number: text for number, text, _ in self._pending}
        found = [(_event(row[:-1]), row[-1]) for row in self.ask(query, event)]
        return [(each, json.loads(late.get(each.id, text))) for each, text in found]

    def content(self, event: Event) -> bytes:
        """What an event read. Raises ValueError where it was pruned or is damaged."""
        if not event.blob:
            return b""
        found = [] if event.pruned else self.ask("SELECT content FROM blobs WHERE hash = ?", event.blob)
        if event.pruned:
            raise ValueError(f"{self.path}: the text of event {event.id} was pruned; it cannot be read again")
        if not found or hashlib.sha256(found[0][0]).hexdigest() != event.blob:
            raise ValueError(f"{self.path}: damaged: the text of event {event.id} is not what was journaled")
        return bytes(found[0][0])

    def prune(self, events: Sequence[Event]) -> None:
        """Within a transaction: let go of the texts of events; the events stay."""
        for event in events:
            if event.blob and not event.pruned:
                self.db.execute("UPDATE events SET pruned = 1 WHERE id = ?", (event.id,))
                self.db.execute("UPDATE blobs SET refs = refs - 1 WHERE hash = ?", (event.blob,))
        self.db.execute("DELETE FROM blobs WHERE refs <= 0")

    def note(self, action: str, after: int, **detail: Any) -> None:
        """Within a transaction: a line of the life's history."""
        text = json.dumps(detail)
        seal = line_seal(self.facts()["history"], after, action, text)
        line = (after, action, text, seal)
        self.db.execute("INSERT INTO history (after, action, detail, seal) VALUES (?, ?, ?, ?)", line)
        self.set_fact("history", seal)

    def notes(self) -> list[tuple[int, int, str, dict[str, Any]]]:
        """(id, newest event then, action, detail), oldest first. Raises ValueError where they are not what was
        written."""
        with self.still():
            rows = self.ask(f"SELECT id, after, action, detail{', seal' * self.sealed} FROM history ORDER BY id")
            last = self.facts().get("history", "")
        if self.sealed:
            with self._named():
                check_history([row[1:] for row in rows], last)
        return [(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    def check_done(self) -> None:
        """Raises ValueError for the first event, on the path or off it, whose statistics are not what was written."""
        if self.sealed:
            with self._named():
                check_done(self._done_rows())

    def copy(self, target: Path) -> None:
        """A consistent copy of the journal in another folder, beside a writer too."""
        with _clear(self.path), contextlib.closing(sqlite3.connect(target / self.path.name)) as other:
            self.db.backup(other)
            other.execute("PRAGMA journal_mode=WAL")


def _connect(path: Path, write: bool) -> sqlite3.Connection:
    if write:
        db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA secure_delete=ON")
        return db
    # Where nothing can be written beside it, no writer can be at work either; but a log that one left is to be read.
    log = path.with_name(f"{path.name}-wal")
    logged = log.exists() and log.stat().st_size > 0
    still = "" if logged or os.access(path.parent, os.W_OK) else "&immutable=1"
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{still}", uri=True, isolation_level=None, timeout=30.0)


def _event(row: tuple[Any, ...]) -> Event:
    event = Event(*row)
    return event._replace(ends=bool(event.ends), pruned=bool(event.pruned))


@contextlib.contextmanager
def _clear(path: Path) -> Iterator[None]:
    """What SQLite says, as a ValueError where the file is damaged and an OSError where it cannot be written."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{path}: {error}; nothing of this step was written") from None
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: damaged ({error})") from None
