"""Opening and beginning the conversations of a life, each on the weights of the snapshot that it stands on."""

from collections.abc import Callable
from pathlib import Path

from nestling.levels import LevelledModel, ReadingState
from nestling.memory.structure import Weights

from .conversation import Conversation, conversations, read_newest
from .files import CHECKSUMS
from .pins import FOLDER, pinning
from .snapshot import Snapshot, read_snapshot
from .voice import Voice


class Talks:
    """The conversations of one life. Weights of the snapshot that was asked for last are kept at hand."""

    def __init__(self, life: Path, model: LevelledModel, seed: int, like: ReadingState) -> None:
        self.life, self.model, self.seed, self._like = life, model, seed, like
        self._at_hand: tuple[bytes, tuple[Weights, ...]] | None = None

    def names(self) -> list[str]:
        return conversations(self.life)

    def resume(self, name: str) -> Conversation:
        """A conversation that there is."""
        about = read_newest(self.life / FOLDER / name)[1]
        return self._on(name, int(about["snapshot"]), int(about["event"]))

    def begin(self, name: str, ground: Callable[[], Snapshot]) -> Conversation:
        """A new conversation on the snapshot that `ground` gives; it is asked while no snapshot can be removed."""
        with pinning(self.life):
            snapshot = ground()
            begun = self._on(name, snapshot.number, snapshot.event)
            try:
                begun.save()
            except BaseException:
                begun.close()
                raise
        return begun

    def _on(self, name: str, number: int, event: int) -> Conversation:
        folder = self.life / "snapshots" / f"{number:012d}"
        sums = (folder / CHECKSUMS).read_bytes() if (folder / CHECKSUMS).exists() else b""
        # Not by its number: after a forget another state may have it.
        if self._at_hand is None or not sums or self._at_hand[0] != sums:
            self._at_hand = (sums, read_snapshot(folder, self._like).reading.levels.weights)
        return Conversation(self.life, name, Voice(self.model, self._at_hand[1]), self.seed, number, event)
