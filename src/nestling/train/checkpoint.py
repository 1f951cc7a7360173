"""A training run on disk: saved whole, gone on with bit for bit."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from nestling.learner import find_training, machine, machine_differences, read_generation, write_generation
from nestling.learner.folder import FORMAT
from nestling.memory.state import flatten, unflatten
from nestling.models.data import to_data

from .loop import Trainer


def save_run(directory: Path, trainer: Trainer, run: dict[str, Any]) -> Path:
    """Write model, configuration and everything the next step needs as one generation of DIR/train."""
    tensors: dict[str, Tensor] = {}
    for index, state in enumerate(trainer.states):
        tensors |= flatten(state, f"sequence.{index}.")
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    clocks = []
    for index, clock in enumerate(trainer.clocks):
        clocks.append({"elapsed": clock.elapsed, "steps": clock.steps, "kept": len(clock.gradients)})
        tensors |= {f"clock.{index}.{i}": gradient for i, gradient in enumerate(clock.gradients)}
    numbers = {p: n for n, p in enumerate(p for group in trainer.optimizer.param_groups for p in group["params"])}
    facts = {"step": trainer.step, "clocks": clocks, "machine": machine(), "kept": trainer.config.beta1}
    facts["levels"] = [[numbers[weight] for weight in maps] for maps in trainer.model.level_weights()]  # for their life
    config = {"format": FORMAT, "model": to_data(trainer.model.config), "train": to_data(trainer.config), "run": run}
    contents: dict[str, dict[str, Tensor] | str] = {
        "config.json": json.dumps(config, indent=2),
        "model.safetensors": dict(trainer.model.state_dict()),
        "training.safetensors": tensors,
        "training.json": json.dumps(facts, indent=2),
    }
    return write_generation(directory / "train", trainer.step, contents)


def load_run(directory: Path, trainer: Trainer) -> list[str]:
    """Bring a trainer to where the newest checkpoint was, and say what differs from the machine it was made on:
    with differences, the continuation is not bit for bit. Raises ValueError where it does not fit."""
    folder = find_training(directory)
    generation = read_generation(folder)
    if "training" not in generation.tensors or "training" not in generation.data:
        raise ValueError(f"{folder}: there is a model but no training state in it; it cannot be resumed")
    tensors, facts = generation.tensors["training"], generation.data["training"]
    trainer.model.load_state_dict(generation.tensors["model"])
    trainer.step = facts["step"]
    trainer.states = [unflatten(state, tensors, f"sequence.{i}.") for i, state in enumerate(trainer.states)]
    packed = trainer.optimizer.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            packed["state"].setdefault(int(number), {})[key] = tensor
    trainer.optimizer.load_state_dict(packed)
    for index, (clock, saved) in enumerate(zip(trainer.clocks, facts["clocks"], strict=True)):
        clock.elapsed, clock.steps = saved["elapsed"], saved["steps"]
        clock.gradients = [tensors[f"clock.{index}.{i}"] for i in range(saved["kept"])]
    return machine_differences(facts["machine"])
