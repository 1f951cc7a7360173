"""Does a life that sleeps stay small, and does it stay able to learn? Thirty bodies, or fifty, and as many nights.

    python studies/sleep/long/run.py --full [--resume]
    python studies/sleep/long/run.py --small-steps [--resume]
    python studies/sleep/long/run.py --tune

A small Hope-Attention is pre-trained on English documentation, then reads body after body. Every body is a piece of
English that nothing else has, its letters replaced by others (a substitution of its own), so that each is as fresh and
as hard as the one before. After every `each` tokens, text of the same substitution that is held out is predicted, on a
copy. Arms are lives with a sleep after each body, without, a fresh model for every body, and shrink-and-perturb.

Results: results/<form>.json beside this file, written after every life; of the life in hand a file is written after
every body. --resume goes on from there, with the same bits as if it had not been stopped. `summary.py` reads them.
"""

import argparse
import json
import math
import os
import string
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from nestling.levels import Growing, Reader, ReadingState, Taps, level, mean_surprise
from nestling.memory.state import map_tensors
from nestling.memory.structure import Weights
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import (
    Reservoir,
    SeedConfig,
    SleepConfig,
    affordable,
    any_token,
    draws,
    evict,
    merge,
    mixture,
    prefixes,
    used,
)
from nestling.sleep.arms import Arm, Kept, no_sleep, sleeping
from nestling.tasks.embedded import embedded_bodies
from nestling.tasks.record import write_result
from nestling.train import Stream, TrainConfig, Trainer

