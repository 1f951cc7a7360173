"""Full disks, read-only folders, cut and flipped files: a clear error or the generation before, nothing silent."""

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from life_kills import Say, spawn
from lives import KEEP, MODEL, crash, same, text
from nestling.learner import Conversation, Learner
from nestling.learner.files import numbered, write_file
from nestling.learner.verify import verify_life
from nestling.learner.voice import Voice
from nestling.learner.witness import Witness


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Learner.create(tmp_path / "life", MODEL, config=KEEP) as life:
        for number in range(6):
            life.learn(text(number), f"doc {number}")
    return tmp_path / "life"


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> Iterator[Learner]:
    shutil.copytree(folder, tmp_path / "whole")
    with Learner.open(tmp_path / "whole") as life:
        yield life


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", ["levels.safetensors", "sequence.safetensors", "snapshot.json", "checksums.json"])
def test_a_damaged_snapshot_is_passed_over(name: str, harm, folder: Path, whole: Learner) -> None:
    newest = numbered(folder / "snapshots")[-1]
    harm(newest / name)
    lost_sums = name == "checksums.json" and harm is Path.unlink  # every other file is as it was
    assert lost_sums or any(str(newest) in problem for problem in verify_life(folder).problems)
    with Learner.open(folder) as life:
        same(life, whole)
        if not lost_sums:
            assert any("learned again" in note for note in life.notes)
    with Learner.open(folder) as life:
        same(life, whole)


def test_a_snapshot_that_lost_its_checksums(folder: Path, whole: Learner) -> None:
    """What it holds is still not what it says that it holds."""
    newest = numbered(folder / "snapshots")[-1]
    (newest / "checksums.json").unlink()
    flip(newest / "levels.safetensors", 0.9)
    assert any("not the state that was written" in problem for problem in verify_life(folder).problems)
    with Learner.open(folder) as life:
        same(life, whole)


def test_all_snapshots_but_birth_damaged(folder: Path, whole: Learner) -> None:
    for snapshot in numbered(folder / "snapshots")[1:]:
        flip(snapshot / "levels.safetensors")
    with Learner.open(folder) as life:
        same(life, whole)
        assert len(life.notes) == 3  # two damaged, and what was learned again
    for snapshot in numbered(folder / "snapshots"):
        flip(snapshot / "levels.safetensors")
    with pytest.raises(ValueError, match=r"no good snapshot is left.*damaged"):
        Learner.open(folder)


