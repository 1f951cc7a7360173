"""One writer: a lock on a file that the system lets go of when its process dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Busy(ValueError):
    """Another process (or another object in this one) holds what was asked for."""


def take(path: Path, what: str) -> int:
    """Lock a file, which is made where there is none, and return its handle; `os.close` lets go.

    The lock belongs to this opening of the file, so that a second taker in the same process is refused too. Raises
    `Busy` at once, naming the holder's process, where it is held.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        raise Busy(f"{what} is open for writing already (process {holder}); a life has one writer") from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait for a short lock on a file, and hold it inside."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