BITS = 1.4426950408889634
HERE = Path(__file__).resolve().parent
ARMS = ("none", "fresh", "shrink and perturb", "sleep", "default night", "sleep, reservoir", "sleep, evict")
Row = dict[str, Any]
DORMANT = 0.025  # of the mean activity of a level's units


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much of the study is done."""

    runs: tuple[int, ...]  # seeds, of the model, the pieces and the substitutions
    bodies: int
    sleeps: int  # bodies of the arm named sleep, one sleep after each
    body_bytes: int  # read of each body
    each: int  # bytes between two looks at held-out text
    held_out: int  # bytes of each body
    dim: int
    train_steps: int
    scale: float  # of the levels' step sizes
    shrink: float  # what is left of the learning levels' weights after each body
    perturb: float  # share of a fresh draw of weights that is added
    sleep: SleepConfig
    reservoir: int  # bytes of wake text kept by the arm that keeps some
    arms: tuple[str, ...] = ARMS[:5]
    read_bytes: int = 700_000  # of English, half of it for pre-training


FULL = Form(
    runs=(10, 11, 12),
    bodies=30,
    sleeps=50,
    body_bytes=2_048,
    each=512,
    held_out=1_024,
    dim=32,
    train_steps=150,
    scale=8.0,
    shrink=0.95,
    perturb=0.025,
    sleep=SleepConfig(seeding=SeedConfig(steps=0), dreams=32, held_out=16, length=16, rehearsal=1.0, when_full=merge()),
    reservoir=2_048,
)
SMALL_STEPS = replace(FULL, scale=1.0, sleeps=30, arms=("fresh", "default night", "sleep", "none"))
QUICK = replace(
    FULL,
    runs=(0,),
    bodies=2,
    sleeps=3,
    body_bytes=512,
    each=256,
    held_out=256,
    dim=16,
    train_steps=2,
    sleep=replace(FULL.sleep, dreams=4, held_out=2, length=8),
    arms=("none", "fresh", "shrink and perturb", "sleep"),
    read_bytes=20_000,
)
PERIODS = (128, 512)


class Text(NamedTuple):
    """A body: what is read, and what is only predicted."""

    read: bytes
    held_out: bytes


def substituted(text: bytes, *key: object) -> bytes:
    """The text with every letter replaced by another, small and capital alike."""
    order = torch.randperm(26, generator=draws(*key)).tolist()
    small, large = string.ascii_lowercase, string.ascii_uppercase
    to = "".join(small[i] for i in order) + "".join(large[i] for i in order)
    return text.translate(bytes.maketrans((small + large).encode(), to.encode()))


def texts(form: Form, run: int, given: bytes | None = None) -> tuple[bytes, bytes, list[Text]]:
    """English to pre-train on, English that is held out, and the bodies: pieces of their own, in a drawn order."""
    if given is None:
        bodies = embedded_bodies(
            read_bytes={"english": form.read_bytes, "python": 2_000, "names": 2_000}, held_out_bytes=32_768
        )
        given, english = b"\n".join(bodies["english"].read), b"\n".join(bodies["english"].held_out)
    else:
        given, english = given[: len(given) * 9 // 10], given[len(given) * 9 // 10 :]
    half, size = len(given) // 2, form.body_bytes + form.held_out
    pieces = [given[at : at + size] for at in range(half, len(given) - size + 1, size)]
    if len(pieces) < form.sleeps:
        raise ValueError(f"texts: {form.sleeps} bodies need {2 * form.sleeps * size} bytes, got {len(given)}")
    order = torch.randperm(len(pieces), generator=draws(run, "pieces"))[: form.sleeps].tolist()
    chosen = [substituted(pieces[i], run, "letters", k) for k, i in enumerate(order)]
    return given[:half], english[: form.held_out], [Text(p[: form.body_bytes], p[form.body_bytes :]) for p in chosen]


def pretrained(form: Form, english: bytes, seed: int) -> Growing:
    """What every arm of a run is born as."""
    levels = tuple(level(period, step_size=form.scale * size) for period, size in zip(PERIODS, (1.0, 2.0), strict=True))
    config = ModelConfig(dim=form.dim, heads=2, blocks=1, mixer=attention(window=64), levels=(*levels, level(math.inf)))
    train = TrainConfig(steps=form.train_steps, rows=8, length=128, learning_rate=4e-3, warmup_steps=10, seed=seed)
    trainer = Trainer(Decoder(config, seed=seed), train)
    stream = Stream.of([english], rows=8, length=128, reset_share=train.reset_share, seed=seed)
    while trainer.step < form.train_steps:
        trainer.run_step(stream)
    return Growing(trainer.model.requires_grad_(False), slots=5, rank=8)


def arm_of(form: Form, model: Growing, name: str) -> Arm:
    """How a life of this name spends its nights."""
    if name == "default night":
        told = affordable(model, form.body_bytes)
        if told is None:
            raise ValueError(f"body_bytes: {form.body_bytes} tokens pay for no default night")
        return sleeping(told)
    if name == "sleep, reservoir":
        length = form.sleep.length
        source = mixture((any_token(), prefixes(length // 2)), (0.5, 0.5))
        return sleeping(replace(form.sleep, source=source), form.reservoir // length, length)
    if name == "sleep, evict":
        return sleeping(replace(form.sleep, when_full=evict()))
    return sleeping(form.sleep) if name == "sleep" else no_sleep()


def shrunk(form: Form, model: Growing, state: ReadingState, key: object) -> ReadingState:
    """w <- shrink w + perturb v, v a fresh draw of such weights, for the levels that learn (Ash and Adams 2020)."""
    weights = list(state.levels.weights)
    for i, lvl in enumerate(model.own):
        if lvl.period != math.inf:
            fresh = lvl.structure.init(form.dim, form.dim, generator=draws(key, i))
            weights[i] = tuple(form.shrink * w + form.perturb * v for w, v in zip(weights[i], fresh, strict=True))
    return state._replace(levels=state.levels._replace(weights=tuple(weights)))


@torch.no_grad()
def plasticity(model: Growing, weights: tuple[Weights, ...], text: bytes) -> dict[str, float]:
    """Signs of a model that learns no more, over the levels' hidden units on a text: the share of units whose mean
    activity is below 0.025 of their level's (dormant, Sokar et al. 2023), the effective rank exp(H(s / sum s)) of
    their activities' singular values s (Roy and Vetterli 2007), and the norm of the weights of levels that learn."""
    taps: list[Taps] = []
    model(torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None], weights=weights, taps=taps)
    hidden = [tap.inputs[-1][0] for tap in taps if tap.inputs]
    learning = [w for lvl, maps in zip(model.own, weights, strict=False) if lvl.period != math.inf for w in maps]
    return {
        "dead units": sum(map(dormant, hidden)) / len(hidden),
        "effective rank": sum(map(effective_rank, hidden)) / len(hidden),
        "weight norm": math.sqrt(sum(float(w.square().sum()) for w in learning)),
        "slot norm": math.sqrt(sum(float(w.square().sum()) for maps in weights[len(model.own) :] for w in maps[:2])),
    }


