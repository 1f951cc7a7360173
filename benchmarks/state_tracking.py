"""Which mixers can track a state: parity, (aa)* and (abab)*, trained on lengths to 50 and tested to 100.

    python benchmarks/state_tracking.py [--models ...] [--languages ...] [--seeds 5]

Every run trains for the same number of steps (or until its minutes are up) on strings of 40 to 50 symbols, with
labels smoothed by 0.1 and, in the second half, with strings that have their own shares of ones; it is tested once,
after training. Each model has one setting for all languages, chosen on seeds from 10 on; without `--models`, its
variants are left out. A margin is the right answer's logit less the other's, the least of all positions.
Results, with every run that was made, go to benchmarks/results/state_tracking.json, after every run.
"""

import argparse
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F

from nestling.levels import level
from nestling.memory import clip, decay_to_start, delta_gradient_descent, dot, gradient_descent, matrix, mlp, retain
from nestling.models import Decoder, ModelConfig
from nestling.sequence import self_modifying, sequence_memory
from nestling.tasks.record import write_result
from nestling.tasks.state_tracking import BINS, LANGUAGES, NO, VOCABULARY, YES, draw


def mixer(error_bound: float, step_bound: float) -> self_modifying:
    """Matrix memories at chunk 1, without a convolution."""
    rule = retain(decay_to_start(), delta_gradient_descent(clip(bound=error_bound)))
    return self_modifying(
        matrix(), rule=rule, chunk=1, projection_chunk=1, step_bound=step_bound, convolution=1, way="recurrent"
    )


SELF_MODIFYING = mixer(error_bound=1.0, step_bound=8.0)
STATIC = (level(math.inf, structure=mlp(expansion=2.0, residual=False)),)
BASE = ModelConfig(vocabulary=VOCABULARY, dim=32, heads=2, blocks=1, mixer=SELF_MODIFYING, levels=STATIC)
MODELS = {
    "self-modifying titans": BASE,
    "hope": replace(BASE, mixer=mixer(error_bound=0.5, step_bound=16.0), levels=(level(16), level(64))),
    "linear attention": replace(BASE, mixer=sequence_memory(matrix(), dot(), gradient_descent(), gradient_at="token")),
}
UNBOUNDED = replace(SELF_MODIFYING, rule=retain(decay_to_start(), delta_gradient_descent()))
VARIANTS = {  # of self-modifying Titans, one term changed in each
    "unbounded error": replace(BASE, mixer=UNBOUNDED),
    "Hope's mixer": replace(BASE, mixer=mixer(error_bound=0.5, step_bound=16.0)),
    "convolution 4": replace(BASE, mixer=replace(SELF_MODIFYING, convolution=4)),
    "step bound 1.5": replace(BASE, mixer=replace(SELF_MODIFYING, step_bound=1.5)),
}


def train(
    config: ModelConfig, language: str, seed: int, steps: int, minutes: float, lr: float, rows: int = 16
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Decoder(config, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    began, losses, step = time.monotonic(), [], 0
    while step < steps and time.monotonic() - began < 60 * minutes:
        strings = draw(language, rows, 40, 50, seed=1_000_000 * seed + step, varied=step >= steps // 2)
        logits = model(strings.symbols)[0][..., YES : NO + 1]
        answers = strings.answers[strings.inside] - YES
        loss = F.cross_entropy(logits[strings.inside], answers, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        losses.append(loss.item())
    result: dict[str, Any] = {"steps": step, "loss": round(sum(losses[-20:]) / len(losses[-20:]), 5)}
    with torch.no_grad():
        for name, (shortest, longest) in BINS.items():
            strings = draw(language, 512, shortest, longest, seed=987_654_321 + seed)
            logits = model(strings.symbols)[0]
            result[name] = round(strings.solved(logits), 4)
            result[f"margin, {name}"] = round(strings.margins(logits).min().item(), 2)
    return result | {"minutes": round((time.monotonic() - began) / 60, 2)}


def summary(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    solved: dict[str, list[int]] = {}
    for row in rows:
        cell = solved.setdefault(f"{row['model']}, {row['language']}", [0, 0])
        cell[0] += row["to 50"] == row["51 to 100"] == 1.0
        cell[1] += 1
    return {
        "what": "benchmarks/state_tracking.py",
        "steps": asked.steps,
        "lr": asked.lr,
        "models": {name: repr((MODELS | VARIANTS)[name].mixer) for name in asked.models},
        "seeds solved to 100": {cell: f"{own} of {of}" for cell, (own, of) in solved.items()},
        "runs": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS | VARIANTS))
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), choices=list(LANGUAGES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--name", default="state_tracking")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for language in asked.languages:
        for name in asked.models:
            for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
                run = train((MODELS | VARIANTS)[name], language, seed, asked.steps, asked.minutes, asked.lr)
                rows.append({"language": language, "model": name, "seed": seed} | run)
                print(json.dumps(rows[-1]), flush=True)
                write_result(asked.out, asked.name, summary(asked, rows))
    print(json.dumps(summary(asked, rows)["seeds solved to 100"], indent=2))


if __name__ == "__main__":
    main()
