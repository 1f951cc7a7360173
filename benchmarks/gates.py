"""What linear memories for the gates cost and spare: held-out bits per byte beside those of deep ones, seed by seed.

    python benchmarks/gates.py [--steps 400] [--seeds 6]

A small Hope is trained on English documentation with `self_modifying()` as it is, whose step sizes and retention come
from MLPs, and with `gate_structure=matrix()`, from equal data in equal order, and read on held-out text in pieces of
512 bytes from fresh states. Results go to benchmarks/results/gates.json, after every pair of runs.
"""

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nestling.levels import surprise_by_position
from nestling.memory import Structure, matrix
from nestling.models import Decoder, preset
from nestling.sequence import self_modifying
from nestling.tasks.demo import BITS
from nestling.tasks.embedded import embedded_bodies
from nestling.tasks.record import write_result
from nestling.train import Stream, TrainConfig, Trainer

LENGTH, PIECE = 128, 512
STRUCTURES: dict[str, Structure | None] = {"deep": None, "linear": matrix()}


def run(structure: Structure | None, seed: int, steps: int, rows: int, lr: float) -> dict[str, Any]:
    config = replace(preset("small"), mixer=self_modifying(gate_structure=structure))
    train = TrainConfig(steps=steps, rows=rows, length=LENGTH, learning_rate=lr, warmup_steps=10, seed=seed)
    bodies = embedded_bodies(held_out_bytes=40_960, seed=seed)["english"]
    stream = Stream.of(bodies.read, rows=rows, length=LENGTH, reset_share=train.reset_share, seed=seed)
    trainer = Trainer(Decoder(config, seed=seed), train)
    began = time.process_time()
    while trainer.step < steps:
        trainer.run_step(stream)
    seconds = time.process_time() - began
    text = b"\n".join(bodies.held_out)
    pieces = [text[at : at + PIECE] for at in range(0, len(text) - PIECE + 1, PIECE)]
    bits = float(surprise_by_position(trainer.model, pieces, piece=PIECE).mean()) * BITS
    return {"bits": bits, "seconds": seconds, "parameters": sum(p.numel() for p in trainer.model.parameters())}


def told(pairs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over the seeds, and the mean of linear - deep with its standard error."""
    more = [pair["linear"]["bits"] - pair["deep"]["bits"] for pair in pairs]
    ratios = [pair["linear"]["seconds"] / pair["deep"]["seconds"] for pair in pairs]
    error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else None
    return {
        "bits": {name: round(statistics.fmean(pair[name]["bits"] for pair in pairs), 4) for name in STRUCTURES},
        "linear_minus_deep": [round(x, 4) for x in more],
        "mean": round(statistics.fmean(more), 4),
        "standard_error": None if error is None else round(error, 4),
        "times_the_seconds": round(statistics.median(ratios), 3),
        "parameters": {name: pairs[0][name]["parameters"] for name in STRUCTURES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pairs = []
    for seed in range(asked.seeds):
        how = seed, asked.steps, asked.rows, asked.lr
        pairs.append({name: run(structure, *how) for name, structure in STRUCTURES.items()})
        print(json.dumps(pairs[-1]), flush=True)
        train = {"steps": asked.steps, "rows": asked.rows, "length": LENGTH, "lr": asked.lr}
        what = {"what": "benchmarks/gates.py", "preset": "small", "train": train, "seeds": len(pairs)}
        write_result(asked.out, "gates", what | told(pairs))


if __name__ == "__main__":
    main()
