"""Reading far beyond the training length: bits per byte by position to 64 times it, for both kinds of retention.

    python benchmarks/long_reading.py [--steps 300] [--seeds 3]

A small Hope is trained on English documentation in rows of 128 bytes that go on over steps, with resets, and then reads
held-out text in pieces of 8,192 bytes from fresh states, its levels as they stand. Results go to
benchmarks/results/long_reading.json, after every run.
"""

import argparse
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nestling.levels.evaluation import surprise_by_position
from nestling.memory import clip, dampen, decay, decay_to_start, delta_gradient_descent, momentum, retain
from nestling.models import Decoder, preset
from nestling.sequence import self_modifying
from nestling.tasks.demo import BITS
from nestling.tasks.embedded import embedded_bodies
from nestling.tasks.record import write_result
from nestling.train import Stream, TrainConfig, Trainer

LENGTH, TIMES = 128, 64
EDGES = [0, 64, 128, 256, 512, 1024, 2048, 4096, 8191]
INNER = delta_gradient_descent(momentum(dampen(clip())))
RETENTIONS = {"to the start": retain(decay_to_start(), INNER), "to zero": retain(decay(), INNER)}


def run(name: str, seed: int, steps: int, rows: int, lr: float) -> dict[str, Any]:
    base = preset("small")
    config = replace(base, mixer=replace(self_modifying(), rule=RETENTIONS[name]))
    train = TrainConfig(steps=steps, rows=rows, length=LENGTH, learning_rate=lr, warmup_steps=10, seed=seed)
    bodies = embedded_bodies(held_out_bytes=61_440, seed=seed)["english"]
    stream = Stream.of(bodies.read, rows=rows, length=LENGTH, reset_share=train.reset_share, seed=seed)
    trainer = Trainer(Decoder(config, seed=seed), train)
    while trainer.step < steps:
        trainer.run_step(stream)
    text = b"\n".join(bodies.held_out)
    pieces = [text[at : at + LENGTH * TIMES] for at in range(0, len(text) - LENGTH * TIMES + 1, LENGTH * TIMES)]
    nats = surprise_by_position(trainer.model, pieces, piece=LENGTH * TIMES)
    spans = {f"{a} to {b}": round(float(nats[:, a:b].mean()) * BITS, 3) for a, b in itertools.pairwise(EDGES)}
    # the same text cut at the training length: what a context of 64 to 128 bytes gives everywhere in it
    short = float(surprise_by_position(trainer.model, pieces, piece=LENGTH)[:, LENGTH // 2 :].mean()) * BITS
    return {
        "retention": name,
        "seed": seed,
        "finite": bool(nats.isfinite().all()),
        "pieces": len(pieces),
        "bits_per_byte": spans,
        "same text at the training length": round(short, 3),
        "last half": round(float(nats[:, LENGTH * TIMES // 2 :].mean()) * BITS, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    runs = []
    for seed in range(asked.seeds):
        for name in RETENTIONS:
            runs.append(run(name, seed, asked.steps, asked.rows, asked.lr))
            print(json.dumps(runs[-1]), flush=True)
            train = {"steps": asked.steps, "rows": asked.rows, "length": LENGTH, "lr": asked.lr}
            result = {"what": "benchmarks/long_reading.py", "train": train, "runs": runs}
            write_result(asked.out, "long_reading", result)


if __name__ == "__main__":
    main()
