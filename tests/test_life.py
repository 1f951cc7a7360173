"""A life on disk: journal, replay, rollback, fork, exact forgetting. Every equality is of all bits."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nestling
from lives import CONFIG, KEEP, MODEL, crash, same, text
from nestling.learner import Busy, Learner, machine
from nestling.learner.intake import as_tokens, pieces_of
from nestling.learner.verify import verify_life
from nestling.levels import Reader
from nestling.memory.state import flatten
from nestling.models import Decoder
from nestling.sequence import self_modifying

HOPE = Decoder(replace(CONFIG, mixer=self_modifying(chunk=8, projection_chunk=8)), seed=1)


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Learner]:
    with Learner.create(tmp_path / "life", MODEL, config=KEEP) as found:
        yield found


def test_a_life_learns_what_a_reader_learns(tmp_path: Path) -> None:
    """Guards that refuse nothing change nothing: the levels are those of a Reader over the same documents."""
    life, reader = Learner.create(tmp_path / "life", HOPE, config=KEEP), Reader(HOPE)
    state = reader.begin()
    for number in range(3):
        life.learn(text(number), f"doc {number}")
        torch.set_flush_denormal(True)
        tokens = torch.tensor(list(text(number)))
        for part in tokens.split(64):  # as the events are cut
            state, _ = reader.read(state, part)
        state, _ = reader.end_document(state)
    expected = flatten(state)
    for name, tensor in flatten(life.state.reading).items():
        assert torch.equal(tensor, expected[name]), name
    life.close()


def test_pieces_do_not_change_what_is_learned(tmp_path: Path) -> None:
    lives = []
    for number, size in enumerate((7, 33, 400)):
        life = Learner.create(tmp_path / str(number), MODEL, config=replace(KEEP, event_bytes=size))
        for document in range(3):
            life.learn(text(document), f"doc {document}")
        lives.append(life)
    pieces = Learner.create(tmp_path / "pieces", MODEL, config=KEEP)
    for document in range(3):
        pieces.learn(iter([text(document)[:1], text(document)[1:50], text(document)[50:]]), f"doc {document}")
    for other in (*lives[1:], pieces):
        same(lives[0], other)
        other.close()
    lives[0].close()


@pytest.mark.parametrize("learned", [0, 1, 2, 3, 5])
def test_a_crash_loses_nothing(tmp_path: Path, learned: int) -> None:
    """Events that were acknowledged and learned, and one that was only acknowledged; then the process is gone."""
    whole = Learner.create(tmp_path / "whole", MODEL, config=KEEP)
    killed = Learner.create(tmp_path / "killed", MODEL, config=KEEP)
    for number in range(learned):
        whole.learn(text(number), f"doc {number}", ends=number != 2)
        killed.learn(text(number), f"doc {number}", ends=number != 2)
    whole.learn(text(99), "last")
    killed.accept(text(99), "last")
    crash(killed)
    with Learner.open(tmp_path / "killed") as again:
        assert again.at == whole.at
        same(whole, again)
        assert again.sources() == whole.sources()
    with Learner.open(tmp_path / "killed") as again:
        assert again.notes == []
        same(whole, again)
    whole.close()


def test_a_document_goes_on_over_calls_and_openings(tmp_path: Path) -> None:
    with Learner.create(tmp_path / "one", MODEL, config=KEEP) as one:
        one.learn(text(1, 20), "doc", ends=False)
        one.learn(text(2, 41), "doc")
        expected = one.digest
    with Learner.create(tmp_path / "two", MODEL, config=KEEP) as two:
        two.learn(text(1, 20), "doc", ends=False)
        assert two.state.source == "doc"
    with Learner.open(tmp_path / "two") as two:
        assert two.state.source == "doc"
        two.learn(text(2, 41), "doc")
        assert two.digest == expected
        assert two.state.source is None


def test_another_source_ends_what_was_open(tmp_path: Path) -> None:
    """The open segment is learned and the sequence state starts afresh, as if the document had been ended by hand."""
    lives = [Learner.create(tmp_path / str(number), MODEL, config=KEEP) for number in range(2)]
    for life, ends in zip(lives, (False, True), strict=True):
        life.learn(text(1, 50), "one", ends=ends)
        life.learn(text(2, 50), "two")
    same(*lives)
    for life in lives:
        life.close()


def test_one_writer_many_readers(life: Learner) -> None:
    life.learn(text(1), "doc")
    with pytest.raises(Busy, match=rf"open for writing already \(process {os.getpid()}\)"):
        Learner.open(life.folder)
    life.snapshot()
    before = life.digest
    readers = [Learner.open(life.folder, write=False) for _ in range(3)]
    life.learn(text(2), "doc")
    for reader in readers:
        assert reader.digest == before
        with pytest.raises(ValueError, match="opened for reading"):
            reader.learn("text", "doc")
        assert reader.status()["waiting"] == len(life.journal.path_ids(life.at, reader.at))
        reader.close()


def test_rollback_brings_back_the_same_bits(life: Learner) -> None:
    life.learn(text(1), "one")
    probe, before, event = life.evaluate([text(9)]), life.digest, life.at
    life.snapshot("before")
    life.learn(text(2), "two")
    after, later = life.digest, life.at
    assert after != before
    life.rollback("before")
    assert (life.digest, life.at) == (before, event)
    assert life.evaluate([text(9)]) == probe
    assert set(life.sources()) == {"one"}
    life.learn(text(3), "three")
    third = life.digest
    life.rollback(later)  # what was left can be gone back to
    assert life.digest == after
    life.rollback("birth")
    assert life.at == 0
    life.learn(text(1), "one")
    assert life.digest == before
    life.learn(text(3), "three")
    assert life.digest == third
    with pytest.raises(ValueError, match="did you mean 'before'"):
        life.rollback("befor")
    with pytest.raises(ValueError, match="no event 999"):
        life.rollback(999)


def test_forks_are_independent(life: Learner, tmp_path: Path) -> None:
    life.learn(text(1), "one")
    start = life.digest
    with life.fork(tmp_path / "fork") as other:
        assert other.digest == start
        other.learn(text(2), "two")
        assert life.digest == start
        life.learn(text(3), "three")
        assert set(other.sources()) == {"one", "two"}
        assert set(life.sources()) == {"one", "three"}
        other.forget("one")
        assert set(life.sources()) == {"one", "three"}
    with life.fork(tmp_path / "early", at=1) as early, Learner.create(tmp_path / "x", MODEL, config=KEEP) as fresh:
        fresh.learn(text(1)[:64], "one", ends=False)
        same(early, fresh)
    with pytest.raises(ValueError, match="is there already"):
        life.fork(tmp_path / "fork")


@pytest.mark.parametrize("forgotten", ["first", "middle", "last", "open"])
def test_forgetting_is_a_life_that_never_read_it(tmp_path: Path, forgotten: str) -> None:
    """Weights, clocks, accumulators, positions and sequence states, bit for bit; and no byte of it is left."""
    order = ["first", "middle", "other", "middle", "last", "open"]
    life = Learner.create(tmp_path / "life", MODEL, config=KEEP)
    never = Learner.create(tmp_path / "never", MODEL, config=KEEP)
    secret = b"SECRET-8731"
    for number, source in enumerate(order):
        document = text(number) + (secret + text(50 + number) if source == forgotten else b"")
        name = f"letter-from-{source}"
        life.learn(document, name, ends=source != "open")
        if source != forgotten:
            never.learn(document, name, ends=source != "open")
    assert life.digest != never.digest
    life.snapshot("named")
    life.forget(f"letter-from-{forgotten}")
    same(life, never)
    assert f"letter-from-{forgotten}" not in life.sources()
    (said,) = (line for line in life.history() if line["action"] == "forget")
    assert said["tokens"] > 0
    life.close()
    for file in (tmp_path / "life").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert secret not in content, file
        assert f"letter-from-{forgotten}".encode() not in content, file
        as_tokens = torch.tensor(list(secret)).numpy().tobytes()
        assert as_tokens not in content, file
    with Learner.open(tmp_path / "life") as again:
        same(again, never)
        again.learn(text(77), "more")
        never.learn(text(77), "more")
        same(again, never)
    never.close()


def test_forgetting_takes_what_derives_from_it(life: Learner) -> None:
    life.learn(text(1), "one")
    life.learn(text(2), "two")
    written_by = life.at
    life.learn(text(3), "three")
    life.learn(text(4), "dream", derived=written_by)
    life.forget("two")
    assert set(life.sources()) == {"one", "three"}


def test_forgetting_on_an_abandoned_path(life: Learner) -> None:
    life.learn(text(1), "one")
    event = life.at
    life.learn(text(2), "two")
    life.learn(text(5), "five")
    later = life.at
    life.rollback(event)
    life.learn(text(3), "three")
    before = life.digest
    life.forget("two")
    assert life.digest == before
    life.rollback(later)
    assert set(life.sources()) == {"one", "five"}


def test_forgetting_an_unknown_source(life: Learner) -> None:
    life.learn(text(1), "one")
    with pytest.raises(ValueError, match="nothing was read from 'tow'; sources: one"):
        life.forget("tow")


def test_pruned_text_is_refused_by_name(tmp_path: Path) -> None:
    config = replace(KEEP, journal_tokens=200)
    with Learner.create(tmp_path / "life", MODEL, config=config) as life:
        for number in range(8):
            life.learn(text(number), f"doc {number}")
        before, history = life.digest, life.history()
        assert any(line["action"] == "prune" for line in history)
        pruned = [event for event in life.journal.all_events() if event.pruned]
        assert pruned
        with pytest.raises(ValueError, match="were pruned; nothing was changed"):
            life.forget("doc 0")
        assert life.digest == before
        life.forget("doc 7")  # read after the newest snapshots
        assert "doc 7" not in life.sources()
    with Learner.open(tmp_path / "life") as again:
        assert "doc 6" in again.sources()


def test_pruned_text_is_gone_from_the_files(tmp_path: Path) -> None:
    with Learner.create(tmp_path / "life", MODEL, config=KEEP) as life:
        for number in range(8):
            life.learn(b"SECRET-8731" + text(number) if number < 4 else text(number), f"doc {number}")
        life.keep(journal_tokens=200)  # nothing is written over its pages after that
    for file in (tmp_path / "life").rglob("*"):
        assert file.is_dir() or b"SECRET" not in file.read_bytes(), file


def test_what_was_pruned_can_be_forgotten(tmp_path: Path) -> None:
    """Nothing of it has to be read again."""
    life = Learner.create(tmp_path / "life", MODEL, config=replace(KEEP, journal_tokens=200))
    never = Learner.create(tmp_path / "never", MODEL, config=KEEP)
    for number in range(8):
        life.learn(text(number), f"doc {number}")
    gone = {event.source for event in life.journal.all_events() if event.pruned}
    assert 1 < len(gone) < 8
    for number in range(8):
        if f"doc {number}" not in gone:
            never.learn(text(number), f"doc {number}")
    life.forget(*gone)
    same(life, never)
    life.close()
    never.close()


def test_the_same_text_of_two_sources(life: Learner) -> None:
    """It is kept once, and stays while one of them is not forgotten."""
    life.learn(text(1, 40), "one")
    life.learn(text(1, 40), "two")
    (held,) = life.journal.ask("SELECT refs FROM blobs")
    assert held == (2,)
    life.forget("one")
    assert life.journal.content(life.journal.event(life.at)) == text(1, 40)
    assert life.verify(replay=True).problems == []


def test_snapshots_of_a_left_path_do_not_count(life: Learner) -> None:
    """Two generations are kept of the path that the life is on."""
    for number in range(3):
        life.learn(text(number, 30), "doc")
        life.snapshot()
    life.rollback(2)
    assert [(s["number"], s["event"]) for s in life.status()["snapshots"]] == [(0, 0), (2, 2), (3, 2)]


def test_what_is_kept_can_be_changed(life: Learner, tmp_path: Path) -> None:
    """From then on, by whoever opens it, and in copies; what is older is let go of at once."""
    for number in range(8):
        life.learn(text(number), f"doc {number}")
    assert not any(event.pruned for event in life.journal.all_events())
    with pytest.raises(ValueError, match="keep_snapshots must be >= 2, got 1"):
        life.keep(journal_tokens=200, keep_snapshots=1)
    assert not any(event.pruned for event in life.journal.all_events())
    digest = life.digest
    life.keep(journal_tokens=200)
    assert life.keep(keep_snapshots=4) == replace(KEEP, journal_tokens=200, keep_snapshots=4)
    kept = [event.id for event in life.journal.all_events() if not event.pruned]
    assert 1 not in kept
    assert life.at in kept
    assert sum(life.journal.event(event).tokens for event in kept) < 400
    assert [line["action"] for line in life.history()][-3:] == ["keep", "prune", "keep"]
    with life.fork(tmp_path / "fork") as fork:
        assert (fork.config, fork.digest) == (life.config, digest)
        for number in range(6):
            fork.learn(text(number), "more")
            fork.snapshot()
        assert len(fork.status()["snapshots"]) == 5
    life.close()
    with Learner.open(life.folder, write=False) as reader:
        assert reader.config == life.config
        with pytest.raises(ValueError, match="opened for reading"):
            reader.keep(journal_tokens=100)
    assert verify_life(life.folder, replay=True).problems == []


def test_snapshots_are_few(life: Learner) -> None:
    for number in range(12):
        life.learn(text(number), "doc")
    names = [s["number"] for s in life.status()["snapshots"]]
    assert names[0] == 0
    assert len(names) == 3


def test_a_name_can_be_let_go(life: Learner) -> None:
    """The snapshot stays while a conversation stands on it, or while it is one of the newest; then it goes."""
    for name in ("first", "second"):
        life.learn(text(1, 9), "doc")
        number = life.snapshot(name).number
    with life.conversation("a") as talk:
        assert talk.snapshot == number
    for _ in range(4):
        life.learn(text(2), "doc")
        life.snapshot()
    life.release_snapshot("first")
    life.release_snapshot("second")
    left = {s["number"]: s["name"] for s in life.status()["snapshots"]}
    assert left.keys() >= {number}
    assert number - 1 not in left
    assert set(left.values()) == {None}
    assert life.verify(replay=True).good
    with pytest.raises(ValueError, match="unknown snapshot 'first'"):
        life.release_snapshot("first")
    life.snapshot("first")


def test_a_forget_names_the_snapshots_that_went(life: Learner) -> None:
    life.learn(text(1), "one")
    life.snapshot("before")
    life.learn(text(2), "two")
    life.snapshot("after")
    assert life.forget("two").snapshots == ("after",)
    assert [s["name"] for s in life.status()["snapshots"] if s["name"]] == ["before"]


def test_a_copy_beside_a_writer_that_lets_go(life: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that goes while its files are being copied is left out, whole."""
    life.learn(text(1), "one")
    life.snapshot()
    copytree, gone = shutil.copytree, list[Path]()

    def half(source: Path, target: Path) -> Path:
        if source.parent.name != "snapshots" or gone:
            return copytree(source, target)
        gone.append(source)
        target.mkdir(parents=True)
        (target / "levels.safetensors").write_bytes(b"half")
        source.rename(tmp_path / "gone")
        raise shutil.Error([(str(source), str(target), "no such file")])

    monkeypatch.setattr(shutil, "copytree", half)
    life.learn(text(2), "two")
    life.fork(tmp_path / "fork").close()
    assert verify_life(tmp_path / "fork").problems == []


