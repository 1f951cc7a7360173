"""Training: streams, clocks of levels, checkpoints, and going on bit for bit."""

import math
import random
from pathlib import Path

import pytest
import torch

from kills import survive
from nestling.learner import machine, newest, read_generation, write_generation
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig, preset
from nestling.train import Stream, TrainConfig, Trainer, load_run, save_run

TEXT = [bytes(random.Random(number).choices(b"abcdefgh \n", k=900 + 70 * number)) for number in range(6)]
TINY = preset("tiny")


def stream(config: TrainConfig, documents: list[bytes] | None = None) -> Stream:
    documents = TEXT if documents is None else documents
    return Stream.of(
        documents, rows=config.rows, length=config.length, reset_share=config.reset_share, seed=config.seed
    )


def test_rows_continue_over_batches() -> None:
    one = Stream.of(TEXT, rows=3, length=50)
    data = b"".join(TEXT)
    for row in range(3):
        start = row * (len(data) // 3)
        read = b"".join(bytes(one.batch(number).tokens[row].tolist()) for number in range(5))
        assert read == data[start : start + 250]
    batch = one.batch(2)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_documents_start_where_they_start() -> None:
    one = Stream.of([b"aaaa", b"bbbbbb", b"", b"cccccccc"], rows=2, length=9)
    batch = one.batch(0)
    assert bytes(batch.tokens[0].tolist()) == b"aaaabbbbb"
    assert batch.reset[0].nonzero().flatten().tolist() == [0, 4]
    assert (~batch.counts[0]).nonzero().flatten().tolist() == [3]  # the target that nothing foretells
    assert one.batch(1).reset[0].nonzero().flatten().tolist() == [1]  # "b" goes on, then "c" begins


def test_random_resets_have_their_share_and_a_seed() -> None:
    share = torch.stack(
        [Stream.of(TEXT, rows=4, length=8, reset_share=0.25).batch(n).reset[:, 0] for n in range(1, 400)]
    )
    starts = torch.stack([Stream.of(TEXT, rows=4, length=8).batch(n).reset[:, 0] for n in range(1, 400)])
    assert abs(float((share & ~starts).float().mean()) - 0.25) < 0.03
    other = Stream.of(TEXT, rows=4, length=8, reset_share=0.25, seed=1)
    assert any(
        not torch.equal(other.batch(n).reset, Stream.of(TEXT, rows=4, length=8, reset_share=0.25).batch(n).reset)
        for n in range(1, 9)
    )


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match="too few"):
        Stream.of([b"abc"], rows=4, length=8)


def test_level_clock_holds_back_until_its_period() -> None:
    """Two rows of 16 tokens make 32 a step: a level of period 96 moves every third step, on the mean gradient."""
    levels = tuple(type(TINY.levels[0])(period) for period in (32, 96, math.inf))
    model = Decoder(ModelConfig(dim=16, heads=2, blocks=1, mixer=TINY.mixer, levels=levels))
    config = TrainConfig(steps=6, rows=2, length=16)
    trainer = Trainer(model, config)
    moved = []
    for _ in range(6):
        before = [tuple(w.detach().clone() for w in maps) for maps in model.level_weights()]
        trainer.run_step(stream(config))
        moved.append([not torch.equal(old[0], new[0]) for old, new in zip(before, model.level_weights(), strict=True)])
    assert moved == [[True, step % 3 == 2, True] for step in range(6)]


def test_compile_is_for_the_steps_of_mixers() -> None:
    """That these are then compiled, and are the plain ones: tests/test_compiled.py."""
    models = [Decoder(TINY) for _ in range(2)]
    for model, asked in zip(models, (False, True), strict=True):
        Trainer(model, TrainConfig(compile=asked))
    plain, compiled = ({block.mixer.step_options is not None for block in model.blocks} for model in models)
    assert (plain, compiled) == ({False}, {True})


def test_accumulation_in_parts_is_one_batch() -> None:
    config = TrainConfig(steps=2, rows=4, length=20)
    weights = []
    for accumulate in (1, 2, 4):
        model = Decoder(TINY, seed=3).double()
        part = TrainConfig(steps=2, rows=4, length=20, accumulate=accumulate)
        trainer = Trainer(model, part)
        for _ in range(2):
            trainer.run_step(stream(config))
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-7, msg=name)
        torch.testing.assert_close(weights[2][name], weight, rtol=0, atol=1e-7, msg=name)


def test_not_finite_raises_and_changes_nothing() -> None:
    config = TrainConfig(steps=2, rows=2, length=16)
    model = Decoder(TINY)
    trainer = Trainer(model, config)
    with torch.no_grad():
        model.norm.fill_(float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.run_step(stream(config))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    config = TrainConfig(steps=8, rows=2, length=24, reset_share=0.3)
    straight = Trainer(Decoder(TINY, seed=1), config)
    for _ in range(8):
        straight.run_step(stream(config))
    first = Trainer(Decoder(TINY, seed=1), config)
    for _ in range(5):
        first.run_step(stream(config))
    save_run(tmp_path, first, {})
    second = Trainer(Decoder(TINY, seed=9), config)
    assert load_run(tmp_path, second) == []
    for _ in range(3):
        second.run_step(stream(config))
    for (name, one), two in zip(straight.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(straight.states, second.states, strict=True):
        assert all(torch.equal(flatten(one)[name], tensor) for name, tensor in flatten(two).items())


def test_resume_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(steps=2, rows=2, length=24)
    trainer = Trainer(Decoder(TINY), config)
    trainer.run_step(stream(config))
    monkeypatch.setattr("nestling.train.checkpoint.machine", lambda: {**machine(), "threads": 64})
    save_run(tmp_path, trainer, {})
    assert load_run(tmp_path, Trainer(Decoder(TINY), config)) == [f"threads: 64 then, {torch.get_num_threads()} now"]


def test_generations_are_whole_and_few(tmp_path: Path) -> None:
    for number in range(5):
        write_generation(tmp_path, number, {"a.safetensors": {"x": torch.full((3,), float(number))}, "b.json": "{}"})
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["000000000003", "000000000004"]
    latest = newest(tmp_path)
    assert latest is not None
    assert torch.equal(read_generation(latest).tensors["a"]["x"], torch.full((3,), 4.0))
    (latest / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged"):
        read_generation(latest)


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL at five random moments; the run goes on each time, and ends where an unkilled one ends."""
    assert survive(tmp_path, kills=5, steps=90)["tensors_equal"] > 50