@pytest.mark.parametrize("harm", [cut, flip], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", ["life.json", "model/model.safetensors", "model/config.json", "model/checksums.json"])
def test_a_damaged_model_is_an_error(name: str, harm, folder: Path) -> None:
    harm(folder / name)
    with pytest.raises(ValueError, match=r"damaged|unknown key|is missing|model/ is"):
        Learner.open(folder)


def test_flipped_journal_pages(folder: Path, whole: Learner, tmp_path: Path) -> None:
    """A bit in every 776th byte of the journal: never is another life taken for this one without a word."""
    size = (folder / "journal.sqlite").stat().st_size
    silent, said = 0, 0
    for number, at in enumerate(range(5, size, 97 * 8)):
        where = tmp_path / f"flipped {number}"
        shutil.copytree(folder, where)
        for more in ("journal.sqlite-wal", "journal.sqlite-shm"):
            (where / more).unlink(missing_ok=True)
        content = bytearray((where / "journal.sqlite").read_bytes())
        content[at] ^= 1 << (number % 8)
        (where / "journal.sqlite").write_bytes(content)
        try:
            with Learner.open(where) as life:
                same(life, whole)
                for event in life.journal.path_events(life.at):
                    life.journal.content(event)
                assert (life.sources(), life.history()) == (whole.sources(), whole.history())
            silent += 1
        except (ValueError, OSError):
            said += 1
        shutil.rmtree(where)
    assert said >= 1
    assert silent >= 1  # free bytes of pages


CHANGES = {
    "UPDATE events SET statistics = replace(statistics, '64', '65') WHERE id = 3": "event 3 did",
    "UPDATE events SET statistics = '{}', done = 0 WHERE id = 3": "event 3 did",
    "UPDATE events SET done = done + 1 WHERE id = 3": "event 3 did",
    "UPDATE events SET seal = '' WHERE id = 3": "event 3 did",
    "UPDATE history SET detail = replace(detail, 'kept', 'left') WHERE id = 2": "line 2 of its history",
    "UPDATE history SET after = 0 WHERE id = 3": "line 3 of its history",
    "UPDATE history SET action = 'fork' WHERE id = 2": "line 2 of its history",
    "DELETE FROM history WHERE id = 1": "line 1 of its history",
    "DELETE FROM history WHERE id = 3": "its history has lost lines",
    "UPDATE facts SET value = '1' WHERE name = 'void'": "its facts are not those",
    "DELETE FROM facts WHERE name = 'about'": "its facts are not those",
}


def test_what_stands_beside_the_chain_is_sealed(folder: Path) -> None:
    """Whoever asks for what was changed is told, and so is verify."""
    with Learner.open(folder) as life:
        life.snapshot("kept")
        life.rollback("kept")
    file = folder / "journal.sqlite"
    whole = file.read_bytes()
    for change, said in CHANGES.items():
        file.write_bytes(whole)
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as db:
            assert db.execute(change).rowcount == 1
        if "facts" in change:
            with pytest.raises(ValueError, match=f"journal.sqlite: damaged: {said}"):
                Learner.open(folder)
            continue
        (problem,) = verify_life(folder).problems
        assert said in problem, change
        with Learner.open(folder, write=False) as life, pytest.raises(ValueError, match=said):
            life.sources() if "events" in change else life.history()


def test_an_event_that_is_not_what_was_journaled_is_not_learned(folder: Path) -> None:
    """Whose text was read is part of what its chain seals: it is asked before the event is learned again."""
    for snapshot in numbered(folder / "snapshots")[1:]:
        shutil.rmtree(snapshot)
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite", isolation_level=None)) as db:
        assert db.execute("UPDATE events SET source = 'doc 9' WHERE source = 'doc 3'").rowcount == 2
    with pytest.raises(ValueError, match=r"journal\.sqlite: damaged: event 7 is not what was journaled"):
        Learner.open(folder)


def test_what_is_acknowledged_is_synchronised(whole: Learner) -> None:
    """As far as SQLite can see to it: 2 is FULL, a sync of the log at every commit."""
    assert whole.journal.ask("PRAGMA synchronous") == [(2,)]
    assert whole.journal.ask("PRAGMA journal_mode") == [("wal",)]


def test_a_journal_that_lost_its_end_is_noticed(folder: Path, tmp_path: Path) -> None:
    life = Learner.open(folder)
    life.journal.ask("PRAGMA wal_checkpoint(TRUNCATE)")
    life.accept(text(9), "last")
    shutil.copytree(folder, tmp_path / "copy")
    crash(life)
    log = tmp_path / "copy" / "journal.sqlite-wal"
    (tmp_path / "copy" / "journal.sqlite-shm").unlink()
    flip(log, 0.01)  # SQLite takes the log up to its first bad frame for all of it
    with pytest.raises(ValueError, match="of 7 steps that were acknowledged it has 6"):
        Learner.open(tmp_path / "copy")
    with Learner.open(tmp_path / "copy", write=False) as reader, reader.fork(tmp_path / "rest") as rest:
        assert set(rest.sources()) == {f"doc {number}" for number in range(6)}
    with Learner.open(folder) as whole_again:
        assert "last" in whole_again.sources()


def test_an_interruption_parts_no_state_from_its_event(folder: Path, whole: Learner, monkeypatch) -> None:
    """Stopped right after an event was learned, before anything says so: closing writes nothing that is not so."""
    life = Learner.open(folder)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for each in (life, whole):
        each.learn(text(7, 20), "before")
    monkeypatch.setattr(life.journal, "record", stopped)
    with pytest.raises(KeyboardInterrupt):
        life.learn(text(8, 20), "last")
    life.close()
    whole.learn(text(8, 20), "last")
    with Learner.open(folder) as again:
        same(again, whole)


@pytest.mark.parametrize("step", ["rollback", "forget"])
def test_a_lost_step_back_is_noticed(step: str, folder: Path, tmp_path: Path) -> None:
    """A log that lost the transaction of a rollback, or of a forgetting, does not bring back what was left behind."""
    life = Learner.open(folder)
    life.journal.ask("PRAGMA wal_checkpoint(TRUNCATE)")
    log = folder / "journal.sqlite"
    before = log.read_bytes()
    life.rollback(2) if step == "rollback" else life.forget("doc 2")
    crash(life)
    log.write_bytes(before)
    log.with_name("journal.sqlite-wal").unlink(missing_ok=True)
    log.with_name("journal.sqlite-shm").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="steps that were acknowledged"):
        Learner.open(folder)


