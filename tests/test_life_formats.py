"""Lives of every release open; formats move up by tested steps; newer ones are refused."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fixture_lives import FOLDER
from lives import text
from nestling.learner import Learner, about
from nestling.learner.verify import verify_life

RELEASES = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())


def test_there_is_a_life_of_this_format() -> None:
    formats = [json.loads((FOLDER / name / "life" / "life.json").read_text())["format"] for name in RELEASES]
    assert about.FORMAT in formats


@pytest.mark.parametrize("release", RELEASES)
def test_a_life_of_each_release(release: str, tmp_path: Path) -> None:
    """It is what it was when it was written, and lives on."""
    facts = json.loads((FOLDER / release / "facts.json").read_text())
    shutil.copytree(FOLDER / release / "life", tmp_path / "life")
    assert verify_life(tmp_path / "life").problems == []
    with Learner.open(tmp_path / "life") as life:
        assert life.digest == facts["digest"]
        assert int(life.state.reading.position) == facts["position"]
        assert {name: told["tokens"] for name, told in life.sources().items()} == facts["sources"]
        assert [line["action"] for line in life.history()] == facts["history"]
        assert life.state.source == "open"
        with life.conversation("talk") as talk:
            assert talk.turns[-1].tokens == facts["said"]
        life.learn(text(9), "more")
        life.forget("one")
        assert "one" not in life.sources()


@pytest.mark.parametrize("release", RELEASES)
def test_going_back_in_it(release: str, tmp_path: Path) -> None:
    facts = json.loads((FOLDER / release / "facts.json").read_text())
    shutil.copytree(FOLDER / release / "life", tmp_path / "life")
    with Learner.open(tmp_path / "life") as life:
        life.rollback("named")
        assert life.digest == facts["named"]


def test_a_journal_without_seals_is_sealed_when_it_is_written_to(tmp_path: Path) -> None:
    """0.1.0 was begun before them. Its readers need none; from the first writer on damage is seen."""
    folder = tmp_path / "life"
    shutil.copytree(FOLDER / "0.1.0" / "life", folder)

    def ask(query: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(folder / "journal.sqlite", isolation_level=None)) as db:
            return db.execute(query).fetchall()

    with Learner.open(folder, write=False) as reader:
        history, sources = reader.history(), reader.sources()
    assert ask("PRAGMA user_version") == [(0,)]
    Learner.open(folder).close()
    assert ask("PRAGMA user_version") == [(2,)]
    with Learner.open(folder) as life:
        assert (life.history(), life.sources()) == (history, sources)
        life.snapshot("later")
        assert life.history()[-1]["name"] == "later"
    replayed = verify_life(folder, replay=True)
    assert replayed.problems == []
    assert any("nestling: not known then" in note for note in replayed.notes)  # so nothing is claimed
    for harm, said in (
        ("UPDATE history SET action = 'death' WHERE id = 1", "line 1 of its history"),
        ("UPDATE events SET done = 0 WHERE id = 1", "event 1 did"),
    ):
        ask(harm)
        assert said in verify_life(folder).problems[-1]


def test_migrations_run_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two made-up formats on top of this one: a reader is sent to the writer; a step that dies half-way runs again."""
    shutil.copytree(FOLDER / RELEASES[-1] / "life", tmp_path / "life")
    now, ran, fails = about.FORMAT, [], [True]

    def first(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
        ran.append("first")
        return {**data, "model": data["model"] + "?"}

    def second(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
        ran.append("second")
        if fails.pop() if fails else False:
            raise OSError("no space left")
        return {**data, "model": data["model"].removesuffix("?")}

    monkeypatch.setattr(about, "FORMAT", now + 2)
    monkeypatch.setattr(about, "MIGRATIONS", {**about.MIGRATIONS, now: first, now + 1: second})
    with pytest.raises(ValueError, match="open it for writing once"):
        Learner.open(tmp_path / "life", write=False)
    with pytest.raises(OSError, match="no space left"):
        Learner.open(tmp_path / "life")
    with Learner.open(tmp_path / "life") as life:
        assert ran == ["first", "second", "second"]
        assert set(life.sources()) == {"one", "two", "open"}
    Learner.open(tmp_path / "life", write=False).close()
    assert len(ran) == 3
    monkeypatch.setattr(about, "FORMAT", now)
    with pytest.raises(ValueError, match=f"a life of format {now + 2}; this version reads up to {now}"):
        Learner.open(tmp_path / "life")
