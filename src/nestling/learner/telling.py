"""What a life can tell of itself, as plain data."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nestling.levels import level

from .conversation import conversations, read_newest
from .fold import Done, LifeState, digest
from .journal import Journal
from .pins import FOLDER
from .recovery import folder_bytes
from .snapshot import list_snapshots


class Learned(NamedTuple):
    """What learning some input did, summed over its events."""

    tokens: int
    nats: float  # mean of a token, each predicted before it was learned
    moved: tuple[float, ...]  # per level, root mean square changes summed over ticks
    refused: dict[str, int]  # segments, by reason
    held: int  # ticks that would have moved a level too far
    quarantined: bool
    bounded: int  # step sizes of memories, one a token, head and layer, that came within 1% of their bound


def summed(done: Sequence[Done], levels: int) -> Learned:
    """What several events did together."""
    refused: Counter[str] = Counter()
    for one in done:
        refused.update(one.refused)
    counted = sum(one.counted for one in done)
    return Learned(
        sum(one.tokens for one in done),
        sum(one.nats for one in done) / counted if counted else float("nan"),
        tuple(sum(one.moved[i] for one in done if one.moved) for i in range(levels)),
        dict(refused),
        sum(one.held for one in done),
        any(one.quarantined for one in done),
        sum(one.bounded for one in done),
    )


def status(folder: Path, journal: Journal, levels: Sequence[level], state: LifeState, event: int) -> dict[str, Any]:
    """What a life has come to and what it weighs."""
    clocks = [int(own[0].elapsed.flatten()[0]) for own in state.reading.levels.rules]
    return {
        "event": event,
        "waiting": len(journal.path_ids(journal.head[0], event)),
        "position": int(state.reading.position),
        "open_source": state.source,
        "digest": digest(state),
        "levels": [{"level": repr(lvl), "since_tick": at} for lvl, at in zip(levels, clocks, strict=True)],
        "sources": sources(journal, state, event),
        "conversations": talks(folder),
        "snapshots": snapshots(folder),
        "bytes": sizes(folder),
    }


def talks(folder: Path) -> dict[str, dict[str, Any]]:
    """Per conversation: the event on whose state it stands, its turns, how many of them the life has learned from; and
    what is wrong with one that cannot be read."""
    found: dict[str, dict[str, Any]] = {}
    for name in conversations(folder):
        try:
            about = read_newest(folder / FOLDER / name)[1]
            found[name] = {"event": about["event"], "turns": len(about["turns"]), "learned": about["learned"]}
        except (ValueError, OSError) as error:
            if (folder / FOLDER / name).exists():  # else it was forgotten meanwhile
                found[name] = {"problem": str(error)}
    return found


def sources(journal: Journal, state: LifeState, event: int) -> dict[str, dict[str, Any]]:
    """Per source on the way to an event: tokens read, surprise when they were read (nats a token), how far each level
    moved meanwhile, what the guards refused, how many step sizes met their bound."""
    done: dict[str, list[Done]] = {}
    for found, statistics in journal.path_statistics(event):
        if found.kind == "learn":
            done.setdefault(found.source, []).extend([Done(**statistics)] if statistics else [])
    told = {}
    for source, all_done in done.items():
        record = state.guard.record(source)
        about = summed(all_done, len(state.reading.levels.weights))._asdict()
        told[source] = about | {"quarantined": record.quarantined, "trusted": record.trusted}
    return told


def history(journal: Journal) -> list[dict[str, Any]]:
    """What happened, oldest first: events on the life's path and what was done to the life."""
    head, _ = journal.head
    lines: list[tuple[int, int, dict[str, Any]]] = [
        (event.id, 0, {"action": event.kind, "event": event.id, "source": event.source, "tokens": event.tokens})
        for event in journal.path_events(head)
    ]
    lines += [(after, number, {"action": action, **detail}) for number, after, action, detail in journal.notes()]
    return [line for _, _, line in sorted(lines, key=lambda line: line[:2])]


def sizes(folder: Path) -> dict[str, int]:
    """Bytes on the disk, by what they are."""
    parts = {name: folder_bytes(folder / name) for name in ("model", "snapshots", "conversations")}
    return parts | {"journal": sum(file.stat().st_size for file in folder.glob("journal.sqlite*"))}


def snapshots(folder: Path) -> list[dict[str, Any]]:
    """The snapshots that there are."""
    found = list_snapshots(folder / "snapshots")
    return [{"number": s.number, "name": s.name, "event": s.event, "tokens": s.position} for s in found]