def test_nothing_bad_is_journaled(life: Learner) -> None:
    with pytest.raises(ValueError, match="empty"):
        life.learn("", "doc")
    with pytest.raises(ValueError, match="source is empty"):
        life.learn("text", "")
    with pytest.raises(ValueError, match="source 'sleep' is what a life's own sleeps are called"):
        life.learn("text", "sleep")
    with pytest.raises(ValueError, match="derived must be an event of this life"):
        life.learn("text", "doc", derived=99)
    with pytest.raises(ValueError, match=r"\[0, 256\), got 3 to 300"):
        life.learn(torch.tensor([3, 300]), "doc")
    for tokens in (torch.zeros(3), torch.tensor([True]), torch.zeros(1, 3).long()):
        with pytest.raises(ValueError, match="whole numbers"):
            life.learn(tokens, "doc")
    for wrong in (281, None, ["text"], memoryview(b"eight by").cast("i")):
        with pytest.raises(ValueError, match="what is read is str, bytes, a tensor of tokens"):
            as_tokens(wrong, life.tokens)
    for wrong in (None, 281, {"text": "doc"}, {"text"}):
        with pytest.raises(ValueError, match="or an iterator of these; got a"):
            pieces_of(wrong)
    assert life.history() == [{"action": "birth", "position": 0}]


