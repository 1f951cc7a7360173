"""A sleep is one event of a life."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestling.cli import main
from nestling.learner import Learner
from nestling.learner.sleeping import Night
from nestling.levels import Growing, level
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import DreamConfig, SeedConfig, SleepConfig, affordable

QUICK = SleepConfig(dreams=6, held_out=4, length=12, seeding=replace(SeedConfig(), steps=3), least_recovered=-1e9)
TEXT = "the quick brown fox jumps over the lazy dog. " * 4


def born(folder: Path, slots: int = 3) -> Learner:
    levels = (level(16, step_size=0.5), level(48, step_size=0.5))
    model = Decoder(ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=24), levels=levels))
    return Learner.create(folder, Growing(model, slots, 2) if slots else model)


def bits(life: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in flatten(life.state.reading).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_sleep_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    """With a bound in seconds too: what is journaled is the steps that were done."""
    with born(tmp_path / "life") as life:
        life.learn(TEXT, "fox")
        awake = bits(life)
        report = life.sleep(QUICK)
        life.sleep(QUICK, seconds=3600.0)
        assert any(pair.kept for pair in report.pairs)
        slept = bits(life)
        assert not same(awake, slept)
        life.learn("and on it reads", "more")
        end, digest = bits(life), life.status()["digest"]
    with Learner.open(tmp_path / "life") as life:  # the last snapshot is that of birth: all of it is replayed
        assert same(bits(life), end)
        assert life.status()["digest"] == digest
        assert [line["action"] for line in life.history()].count("sleep") == 2


def test_a_sleep_is_forgotten_and_forgotten_sources_were_not_dreamt_of(tmp_path: Path) -> None:
    with born(tmp_path / "never") as life:
        life.learn(TEXT, "fox")
        life.sleep(QUICK)
        never = bits(life)
    with born(tmp_path / "life") as life:
        life.learn("another body, of other words. " * 3, "other")
        life.learn(TEXT, "fox")
        life.sleep(QUICK)
        assert not same(bits(life), never)
        life.forget("other")
        assert same(bits(life), never), "the same sleep, on what is left"
        life.forget("sleep")
        awake = bits(life)
    with born(tmp_path / "awake") as life:
        life.learn(TEXT, "fox")
        assert same(bits(life), awake)


def test_a_life_without_slots_cannot_sleep(tmp_path: Path) -> None:
    with born(tmp_path / "life", slots=0) as life, pytest.raises(ValueError, match="no slots to sleep into"):
        life.sleep(QUICK)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    life, text = str(tmp_path / "life"), tmp_path / "text.txt"
    text.write_text(TEXT)
    born(tmp_path / "life").close()
    assert main(["learn", life, str(text)]) == 0
    capsys.readouterr()
    assert main(["sleep", life]) == 2
    assert "180 tokens were read since the last sleep, and a quarter of that buys no night" in capsys.readouterr().err
    assert main(["sleep", life, "--steps", "2", "--dreams", "4", "--dream", "--probe", str(text), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (pair,) = told["pairs"]
    assert (pair["fast"], pair["slow"], pair["steps"]) == (16.0, 48.0, 2)
    assert set(told["probes"]["text.txt"]) == {"before", "awake", "after"}
    assert len(told["dreamt"]["rounds"][0]["importance"]) == 8
    assert told["seconds"] > 0
    assert main(["verify", life, "--replay"]) == 0


def test_the_context_of_an_open_document_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "life"
    with born(folder) as life:
        life.learn(TEXT[:100], "fox", ends=False)
    assert main(["sleep", str(folder), "--steps", "1", "--dreams", "4", "--context", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [(pair["fast"], pair["slow"]) for pair in pairs] == [(16.0, 48.0), (0.0, 16.0)]
    assert pairs[1]["before"] > 0
    with Learner.open(folder, write=False) as life:
        assert life.verify(replay=True).problems == []


def test_slots_are_asked_for_at_birth(tmp_path: Path) -> None:
    assert main(["new", str(tmp_path / "life"), "--preset", "tiny", "--slots", "2", "--rank", "3"]) == 0
    with Learner.open(tmp_path / "life") as life:
        assert isinstance(life.model, Growing)
        assert (life.model.slots, life.model.rank) == (2, 3)


def test_a_default_sleep_is_paid_by_what_was_read_since_the_last(tmp_path: Path) -> None:
    with born(tmp_path / "life") as life:
        life.learn(TEXT * 20, "fox")
        told = life.night()
        assert told == affordable(life.model, 20 * len(TEXT))
        assert told.dreams >= 4
        life.sleep(QUICK)
        with pytest.raises(ValueError, match="0 tokens were read since the last sleep"):
            life.sleep()


def test_dreaming_is_replayed_where_it_was_begun(tmp_path: Path) -> None:
    dreaming = DreamConfig(dreams=3, length=6, best=1, others=1, trial_steps=1, steps=2, learning_rate=0.1)
    with born(tmp_path / "life") as life:
        life.learn(TEXT, "fox")
        report = life.sleep(replace(QUICK, dreaming=dreaming))
        assert report.dreamt is not None
        assert report.dreamt.outcome in ("kept", "no dream helped", "no gain")
        assert "dreaming: " in str(report)
        late = life.sleep(replace(QUICK, dreaming=dreaming), seconds=0.0)
        assert late.dreamt is None
        assert [pair.outcome for pair in late.pairs] == ["out of time"]
        end = bits(life)
    with Learner.open(tmp_path / "life") as life:
        assert same(bits(life), end)


def test_a_pair_that_explodes_does_so_again_in_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeding = sys.modules["nestling.sleep.seed"]  # the package's attribute of that name is the function
    monkeypatch.setattr(seeding, "EXPLODED", 1.0)  # a step that is worse than the first
    monkeypatch.setattr(seeding, "SLACK", 0.0)
    wild = replace(QUICK, rehearsal=0.0, seeding=replace(SeedConfig(), steps=9, learning_rate=0.3))
    with born(tmp_path / "life") as life:
        life.learn(TEXT, "fox")
        (pair,) = life.sleep(wild).pairs
        assert pair.outcome == "exploded"
        assert pair.steps > 0
        life.snapshot()
        told = life.verify(replay=True)
        assert told.checked["states learned again"] == 1
        assert told.problems == []


def test_nights_journaled_by_steps_alone_are_still_read() -> None:
    night = Night(QUICK, "key", (3, None, -1))
    assert Night.read(night.write()) == night
    old = json.dumps(json.loads(night.write()) | {"steps": [3, 0, -1]}).encode()
    assert Night.read(old).steps == (3, 0, -1)


def test_what_is_open_is_learned_under_the_guards(tmp_path: Path) -> None:
    """As much of a document as had arrived: what the guards counted of it is part of the life, and of its replay."""
    with born(tmp_path / "life") as life:
        life.learn(TEXT[:80], "fox", ends=False)
        before = life.state.guard.record("fox").segments
        assert life.state.reading.segment.numel() >= 8
        life.sleep(QUICK)
        assert life.state.guard.record("fox").segments == before + 1
        life.snapshot()
        assert life.verify(replay=True).problems == []


def test_full_slots_and_the_student_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was chosen is journaled, for a life of one slot too."""
    folder = tmp_path / "life"
    flags = ["--steps", "1", "--dreams", "8", "--json"]
    with born(folder, slots=1) as life:
        life.learn(TEXT, "fox")
        life.sleep(QUICK)
        life.learn(TEXT[::-1], "other")
    outcomes = []
    for asked in (["--full", "merge"], ["--full", "evict", "--student", "paper"]):
        assert main(["sleep", str(folder), *flags, *asked]) == 0
        outcomes.append(json.loads(capsys.readouterr().out)["pairs"][0])
    assert outcomes[0]["outcome"] == "full: one slot cannot be merged with another"
    assert outcomes[1]["before"] == outcomes[1]["students"]["paper"] != outcomes[1]["students"]["reset"]
    with Learner.open(folder, write=False) as life:
        nights = [Night.read(life.journal.content(e)) for e in life.journal.path_events(life.at) if e.kind == "sleep"]
    assert [(type(n.config.when_full).__name__, type(n.config.student).__name__) for n in nights[1:]] == [
        ("merge", "reset"),
        ("evict", "paper"),
    ]
