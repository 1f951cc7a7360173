"""The commands on a life: what they print, and what they say to bad input."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nestling.cli import life, main, reading, resting, stacking, talking

OPTIONS = {
    life.new: "directory model preset slots rank config json",
    life.status: "directory now json",
    life.history: "directory json",
    life.snapshot: "directory name remove json",
    life.keep: "directory snapshot_tokens keep_snapshots journal_tokens json",
    life.rollback: "directory to json",
    life.fork: "directory copy at json",
    life.forget: "directory sources json",
    life.release: "directory source json",
    resting.sleep: "directory steps seconds dreams dream context full student probe json",
    life.why: "directory prompt answer exact json",
    life.verify: "directory replay json",
    stacking.stack: "base out periods levels how step_size rank context overlap loss seed",
    reading.learn: "directory paths source again sleep full json",
    talking.generate_command: "directory prompt tokens temperature seed json",
    talking.chat: "directory conversation prompt read tokens temperature stop learn own_words json",
}


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: command.__name__)
def test_options_stay(command: Any) -> None:
    """Scripts rely on them: a change here is a change for everybody who uses the command line."""
    assert " ".join(inspect.signature(command).parameters) == OPTIONS[command]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text("a line about herons, again. " * 6)
    (folder / "b.txt").write_text("SECRET-5512 is in this one. " * 6)
    assert main(["new", str(folder / "life"), "--preset", "tiny", "--seed", "4"]) == 0
    assert main(["learn", str(folder / "life"), str(folder / "a.txt"), str(folder / "b.txt")]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def told(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capfd.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_a_life_by_commands(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = folder / "life"
    status = told(capfd, "status", where)
    assert status["seed"] == 4
    sources = list(status["sources"])
    assert [Path(source).name for source in sources] == ["a.txt", "b.txt"]
    now = told(capfd, "status", where, "--now")["sources"][sources[1]]
    assert 0 < now["nats_now"] < now["nats"]  # it was learned
    assert [line["action"] for line in told(capfd, "history", where)] == ["birth", "learn", "learn"]
    assert told(capfd, "snapshot", where, "two")["event"] == 2
    learned = told(capfd, "learn", where, folder / "a.txt", "--source", "again")
    assert learned["tokens"] == 168
    passed = told(capfd, "learn", where, folder / "a.txt", "--source", "again", "--no-again")
    assert (passed["tokens"], passed["read_before"]) == (0, ["again"])
    why = told(capfd, "why", where, "--prompt", "a line about ", "--answer", "herons", "--exact")
    assert set(why["exact"]) == {*sources, "again"}
    assert told(capfd, "rollback", where, "two")["digest"] == status["digest"]
    assert told(capfd, "fork", where, folder / "fork", "--at", "1")["event"] == 1
    assert list(told(capfd, "status", folder / "fork")["sources"]) == sources[:1]
    chat = told(capfd, "chat", where, "--prompt", "hello", "--prompt", "again", "--tokens", "4", "--learn")
    assert [turn["user"] for turn in chat["turns"]] == ["hello", "again"]
    assert chat["learned"]["tokens"] == len("hello\nagain\n")
    assert len(told(capfd, "generate", where, "--prompt", "a line", "--tokens", "5")["text"]) > 0
    assert told(capfd, "status", where)["conversations"] == {"main": {"event": 2, "turns": 4, "learned": 4}}
    gone = told(capfd, "forget", where, sources[1], "conversation main")
    assert (gone["events"], gone["tokens"]) == (2, 168 + len("hello\nagain\n"))
    assert gone["conversations"] == ["main"]
    assert told(capfd, "status", where)["conversations"] == {}
    assert told(capfd, "verify", where, "--replay")["problems"] == []
    assert list(told(capfd, "status", where)["sources"]) == sources[:1]
    assert not any(b"SECRET" in file.read_bytes() for file in where.rglob("*") if file.is_file())


def test_keeping_less(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = folder / "life"
    before = told(capfd, "keep", where)
    assert (before["keep_snapshots"], before["journal_tokens"]) == (2, None)  # infinity is no JSON
    assert main(["keep", str(where), "--journal-tokens", "200", "--keep-snapshots", "3"]) == 0
    assert "keep snapshots 3, journal tokens 200" in capfd.readouterr().out
    assert told(capfd, "keep", where)["keep_snapshots"] == 3
    assert "keep" in [line["action"] for line in told(capfd, "history", where)]


def test_tables(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    where = str(folder / "life")
    for command, said in (("status", "a.txt"), ("history", "birth"), ("verify", "2 events")):
        assert main([command, where]) == 0
        assert said in capfd.readouterr().out
    assert main(["why", where, "--prompt", "a ", "--answer", "line"]) == 0
    assert "as at birth" in capfd.readouterr().out


def test_from_a_trained_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the model's folder had learned goes into the life."""
    text = tmp_path / "text.txt"
    text.write_text("some text to train and read. " * 20)
    tiny = ["--preset", "tiny", "--steps", "2", "--rows", "2", "--length", "24", "--threads", "1"]
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "model"), *tiny]) == 0
    assert main(["learn", str(tmp_path / "model"), str(text)]) == 0
    assert told(capfd, "new", tmp_path / "life", "--model", tmp_path / "model")["position"] == 580


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("status nowhere", "no such folder"),
        ("status .", "begin one with: nestling new"),
        ("new life --preset tiny", "is there already"),
        ("new other", "either --model"),
        ("rollback life nothing", "unknown snapshot 'nothing'"),
        ("forget life nothing", "nothing was read from 'nothing'"),
        ("release life nothing", "not in quarantine"),
        ("snapshot life 7", "must not be empty, a number"),
        ("snapshot life nothing --remove", "unknown snapshot 'nothing'"),
        ("chat life --prompt x --stop=", "stop must be at least one character"),
        ("why life --prompt a --answer=", "at least one token"),
        ("chat life --prompt x --conversation ../x", "letters, digits"),
        ("fork life life", "is there already"),
        ("keep life --keep-snapshots 1", "keep_snapshots must be >= 2, got 1"),
    ],
    ids=lambda words: words.split()[0],
)
def test_bad_input(
    arguments: str, said: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(arguments.split()) == 2
    line = capfd.readouterr().err.strip()
    assert "\n" not in line
    assert said in line


@pytest.mark.parametrize(
    "command", ["status", "history", "chat --prompt a --tokens 1", "generate --prompt a --tokens 1"]
)
def test_an_older_snapshot_is_never_taken_in_silence(
    command: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers too say that the state they show is not the newest."""
    monkeypatch.setenv("COLUMNS", "400")
    (sorted((folder / "life" / "snapshots").iterdir())[-1] / "levels.safetensors").write_bytes(b"torn")
    name, *flags = command.split()
    assert main([name, str(folder / "life"), *flags]) == 0
    said = capfd.readouterr()
    assert "an older snapshot is taken" in said.out + said.err


def test_a_new_life_has_a_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(tmp_path / "life"), "--preset", "tiny"]) == 0
    assert main(["status", str(tmp_path / "life")]) == 0
    assert "nothing was read yet" in capfd.readouterr().out


def test_damage_is_exit_code_2(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    newest = sorted((folder / "life" / "snapshots").iterdir())[-1]
    (newest / "levels.safetensors").write_bytes(b"torn")
    assert main(["verify", str(folder / "life"), "--json"]) == 2
    assert "damaged" in capfd.readouterr().out
