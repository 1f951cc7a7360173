"""A model's folder: what training wrote, and the life that goes on from it.

DIR/train/N/  config.json, model.safetensors and what the next training step needs, after N steps
DIR/life/N/   levels.safetensors, sequence.safetensors, life.json, after N tokens were read
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nestling.levels import LevelsState, Moments, ReadingState, hand_over
from nestling.memory.state import flatten, unflatten
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data

from .files import Contents, Generation, newest, read_generation, write_generation
from .stacked import SavedStack
from .states import fingerprint

FORMAT = 1


class SavedModel(NamedTuple):
    """A model read from its folder, its hash, and the generation that it came from."""

    model: Decoder
    hash: str
    generation: Generation

    def encode(self, text: bytes) -> torch.Tensor:
        """Tokens of a text: its bytes, int64 [n]."""
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def model_hash(model: Decoder) -> str:
    """What a life says that it fits: a digest of the model's expression and weights."""
    config = json.dumps(to_data(model.config), sort_keys=True)
    return hashlib.sha256(f"{config} {fingerprint(model)}".encode()).hexdigest()[:16]


def find_training(directory: Path) -> Path:
    """The newest training checkpoint. Raises ValueError where there is none."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    folder = newest(directory / "train")
    if folder is None:
        raise ValueError(f"{directory}: not a model folder (it has no train/ with a checkpoint in it)")
    return folder


def load_model(directory: Path) -> SavedModel:
    """The model of a folder that `nestling train --out` made. Raises ValueError naming what does not fit."""
    folder = find_training(directory)
    generation = read_generation(folder)
    for name in ("config", "model"):
        if name not in generation.data and name not in generation.tensors:
            raise ValueError(f"{folder}: {name}.{'json' if name == 'config' else 'safetensors'} is missing")
    saved = generation.data["config"]
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{folder}/config.json: format {saved.get('format')!r}; this version reads {FORMAT}")
    model = Decoder(from_data(ModelConfig, saved["model"], path=f"{folder}/config.json: model"))
    try:
        model.load_state_dict(generation.tensors["model"])
    except RuntimeError as error:
        raise ValueError(f"{folder}/model.safetensors does not fit config.json: {error}") from None
    return SavedModel(model, model_hash(model), generation)


def open_life(directory: Path, saved: SavedModel | SavedStack, reader: Any) -> Any:
    """The life that was last saved in a folder, as the reader's state; one that begins, where there is none yet."""
    folder = newest(directory / "life")
    start = reader.begin()
    if folder is None:
        if isinstance(saved, SavedStack):
            return start
        return start._replace(levels=_handed_on(saved, start.levels))
    life = read_generation(folder)
    facts = life.data.get("life", {})
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder}/life.json: format {facts.get('format')!r}; this version reads {FORMAT}")
    if facts.get("model") != saved.hash:
        raise ValueError(
            f"{folder}: a life of model {facts.get('model')}, but the model in {directory} is {saved.hash}; "
            "train into another folder, or move life/ away"
        )
    return unpack(start, life.tensors, facts["position"])


def _handed_on(saved: SavedModel, levels: LevelsState) -> LevelsState:
    """The levels at the start of a life, with what training remembered of them: the optimizer's moments, and what had
    been accumulated since their last ticks."""
    tensors, facts = saved.generation.tensors.get("training", {}), saved.generation.data.get("training", {})
    moments = [[_moments(tensors, facts, number) for number in maps] for maps in facts.get("levels", [])]
    if moments:
        levels = hand_over(saved.model.levels, levels, moments)
    clocks, step = facts.get("clocks", []), saved.generation.data["config"].get("train", {})
    return _half_filled(levels, tensors, clocks, step["rows"] * step["length"]) if clocks else levels


def _moments(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], number: int) -> Moments | None:
    """What the optimizer kept of one of its parameters; None of one that it has not stepped yet."""
    kept = {name: tensors.get(f"optimizer.{number}.{name}") for name in ("exp_avg", "exp_avg_sq", "step")}
    mean, square, steps = kept.values()
    if mean is None or square is None or steps is None:
        return None
    return Moments(mean, square, int(steps), facts["kept"])


def _half_filled(
    levels: LevelsState, tensors: Mapping[str, torch.Tensor], clocks: Sequence[Mapping[str, Any]], a_step: int
) -> LevelsState:
    """The levels with what training had accumulated for them since their last ticks, mean gradients of steps of a_step
    tokens: as gradients of the loss summed over tokens, which is what a level's clock counts."""
    rules = list(levels.rules)
    for index, clock in enumerate(clocks):
        if not clock["kept"]:
            continue
        rules[index] = tuple(
            state._replace(
                elapsed=torch.full_like(state.elapsed, clock["elapsed"]),
                gradient=tensors[f"clock.{index}.{i}"] * a_step,
            )
            for i, state in enumerate(rules[index])
        )
    return levels._replace(rules=tuple(rules))


def save_life(directory: Path, saved: SavedModel | SavedStack, state: Any, facts: dict[str, Any]) -> Path:
    """Write a life, levels and sequence state each in a file of their own, in one atomic step."""
    position = int(state.position)
    name = {"base": saved.name} if isinstance(saved, SavedStack) else {}
    about = {"format": FORMAT, "model": saved.hash, "position": position, **name, **facts}
    contents: Contents = {**pack(state), "life.json": json.dumps(about, indent=2)}
    return write_generation(directory / "life", position, contents)


def pack(state: Any) -> dict[str, dict[str, torch.Tensor]]:
    """A reading state as files: levels and sequence state each in one of their own."""
    sequence = {"segment": state.segment}
    if isinstance(state, ReadingState):  # an encoder's state has no sequence state in it
        sequence |= {"logits": state.logits} | flatten(state.before, "before.") | flatten(state.now, "now.")
    return {"levels.safetensors": flatten(state.levels), "sequence.safetensors": sequence}


def unpack(like: Any, tensors: Mapping[str, dict[str, torch.Tensor]], position: int) -> Any:
    """The reading state that `pack` gave, for the model whose state `like` is. Raises ValueError naming a tensor that
    is missing or does not fit."""
    for name in ("levels", "sequence"):
        if name not in tensors:
            raise ValueError(f"{name}.safetensors is missing")
    sequence = tensors["sequence"]
    levels: LevelsState = unflatten(like.levels, tensors["levels"])
    if not isinstance(like, ReadingState):
        return like._replace(levels=levels, position=torch.tensor(position), segment=sequence["segment"])
    return ReadingState(
        levels=levels,
        position=torch.tensor(position),
        segment=sequence["segment"],
        before=unflatten(like.before, sequence, "before."),
        now=unflatten(like.now, sequence, "now."),
        logits=sequence["logits"],
    )
