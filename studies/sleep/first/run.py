"""Does sleep keep what a life has learned? Four arms and their controls, read on real text that is held out.

    python studies/sleep/first/run.py --quick [--texts FOLDER]
    python studies/sleep/first/run.py --full --texts FOLDER [--resume]

A small Hope-Attention is pre-trained on English documentation, then lives through bodies of text that follow one
another, and rests after every `night` tokens. Each arm is run at several step sizes, so that arms can be compared at
equal plasticity: forgetting is read off the no-sleep arm's frontier where it has learned as much of the newest body.

texts: a folder with more bodies, one file *.txt or *.txt.xz each; the last tenth of each is held out. Without it the
bodies are the Python source and the Unicode names that come with Python. Results: results/<form>.json beside this file,
written after every life; --resume goes on from what is there. `summary.py` reads it.
"""

import argparse
import json
import lzma
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nestling.levels import Growing, Reader, ReadingState, level, mean_surprise
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import SeedConfig, SleepConfig, any_token, merge, mixture, prefixes
from nestling.sleep.arms import Arm, ewc, extra_passes, fall_back, no_sleep, off_policy, replay, sleeping
from nestling.sleep.grow import draws
from nestling.tasks.embedded import Body, check_no_leak, embedded_bodies
from nestling.tasks.record import write_result
from nestling.train import Stream, TrainConfig, Trainer

BITS = 1.4426950408889634
HERE = Path(__file__).resolve().parent
OLD = "english"


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much of the study is done."""

    runs: tuple[int, ...]  # each a seed and an order of bodies
    arms: tuple[str, ...]
    dim: int
    train_steps: int
    body_bytes: int  # read of each body
    night: int  # tokens between two rests
    held_out: int  # bytes of each body
    scales: tuple[float, ...]  # of the levels' step sizes, for every arm
    frontier: tuple[float, ...]  # the same, for the arm that does not sleep
    sleep: SleepConfig


SEEDING = SeedConfig(steps=16, prefixes=4, completions=2, learning_rate=3e-3)
QUICK = Form(
    runs=(0, 1, 2, 3),
    arms=(
        "none",
        "sleep, no rehearsal",
        "sleep",
        "regression alone",
        "off policy",
        "replay",
        "extra passes",
        "fall back",
        "ewc",
    ),
    dim=48,
    train_steps=150,
    body_bytes=4_096,
    night=2_048,
    held_out=4_096,
    scales=(0.5,),
    frontier=(0.03, 0.06, 0.12, 0.25, 0.5, 1.0),
    sleep=SleepConfig(seeding=SEEDING, dreams=48, held_out=24, length=24, rehearsal=0.0, when_full=merge()),
)
# Settings were chosen on runs 0 to 3 (the quick form) and 100; the full form's runs are others.
FULL = replace(
    QUICK,
    runs=tuple(range(10, 18)),
    arms=("none", "sleep", "sleep, reservoir", "replay", "extra passes"),
    train_steps=300,
    body_bytes=6_144,
    night=3_072,
    frontier=(0.03, 0.06, 0.12, 0.25, 0.5),
    sleep=replace(QUICK.sleep, seeding=replace(SEEDING, steps=8, prefixes=8, learning_rate=1e-3)),
)
PERIODS = (64, 512)


def arms(form: Form) -> dict[str, Arm]:
    """By name. Reservoirs are of the same size; a night of replay reads as many tokens as were read awake / 4."""
    held = 4_096 // form.sleep.length
    mixed = mixture((any_token(), prefixes(form.sleep.length // 2)), (0.5, 0.5))
    rehearsed = replace(form.sleep, rehearsal=1.0)
    return {
        "none": no_sleep(),
        "sleep, no rehearsal": sleeping(form.sleep),
        "sleep": sleeping(rehearsed),
        "sleep, reservoir": sleeping(replace(rehearsed, source=mixed), held, form.sleep.length),
        "regression alone": sleeping(replace(rehearsed, seeding=replace(form.sleep.seeding, steps=0))),
        "replay": replay(held, form.sleep.length, form.night // 4),
        "extra passes": extra_passes(1, form.night // 4),
        "off policy": off_policy(form.sleep),
        "fall back": fall_back(0.5),
        "ewc": ewc(dreams=form.sleep.dreams, length=form.sleep.length),
    }


def bodies(form: Form, texts: Path | None) -> dict[str, Body]:
    """By name; pre-training's first. No held-out text shares 50 bytes with any that is read."""
    found = embedded_bodies(held_out_bytes=32_768)
    for file in sorted([*texts.rglob("*.txt"), *texts.rglob("*.txt.xz")]) if texts else []:
        text = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        edge = len(text) * 9 // 10
        if edge >= form.body_bytes and len(text) - edge >= form.held_out:
            name = file.parent.name if file.name.startswith("input") else file.name.partition(".")[0]
            found[name] = Body(name, (text[:edge],), (text[edge : edge + 32_768],))
    check_no_leak(found)
    return found


