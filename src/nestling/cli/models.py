"""Commands on a model's folder: info, check."""

from dataclasses import fields
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nestling.checks import check
from nestling.learner import is_stacked, load_model, load_stacked, newest

from .shared import app


@app.command(name="info")
def info(directory: tyro.conf.Positional[Path]) -> None:
    """Say what a model is, how it was trained and what its life has read.

    Args:
        directory: a model's folder.
    """
    table = Table(title=str(directory), show_header=False)
    if is_stacked(directory):
        stacked = load_stacked(directory)
        table.add_row("pre-trained model", stacked.name)
        for name, value in vars(stacked.model.config).items():
            table.add_row(name, Text(repr(value)))
        table.add_row("model hash", stacked.hash)
        table.add_row("life", _life(directory))
        Console().print(table)
        return
    saved = load_model(directory)
    config = saved.model.config
    table.add_row("mixer", repr(config.mixer))
    for lvl in config.levels:
        table.add_row("level", repr(lvl))
    for field in fields(config):
        if field.name not in ("mixer", "levels"):
            table.add_row(field.name, str(getattr(config, field.name)))
    table.add_row("parameters", f"{sum(p.numel() for p in saved.model.parameters()):,}")
    table.add_row("model hash", saved.hash)
    table.add_row("trained steps", str(saved.generation.data.get("training", {}).get("step", "not known")))
    table.add_row("life", _life(directory))
    Console().print(table)


def _life(directory: Path) -> str:
    life = newest(directory / "life")
    return "none yet" if life is None else f"{int(life.name):,} tokens read"


@app.command(name="check")
def check_command(
    directory: tyro.conf.Positional[Path], *, only: tuple[str, ...] = (), steps: int = 300, seed: int = 0
) -> None:
    """Run the correctness kit on a model: causality, gradients, invariances, the entropy floor and more.

    Args:
        directory: a model's folder.
        only: names of checks; all of them, where none is named.
        steps: of training on random tokens, for entropy_floor (nearly all of the time).
        seed: of the tokens and the small perturbation of the weights.
    """
    saved = load_model(directory)
    torch.set_flush_denormal(True)
    report = check(saved.model, seed=seed, only=only or None, steps=steps)
    Console().print(report)
    if not report.passed:
        raise ValueError(f"{directory}: {', '.join(f.name for f in report if f.passed is False)} failed")
