"""How much memory a process and those that it started hold together."""

import os
import resource
from pathlib import Path

_PROC = Path("/proc")


def footprint_bytes() -> int:
    """What this process and all below it hold now, pages that several share counted once (proportional set size);
    where the system does not tell, the most that this process alone has held."""
    family = [os.getpid()]
    for pid in family:  # grows while it is walked
        family += _children(pid)
    sizes = [size for pid in family if (size := _proportional_bytes(pid)) is not None]
    return sum(sizes) if sizes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _children(pid: int) -> list[int]:
    try:
        lists = [file.read_text() for file in (_PROC / str(pid) / "task").glob("*/children")]
    except OSError:  # it has ended meanwhile
        return []
    return [int(word) for text in lists for word in text.split()]


def _proportional_bytes(pid: int) -> int | None:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