def piece(documents: tuple[bytes, ...], size: int, *key: object) -> bytes:
    """Some bytes of a body, from a place of a run's own."""
    text = b"\n".join(documents)
    start = int(torch.randint(0, max(1, len(text) - size), (1,), generator=draws(*key)))
    return text[start : start + size]


def pretrained(form: Form, english: bytes, seed: int) -> Decoder:
    levels = (level(PERIODS[0], step_size=1.0), level(PERIODS[1], step_size=2.0), level(float("inf")))
    config = ModelConfig(dim=form.dim, heads=2, blocks=2, mixer=attention(window=64), levels=levels)
    train = TrainConfig(steps=form.train_steps, rows=8, length=128, learning_rate=4e-3, warmup_steps=10, seed=seed)
    trainer = Trainer(Decoder(config, seed=seed), train)
    stream = Stream.of([english], rows=8, length=128, reset_share=train.reset_share, seed=seed)
    while trainer.step < form.train_steps:
        trainer.run_step(stream)
    return trainer.model.requires_grad_(False)


def scaled(model: Decoder, scale: float) -> Growing:
    """The same weights, with levels that take larger or smaller steps."""
    levels = tuple(replace(lvl, step_size=lvl.step_size * scale) for lvl in model.config.levels)
    other = Decoder(replace(model.config, levels=levels)).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return Growing(other, slots=5, rank=8)


def live(
    model: Growing,
    arm: Arm,
    days: list[tuple[str, bytes]],
    probes: dict[str, Callable[[ReadingState], float]],
    night: int,
    key: object,
) -> dict[str, Any]:
    """One life: every body in turn, a rest after each `night` tokens; bits per byte of every body after every one."""
    reader, kept = Reader(model), arm.begin()
    state, table = reader.begin(), [{name: probe(reader.begin()) for name, probe in probes.items()}]
    reports, seconds, spent, stored, awake = [], 0.0, 0, 0, 0.0
    for number, (_, text) in enumerate(days):
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        for index, part in enumerate(tokens.split(night)):
            began = time.perf_counter()
            state, _ = reader.read(state, part)
            awake += time.perf_counter() - began
            kept = arm.awake(kept, part, key)
            began = time.perf_counter()
            state, kept, rest = arm.rest(model, state, kept, (key, number, index))
            seconds += time.perf_counter() - began
            spent, stored = spent + rest.tokens, max(stored, rest.bytes_stored)
            reports += [
                {"pair": [p.fast, p.slow], "outcome": p.outcome, "before": p.before, "started": p.started,
                 "after": p.after, "room": p.room, "students": p.students}
                for p in (rest.report.pairs if rest.report else ())
            ]  # fmt: skip
        state, _ = reader.end_document(state)
        table.append({name: probe(state) for name, probe in probes.items()})
    return {
        "bits": table, "seconds awake": round(awake, 2), "seconds at rest": round(seconds, 2),
        "tokens at rest": spent, "bytes stored": stored, "pairs": reports,
    }  # fmt: skip


