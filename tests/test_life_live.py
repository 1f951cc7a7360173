"""A life on disk that sleeps on a schedule while it learns."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from lives import crash
from nestling.cli import main
from nestling.learner import Learner, LifeConfig
from nestling.learner.event import Event
from nestling.learner.journal import Journal
from nestling.learner.sleeping import Night, due_night, moment
from nestling.levels import Growing, Reader, ReadingState, level
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import (
    Pair,
    Schedule,
    SeedConfig,
    SleepConfig,
    affordable,
    after,
    at_ticks,
    begin,
    by_hand,
    live,
    merge,
    used,
    when_slots_fill,
    when_surprised,
)

LEVELS = (level(32, step_size=0.5), level(96, step_size=0.5), level(float("inf")))
CONFIG = ModelConfig(dim=8, heads=1, blocks=1, mixer=attention(window=8), levels=LEVELS)
QUICK = SleepConfig(dreams=2, held_out=1, length=2, rehearsal=0.5, seeding=SeedConfig(steps=0), least_recovered=-1e9)
TEXT = b"the quick brown fox jumps over the lazy dog. " * 5  # 225
KEEP = LifeConfig(snapshot_tokens=100, event_bytes=50)


def model(slots: int = 3, levels: int = 3) -> Growing:
    return Growing(Decoder(replace(CONFIG, levels=LEVELS[:levels]), seed=3).requires_grad_(False), slots, 2)


def born(folder: Path, slots: int = 3, levels: int = 2) -> Learner:
    return Learner.create(folder, model(slots, levels), config=KEEP)


def nights(life: Learner) -> list[tuple[int, Night]]:
    """Where every sleep of a life's path was, and what."""
    position, found = 0, []
    for event in life.journal.path_events(life.at):
        position += event.tokens
        if event.kind == "sleep":
            found.append((position, Night.read(life.journal.content(event))))
    return found


@pytest.mark.parametrize("schedule", [at_ticks(at_least=32), after(45)], ids=repr)
def test_it_sleeps_where_a_life_in_memory_does(tmp_path: Path, schedule) -> None:
    """Oracle: `sleep.live`, whose keys alone differ."""
    expected = live(model(), begin(model()), torch.tensor(list(TEXT[:100])), schedule, QUICK)[2]
    with born(tmp_path / "life", levels=3) as life:
        learned, reports = life.live([TEXT[:50], TEXT[50:100]], "fox", schedule, QUICK, share=None)
        assert learned.tokens == 100
        slept = nights(life)
        assert [position for position, _ in slept] == [night.position for night in expected]
        assert [night.only for _, night in slept] == [
            tuple(Pair(pair.fast, pair.slow) for pair in night.report.pairs) for night in expected
        ]
        assert len(reports) == len(slept) >= 2
        assert int(life.state.reading.position) == 100
        assert life.state.source is None


def test_it_is_replayed_bit_for_bit_and_however_the_text_is_cut(tmp_path: Path) -> None:
    ends = []
    for name, cut in (("one", [225]), ("cut", [31, 33, 36, 125])):
        with born(tmp_path / name) as life:
            parts = iter(torch.tensor(list(TEXT)).split(cut))
            life.live(parts, "fox", after(100), QUICK, share=None)
            ends.append(life.digest)
            assert life.verify(replay=True).problems == []
    assert ends[0] == ends[1]
    with born(tmp_path / "by hand") as life:
        life.live(TEXT, "fox", by_hand(), QUICK)
        awake = life.digest
    with born(tmp_path / "learned") as life:
        life.learn(TEXT, "fox")
        assert life.digest == awake
    with Learner.open(tmp_path / "cut") as life:
        assert [line["action"] for line in life.history()].count("sleep") == 2
        life.forget("sleep")
        assert life.digest == awake


class Killed(Exception): ...