def test_tokens_and_text_are_one(tmp_path: Path) -> None:
    with Learner.create(tmp_path / "a", MODEL) as a, Learner.create(tmp_path / "b", MODEL) as b:
        a.learn("grüß dich", "doc")
        b.learn(torch.tensor(list("grüß dich".encode())), "doc")
        same(a, b)
        a.learn(bytearray(b"and so on"), "doc")
        b.learn(iter([memoryview(b"and"), b" so on"]), "doc")
        same(a, b)


def test_birth_can_go_on_from_a_reading_state(tmp_path: Path) -> None:
    reader = Reader(MODEL)
    state, _ = reader.read(reader.begin(), torch.tensor(list(text(4, 50))))
    state, _ = reader.end_document(state)
    with Learner.create(tmp_path / "life", MODEL, birth=state) as life:
        expected = flatten(state)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in flatten(life.state.reading).items())
        assert life.status()["position"] == 50


def test_another_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Learner.create(tmp_path / "life", MODEL, config=KEEP)
    life.learn(text(1), "one")
    life.snapshot()
    life.accept(text(2), "two")
    crash(life)
    here = {**machine(), "threads": 64, "nestling": "99.0"}
    monkeypatch.setattr(sys.modules["nestling.learner.machine"], "machine", lambda: here)
    with Learner.open(tmp_path / "life") as again:
        assert any("not the same bit for bit: threads: 1 then, 64 now" in note for note in again.notes)
        assert any(f"nestling: {nestling.__version__} then, 99.0 now" in note for note in again.notes)
        assert set(again.sources()) == {"one", "two"}
    with Learner.open(tmp_path / "life") as again:
        assert again.notes == []  # nothing had to be learned again


