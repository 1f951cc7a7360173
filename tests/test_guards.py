"""Guards: what is not finite or jumps is skipped and counted; a source that goes on so is quarantined."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lives import CONFIG, KEEP, MODEL, crash, same, text, trained
from nestling.cli import main
from nestling.learner import Guards, Learner
from nestling.learner.guards import Guard, GuardState, Record, Running
from nestling.levels import LevelsState, Reader, initialization, level
from nestling.levels.reading import ReadingState
from nestling.levels.writing import advance, nothing
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import self_modifying

STRICT = replace(KEEP, guards=Guards(surprise_jump=1.5, warm_segments=4, strikes=3))
OFF = replace(KEEP, guards=Guards(surprise_jump=math.inf, level_jump=math.inf))


def garbage(seed: int, size: int = 200) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Learner]:
    """A life that has learned what its texts look like."""
    with Learner.create(tmp_path / "life", trained(), config=STRICT) as found:
        for number in range(6):
            found.learn(text(number, 200), "clean")
        yield found


def test_clean_text_is_taken_in(life: Learner) -> None:
    assert life.sources()["clean"]["refused"] == {}
    found = life.learn(text(60, 200), "more")
    assert (found.refused, found.held, found.quarantined) == ({}, 0, False)


def test_steps_at_their_bound_are_told_by_source(tmp_path: Path, capfd) -> None:
    """Documents are learned in events of 64 bytes, and count from their beginning."""
    model = Decoder(replace(CONFIG, mixer=self_modifying(chunk=8, projection_chunk=8)), seed=1)
    with Learner.create(tmp_path / "life", model, config=KEEP) as life:
        assert life.learn(text(1), "gates as they begin").bounded == 0
    with torch.no_grad():
        model.blocks[0].mixer.gate_bias[:, 0] = 50.0
    with Learner.create(tmp_path / "bounded", model, config=KEEP) as life:
        assert [life.learn(text(number, size), "all").bounded for number, size in ((1, 90), (2, 30))] == [180, 60]
        assert life.sources()["all"]["bounded"] == 240
    main(["status", str(tmp_path / "bounded"), "--json"])
    assert '"bounded": 240' in capfd.readouterr().out
    (tmp_path / "text").write_bytes(text(3))
    main(["learn", str(tmp_path / "bounded"), str(tmp_path / "text")])
    assert "180 step sizes of memories came to their bound" in " ".join(capfd.readouterr().out.split())


def test_garbage_is_refused_and_its_source_quarantined(life: Learner) -> None:
    before = life.evaluate([text(50)])[0]
    first = life.learn(garbage(1), "noise")
    assert first.refused["surprise"] >= 3
    assert first.quarantined
    assert abs(life.evaluate([text(50)])[0] - before) < 0.1
    levels = flatten(life.state.reading.levels)
    second = life.learn(garbage(2), "noise")
    assert second == (0, second.nats, (0.0, 0.0), {}, 0, True, 0)
    assert all(torch.equal(tensor, levels[name]) for name, tensor in flatten(life.state.reading.levels).items())
    assert life.sources()["noise"]["quarantined"]
    assert not life.learn(text(61), "clean").quarantined
    life.release("noise")
    third = life.learn(garbage(3), "noise")
    assert third.refused == {}
    assert life.sources()["noise"]["trusted"]
    with pytest.raises(ValueError, match="not in quarantine"):
        life.release("clean")


def test_what_follows_a_quarantine_in_the_same_document_is_refused(life: Learner) -> None:
    """Also where it is such as the life has learned from before."""
    found = life.learn(garbage(1) + text(9, 400), "noise")
    assert found.refused["surprise"] == STRICT.guards.strikes
    assert set(found.refused) == {"surprise", "quarantined"}
    assert found.refused["quarantined"] > 15, "the whole of what follows"


def test_a_replay_decides_the_same(life: Learner, tmp_path: Path) -> None:
    for number in range(4):
        life.learn(garbage(number, 90), "noise" if number % 2 else "hiss")
        life.learn(text(30 + number), "clean")
    life.release("hiss")
    life.learn(garbage(9, 90), "hiss")
    expected, sources = life.digest, life.sources()
    with life.fork(tmp_path / "fork", at="birth") as fork:
        fork.rollback(life.at)
        assert fork.digest == expected
        assert fork.sources() == sources
    crash(life)
    with Learner.open(life.folder) as again:
        assert again.digest == expected
        assert again.verify(replay=True).good


def test_forgetting_what_was_refused(life: Learner, tmp_path: Path) -> None:
    never = Learner.create(tmp_path / "never", trained(), config=STRICT)
    for number in range(6):
        never.learn(text(number, 200), "clean")
    life.learn(garbage(1, 90), "noise")
    for one in (life, never):
        one.learn(text(40), "later")
    life.forget("noise")
    same(life, never)
    never.close()


class Spoiled(Decoder):
    """A model that gives infinities wherever byte 0 comes up."""

    def forward(self, tokens, state=None, **given):  # type: ignore[no-untyped-def, override]
        logits, state = super().forward(tokens, state, **given)
        return logits + (tokens == 0).cumsum(1).clamp(max=1)[..., None] * torch.inf * logits, state


def test_what_is_not_finite_is_skipped_without_any_bound() -> None:
    model = Spoiled(MODEL.config, seed=1)
    guard = Guard(OFF.guards, model.levels, GuardState.begin(2), "doc")
    reader = Reader(model, accept=guard)
    state, _ = reader.read(reader.begin(), torch.tensor(list(text(1, 120))))
    before = guard.state.record("doc")
    state, _ = reader.read(state, torch.tensor([0, *text(2, 60)]))
    assert guard.refused["not finite"] >= 2
    assert guard.state.record("doc").segments > before.segments
    assert all(bool(tensor.isfinite().all()) for tensor in flatten(state.levels).values())


def test_a_level_that_would_move_too_far_is_held(tmp_path: Path) -> None:
    """The same gradients with a bound that only a tick can break: weights stay, clocks go on."""
    guards = Guards(surprise_jump=math.inf, level_jump=8.0, warm_segments=2)
    state = GuardState(Running(), (Running(9, 1e9),) * 2, (Running(9, 1e-9), Running()), {})
    guard = Guard(guards, MODEL.levels, state, "doc")
    reader = Reader(MODEL, accept=guard)
    start = reader.begin()
    after, _ = reader.read(start, torch.tensor(list(text(1, 100))))
    assert guard.held[0] == 4  # every tick of the fast level: at 24, 48, 72, 96
    assert guard.held[1] == 0
    weights, birth = after.levels.weights, start.levels.weights
    assert all(torch.equal(a, b) for a, b in zip(weights[0], birth[0], strict=True))
    assert not torch.equal(weights[1][0], birth[1][0])
    free = Reader(MODEL).read(start, torch.tensor(list(text(1, 100))))[0]
    assert int(after.levels.rules[0][0].elapsed) == int(free.levels.rules[0][0].elapsed)


def test_passing_over_is_a_segment_of_zero_gradient() -> None:
    """Clocks go on; a tick steps on what came before; by hand, with a rule that is plain descent."""
    config = ModelConfig(dim=16, heads=2, blocks=1, mixer=MODEL.config.mixer, levels=(level(10, step_size=0.5),))
    model = Decoder(config, seed=2)
    reader = Reader(model, segment=5)
    state = reader.read(reader.begin(), torch.tensor(list(text(1, 6))))[0].levels  # one segment of 5 was learned
    assert int(state.rules[0][0].elapsed) == 5
    after = advance(model.levels, state, nothing(model.levels, state, 5))
    for weight, old, own in zip(after.weights[0], state.weights[0], state.rules[0], strict=True):
        torch.testing.assert_close(weight, old - 0.5 / 10 * own.gradient)
    assert int(after.rules[0][0].elapsed) == 0
    between = advance(model.levels, state, nothing(model.levels, state, 3))
    assert int(between.rules[0][0].elapsed) == 8
    assert torch.equal(between.rules[0][0].gradient, state.rules[0][0].gradient)


def test_levels_that_start_again_keep_their_starts_in_a_guarded_life() -> None:
    """The same stream with a guard that holds nothing: a start is learned, restarted from, and passed over."""
    fast = level(8, step_size=0.5, transfer=initialization(order=1))
    levels = (fast, level(24, step_size=0.5))
    model = Decoder(ModelConfig(dim=16, heads=2, blocks=1, mixer=MODEL.config.mixer, levels=levels), seed=2)
    tokens = torch.tensor(list(text(1, 120)))
    free = Reader(model).read(Reader(model).begin(), tokens)[0].levels
    guard = Guard(OFF.guards, model.levels, GuardState.begin(2), "doc")
    judged = Reader(model, accept=guard).read(Reader(model).begin(), tokens)[0].levels
    assert judged.starts[0] is not None
    theirs = flatten(judged)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in flatten(free).items())
    over = advance(model.levels, judged, nothing(model.levels, judged, 8))
    assert over.starts[0] is not None
    assert int(over.starts[0].rules[0].elapsed) == (int(judged.starts[0].rules[0].elapsed) + 8) % 24


def test_decisions_do_not_depend_on_the_pieces() -> None:
    """The same segments are refused however the text arrives."""
    tokens = torch.tensor(list(text(1, 300) + garbage(3, 70) + text(2, 80)))
    found: list[tuple[GuardState, LevelsState]] = []
    for pieces in ([450], [1] * 450, [7, 200, 243]):
        guard = Guard(STRICT.guards, trained().levels, GuardState.begin(2), "doc")
        reader = Reader(trained(), accept=guard)
        state: ReadingState = reader.begin()
        for part in tokens.split(pieces):
            state, _ = reader.read(state, part)
        found.append((guard.state, state.levels))
        assert guard.refused["surprise"] >= 1
    for guards, levels in found[1:]:
        assert guards == found[0][0]
        theirs = flatten(found[0][1])
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in flatten(levels).items())


def test_numbers_survive_json() -> None:
    state = GuardState(Running(3, 0.1), (Running(1, 1e-17),), (Running(),), {"a": Record(4, 2, True, False)})
    assert GuardState.from_data(state.to_data()) == state


@pytest.mark.parametrize(
    ("broken", "said"),
    [({"surprise_jump": 1.0}, "surprise_jump must be > 1"), ({"strikes": 0}, "strikes"), ({"share": 2.0}, "share")],
    ids=str,
)
def test_bad_guards(broken: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Guards(**broken)
