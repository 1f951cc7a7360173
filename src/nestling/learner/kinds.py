"""Kinds of models that can have a life: how each is kept in the life's folder, and how it turns text into tokens."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from nestling.levels import Growing, LevelledModel, StackedDecoder
from nestling.memory import known
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data

from .files import CHECKSUMS, Contents, read_folder, write_folder
from .stacked import retold, tokens_of, told

FORMAT = 1


@runtime_checkable
class Tokens(Protocol):
    """From text to tokens and back."""

    @property
    def size(self) -> int: ...
    def encode(self, text: bytes) -> Tensor: ...
    def decode(self, tokens: Tensor) -> bytes: ...


class Bytes:
    """A token is a byte."""

    size = 256

    def encode(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0, dtype=torch.long)

    def decode(self, tokens: Tensor) -> bytes:
        return bytes(tokens.tolist())


class Kind(NamedTuple):
    """A kind of model. fits: is this one of them? contents: its files; load: the model from their tensors and JSON;
    tokens: of a model."""

    fits: Callable[[object], bool]
    contents: Callable[[Any], Contents]
    load: Callable[[dict[str, dict[str, Tensor]], dict[str, Any]], LevelledModel]
    tokens: Callable[[Any], Tokens]


def _decoder_contents(model: Decoder) -> Contents:
    kind = str(model.embedding.dtype).removeprefix("torch.")
    about = {"format": FORMAT, "kind": "decoder", "dtype": kind, "model": to_data(model.config)}
    return {"config.json": json.dumps(about, indent=2), "model.safetensors": dict(model.state_dict())}


def _load_decoder(tensors: dict[str, dict[str, Tensor]], about: dict[str, Any]) -> Decoder:
    model = Decoder(from_data(ModelConfig, about["model"], path="model/config.json: model"))
    model.to(getattr(torch, about["dtype"])).load_state_dict(tensors["model"])
    return model.requires_grad_(False)


def _byte_tokens(model: Decoder) -> Tokens:
    if model.config.vocabulary != Bytes.size:
        raise ValueError(f"a decoder of vocabulary {model.config.vocabulary} has no tokens; a life needs bytes (256)")
    return Bytes()


def _stack_contents(model: StackedDecoder) -> Contents:
    return {"config.json": json.dumps({"format": FORMAT, "kind": "stacked", **told(model)}, indent=2)}


def _load_stack(tensors: dict[str, dict[str, Tensor]], about: dict[str, Any]) -> LevelledModel:
    return retold(about, "model/config.json").requires_grad_(False)  # type: ignore[return-value]


def _growing_contents(model: Growing) -> Contents:
    """Those of the model inside, and how many slots there are beside its levels: slots are the life's."""
    inner = dict(kind_of(model.model).contents(model.model))
    about = json.loads(str(inner["config.json"]))
    about |= {"kind": "growing", "of": about["kind"], "slots": model.slots, "rank": model.rank}
    return inner | {"config.json": json.dumps(about, indent=2)}


def _load_growing(tensors: dict[str, dict[str, Tensor]], about: dict[str, Any]) -> LevelledModel:
    inner = known(about["of"], KINDS, "kind of model").load(tensors, about)
    return Growing(inner, about["slots"], about["rank"])


KINDS: dict[str, Kind] = {
    "decoder": Kind(lambda model: isinstance(model, Decoder), _decoder_contents, _load_decoder, _byte_tokens),
    "growing": Kind(
        lambda model: isinstance(model, Growing) and any(kind.fits(model.model) for kind in KINDS.values()),
        _growing_contents,
        _load_growing,
        lambda model: kind_of(model.model).tokens(model.model),
    ),
    "stacked": Kind(lambda model: isinstance(model, StackedDecoder), _stack_contents, _load_stack, tokens_of),
}
"""Every kind of model that a life can be of; a new one is a row."""


def kind_of(model: object) -> Kind:
    """The kind of a model. Raises ValueError where there is none."""
    for kind in KINDS.values():
        if kind.fits(model):
            return kind
    raise ValueError(f"a life cannot be of a {type(model).__name__}; it can be of: {', '.join(KINDS)}")


def write_model(folder: Path, model: LevelledModel) -> str:
    """Write a model into a folder of its own, whole or not at all, and return its hash."""
    write_folder(folder, kind_of(model).contents(model))
    return folder_hash(folder)


def folder_hash(folder: Path) -> str:
    """The hash of a model's folder: of every byte in it."""
    return hashlib.sha256((folder / CHECKSUMS).read_bytes()).hexdigest()[:16]


def read_model(folder: Path) -> tuple[LevelledModel, Tokens, str]:
    """A model, its tokens and its hash. Raises ValueError naming a file that is damaged or does not fit."""
    tensors, data = read_folder(folder)
    about = data.get("config", {})
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder}/config.json: format {about.get('format')!r}; this version reads {FORMAT}")
    kind = known(about["kind"], KINDS, "kind of model")
    try:
        model = kind.load(tensors, about)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: the weights do not fit config.json ({error})") from None
    return model, kind.tokens(model), folder_hash(folder)
