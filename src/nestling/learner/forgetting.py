"""Forgetting: a source, and all that derives from it, is taken out of the tree of events."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .event import BIRTH, Event, event_key
from .journal import Journal


class Plan(NamedTuple):
    """What forgetting takes out. gone: the events; tainted: every event whose path they are on; base: the
    last event of the head's path that knows nothing of it; head: where the head will be; snapshots: the names of those
    that knew of it, once they are removed."""

    gone: set[int]
    tainted: set[int]
    base: int
    head: int
    tokens: int
    snapshots: tuple[str, ...] = ()


def plan_forgetting(journal: Journal, sources: Collection[str]) -> Plan:
    """What would be forgotten. Raises ValueError for a source that was never read."""
    events = journal.all_events()
    names = sorted({event.source for event in events})
    for source in sources:
        if source not in names:
            raise ValueError(f"nothing was read from {source!r}; sources: {', '.join(names[:20]) or 'none'}")
    gone: set[int] = set()
    tainted: set[int] = set()
    for event in events:  # a parent has the smaller id, and so has what an event derives from
        if event.source in sources or event.derived in tainted:
            gone.add(event.id)
        if event.id in gone or event.parent in tainted:
            tainted.add(event.id)
    path = journal.path_ids(journal.head[0])
    base = max((event for event in path if event not in tainted), default=BIRTH)
    head = max((event for event in path if event not in gone), default=BIRTH)
    tokens = sum(event.tokens for event in events if event.id in gone)
    return Plan(gone, tainted, base, head, tokens)


def take_out(journal: Journal, plan: Plan) -> None:
    """Within one transaction: the events and their texts go, what came after them is hung before them, with the
    keys and chain hashes of lives that never had them. That it happened stays in the history, not what it was."""
    events = journal.all_events()
    by_id = {event.id: event for event in events}

    def kept(event: int) -> int:
        while event in plan.gone:
            event = by_id[event].parent
        return event

    with journal.transaction(acknowledged=True) as db:
        for event in events:
            if event.id in plan.gone:
                db.execute("DELETE FROM events WHERE id = ?", (event.id,))
                if not event.pruned:
                    db.execute("UPDATE blobs SET refs = refs - 1 WHERE hash = ?", (event.blob,))
        db.execute("DELETE FROM blobs WHERE refs <= 0")
        chains = {BIRTH: journal.facts()["birth"]}
        remaining = [event._replace(parent=kept(event.parent)) for event in events if event.id not in plan.gone]
        for event in _counted_again(remaining, {event.source for event in events if event.id in plan.gone}):
            chains[event.id] = event.link(chains[event.parent])
            if event.id in plan.tainted:
                row = (event.parent, event.key, chains[event.id], event.id)
                db.execute("UPDATE events SET parent = ?, key = ?, chain = ? WHERE id = ?", row)
        journal.set_fact("head", [plan.head, chains[plan.head]])
        journal.set_fact("scrub", 1)  # its traces are still in the journal's pages
        journal.set_fact("void", 1)  # and in snapshots
        journal.note("forget", journal.last(), events=len(plan.gone), tokens=plan.tokens)


def _counted_again(events: Sequence[Event], sources: set[str]) -> list[Event]:
    """The events (parents first), those of `sources` with the keys of their places among what is left of their
    source."""
    left = sources & {event.source for event in events}  # few: where some of a source derived from what is forgotten
    read: dict[int, Counter[str]] = {BIRTH: Counter()}
    found = []
    for event in events:
        before = read[event.parent]
        read[event.id] = before
        if event.source in left:
            key = event_key(event.source, before[event.source], event.kind, event.blob, event.ends)
            event = event._replace(key=key)
            read[event.id] = before + Counter([event.source])
        found.append(event)
    return found


def scrub(journal: Journal) -> None:
    """Leave no trace of what was deleted in any page of the journal: rewrite it whole, and empty the write-ahead
    log."""
    if not journal.facts()["scrub"]:
        return
    journal.ask("VACUUM")
    busy = journal.ask("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
    if not busy:  # else a reader is at it; the next opening tries again
        with journal.transaction():
            journal.set_fact("scrub", 0)
