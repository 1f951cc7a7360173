"""A new life's folder: begun from a model, or copied from another life. It appears whole or not at all."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nestling.levels import LevelledModel, ReadingState

from .about import LifeConfig, begin_about, write_about
from .event import BIRTH, birth_chain
from .files import sync_folder, sync_tree
from .fold import Fold, digest
from .journal import Journal
from .kinds import read_model, write_model
from .snapshot import list_snapshots, write_snapshot


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all went well. Raises ValueError where there is one already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; a life begins in a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.tmp*"):  # by a process that was killed
        if not _runs(left.name.rpartition("tmp")[2]):
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _runs(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def begin_life(folder: Path, model: LevelledModel, config: LifeConfig, birth: ReadingState | None) -> None:
    """The folder of a life that has read nothing."""
    with new_folder(folder) as new:
        model_hash = write_model(new / "model", model)
        born, _, _ = read_model(new / "model")
        state = Fold(born, config.guards).begin(birth)
        chain = birth_chain(f"{model_hash} {digest(state)}", config.seed)
        journal = Journal.create(new, chain)
        with journal.transaction():
            journal.note("birth", BIRTH, position=int(state.reading.position))
        journal.close()
        write_snapshot(new / "snapshots", state, BIRTH, chain)
        write_about(new, begin_about(model_hash, config))


def copy_life(life: Path, journal: Journal, folder: Path, event: int) -> None:
    """A copy of a life as it stood after an event. Conversations stay behind."""
    with new_folder(folder) as new:
        _copy_folder(life / "model", new / "model")
        shutil.copyfile(life / "life.json", new / "life.json")
        journal.copy(new)
        for snapshot in list_snapshots(life / "snapshots"):
            copied = new / "snapshots" / snapshot.folder.name
            try:
                _copy_folder(snapshot.folder, copied)
            except FileNotFoundError:
                if snapshot.folder.exists():
                    raise
                shutil.rmtree(copied, ignore_errors=True)  # the life's writer let go of it meanwhile
        other = Journal(new)
        try:
            if other.chain_of(event) is None:
                raise ValueError(f"{life}: event {event} was forgotten while the life was being copied; fork it again")
            with other.transaction(acknowledged=True):
                other.set_fact("head", [event, other.chain_of(event)])
                other.note("forked", other.last(), event=event)
        finally:
            other.close()


def _copy_folder(source: Path, target: Path) -> None:
    """Copy files, without their modes: the copy of a life that may only be read is to be written."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