def test_a_cut_journal_is_an_error(folder: Path) -> None:
    journal = folder / "journal.sqlite"
    journal.write_bytes(journal.read_bytes()[:5000])
    with pytest.raises((ValueError, OSError), match=r"journal\.sqlite"):
        Learner.open(folder)
    journal.unlink()
    with pytest.raises(ValueError, match=r"journal\.sqlite: missing"):
        Learner.open(folder)


def test_a_new_life_says_what_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "life.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99; this version reads up to"):
        Learner.open(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        Learner.open(tmp_path / "nowhere")


def limit(size: int) -> None:
    """No file of this process may grow beyond a size any more, as under a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill(folder: Path, say: Say, size: int | None = None) -> None:
    """Learn until there is no room; say what went well and what did not. size: of a file, at most."""
    life = Learner.open(folder)
    if size is not None:
        limit(size)
    for number in range(2000):
        try:
            life.accept(text(100 + number, 900), f"more {number}")
            say(f"accepted more {number}")
            life.catch_up()
        except OSError as error:
            say(f"error {error}")
            return


def check_after(folder: Path, said: list[str]) -> None:
    accepted = {line.removeprefix("accepted ") for line in said if line.startswith("accepted")}
    assert accepted
    assert any(line.startswith("error") for line in said), said
    with Learner.open(folder) as life:
        assert accepted <= set(life.sources())
    assert verify_life(folder, replay=True).problems == []


def test_a_quota(folder: Path) -> None:
    child = spawn(lambda say: fill(folder, say, 160_000))
    child.wait_for("done")
    check_after(folder, child.kill())


STEPS: dict[str, Callable[[Learner], object]] = {
    "snapshot": lambda life: life.snapshot("name"),
    "rollback": lambda life: life.rollback(4),
    "forget": lambda life: life.forget("doc 4"),
    "fork": lambda life: life.fork(life.folder.with_name("fork")).close(),
    "conversation": lambda life: life.conversation("a").close(),
    "keep": lambda life: life.keep(journal_tokens=100),
}


@pytest.mark.parametrize("size", [200, 30_000])
def test_no_room_for_a_step(size: int, folder: Path, whole: Learner) -> None:
    """It is refused and nothing of it has happened, or it is finished by whoever opens the life next."""
    refused = list[str]()
    for name, step in STEPS.items():
        where = folder.with_name(name) / "life"
        shutil.copytree(folder, where)

        def work(say: Say, step: Callable[[Learner], object] = step, where: Path = where) -> None:
            life = Learner.open(where)
            limit(size)
            try:
                step(life)
            except OSError as error:
                say(f"refused {error}")

        child = spawn(work)
        child.wait_for("done")
        refused += [name] * (child.kill() != ["done"])
        with Learner.open(where) as life:
            if name in ("rollback", "forget") and life.digest != whole.digest:
                with whole.fork(folder.with_name(f"{name} whole")) as other:
                    step(other)
                    same(life, other)
            else:
                same(life, whole)
        assert verify_life(where).problems == []
        assert not where.with_name("fork").exists() or verify_life(where.with_name("fork")).problems == []
    assert refused == list(STEPS) if size == 200 else {"snapshot", "forget"} <= set(refused)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root; test_a_quota runs everywhere")
def test_a_full_disk(folder: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    try:
        shutil.copytree(folder, mount / "life")
        child = spawn(lambda say: fill(mount / "life", say))
        child.wait_for("done")
        said = child.kill()
        shutil.copytree(mount / "life", tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    check_after(tmp_path / "moved", said)


def test_a_read_only_folder(folder: Path, whole: Learner, tmp_path: Path) -> None:
    """Nothing can be written: a writer is told so, readers see the newest snapshot, and a copy is a life like any."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    logged = tmp_path / "logged"
    with Learner.open(folder) as life:
        life.accept(text(7), "waiting")
        shutil.copytree(folder, logged)  # as if it had been killed: what was accepted is in the log alone
        life.forget("waiting")

    def work(say: Say) -> None:
        for path in (logged, *logged.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            for parent in folder.resolve().parents:
                if parent.stat().st_uid == 0 and parent.is_relative_to(tempfile.gettempdir()):
                    parent.chmod(parent.stat().st_mode | 0o055)
            os.setgid(65534)
            os.setuid(65534)
        try:
            Learner.open(folder)
        except OSError as error:
            say(f"refused {error}")
        with Learner.open(folder, write=False) as life:
            say(f"read {life.digest} {len(life.sources())} {verify_life(folder).problems}")
            with life.fork(tmp_path / "open" / "fork") as fork:
                for number in range(4):
                    fork.learn(text(number, 9), "more")
                    fork.snapshot()
        with Learner.open(logged, write=False) as life:
            say(f"waiting {life.status()['waiting']} {life.notes}")

    child = spawn(work)
    child.wait_for("done")
    refused, read, waiting, _ = child.kill()
    assert "ermission denied" in refused
    assert read == f"read {whole.digest} 6 []"
    assert waiting == "waiting 2 []"
    found = verify_life(tmp_path / "open" / "fork")
    assert (found.problems, found.notes) == ([], [])
    assert len(numbered(tmp_path / "open" / "fork" / "snapshots")) == 3


def test_facts_that_were_changed(folder: Path) -> None:
    """Still JSON, still a life: verify compares it with the journal's hash; what is missing is named."""
    file = folder / "life.json"
    whole = file.read_text()
    assert '"seed": 0' in whole
    file.write_text(whole.replace('"seed": 0', '"seed": 1'))
    (problem,) = verify_life(folder).problems
    assert "life.json: damaged: not the facts" in problem
    with Learner.open(folder) as life:
        assert problem in life.notes
    assert verify_life(folder).problems == [problem]
    file.write_text(whole.replace('"machine": {', '"engine": {'))
    with pytest.raises(ValueError, match="machine is missing"):
        Learner.open(folder)
    file.write_text(whole)
    assert verify_life(folder).problems == []


def test_a_newer_journal_is_refused(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        db.execute("PRAGMA user_version=3")
    with pytest.raises(ValueError, match=r"journal\.sqlite: format 3; this version reads up to 2"):
        Learner.open(folder)


def full_disk(*_: object) -> None:
    raise OSError("no space left")


def test_a_close_that_fails_lets_go_of_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Learner.open(folder)
    monkeypatch.setattr(life.journal, "transaction", full_disk)
    life.journal._pending.append((1, "{}", 1))
    with pytest.raises(OSError, match="no space left"):
        life.close()
    Learner.open(folder).close()


def test_a_conversation_that_cannot_begin_lets_go_of_its_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Learner.open(folder) as life:
        monkeypatch.setattr(Conversation, "save", full_disk)
        with pytest.raises(OSError, match="no space left") as failed:
            life.conversation("a")
        monkeypatch.undo()
        life.conversation("a").close()
        assert failed.value is not None  # its traceback holds on to what failed


def test_a_witness_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is in the journal all the same: what follows counts on from it."""
    with Learner.open(folder) as life:
        monkeypatch.setattr(Witness, "write", full_disk)
        with pytest.raises(OSError, match="no space left; the step itself is in the journal"):
            life.accept(text(7), "doc 1")
        monkeypatch.undo()
        life.learn(text(8), "doc 1")
    assert verify_life(folder).problems == []


def test_a_forget_that_is_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object still had what is forgotten: it says that it is of no use, and the life opens without it."""
    life = Learner.open(folder)
    monkeypatch.setattr("nestling.learner.learner.scrub", full_disk)
    with pytest.raises(OSError, match="no space left"):
        life.forget("doc 2")
    monkeypatch.undo()
    for use in (lambda: life.digest, lambda: life.learn("more", "doc"), lambda: life.evaluate(["more"]), life.snapshot):
        with pytest.raises(ValueError, match=r"a forget was cut short .*no space left.*open the life again"):
            use()
    life.close()
    with Learner.open(folder) as again:
        assert "doc 2" not in again.sources()
    assert verify_life(folder, replay=True).problems == []


def test_a_reader_that_keeps_what_is_forgotten_is_told_of(folder: Path) -> None:
    life = Learner.open(folder)
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM blobs").fetchone()[0] > 6
        life.journal.ask("PRAGMA busy_timeout=10")
        life.forget("doc 2")
        assert any("a reader holds it open: what was forgotten" in note for note in life.notes)
    life.close()
    with Learner.open(folder) as again:
        assert again.notes == []


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes, then its name, then the folder that the name is in."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".tmp")[0]))
        fsync(handle)

    def record_replace(source: Path, target: Path) -> None:
        done.append(("replace", target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_file(tmp_path / "name", b"bytes")
    assert done == [("fsync", ".name"), ("replace", "name"), ("fsync", tmp_path.name)]
    done.clear()
    Conversation(tmp_path, "a", Voice(MODEL, MODEL.level_weights()), 0, 0, 0).close()
    assert done == [("fsync", "conversations"), ("fsync", tmp_path.name)]