def dormant(hidden: Tensor) -> float:
    """The share of units [n, units] that are hardly ever active."""
    activity = hidden.abs().mean(0)
    return float((activity <= DORMANT * activity.mean()).double().mean())


def effective_rank(hidden: Tensor) -> float:
    values = torch.linalg.svdvals(hidden.double())
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def stored_bytes(state: object) -> int:
    """Bytes of memory that the tensors of a state hold on to, each storage once."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    map_tensors(note, state)
    return sum(held.values())


def dense_bytes(state: object) -> int:
    """Bytes of the tensors of a state, each written out: what a life's size must stay inside of."""
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.numel() * tensor.element_size()) or tensor, state)
    return sum(sizes)


class Body(NamedTuple):
    """What one body of a life needs beside the life itself."""

    form: Form
    model: Growing
    arm: Arm
    text: Text
    english: bytes
    key: object

    def bits(self, state: ReadingState, text: bytes) -> float:
        return BITS * mean_surprise(self.model, [text], weights=state.levels.weights)

    def live(self, name: str, state: ReadingState, kept: Kept) -> tuple[ReadingState, Kept, Row]:
        """The life after a body and its night, and what is told of both."""
        reader, began = Reader(self.model), time.perf_counter()
        curve, nats = [self.bits(state, self.text.held_out)], []
        tokens = torch.frombuffer(bytearray(self.text.read), dtype=torch.uint8).long()
        for part in tokens.split(self.form.each):
            state, out = reader.read(state, part)
            nats.append(out.nll)
            curve.append(self.bits(state, self.text.held_out))
        kept, awake = self.arm.awake(kept, tokens, self.key), time.perf_counter()
        found = plasticity(self.model, state.levels.weights, self.text.held_out)
        state, kept, rest = self.arm.rest(self.model, state, kept, self.key)
        if name == "shrink and perturb":
            state = shrunk(self.form, self.model, Reader(self.model).settle(state), (self.key, "perturb"))
        rested, size = time.perf_counter(), stored_bytes(state.levels)
        whole = stored_bytes(state) + stored_bytes(kept.reservoir)
        state, _ = reader.end_document(state)
        row = {
            "curve": curve, "read at": BITS * float(torch.cat(nats).nanmean()),
            "after rest": self.bits(state, self.text.held_out), "english": self.bits(state, self.english),
            "level bytes": size, "state bytes": whole, "bytes of text": rest.bytes_stored,
            "slots": [count for _, count in sorted(used(self.model, state.levels.weights).items())],
            "pairs": [[p.outcome, p.room, p.before, p.after] for p in (rest.report.pairs if rest.report else ())],
            "tokens at rest": rest.tokens,
            "seconds awake": round(awake - began, 3), "seconds at rest": round(rested - awake, 3),
        }  # fmt: skip
        return state, kept, row | found


