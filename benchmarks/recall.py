"""What can a mixer hold, and bind anew? Multi-query associative recall with decoders of one layer.

    python benchmarks/recall.py [--settings ...] [--models ...] [--seeds 3] [--steps 1000]

Two settings. In `once` every key stands in one pair: how many pairs can be held? Trained on 2 and 4 pairs for the
first third, then on 4, 8 and 16, tested also on more. In `again` keys return with other values, and the last value of a
key is wanted: trained on 2 and 4 keys, then on 4 and 8, half of the steps with as many pairs as keys and half with
four times as many, tested on 8 keys in up to 64 pairs.

Every model trains for the same number of steps of the same number of tokens, and is tested once, after training. The
learning rates are those that were best in the mean of all tests of two other seeds, on one grid for all (1e-2, 2e-2
and 4e-2, for `again` also 3e-3; results/recall_tuning.json, made with --lr and --first-seed 10), but for memories of
Titans' rule, matrix and deep, in `again`: 1e-2, not tuned. One core, 20 to 40 seconds a run, minutes for those of SLOW,
which are left out without --models (results/recall_every_token.json, one seed). Results go to
benchmarks/results/recall.json.

None but attention has stopped improving by then, and seeds differ widely: what is measured is what a mixer has learned
to hold in this time, not what it could hold.
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
from nestling.memory import decay, dot, gradient_descent, l2, matrix, mlp, retain, retain_first
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention, sequence_memory
from nestling.tasks.recall import Recall, chance, draw
from nestling.tasks.record import write_result

VOCABULARY, DIM, HEADS = 128, 32, 2
TOKENS = 1024  # a step
TESTS = {  # pairs of keys and values, and how many keys there are; more pairs than any in training are among them
    "once": ((4, 4), (8, 8), (16, 16), (32, 32), (48, 48)),
    "again": ((8, 8), (16, 8), (32, 8), (64, 8)),
}
STATIC = (level(math.inf, structure=mlp(expansion=2.0, residual=False)),)
MIXERS = {
    "linear attention": sequence_memory(matrix(), dot(), gradient_descent(), 32, "token"),
    "linear attention with retention": sequence_memory(
        matrix(), dot(), retain(decay(), gradient_descent()), 32, "token"
    ),
    "delta rule": sequence_memory(matrix(), l2(), gradient_descent(), 32, "token"),
    "gated delta rule": sequence_memory(matrix(), l2(), retain_first(decay(), gradient_descent()), 32, "token"),
    "matrix memory": sequence_memory(matrix(), chunk=16),
    "deep memory": sequence_memory(mlp(expansion=2.0), chunk=16),
    "attention": attention(window=192),
}
SLOW = {  # gradients at every token's own weights, one token after the other; only where they are asked for
    "matrix memory, every token": sequence_memory(matrix(), chunk=1),
    "deep memory, every token": sequence_memory(mlp(expansion=2.0), chunk=1),
}
LEARNING_RATES = {setting: dict.fromkeys([*MIXERS, *SLOW], 1e-2) for setting in TESTS}
LEARNING_RATES["once"] |= dict.fromkeys(
    ("linear attention with retention", "delta rule", "gated delta rule", "deep memory", "attention"), 2e-2
)
LEARNING_RATES["again"] |= dict.fromkeys(("linear attention with retention", "gated delta rule"), 2e-2)


def drawn_at(setting: str, step: int, steps: int, seed: int) -> Recall:
    """The sequences of a step."""
    early = 3 * step < steps
    if setting == "once":
        some = (2, 4) if early else (4, 8, 16)
        writes = pairs = some[step % len(some)]
    else:
        pairs = ((2, 4) if early else (4, 8))[step % 2]
        writes = pairs * (1, 4)[step // 2 % 2]
    length = 2 * (writes + pairs)
    return draw(
        TOKENS // length,
        length,
        pairs,
        1_000_000 * seed + step,
        writes=writes,
        vocabulary=VOCABULARY,
        power=None,
    )


def train(setting: str, name: str, seed: int, steps: int, lr: float) -> dict[str, Any]:
    config = ModelConfig(
        vocabulary=VOCABULARY, dim=DIM, heads=HEADS, blocks=1, mixer=(MIXERS | SLOW)[name], levels=STATIC
    )
    model = Decoder(config, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    began, losses = time.process_time(), []
    for step in range(steps):
        drawn = drawn_at(setting, step, steps, seed)
        loss = F.cross_entropy(model(drawn.tokens)[0][drawn.asked], drawn.targets[drawn.asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    result: dict[str, Any] = {"loss": round(sum(losses[-30:]) / len(losses[-30:]), 4)}
    return result | tested(model, setting, seed) | {"seconds of the processor": round(time.process_time() - began, 1)}


@torch.no_grad()
def tested(model: Decoder, setting: str, seed: int) -> dict[str, float]:
    """The share of right answers, for as many pairs as there are."""
    found = {}
    for writes, pairs in TESTS[setting]:
        length = 2 * (writes + pairs)
        drawn = draw(4096 // pairs, length, pairs, 987_654_321 + seed, writes=writes, vocabulary=VOCABULARY, power=None)
        found[f"{writes} pairs"] = round(drawn.accuracy(model(drawn.tokens)[0]), 4)
    return found


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over seeds, for every setting, model and learning rate: each test, and all of them together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['setting']}, {row['model']}, {row['lr']}", []).append(row)
    found = {}
    for name, group in groups.items():
        tests = [f"{writes} pairs" for writes, _ in TESTS[group[0]["setting"]]]
        found[name] = {test: round(sum(row[test] for row in group) / len(group), 4) for test in tests}
        found[name]["of all"] = round(sum(found[name].values()) / len(tests), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--models", nargs="+", default=list(MIXERS), choices=list(MIXERS | SLOW))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", nargs="+", type=float, help="each in turn, in place of the model's own")
    parser.add_argument("--name", default="recall")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    guess = round(chance(VOCABULARY), 4)
    rows: list[dict[str, Any]] = []
    result = {
        "what": "benchmarks/recall.py",
        "task": f"multi-query associative recall, vocabulary {VOCABULARY}; once: trained on up "
        "to 16 pairs of different keys; again: on up to 32 pairs of up to 8 keys, tested on 8 keys",
        "steps": asked.steps,
        "tokens a step": TOKENS,
        "shape": {"dim": DIM, "heads": HEADS, "blocks": 1},
        "mixers": {name: repr((MIXERS | SLOW)[name]) for name in asked.models},
        "chance": guess,
    }
    for setting in asked.settings:
        for name in asked.models:
            for lr in asked.lr or [LEARNING_RATES[setting][name]]:
                for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
                    run = train(setting, name, seed, asked.steps, lr)
                    rows.append({"setting": setting, "model": name, "lr": lr, "seed": seed} | run)
                    print(json.dumps(rows[-1]), f"chance: {guess}", flush=True)
                    write_result(asked.out, asked.name, result | {"means": means(rows), "runs": rows})


if __name__ == "__main__":
    main()