def test_killed_anywhere_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with born(tmp_path / "whole") as life:
        life.live(TEXT[:150], "fox", after(100), QUICK, share=None)
        expected = life.digest
    append = Journal.append
    for number in range(3):  # two parts of the text, and a sleep between them
        for before in (True, False):
            left = [number]

            def dies(self, *given, left: list[int] = left, before: bool = before):
                left[0] -= 1
                if left[0] < 0 and before:
                    raise Killed
                found = append(self, *given)
                if left[0] < 0:
                    raise Killed
                return found

            monkeypatch.setattr(Journal, "append", dies)
            life = born(tmp_path / f"{number} {before}")
            with pytest.raises(Killed):
                life.live(TEXT[:150], "fox", after(100), QUICK, share=None)
            crash(life)
            monkeypatch.undo()
            with Learner.open(life.folder) as life:
                rest = life.unread(TEXT[:150], "fox")
                if rest.numel():
                    life.live(rest, "fox", after(100), QUICK, share=None)
                assert life.digest == expected, (number, before)
                assert life.unread(TEXT[:150], "fox").numel() == 0


def test_what_was_read_is_known_however_it_was_cut(tmp_path: Path) -> None:
    with born(tmp_path / "life") as life:
        assert bytes(life.unread(TEXT, "fox").tolist()) == TEXT
        life.learn(TEXT[:70], "fox", ends=False)
        assert bytes(life.unread(TEXT, "fox").tolist()) == TEXT[70:]
        assert life.unread(b"a" + TEXT[1:], "fox").numel() == len(TEXT)
        assert life.unread(TEXT[:60], "fox").numel() == 60, "more than it was read"
        life.learn(TEXT[70:], "fox")
        assert life.unread(TEXT, "fox").numel() == 0
        assert life.unread(TEXT, "other").numel() == life.unread(TEXT + b"!", "fox").numel() - 1 == len(TEXT)
        life.learn(TEXT[:20], "fox", ends=False)
        life.learn(b"in between", "other")
        assert life.unread(TEXT[:40], "fox").numel() == 40, "another source ended it"


def day_of(*events: tuple[int, float]) -> list:
    """Events of so many tokens, each as surprising."""
    told = dict.fromkeys(Event._fields, 0) | {"kind": "learn"}
    return [
        (Event(**told | {"tokens": n}), {"tokens": n, "nats": nats * (n - 1), "counted": n - 1}) for n, nats in events
    ]


def read(grown: Growing, tokens: int) -> ReadingState:
    state = Reader(grown).begin()
    return state._replace(position=state.position + tokens)


def test_a_default_night_costs_a_quarter_and_else_the_life_stays_awake() -> None:
    grown, kind = model(), SleepConfig(when_full=merge())
    found = due_night(grown, after(1_000), read(grown, 5_000), day_of((600, 2.0), (600, 2.0)), kind, 0.25)
    assert found is not None
    assert found.pairs == (Pair(96, float("inf")), Pair(32, 96))
    assert found.config == affordable(grown, 1_200, kind)
    assert due_night(grown, after(1_000), read(grown, 5_000), day_of((900, 2.0)), kind, 0.25) is None
    fast = due_night(grown, at_ticks(), read(grown, 3_232), day_of((1_200, 2.0)), kind, 0.25)
    assert fast is not None
    assert fast.config == affordable(grown, 1_200, kind, chosen=fast.pairs) != found.config
    assert due_night(grown, at_ticks(), read(grown, 3_232), day_of((90, 2.0)), kind, 0.25) is None, "too short a day"
    assert due_night(grown, at_ticks(), read(grown, 3_232), day_of((90, 2.0)), kind, None).config is kind


def test_a_schedule_is_told_of_surprise_by_what_was_journaled() -> None:
    """The mean of the events since it was asked before, and the least of those means; a life was awake so long."""
    grown, schedule = model(), when_surprised(0.3, at_least=64, over=64)
    day = day_of((50, 3.0), (14, 1.0), (64, 2.0), (40, 4.0), (24, 5.0))
    found = moment(grown, schedule, read(grown, 320), day)
    assert (found.position, found.awake) == (320, 192)
    assert found.surprise == pytest.approx((39 * 4.0 + 23 * 5.0) / 62)
    assert found.best == 2.0
    assert moment(grown, schedule, read(grown, 192), day[:2]).best == float("inf"), "asked for the first time"
    asked = [due_night(grown, schedule, read(grown, 320), part, QUICK, None) for part in (day, day[:3], day[:2])]
    assert [night is None for night in asked] == [False, True, True]