def save(file: Path, state: ReadingState, kept: Kept, rows: list[Row]) -> None:
    """A life between two bodies, for --resume: its sequence state is fresh there."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        alone = tensor.dim() > 0 and not any(tensor.stride())  # one zero that stands for all takes no room on disk too
        tensors.append((tensor[(0,) * tensor.dim()] if alone else tensor).clone())
        return tensor

    map_tensors(note, (state.levels, state.position))
    part = file.with_suffix(".part")
    torch.save({"tensors": tensors, "reservoir": list(kept.reservoir), "rows": json.dumps(rows)}, part)
    part.replace(file)


def load(file: Path, model: Growing, arm: Arm) -> tuple[ReadingState, Kept, list[Row]]:
    """The life that `save` wrote."""
    told, reader, kept = torch.load(file), Reader(model), arm.begin()
    fresh, tensors = reader.begin(), iter(told["tensors"])
    levels, position = map_tensors(lambda like: next(tensors).expand(like.shape), (fresh.levels, fresh.position))
    state = reader.begin(levels)._replace(position=position)
    return state, kept._replace(reservoir=Reservoir(*told["reservoir"])), json.loads(told["rows"])


def live(
    form: Form, model: Growing, name: str, run: int, bodies: Sequence[Text], english: bytes, file: Path
) -> Iterator[Row]:
    """The bodies of one life, one by one; those that `file` holds are not lived again."""
    arm = arm_of(form, model, name)
    state, kept, rows = Reader(model).begin(), arm.begin(), []
    if file.exists():
        state, kept, rows = load(file, model, arm)
    yield from rows
    for number in range(len(rows), len(bodies)):
        if name == "fresh":
            state = Reader(model).begin()
        body = Body(form, model, arm, bodies[number], english, (run, "life", number))
        state, kept, row = body.live(name, state, kept)
        rows.append({"body": number} | row)
        save(file, state, kept, rows)
        yield rows[-1]


def study(
    form: Form,
    name: str,
    folder: Path,
    *,
    resume: bool = False,
    given: bytes | None = None,
    arms: Sequence[str] = (),
    runs: Sequence[int] = (),
) -> dict[str, Any]:
    """All lives of a form, or those of some `arms` and `runs`; folder/<name>.json after each of them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    lives: list[dict[str, Any]] = json.loads(file.read_text())["lives"] if resume and file.exists() else []
    for run in runs or form.runs:
        wanted = [arm for arm in arms or form.arms if (run, arm) not in {(life["run"], life["arm"]) for life in lives}]
        if not wanted:
            continue
        read, english, bodies = texts(form, run, given)
        model = pretrained(form, read, run)
        budget = dense_bytes(Reader(model).begin().levels)
        for arm in wanted:
            state = folder / f".{name}-{run}-{ARMS.index(arm)}.pt"
            if not resume:
                state.unlink(missing_ok=True)
            rows = list(
                live(form, model, arm, run, bodies if arm == "sleep" else bodies[: form.bodies], english, state)
            )
            lives.append({"run": run, "arm": arm, "budget": budget, "rows": rows})
            write_result(folder, name, {"form": repr(form), "lives": lives})
            state.unlink(missing_ok=True)
            ends = [row["curve"][-1] for row in rows]
            print(f"run {run}, {arm}: bits after a body {ends[0]:.3f} ... {ends[-1]:.3f}", flush=True)
    return {"lives": lives}


def tune(folder: Path) -> None:
    """Step sizes, then shrink-and-perturb, on a seed that is not reported: mean bits a byte right after a body. What
    results/tuning.json holds is not done again."""
    short, file = replace(FULL, runs=(100,), bodies=10), folder / "tuning.json"
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    scales = [replace(short, scale=scale, arms=("none", "fresh")) for scale in (1.0, 2.0, 4.0, 8.0, 16.0)]
    shrinks = [
        replace(short, shrink=shrink, perturb=round((1 - shrink) / 2, 3), arms=("shrink and perturb",))
        for shrink in (0.99, 0.95, 0.9)
    ]
    for form in (*shrinks, *scales):
        told = {"scale": form.scale, "shrink": form.shrink, "perturb": form.perturb}
        if any(row["form"] == told and row["arm"] == form.arms[0] for row in rows):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            lives = study(form, "tuning", Path(temporary))["lives"]
        for life in lives:
            mean = sum(row["curve"][-1] for row in life["rows"]) / form.bodies
            rows.append({"form": told, "arm": life["arm"], "bits after a body": mean})
        write_result(folder, "tuning", {"about": repr(short), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--quick", action="store_true")
    form.add_argument("--full", action="store_true")
    form.add_argument("--small-steps", action="store_true", help="the full form with an eighth of its step sizes")
    form.add_argument("--tune", action="store_true")
    parser.add_argument("--texts", type=Path, help="a file of text to use instead of Python's own documentation")
    parser.add_argument("--only", nargs="*", help="names of arms")
    parser.add_argument("--runs", nargs="*", type=int)
    parser.add_argument("--resume", action="store_true", help="go on after the last body that the result file holds")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    told = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if told.tune:
        return tune(told.out)
    chosen, name = (FULL, "full") if told.full else (QUICK, "quick")
    if told.small_steps:
        chosen, name = SMALL_STEPS, "small_steps"
    given = told.texts.read_bytes() if told.texts else None
    study(chosen, name, told.out, resume=told.resume, given=given, arms=told.only or (), runs=told.runs or ())


if __name__ == "__main__":
    main()
