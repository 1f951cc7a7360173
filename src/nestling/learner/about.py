"""life.json: what a life is, written once at its birth; its format, and how older formats become this one."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.models.data import from_data, to_data

from .files import write_file
from .guards import Guards
from .machine import machine

FORMAT = 1
FILE = "life.json"


@dataclass(frozen=True, kw_only=True)
class LifeConfig:
    """How a life is kept."""

    seed: int = 0  # of everything random in it
    event_bytes: int = 65_536  # longest text of one event; a longer document is journaled in pieces
    snapshot_tokens: int = 65_536  # learned between two snapshots: what a crash costs at most, in replay
    keep_snapshots: int = 2  # beside birth, named and pinned ones
    journal_tokens: float = math.inf  # text older than so many tokens is pruned, and cannot be forgotten exactly then
    guards: Guards = Guards()

    def __post_init__(self) -> None:
        for name, least in (("event_bytes", 1), ("snapshot_tokens", 1), ("keep_snapshots", 2), ("journal_tokens", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class About:
    """A life's facts: the hash of its model, how it is kept, the machine it was born on."""

    model: str
    config: LifeConfig
    machine: dict[str, Any]


MIGRATIONS: dict[int, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {}
"""From the format that is its key to the next: changes the folder, and returns the facts as the next format has them.
Interrupted anywhere, it can run again."""


def write_about(folder: Path, about: About) -> None:
    data = {"format": FORMAT, "model": about.model, "config": to_data(about.config), "machine": about.machine}
    write_file(folder / FILE, json.dumps(data, indent=2).encode())


def begin_about(model: str, config: LifeConfig) -> About:
    return About(model, config, machine())


def is_life(folder: Path) -> bool:
    """Whether a folder holds a life."""
    return (folder / FILE).is_file()


def read_about(folder: Path, *, write: bool) -> About:
    """A life's facts; an older format is brought to this one where `write`. Raises ValueError where the folder holds
    no life, one of a newer format, or one of an older format that is only to be read."""
    data, found = check_format(folder)
    while found < FORMAT:
        if not write:
            raise ValueError(f"{folder}: a life of format {found}; open it for writing once, to bring it to {FORMAT}")
        if found not in MIGRATIONS:
            raise ValueError(f"{folder}: a life of format {found}, which this version does not read")
        data = MIGRATIONS[found](folder, data)
        found += 1
        write_file(folder / FILE, json.dumps({**data, "format": found}, indent=2).encode())
    missing = [name for name in ("model", "config", "machine") if name not in data]
    if missing:
        raise ValueError(f"{folder / FILE}: damaged: {', '.join(missing)} is missing")
    config = from_data(LifeConfig, data["config"], path=f"{folder / FILE}: config")
    return About(data["model"], config, data["machine"])


def about_seal(folder: Path) -> list[Any]:
    """The format of a life's facts and their hash, for the journal: `life.json` alone could not say that it was
    changed."""
    data, found = check_format(folder)
    return [found, hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()]


def broken_seal(folder: Path, seal: list[Any] | None) -> str | None:
    """What is wrong, where a life's facts are not those that the journal knows; lives that are older than the seal, or
    were brought to a newer format since, have none to compare with."""
    now = about_seal(folder)
    if seal is None or seal[0] < now[0] or seal == now:
        return None
    return f"{folder / FILE}: damaged: not the facts that the life was begun with"


def check_format(folder: Path) -> tuple[dict[str, Any], int]:
    """The facts of a life as they lie there, and their format. Raises ValueError where this version cannot read
    them."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not is_life(folder):
        raise ValueError(f"{folder}: not a life (it has no {FILE}); begin one with: nestling new {folder}")
    try:
        data = json.loads((folder / FILE).read_text())
        found = int(data["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE}: damaged ({error})") from None
    if found > FORMAT:
        raise ValueError(f"{folder}: a life of format {found}; this version reads up to {FORMAT}: use a newer one")
    return data, found
