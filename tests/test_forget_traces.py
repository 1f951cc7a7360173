"""What a forget leaves where something else went wrong: a kill half-way, files that cannot be read, other keys."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lives import KEEP, MODEL, crash, same, text
from nestling.learner import Learner
from nestling.learner.conversation import conversations
from nestling.learner.files import numbered
from nestling.learner.intake import as_tokens
from nestling.learner.snapshot import list_snapshots
from nestling.learner.verify import verify_life

SECRET = b"SECRET-8731"


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Learner]:
    with Learner.create(tmp_path / "life", MODEL, config=KEEP) as found:
        found.learn(text(1), "one")
        yield found


def traces(folder: Path) -> list[Path]:
    tokens = str(list(SECRET)).encode()
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if SECRET in file.read_bytes() or tokens in file.read_bytes()]


def test_a_conversation_whose_removal_was_killed(life: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rename that hides it and the removal: verify tells, and the next opening removes it."""
    with life.conversation("a") as talk:
        talk.hear(as_tokens(SECRET, life.tokens))
        life.learn_conversation(talk)

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        replace(source, target)
        if str(target).endswith(".a.old"):
            raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        life.forget("conversation a")
    monkeypatch.undo()
    crash(life)
    assert any(".a.old" in note for note in verify_life(life.folder).notes)
    with Learner.open(life.folder) as again:
        assert verify_life(life.folder).notes == []
        again.forget("conversation a")
    assert traces(life.folder) == []


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"{")], ids=["missing", "cut"])
def test_a_snapshot_that_does_not_say_what_it_is(life: Learner, harm) -> None:
    """Nobody knows whether it learned what is forgotten; nor a conversation on it."""
    life.snapshot("early")
    with life.conversation("early"):
        pass
    life.learn(SECRET * 9, "two")
    with life.conversation("late"):
        pass
    life.learn(text(3), "three")
    knew = numbered(life.folder / "snapshots")[-1]
    harm(knew / "snapshot.json")
    life.forget("two")
    snapshots = life.folder / "snapshots"
    assert [s.folder for s in list_snapshots(snapshots)] == numbered(snapshots)
    assert conversations(life.folder) == ["early"]
    assert verify_life(life.folder, replay=True).problems == []


@pytest.mark.parametrize("harmed", ["conversation.json", "sequence.safetensors"])
def test_a_conversation_that_cannot_be_read(harmed: str, life: Learner) -> None:
    for name in ("good", "bad"):
        with life.conversation(name) as talk:
            talk.hear(as_tokens(SECRET, life.tokens))
    life.learn(text(2), "two")
    for generation in numbered(life.folder / "conversations" / "bad"):
        (generation / harmed).write_bytes((generation / harmed).read_bytes()[:-3])
    life.forget("two")
    assert conversations(life.folder) == ["good"]


def test_what_moved_from_page_to_page(life: Learner) -> None:
    """The journal's pages split as it grows; what they held before is wiped too, names of sources included."""
    for number in range(24):
        name = f"{SECRET.decode()} {number}" if number % 4 == 0 else f"letter {number}"
        life.accept(b"ab", name + " from somebody with a very long name" * 5)
    life.catch_up()
    life.forget(*(source for source in life.sources() if source.startswith(SECRET.decode())))
    assert traces(life.folder) == []


def test_a_conversation_after_a_forget_is_on_the_levels_that_are(life: Learner) -> None:
    """The snapshot after a forget may have the number of one that is gone, whose weights were at hand."""
    life.learn(text(2, 30), "two")
    with life.conversation("before") as talk:
        number = talk.snapshot
    life.forget("two")
    with life.conversation("after") as talk:
        assert talk.snapshot == number
        for mine, theirs in zip(talk.voice.weights, life.state.reading.levels.weights, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


def test_a_source_that_lost_some_of_its_events(tmp_path: Path) -> None:
    """Where one derived from what is forgotten, the others have the keys of a life that never read either."""
    life = Learner.create(tmp_path / "life", MODEL, config=KEEP)
    never = Learner.create(tmp_path / "never", MODEL, config=KEEP)
    life.learn(text(1), "x", ends=False)
    life.learn(text(2), "notes", derived=life.at)
    for each in (life, never):
        each.learn(text(3), "notes")
        each.learn(text(4), "other")
        each.learn(text(5, 20), "notes")
    life.forget("x")
    keys, expected = ([event.key for event in each.journal.path_events(each.at)] for each in (life, never))
    assert keys == expected
    assert [life.journal.chain_of(life.at)] == [never.journal.chain_of(never.at)]
    same(life, never)
    never.close()
    life.close()
    assert verify_life(tmp_path / "life", replay=True).problems == []