def test_replay_on_another_machine_claims_nothing(life: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that differ there are no damage: it is noted. On the machine that wrote them they are."""
    life.learn(text(1), "one")
    life.snapshot()
    verify = sys.modules["nestling.learner.verify"]
    monkeypatch.setattr(verify, "digest", lambda state: "other bits")
    assert not life.verify(replay=True).good
    monkeypatch.setattr(sys.modules["nestling.learner.machine"], "machine", lambda: {**machine(), "threads": 64})
    found = life.verify(replay=True)
    assert found.good
    assert any("threads: 1 then, 64 now" in note for note in found.notes)
    assert any("not what its events come to" in note for note in found.notes)


def test_who_waits_is_told(tmp_path: Path) -> None:
    """Every token that is learned again when a life is opened, copied or verified."""
    life, heard = Learner.create(tmp_path / "life", MODEL, config=KEEP), list[int]()
    life.learn(text(1), "one")
    life.learn(text(2), "two")
    life.accept(text(3), "three")
    crash(life)
    with Learner.open(tmp_path / "life", tell=heard.append) as again:
        assert sum(heard) == 3 * 90 - 154  # the newest snapshot stands in the middle of "two"
        heard.clear()
        again.fork(tmp_path / "fork", at=1, tell=heard.append).close()
        assert sum(heard) == 64
        heard.clear()
    assert verify_life(tmp_path / "life", replay=True, tell=heard.append).good
    assert sum(heard) == 3 * 90


def test_what_a_killed_copy_left_is_removed(life: Learner, tmp_path: Path) -> None:
    (tmp_path / ".fork.tmp99999999").mkdir()
    life.fork(tmp_path / "fork").close()
    assert not list(tmp_path.glob(".*"))


def test_remembered_is_evaluated_on_what_was_read(life: Learner) -> None:
    life.learn(text(1), "one")
    life.learn(text(2), "two")
    first = bytes(text(2)[:64])  # the first event of it
    assert life.remembered() == {"one": life.evaluate([text(1)[:64]])[0], "two": life.evaluate([first])[0]}


def test_evaluation_by_hand(life: Learner) -> None:
    """The levels as they stand, and one forward pass."""
    life.learn(text(1), "one")
    tokens = torch.tensor(list(text(1)))
    logits, _ = MODEL(tokens[None], weights=life.state.reading.levels.weights)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:]).item()
    at_birth = torch.nn.functional.cross_entropy(MODEL(tokens[None])[0][0, :-1], tokens[1:]).item()
    (found,) = life.evaluate([text(1)])
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(at_birth - expected) > 1e-4 * expected
