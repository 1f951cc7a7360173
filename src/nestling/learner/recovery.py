"""From what lies on the disk to a state: the newest good snapshot of the life's own path, and what is no longer
needed."""

import math
from pathlib import Path
from typing import NamedTuple

from nestling.levels import ReadingState

from .about import LifeConfig
from .event import BIRTH
from .files import clear_leftovers, numbered, remove_folders
from .fold import LifeState
from .journal import Journal
from .machine import machine_differences
from .pins import clear_conversations, keep_conversations_of, pinned_snapshots
from .snapshot import Snapshot, list_snapshots, read_snapshot, superfluous


class Found(NamedTuple):
    """A state to go on from. notes: what a person should know of how it was found; damaged: snapshots passed over."""

    state: LifeState
    snapshot: Snapshot
    notes: list[str]
    damaged: set[int]


def check_witness(journal: Journal) -> None:
    """Raises ValueError where the journal has lost what was acknowledged."""
    seen, steps = journal.witness.read(), journal.facts()["steps"]
    if seen is not None and seen[0] > steps:
        raise ValueError(
            f"{journal.path}: damaged: of {seen[0]} steps that were acknowledged it has {steps}; "
            "fork the life to go on from what is left of it"
        )


def newest_state(folder: Path, journal: Journal, like: ReadingState, event: int | None) -> Found:
    """The newest good snapshot on the way to `event`; None: to the head. A damaged one is passed over, and that is
    said. Raises ValueError where none is left."""
    with journal.still():
        goal = journal.head[0] if event is None else event
        way = {BIRTH: 0} | {number: depth for depth, number in enumerate(journal.path_ids(goal), 1)}
        listed = list_snapshots(folder / "snapshots")
        live = [s for s in listed if s.event in way and journal.chain_of(s.event) == s.chain]
        chain = journal.chain_of(goal)
    notes: list[str] = []
    damaged: set[int] = set()
    for snapshot in sorted(live, key=lambda s: (way[s.event], s.number), reverse=True):
        try:
            state = read_snapshot(snapshot.folder, like)
        except (ValueError, OSError) as error:
            if not snapshot.folder.exists():  # let go of by the writer meanwhile: there is a newer one
                return newest_state(folder, journal, like, event)
            notes.append(f"{error}; an older snapshot is taken")
            damaged.add(snapshot.number)
            continue
        if journal.chain_of(goal) != chain:  # the writer forgot something on the way, and its snapshots
            return newest_state(folder, journal, like, event)
        if snapshot.event != goal:
            notes += [
                f"this machine differs from the snapshot's, what follows is not the same bit for bit: {difference}"
                for difference in machine_differences(snapshot.machine)
            ]
        return Found(state, snapshot, notes, damaged)
    raise ValueError("; ".join([f"{folder}: no good snapshot is left to go on from", *notes]))


def way_back(
    folder: Path,
    journal: Journal,
    like: ReadingState,
    target: int,
    base: int | None = None,
    without: frozenset[int] | set[int] = frozenset(),
) -> None:
    """Raises ValueError where the way to an event, from the newest good snapshot at or before event `base` (`target`,
    if none is given), is not all there; events `without` are not needed."""
    start = newest_state(folder, journal, like, target if base is None else base).snapshot.event
    missing = [e.id for e in journal.path_events(target, start) if e.pruned and e.id not in without]
    if missing:
        some = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{folder}: the texts of events {some} would have to be read again, and were pruned; nothing was changed"
        )


def void(journal: Journal, snapshot: Snapshot) -> bool:
    """Whether a snapshot's path is not in the journal any more: something on it was forgotten."""
    return journal.chain_of(snapshot.event) != snapshot.chain


def clean(folder: Path, journal: Journal, config: LifeConfig, damaged: set[int]) -> None:
    """Remove what killed processes left, snapshots and conversations of what was forgotten, and what is kept no
    longer. For the writer, once the journal is known to be whole."""
    root = folder / "snapshots"
    clear_leftovers(root)
    clear_leftovers(folder)
    clear_conversations(folder)
    if journal.facts()["void"]:
        # What does not say what it is may have learned what was forgotten: it goes too.
        good = [s for s in list_snapshots(root) if not void(journal, s)]
        keep_conversations_of(folder, {s.number for s in good})
        remove_folders([each for each in numbered(root) if each not in {s.folder for s in good}])
        with journal.transaction():
            journal.set_fact("void", 0)
    on_the_way = {BIRTH, *journal.path_ids(journal.head[0])}
    snapshots = list_snapshots(root)
    live = [s for s in snapshots if s.event in on_the_way and s.number not in damaged]
    with pinned_snapshots(folder) as pinned:
        numbers = {s.number for s in live}
        remove_folders([s.folder for s in superfluous(snapshots, numbers, pinned, config.keep_snapshots)])
    kept = live[-config.keep_snapshots :]
    if len(kept) == config.keep_snapshots:
        _prune(journal, config.journal_tokens, min(s.event for s in kept))


def _prune(journal: Journal, tokens: float, before: int) -> None:
    """Let go of texts that are older than `tokens`, and not needed to go on from a snapshot after event `before`."""
    if tokens == math.inf:
        return
    way = journal.path_events(journal.head[0])
    age, old = 0, []
    for event in reversed(way):
        age += event.tokens
        if age > tokens and event.id <= before and not event.pruned:
            old.append(event)
    oldest = max((event.id for event in old), default=BIRTH)
    on_the_way = {event.id for event in way}
    old += [e for e in journal.all_events() if e.id <= oldest and e.id not in on_the_way and not e.pruned]
    if old:
        with journal.transaction():
            journal.prune(old)
            journal.note("prune", journal.last(), events=len(old), tokens=sum(event.tokens for event in old))


def folder_bytes(folder: Path) -> int:
    """The size of everything in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