@dataclass(frozen=True, repr=False)
class each_50(Schedule):
    def pairs(self, levels, moment) -> tuple[Pair, ...]:
        return (Pair(32, 96),)

    def next(self, levels, position: int) -> int:
        return position // 50 * 50 + 50


def test_no_night_follows_another_without_a_day(tmp_path: Path) -> None:
    with born(tmp_path / "life") as life:
        for part in (TEXT[:50], TEXT[50:60]):
            life.live(part, "fox", each_50(), QUICK, share=None)
        assert [at for at, _ in nights(life)] == [50]


def test_slots_ask_and_the_day_is_what_was_learned_since_the_last_sleep(tmp_path: Path) -> None:
    with born(tmp_path / "life", slots=1, levels=3) as life:
        life.live(TEXT[:100], "fox", at_ticks(at_least=96), QUICK, share=None, ends=False)
        assert [event.tokens for event, _ in life.journal.day(life.at)] == [4]
        life.live(TEXT[100:], "fox", when_slots_fill(each=64), QUICK, share=None)
        assert [at for at, _ in nights(life)] == [96]
    with Learner.open(tmp_path / "life") as life:
        day = life.journal.day(life.at)
        assert [event.tokens for event, _ in day] == [4, 28, 50, 14, 33]
        assert all(done["tokens"] == event.tokens for event, done in day)
        assert life.journal.day(0) == []
        assert life.verify(replay=True).problems == [], "of some pairs only"


def test_however_long_it_lives_only_rows_of_its_journal_are_added(tmp_path: Path) -> None:
    """Slots are merged, texts let go of: states stay as large, and an event leaves less than 600 bytes."""
    keep, config = replace(KEEP, journal_tokens=60), replace(QUICK, when_full=merge())
    with Learner.create(tmp_path / "life", model(2, 2), config=keep) as life:
        sizes = []
        for _ in range(3):
            life.live((TEXT * 2)[:300], "fox", after(100), config, share=None)
            life.journal.ask("PRAGMA wal_checkpoint(TRUNCATE)")
            (text,) = life.journal.ask("SELECT SUM(LENGTH(content)) FROM blobs")[0]
            told = life.status()["bytes"]
            sizes.append((told["snapshots"], told["journal"], text, len(life.journal.path_ids(life.at))))
            assert max(used(life.model, life.state.reading.levels.weights).values()) <= 2
    assert max(s[0] for s in sizes[1:]) < 1.1 * min(s[0] for s in sizes[1:])
    assert sizes[2][2] < 1.1 * sizes[1][2] + 100
    assert sizes[2][1] - sizes[1][1] < 600 * (sizes[2][3] - sizes[1][3]) + 4096  # a page


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = str(tmp_path / "life"), tmp_path / "text.txt"
    text.write_bytes((TEXT * 4)[:850])
    born(tmp_path / "life").close()
    learn = ["learn", folder, str(text), "--sleep", "after(800)", "--full", "merge"]
    assert main([*learn, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [len(night["pairs"]) for night in told["nights"]] == [1]
    assert main([*learn, "--no-again"]) == 0
    assert capsys.readouterr().out == "passed over 1 documents that were read before\n"
    assert main(learn) == 0
    assert "slept 1 times; pairs of levels: " in capsys.readouterr().out
    with Learner.open(folder, write=False) as life:
        assert [type(night.config.when_full).__name__ for _, night in nights(life)] == ["merge", "merge"]
    with Learner.create(tmp_path / "plain", Decoder(CONFIG)) as life:
        life.close()
    assert main(["learn", str(tmp_path / "plain"), str(text), "--sleep", "after(1000)"]) == 2
    assert "no slots to sleep into" in capsys.readouterr().err


def test_a_night_of_some_pairs_is_plain_data() -> None:
    night = Night(QUICK, "key", (None,), only=(Pair(96, float("inf")),))
    assert Night.read(night.write()) == night
    assert b'"inf"' in night.write()
    assert b'"only"' not in night._replace(only=None).write()
