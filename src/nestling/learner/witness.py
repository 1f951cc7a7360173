"""A second witness of what was acknowledged, beside the journal.

A journal whose last pages are cut off or damaged looks like a shorter journal. The witness says how far it had come.
"""

import hashlib
import os
from pathlib import Path

SLOT = 128  # bytes; two slots, written in turn, so that a torn write spoils one of them at most


class Witness:
    """A small file with the number of steps that were acknowledged (events, rollbacks, forgettings), written after the
    journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._turn = 0

    def write(self, steps: int, chain: str) -> None:
        """Bear witness that so many steps are in the journal, and of the head's chain hash; on the disk when this
        returns."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._turn = 1 - self._newest_slot()
        line = f"{steps} {chain}"
        slot = f"{line} {hashlib.sha256(line.encode()).hexdigest()}".encode().ljust(SLOT, b"\n")
        os.pwrite(self._handle, slot, self._turn * SLOT)
        os.fdatasync(self._handle)
        self._turn = 1 - self._turn

    def read(self) -> tuple[int, str] | None:
        """The steps that were witnessed and the head's chain hash then; None where no slot is whole."""
        found = [slot for slot in self._slots() if slot is not None]
        return max(found) if found else None

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _newest_slot(self) -> int:
        first, second = self._slots()
        return int((second or (-1, "")) > (first or (-1, "")))

    def _slots(self) -> list[tuple[int, str] | None]:
        data = self.path.read_bytes() if self.path.exists() else b""
        return [_parse(data[at : at + SLOT]) for at in (0, SLOT)]


def _parse(slot: bytes) -> tuple[int, str] | None:
    words = slot.decode("ascii", "replace").split()
    if len(words) != 3 or hashlib.sha256(f"{words[0]} {words[1]}".encode()).hexdigest() != words[2]:
        return None
    return int(words[0]), words[1]
