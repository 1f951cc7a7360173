"""How many pairs can a mixer hold? Multi-query associative recall with decoders of one layer.

    python benchmarks/recall.py [--models ...] [--seeds 1] [--steps 1000]

Every model trains for the same number of steps of the same number of tokens: on 2 and 4 pairs for the first third,
then on 4, 8 and 16; it is tested once, after training, also on more pairs than it was trained on. One core, about two
minutes in all for one seed. Results go to benchmarks/results/recall.json.

None but attention has stopped improving by then, and seeds differ widely: what is measured is what a mixer has learned
to hold in this time, not what it could hold. recall_smaller_step.json is --lr 5e-3 --steps 800 --seeds 2.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F

from nestling.levels import level
from nestling.memory import dot, gradient_descent, l2, matrix, mlp
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention, sequence_memory
from nestling.tasks.recall import chance, draw
from nestling.tasks.record import write_result

VOCABULARY, DIM, HEADS = 128, 32, 2
TOKENS = 1024  # a step
PAIRS = (4, 8, 16, 32, 48)  # of the test; the last two are more than any in training
STATIC = (level(math.inf, structure=mlp(expansion=2.0, residual=False)),)
MIXERS = {
    "linear attention": sequence_memory(matrix(), dot(), gradient_descent(), 32, "token"),
    "delta rule": sequence_memory(matrix(), l2(), gradient_descent(), 32, "token"),
    "matrix memory": sequence_memory(matrix(), chunk=16),
    "deep memory": sequence_memory(mlp(expansion=2.0), chunk=16),
    "attention": attention(window=192),
}


def pairs_at(step: int, steps: int) -> int:
    """How many pairs the sequences of a step have."""
    some = (2, 4) if 3 * step < steps else (4, 8, 16)
    return some[step % len(some)]


def train(name: str, seed: int, steps: int, lr: float) -> dict[str, Any]:
    config = ModelConfig(vocabulary=VOCABULARY, dim=DIM, heads=HEADS, blocks=1, mixer=MIXERS[name], levels=STATIC)
    model = Decoder(config, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    began, losses = time.process_time(), []
    for step in range(steps):
        pairs = pairs_at(step, steps)
        drawn = draw(
            TOKENS // (4 * pairs), 4 * pairs, pairs, 1_000_000 * seed + step, vocabulary=VOCABULARY, power=None
        )
        loss = F.cross_entropy(model(drawn.tokens)[0][drawn.asked], drawn.targets[drawn.asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    result: dict[str, Any] = {"loss": round(sum(losses[-30:]) / len(losses[-30:]), 4)}
    with torch.no_grad():
        for pairs in PAIRS:
            drawn = draw(4096 // pairs, 4 * pairs, pairs, 987_654_321 + seed, vocabulary=VOCABULARY, power=None)
            result[f"{pairs} pairs"] = round(drawn.accuracy(model(drawn.tokens)[0]), 4)
    return result | {"seconds of the processor": round(time.process_time() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    guess = round(chance(VOCABULARY), 4)
    rows: list[dict[str, Any]] = []
    result = {
        "what": "benchmarks/recall.py",
        "task": f"multi-query associative recall, vocabulary {VOCABULARY}; trained on up to 16 pairs",
        "steps": asked.steps,
        "tokens a step": TOKENS,
        "lr": asked.lr,
        "shape": {"dim": DIM, "heads": HEADS, "blocks": 1},
        "mixers": {name: repr(MIXERS[name]) for name in asked.models},
        "chance": guess,
        "runs": rows,
    }
    for name in asked.models:
        for seed in range(asked.seeds):
            rows.append({"model": name, "seed": seed} | train(name, seed, asked.steps, asked.lr))
            print(json.dumps(rows[-1]), f"chance: {guess}", flush=True)
    write_result(asked.out, "recall", result)


if __name__ == "__main__":
    main()
