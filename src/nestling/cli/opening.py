"""How commands open a life: what a person should know of it is said, and what takes long shows that it goes on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nestling.learner import Learner
from nestling.learner.fold import Tell

from .shared import console, progress


@contextmanager
def opened(directory: Path, *, write: bool = True, notes: bool = True) -> Iterator[Learner]:
    """A life, to be closed at the end. notes: say on stderr what there is to know of how it was opened."""
    torch.set_flush_denormal(True)
    with learning_again() as tell:
        life = Learner.open(directory, write=write, tell=tell)
    with life:
        if notes:
            say_notes(life.notes)
        yield life


def say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"[yellow]{note}[/]")


@contextmanager
def learning_again() -> Iterator[Tell]:
    """A bar that is there once something is learned again."""
    with progress() as bars:
        task = bars.add_task("learning again", total=None, note="", visible=False)
        yield lambda tokens: bars.update(
            task, advance=tokens, visible=True, note=f"{bars.tasks[0].completed:,.0f} tokens"
        )
