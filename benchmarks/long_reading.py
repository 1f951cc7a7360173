"""Reading far beyond the training length: what it costs to 64 times it, for both kinds of retention.

    python benchmarks/long_reading.py [--steps 400] [--seeds 4]

A small Hope is trained on English documentation in rows of 128 bytes that go on over steps, with resets, and then reads
held-out text in pieces of 8,192 bytes from fresh states, its levels as they stand. Every byte from the 128th on is
compared with itself, read with the 64 to 127 bytes before it alone: what stands later in the pieces may be harder text.
Differences come with their standard errors over pieces. Results go to benchmarks/results/long_reading.json, after
every run.
"""

import argparse
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from nestling.levels import LevelledModel, surprise_by_position
from nestling.memory import clip, dampen, decay, decay_to_start, delta_gradient_descent, momentum, retain
from nestling.models import Decoder, preset
from nestling.sequence import self_modifying
from nestling.tasks.demo import BITS
from nestling.tasks.embedded import embedded_bodies
from nestling.tasks.record import write_result
from nestling.train import Stream, TrainConfig, Trainer

LENGTH, TIMES = 128, 64
EDGES = [LENGTH * 2**n for n in range(7)]  # positions of bytes
INNER = delta_gradient_descent(momentum(dampen(clip())))
RETENTIONS = {"to the start": retain(decay_to_start(), INNER), "to zero": retain(decay(), INNER)}


def run(name: str, seed: int, steps: int, rows: int, lr: float) -> dict[str, Any]:
    base = preset("small")
    config = replace(base, mixer=replace(self_modifying(), rule=RETENTIONS[name]))
    train = TrainConfig(steps=steps, rows=rows, length=LENGTH, learning_rate=lr, warmup_steps=10, seed=seed)
    bodies = embedded_bodies(held_out_bytes=58_368, seed=seed)["english"]
    stream = Stream.of(bodies.read, rows=rows, length=LENGTH, reset_share=train.reset_share, seed=seed)
    trainer = Trainer(Decoder(config, seed=seed), train)
    while trainer.step < steps:
        trainer.run_step(stream)
    text = b"\n".join(bodies.held_out)
    pieces = [text[at : at + LENGTH * TIMES] for at in range(0, len(text) - LENGTH * TIMES + 1, LENGTH * TIMES)]
    whole = bits(trainer.model, pieces)
    far, near = whole[:, LENGTH - 1 :], at_training_length(trainer.model, pieces)
    spans = {f"{a} to {b}": slice(a - LENGTH, b - LENGTH) for a, b in itertools.pairwise(EDGES)}
    all_of_it = compared(far, near)
    return {
        "retention": name,
        "seed": seed,
        "finite": bool(whole.isfinite().all()),
        "pieces": len(pieces),
        "bits_per_byte": round(float(far.mean()), 3),
        "at the training length": round(float(near.mean()), 3),
        "difference": all_of_it,
        "no worse": all_of_it[0] <= 2 * all_of_it[1],
        "difference by position": {span: compared(far[:, at], near[:, at]) for span, at in spans.items()},
    }


def bits(model: LevelledModel, pieces: list[bytes]) -> Tensor:
    """Of every byte but the first of each piece."""
    return surprise_by_position(model, pieces, piece=len(pieces[0])) * BITS


def at_training_length(model: LevelledModel, pieces: list[bytes]) -> Tensor:
    """Bits of every byte of the pieces from the LENGTH-th on, from a fresh state half to a whole LENGTH before it."""
    half = LENGTH // 2
    cuts = [piece[at : at + LENGTH] for piece in pieces for at in range(half, len(piece) - half, half)]
    return bits(model, cuts)[:, half - 1 :].reshape(len(pieces), -1)


def compared(far: Tensor, near: Tensor) -> tuple[float, float]:
    """The mean of far - near, and its standard error over pieces."""
    each = (far - near).mean(1)
    return round(float(each.mean()), 4), round(float(each.std()) / math.sqrt(len(each)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    runs = []
    for name in RETENTIONS:
        for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
            runs.append(run(name, seed, asked.steps, asked.rows, asked.lr))
            print(json.dumps(runs[-1]), flush=True)
            train = {"steps": asked.steps, "rows": asked.rows, "length": LENGTH, "lr": asked.lr}
            result = {"what": "benchmarks/long_reading.py", "train": train, "runs": runs}
            write_result(asked.out, "long_reading", result)


if __name__ == "__main__":
    main()