def measures(table: list[dict[str, float]], order: list[str]) -> dict[str, float]:
    """learned: how far below its first value each body stood right after it was read; forgotten: how far above its
    lowest value each older body (pre-training's too) stands at the end. Means, in bits a byte."""
    learned = [table[0][name] - table[k + 1][name] for k, name in enumerate(order)]
    old = [OLD, *order[:-1]]
    forgotten = [table[-1][name] - min(row[name] for row in table) for name in old]
    final = [table[-1][name] for name in [OLD, *order]]
    return {
        "learned": sum(learned) / len(learned),
        "forgotten": sum(forgotten) / len(forgotten),
        "all bodies at the end": sum(final) / len(final),
    }


def at_equal_plasticity(lives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every life that rests: what the no-sleep arm of the same run forgets where it has learned as much, read off
    its frontier by straight lines, and the share of it that was recovered. None: outside of the frontier."""
    found = []
    for life in lives:
        if life["arm"] == "none":
            continue
        points = sorted(
            (other["learned"], other["forgotten"])
            for other in lives
            if other["arm"] == "none" and other["run"] == life["run"]
        )
        without = None
        for (low, least), (high, most) in pairwise(points):
            if low <= life["learned"] <= high:
                share = (life["learned"] - low) / max(high - low, 1e-12)
                without = least + share * (most - least)
        recovered = None if without is None else 1 - life["forgotten"] / without
        told = {key: life[key] for key in ("run", "arm", "scale", "learned", "forgotten")}
        found.append(told | {"none forgets": without, "recovered": recovered})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--quick", action="store_true")
    form.add_argument("--full", action="store_true")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--only", nargs="*", help="names of arms")
    parser.add_argument("--runs", nargs="*", type=int, help="numbers of runs; all by default")
    parser.add_argument("--bodies", type=int, default=3, help="bodies of a life")
    parser.add_argument("--resume", action="store_true", help="keep the lives that the result file holds")
    parser.add_argument("--out", default=None)
    told = parser.parse_args()
    form, name = (FULL, "full") if told.full else (QUICK, "quick")
    name = told.out or name
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    file = HERE / "results" / f"{name}.json"
    lives: list[dict[str, Any]] = json.loads(file.read_text())["lives"] if told.resume and file.exists() else []
    texts = bodies(form, told.texts)
    for run in told.runs or form.runs:
        for life in run_lives(form, texts, run, told.bodies, told.only or form.arms, lives):
            lives.append(life)
            about = {"form": repr(form), "texts": sorted(texts), "at equal plasticity": at_equal_plasticity(lives)}
            write_result(HERE / "results", name, about | {"lives": lives})
            said = ("run", "arm", "scale", "learned", "forgotten", "seconds awake", "seconds at rest")
            print(json.dumps({key: life[key] for key in said}), flush=True)


def run_lives(
    form: Form, texts: dict[str, Body], run: int, count: int, names: Sequence[str], done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every life of one run that has not been lived yet."""
    orders = list(permutations(sorted(name for name in texts if name != OLD), count))
    order = list(orders[run % len(orders)])
    held_out = {name: piece(texts[name].held_out, form.held_out, run, name, "held out") for name in [OLD, *order]}
    days = [(name, piece(texts[name].read, form.body_bytes, run, name, "read")) for name in order]
    lived = {(life["run"], life["arm"], life["scale"]) for life in done}
    wanted = [
        (scale, name)
        for scale in sorted({*form.scales, *form.frontier})
        for name in names
        if scale in (form.frontier if name == "none" else form.scales) and (run, name, scale) not in lived
    ]
    model = pretrained(form, b"\n".join(texts[OLD].read), run) if wanted else None
    for scale, name in wanted:
        assert model is not None
        growing = scaled(model, scale)
        probes = {body: _probe(growing, text) for body, text in held_out.items()}
        life = live(growing, arms(form)[name], days, probes, form.night, (run, "life"))
        yield {"run": run, "order": order, "scale": scale, "arm": name} | measures(life["bits"], order) | life


def _probe(model: Growing, text: bytes) -> Callable[[ReadingState], float]:
    return lambda state: BITS * mean_surprise(model, [text], weights=state.levels.weights)


if __name__ == "__main__":
    main()
