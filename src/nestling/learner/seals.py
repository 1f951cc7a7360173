"""Seals: what the chain of events does not cover is hashed too, so that a bit that changes in it is seen.

    facts      all of them under one seal, which is a fact itself
    history    each line with the lines before it; the last seal is a fact
    events     what each has done; "" where nothing was recorded yet

They tell of damage. Whoever writes a journal anew on purpose can seal it anew.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping

from .event import hash_of

UNRECORDED = "{}"
"""The statistics of an event that was not learned yet."""


def facts_seal(facts: Mapping[str, str]) -> str:
    """Of facts by name, as they are written."""
    return hash_of(*(word for name in sorted(facts) if name != "seal" for word in (name, facts[name])))


def line_seal(before: str, after: int, action: str, detail: str) -> str:
    """Of a line of the history, from that of the line before it ("" for the first)."""
    return hash_of(before, str(after), action, detail)


def done_seal(event: int, done: int, statistics: str) -> str:
    """Of what an event has done."""
    return hash_of(str(event), str(done), statistics)


def check_facts(rows: Mapping[str, str]) -> None:
    """Raises ValueError where facts are not those that were written; journals of the first format have no seal."""
    if "seal" in rows and rows["seal"] != json.dumps(facts_seal(rows)):
        raise ValueError("damaged: its facts are not those that were written")


def check_done(rows: Iterable[tuple[int, int, str, str]]) -> None:
    """Raises ValueError for the first event (id, done, statistics, seal) of which something else is told than was
    written."""
    for event, done, statistics, seal in rows:
        if seal != (done_seal(event, done, statistics) if (done, statistics) != (0, UNRECORDED) else ""):
            raise ValueError(f"damaged: what it says that event {event} did is not what was written")


def check_history(lines: Iterable[tuple[int, str, str, str]], last: str) -> None:
    """Raises ValueError where the lines (after, action, detail, seal) of the history are not those that were
    written. last: the seal of the last one."""
    before = ""
    for number, (after, action, detail, seal) in enumerate(lines, 1):
        if seal != line_seal(before, after, action, detail):
            raise ValueError(f"damaged: line {number} of its history is not what was written")
        before = seal
    if before != last:
        raise ValueError("damaged: its history has lost lines")


def seal_all(db: sqlite3.Connection) -> None:
    """Within a transaction: bring a journal of the first format, which has no seals, to the second."""
    for table in ("events", "history"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN seal TEXT NOT NULL DEFAULT ''")
    for event, done, statistics in db.execute("SELECT id, done, statistics FROM events").fetchall():
        if (done, statistics) != (0, UNRECORDED):
            db.execute("UPDATE events SET seal = ? WHERE id = ?", (done_seal(event, done, statistics), event))
    before = ""
    for number, *line in db.execute("SELECT id, after, action, detail FROM history ORDER BY id").fetchall():
        before = line_seal(before, *line)
        db.execute("UPDATE history SET seal = ? WHERE id = ?", (before, number))
    write_fact(db, "history", before)
    db.execute("PRAGMA user_version=2")


def write_fact(db: sqlite3.Connection, name: str, value: object) -> None:
    """Within a transaction: a fact, and the seal of all of them."""
    db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))
    facts = dict(db.execute("SELECT name, value FROM facts").fetchall())
    db.execute("INSERT OR REPLACE INTO facts VALUES ('seal', ?)", (json.dumps(facts_seal(facts)),))
