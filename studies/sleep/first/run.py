"""Does sleep keep what a life has learned? Four arms and their controls, read on real text that is held out.

    python studies/sleep/first/run.py --quick [--texts FOLDER]
    python studies/sleep/first/run.py --full --texts FOLDER

A small Hope-Attention is pre-trained on English documentation, then lives through bodies of text that follow one
another, and rests after every `night` tokens. Each arm is run at several step sizes, so that arms can be compared at
equal plasticity: forgetting is read off the no-sleep arm's frontier where it has learned as much of the newest body.

texts: a folder with more bodies, one file *.txt or *.txt.xz each; the last tenth of each is held out. Without it the
bodies are the Python source and the Unicode names that come with Python. Results: results/<form>.json beside this file.
"""

import argparse
import json
import lzma
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nestling.levels import Growing, Reader, ReadingState, level, mean_surprise
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import SeedConfig, SleepConfig, any_token, merge, mixture, prefixes
from nestling.sleep.arms import Arm, ewc, extra_passes, fall_back, no_sleep, off_policy, replay, sleeping
from nestling.tasks.embedded import embedded_bodies
from nestling.tasks.record import write_result
from nestling.train import Stream, TrainConfig, Trainer

BITS = 1.4426950408889634
HERE = Path(__file__).resolve().parent
OLD = "english"


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much of the study is done."""

    runs: int  # pairs of a seed and an order of bodies
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
    runs=4,
    dim=48,
    train_steps=150,
    body_bytes=4_096,
    night=2_048,
    held_out=4_096,
    scales=(0.5,),
    frontier=(0.03, 0.06, 0.12, 0.25, 0.5, 1.0),
    sleep=SleepConfig(seeding=SEEDING, dreams=48, held_out=24, length=24, rehearsal=0.0, when_full=merge()),
)
FULL = replace(
    QUICK,
    runs=8,
    dim=128,
    train_steps=2_000,
    body_bytes=65_536,
    night=16_384,
    held_out=32_768,
    scales=(0.25, 0.5, 1.0, 2.0),
    frontier=(0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0),
    sleep=replace(QUICK.sleep, seeding=replace(SEEDING, steps=100, prefixes=8, completions=4), dreams=256, length=64),
)
PERIODS = (64, 512)


def arms(form: Form) -> dict[str, Arm]:
    """By name. Reservoirs are of the same size; a night of replay reads as many tokens as were read awake / 4."""
    held = 4_096 // form.sleep.length
    mixed = mixture((any_token(), prefixes(form.sleep.length // 2)), (0.5, 0.5))
    return {
        "none": no_sleep(),
        "sleep": sleeping(form.sleep),
        "sleep, reservoir": sleeping(replace(form.sleep, source=mixed), held, form.sleep.length),
        "sleep, rehearsal": sleeping(replace(form.sleep, rehearsal=1.0)),
        "regression alone": sleeping(replace(form.sleep, rehearsal=1.0, seeding=replace(form.sleep.seeding, steps=0))),
        "replay": replay(held, form.sleep.length, form.night // 4),
        "extra passes": extra_passes(1, form.night // 4),
        "off policy": off_policy(form.sleep),
        "fall back": fall_back(0.5),
        "ewc": ewc(dreams=form.sleep.dreams, length=form.sleep.length),
    }


def bodies(form: Form, texts: Path | None, seed: int) -> dict[str, tuple[bytes, bytes]]:
    """(read, held out) by name; the first is what the model is pre-trained on."""
    found = {}
    for name, body in embedded_bodies(held_out_bytes=max(8_192, form.held_out), seed=seed).items():
        found[name] = (b"\n".join(body.read), b"\n".join(body.held_out)[: form.held_out])
    for file in sorted([*texts.rglob("*.txt"), *texts.rglob("*.txt.xz")]) if texts else []:
        text = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        edge = len(text) * 9 // 10
        if edge >= form.body_bytes and len(text) - edge >= form.held_out:
            found[file.name.partition(".")[0]] = (text[:edge], text[edge : edge + form.held_out])
    return found


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
    parser.add_argument("--out", default=None)
    told = parser.parse_args()
    chosen = FULL if told.full else QUICK
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results: list[dict[str, Any]] = []
    for run in told.runs or range(chosen.runs):
        texts = bodies(chosen, told.texts, run)
        model = pretrained(chosen, texts[OLD][0], run)
        names = [name for name in texts if name != OLD]
        order = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(run)).tolist()]
        order = order[: told.bodies]
        days = [(name, texts[name][0][: chosen.body_bytes]) for name in order]
        for scale in sorted({*chosen.scales, *chosen.frontier}):
            growing = scaled(model, scale)
            probes = {
                name: lambda s, held=texts[name][1]: BITS * mean_surprise(growing, [held], weights=s.levels.weights)  # noqa: B023
                for name in [OLD, *order]
            }
            for name, arm in arms(chosen).items():
                if (told.only and name not in told.only) or scale not in (
                    chosen.frontier if name == "none" else chosen.scales
                ):
                    continue
                lived = live(growing, arm, days, probes, chosen.night, (run, "life"))
                found = {"run": run, "order": order, "scale": scale, "arm": name} | measures(lived["bits"], order)
                results.append(found | lived)
                print(json.dumps(found | {k: lived[k] for k in ("seconds at rest", "bytes stored")}), flush=True)
                about = {
                    "form": repr(chosen),
                    "texts": sorted(texts),
                    "at equal plasticity": at_equal_plasticity(results),
                }
                about["lives"] = results
                write_result(HERE / "results", told.out or ("full" if told.full else "quick"), about)  # what there is


if __name__ == "__main__":
    main()
