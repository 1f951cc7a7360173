"""Which snapshots conversations stand on.

LIFE/conversations/ID/N/  conversation.json, sequence.safetensors, checksums.json; N counts turns
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from .files import newest, remove_folders
from .lock import turn

FOLDER = "conversations"


@contextlib.contextmanager
def pinning(life: Path) -> Iterator[None]:
    """Hold still what is pinned: no snapshot is removed and no other conversation begins inside."""
    (life / FOLDER).mkdir(exist_ok=True)
    with turn(life / FOLDER / ".lock"):
        yield


@contextlib.contextmanager
def pinned_snapshots(life: Path) -> Iterator[set[int]]:
    """The numbers of the snapshots that conversations stand on, held still inside."""
    with pinning(life):
        yield set(_pins(life).values())


def remove_conversations_of(life: Path, snapshots: set[int]) -> None:
    """Remove every conversation that stands on one of the snapshots."""
    if not (life / FOLDER).is_dir():
        return
    with pinning(life):
        remove_folders([folder for folder, number in _pins(life).items() if number in snapshots])


def _pins(life: Path) -> dict[Path, int]:
    found = {}
    for folder in sorted((life / FOLDER).iterdir()):
        generation = newest(folder) if folder.is_dir() and not folder.name.startswith(".") else None
        if generation is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one holds nothing
                found[folder] = int(json.loads((generation / "conversation.json").read_text())["snapshot"])
    return found
