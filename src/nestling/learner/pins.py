"""Which snapshots conversations stand on.

LIFE/conversations/ID/N/  conversation.json, sequence.safetensors, checksums.json; N counts turns
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from .files import check_sums, clear_leftovers, newest, numbered, remove_folders
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
        yield {pin for pin in map(_pin, _begun(life)) if pin is not None}


def keep_conversations_of(life: Path, snapshots: set[int]) -> None:
    """Remove every conversation but those that are known to stand on one of the snapshots: of one that cannot be read,
    or that is not as it was written, nobody can say what it knew."""
    if not (life / FOLDER).is_dir():
        return
    with pinning(life):
        remove_folders([folder for folder in _begun(life) if not _sound(folder) or _pin(folder) not in snapshots])


def clear_conversations(life: Path) -> None:
    """Remove what is left of conversations whose removal was cut short. For the life's writer."""
    if (life / FOLDER).is_dir():
        with pinning(life):
            clear_leftovers(life / FOLDER)


def _begun(life: Path) -> list[Path]:
    folders = sorted(folder for folder in (life / FOLDER).glob("[!.]*") if folder.is_dir())
    return [folder for folder in folders if newest(folder) is not None]


def _pin(folder: Path) -> int | None:
    """The snapshot that a conversation stands on, as its newest readable generation says; None where none does."""
    for generation in reversed(numbered(folder)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((generation / "conversation.json").read_text())["snapshot"])
    return None


def _sound(folder: Path) -> bool:
    try:
        for generation in numbered(folder):
            check_sums(generation)
    except (OSError, ValueError):
        return False
    return True
