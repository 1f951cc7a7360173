"""Readers beside a writer: what they see is one moment of the life, whatever the writer does meanwhile."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lives import KEEP, MODEL, text
from nestling.learner import Learner
from nestling.learner.journal import Journal
from nestling.learner.verify import verify_life


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Learner]:
    with Learner.create(tmp_path / "life", MODEL, config=replace(KEEP, snapshot_tokens=10_000)) as found:
        found.learn(text(1), "one")
        found.learn(text(2), "two")
        found.snapshot()
        found.journal.ask("PRAGMA busy_timeout=10")  # a reader in this process does not go on while its writer waits
        yield found


def meanwhile(monkeypatch: pytest.MonkeyPatch, method: str, writer: Learner, does: Callable[[], object]) -> None:
    """The first time that anybody but the writer asks its journal, the writer does something before the answer is
    used."""
    original, done = getattr(Journal, method), list[None]()

    def asked(journal: Journal, *given: Any) -> Any:
        answer = original(journal, *given)
        if journal is not writer.journal and not done:
            done.append(None)
            does()
        return answer

    monkeypatch.setattr(Journal, method, asked)


@pytest.mark.parametrize("forgotten", ["one", "two"])
@pytest.mark.parametrize("method", ["facts", "path_ids"])
def test_a_reader_that_opens_while_its_writer_forgets(method: str, forgotten: str, life: Learner, monkeypatch) -> None:
    """It sees the life after it; not its birth, of which alone the snapshot is always there."""
    meanwhile(monkeypatch, method, life, lambda: life.forget(forgotten))
    with Learner.open(life.folder, write=False) as reader:
        monkeypatch.undo()
        assert forgotten not in life.sources()
        assert reader.digest == life.digest
        assert set(reader.sources()) == {"one", "two"} - {forgotten}


@pytest.mark.parametrize("method", ["all_events", "path_events"])
def test_a_writer_goes_on_while_it_is_verified(method: str, life: Learner, monkeypatch) -> None:
    meanwhile(monkeypatch, method, life, lambda: life.learn(text(3), "three"))
    assert verify_life(life.folder).problems == []
    monkeypatch.undo()
    assert "three" in life.sources()


def test_what_a_reader_saw_may_be_forgotten(life: Learner) -> None:
    with Learner.open(life.folder, write=False) as reader:
        life.forget("one")
        life.forget("two")
        for look in (reader.sources, reader.status):
            with pytest.raises(ValueError, match="there is no event"):
                look()


def test_a_conversation_stands_on_what_is_there(life: Learner) -> None:
    """Not on what the reader saw under the same number before."""
    with Learner.open(life.folder, write=False) as reader:
        number, seen = reader.stands_on.number, reader.at
        life.forget("two")
        with reader.conversation("a") as talk:
            assert (talk.snapshot, talk.event) == (number, life.at)
            assert talk.event != seen
            weights = life.state.reading.levels.weights
            assert all(torch.equal(a, b) for a, b in zip(talk.voice.weights[0], weights[0], strict=True))


def test_a_reader_explains_the_state_that_it_sees(life: Learner) -> None:
    """What was learned since its snapshot is no part of it."""
    expected = life.why("ab", "cd", exact=True)
    life.learn(text(3), "three")
    with Learner.open(life.folder, write=False) as reader:
        assert reader.why("ab", "cd", exact=True) == expected
    assert set(expected.sources) == {"one", "two"}


def test_a_reader_is_told_where_the_journal_lost_its_end(life: Learner) -> None:
    life.journal.witness.write(99, "0" * 32)
    with Learner.open(life.folder, write=False) as reader:
        (note,) = reader.notes
        assert "of 99 steps that were acknowledged it has 2" in note


def test_a_copy_of_what_is_forgotten_meanwhile(life: Learner, tmp_path: Path, monkeypatch) -> None:
    with Learner.open(life.folder, write=False) as reader:
        meanwhile(monkeypatch, "chain_of", life, lambda: life.forget("two"))
        with pytest.raises(ValueError, match="was forgotten while the life was being copied"):
            reader.fork(tmp_path / "fork", at=reader.at)
        monkeypatch.undo()
    assert not (tmp_path / "fork").exists()
