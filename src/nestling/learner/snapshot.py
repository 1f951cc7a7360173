"""Snapshots: a life's state after an event, as files that are there whole or not at all.

LIFE/snapshots/N/  levels.safetensors, sequence.safetensors, snapshot.json, checksums.json; N counts snapshots

A snapshot names the event that it is the state after, and the hash of the path to it. One whose path is not in the
journal any more is never read.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nestling.levels import ReadingState

from .files import Contents, numbered, read_generation, write_file, write_generation
from .fold import LifeState, digest
from .folder import pack, unpack
from .guards import GuardState
from .machine import machine

FORMAT = 1
RELEASED = "released"  # an empty file in the folder of a snapshot that had a name


class Snapshot(NamedTuple):
    """What a snapshot says of itself."""

    folder: Path
    number: int
    name: str | None  # a named one is kept until it is removed by name
    event: int
    chain: str
    position: int  # tokens
    digest: str  # of the whole state
    machine: dict[str, Any]


def write_snapshot(root: Path, state: LifeState, event: int, chain: str, name: str | None = None) -> Snapshot:
    """Write the state after `event` as the next snapshot."""
    existing = numbered(root)
    number = int(existing[-1].name) + 1 if existing else 0
    position = int(state.reading.position)
    about = {
        "format": FORMAT,
        "name": name,
        "event": event,
        "chain": chain,
        "position": position,
        "digest": digest(state),
        "machine": machine(),
        "source": state.source,
        "guard": state.guard.to_data(),
    }
    contents: Contents = {**pack(state.reading), "snapshot.json": json.dumps(about, indent=2)}
    folder = write_generation(root, number, contents, keep=None)
    return Snapshot(folder, number, name, event, chain, position, about["digest"], about["machine"])  # type: ignore[arg-type]


def read_snapshot(folder: Path, like: ReadingState) -> LifeState:
    """The state in a snapshot, for the model whose reading state `like` is. Raises ValueError where a file is missing
    or damaged, or where the state is not the one that was written."""
    generation = read_generation(folder)
    about = generation.data.get("snapshot", {})
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder}/snapshot.json: format {about.get('format')!r}; this version reads {FORMAT}")
    try:
        reading = unpack(like, generation.tensors, about["position"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    state = LifeState(reading, about["source"], GuardState.from_data(about["guard"]))
    if digest(state) != about["digest"]:
        raise ValueError(f"{folder}: damaged: not the state that was written")
    return state


def list_snapshots(root: Path) -> list[Snapshot]:
    """Every snapshot that can say what it is, oldest first; the others are left out."""
    found = []
    for folder in numbered(root):
        try:
            about = json.loads((folder / "snapshot.json").read_text())
            name = None if (folder / RELEASED).exists() else about["name"]
            facts = (name, about["event"], about["chain"], about["position"], about["digest"])
            found.append(Snapshot(folder, int(folder.name), *facts, about["machine"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def events_by_name(root: Path) -> dict[str, int]:
    """The events that the named snapshots are the states after."""
    return {s.name: s.event for s in list_snapshots(root) if s.name is not None}


def check_free(root: Path, name: str) -> None:
    """Raises ValueError for what cannot be the name of a new snapshot."""
    if not name or name.isdigit() or name == "birth":
        raise ValueError(f"a snapshot's name must not be empty, a number or 'birth', got {name!r}")
    if name in events_by_name(root):
        raise ValueError(f"there is a snapshot named {name!r} already")


def release_name(snapshot: Snapshot) -> None:
    """Take a snapshot's name from it; what was written of it stays as it is, checksums included."""
    write_file(snapshot.folder / RELEASED, b"")


def superfluous(snapshots: Iterable[Snapshot], live: set[int], pinned: set[int], keep: int) -> list[Snapshot]:
    """The snapshots that may go: not birth, not named, not pinned, and not among the `keep` newest of the life's own
    path (`live`: its snapshots' numbers)."""
    snapshots = list(snapshots)
    newest = {s.number for s in [s for s in snapshots if s.number in live][-keep:]}
    return [s for s in snapshots if s.number not in newest | pinned and s.name is None and s.number != 0]
