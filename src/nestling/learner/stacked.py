"""A folder of a pre-trained model with levels: which model it is, how levels are stacked in it, and a life of them.

DIR/stack.json    the pre-trained model's folder, name and fingerprint, and the `StackConfig`
DIR/life/N/       as for any model: the levels and the sequence state; nothing of the pre-trained model is copied
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestling.levels import MaskedReader, Reader, StackConfig, Stacked, StackedEncoder, masked_tokens, stack
from nestling.memory.state import unflatten
from nestling.memory.structure import Weights
from nestling.models.data import from_data, to_data

from .files import write_file
from .states import fingerprint, read_fitting, write_fitting

FORMAT = 1
NAME = "stack.json"


class StackTokens(NamedTuple):
    """From text to a pre-trained model's tokens and back: the tokenizer of transformers, or None where tokens are
    bytes; and how many there are."""

    tokenizer: Any
    size: int

    def encode(self, text: bytes) -> Tensor:
        """Tokens of a text, int64 [n], without special ones. Raises ValueError where a tokenizer is given bytes that
        are not UTF-8."""
        if self.tokenizer is None or not text:
            return torch.tensor(list(text), dtype=torch.int64)
        try:
            words = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"this model's tokenizer reads UTF-8, and byte {error.start} of the text is not") from None
        ids = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> bytes:
        return bytes(tokens.tolist()) if self.tokenizer is None else self.tokenizer.decode(tokens).encode()


class SavedStack(NamedTuple):
    """A stacked model read from its folder, its tokens, the name of the pre-trained model, and a hash of it and of how
    it is stacked."""

    model: Stacked
    tokens: StackTokens
    name: str
    hash: str

    def encode(self, text: bytes) -> Tensor:
        """Tokens of a text, int64 [n], without special ones."""
        return self.tokens.encode(text)

    def decode(self, tokens: Tensor) -> bytes:
        return self.tokens.decode(tokens)


def stack_hash(model: Stacked) -> str:
    """What a life of a stacked model says that it fits: a digest of the pre-trained weights and of the stacking."""
    config = json.dumps(to_data(model.config), sort_keys=True)
    return hashlib.sha256(f"{config} {fingerprint(model.base)}".encode()).hexdigest()[:16]


def reader_of(model: Stacked, *, learning: bool) -> Any:
    """What reads text with a stacked model. Raises ValueError where it is an encoder that does not say what it learns
    from, or that learns from classes."""
    if isinstance(model, StackedEncoder) and isinstance(model.config.loss, masked_tokens):
        return MaskedReader(model, learning=learning)
    if isinstance(model, StackedEncoder):
        model.init_state(1)  # says what is wrong
    return Reader(model, learning=learning)  # type: ignore[arg-type]


def is_stacked(directory: Path) -> bool:
    return (directory / NAME).is_file()


def save_stacked(directory: Path, base: Path, config: StackConfig) -> Stacked:
    """Stack levels in the model of a folder of transformers, and write down how. Raises ValueError where there is none,
    where its layout is not known, and where the directory holds a model already."""
    if any((directory / name).exists() for name in (NAME, "train", "life")):
        raise ValueError(f"{directory}: holds a model already; choose another folder")
    model = stack(read_pretrained(base), config=config)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / NAME, json.dumps({"format": FORMAT, **told(model)}, indent=2).encode())
    return model


def told(model: Stacked) -> dict[str, Any]:
    """What a stacked model is, as data: where the pre-trained one lies, what it is, and how levels are stacked in it.
    Raises ValueError where it was not read from a folder: a life does not copy it."""
    base = Path(getattr(model.base, "name_or_path", "") or "?")
    if not (base / "config.json").is_file():
        raise ValueError(
            f"the pre-trained {type(model.base).__name__} is in no folder: save it, and load it from there"
        )
    about = {"base": str(base.resolve()), "name": type(model.base).__name__}
    return about | {"fingerprint": fingerprint(model.base), "stack": to_data(model.config)}


def retold(about: dict[str, Any], path: str) -> Stacked:
    """The stacked model of `told`. Raises ValueError where the pre-trained one is gone, or not what it was."""
    base = Path(about["base"])
    model = stack(read_pretrained(base), config=from_data(StackConfig, about["stack"], path=f"{path}: stack"))
    found = fingerprint(model.base)
    if found != about["fingerprint"]:
        raise ValueError(f"{base}: its weights are {found}, but {path} was made for {about['fingerprint']}")
    return model


def tokens_of(model: Stacked) -> StackTokens:
    """The tokens of the pre-trained model in a stacked one."""
    size = model.base.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return StackTokens(_tokenizer(Path(model.base.name_or_path), size), size)  # type: ignore[arg-type]


def load_stacked(directory: Path) -> SavedStack:
    """The model of a folder that `save_stacked` wrote. Raises ValueError naming what is missing or does not fit."""
    path = directory / NAME
    try:
        about = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path}: not a format that this version reads ({FORMAT})")
    model = retold(about, str(path))
    return SavedStack(model, tokens_of(model), f"{about['name']} of {about['base']}", stack_hash(model))


def save_levels(path: Path | str, model: Stacked, weights: tuple[Weights, ...], name: str) -> None:
    """Write the levels of a life: their weights, the pre-trained model's name and what they fit; nothing else."""
    write_fitting(path, weights, stack_hash(model), base=name)


def load_levels(path: Path | str, model: Stacked) -> tuple[Weights, ...]:
    """The levels in a file, for the stacked model that they were saved with: pass them as `weights=`. Raises ValueError
    naming the file where it is damaged, or of another model."""
    tensors, _ = read_fitting(path, stack_hash(model), "levels")
    return unflatten(tuple(tuple(w.detach() for w in maps) for maps in model.level_weights()), tensors)


def read_pretrained(directory: Path) -> nn.Module:
    """The model in a folder that transformers wrote, of the class that it names."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("pre-trained models need transformers: pip install 'nestling[hf]'") from None
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no folder of a model of transformers (it has no config.json)")
    named = json.loads((directory / "config.json").read_text()).get("architectures") or [None]
    kind = getattr(transformers, str(named[0]), None)
    if kind is None:
        raise ValueError(f"{directory}/config.json: its architecture {named[0]!r} is not one of transformers'")
    return kind.from_pretrained(directory, local_files_only=True)


def _tokenizer(directory: Path, vocabulary: int) -> Any:
    """The tokenizer in a model's folder; None, for bytes, where there is none and the vocabulary is 256."""
    patterns = ("tokenizer*.json", "vocab.*", "*.model", "tokenizer.*")
    if any(next(directory.glob(pattern), None) for pattern in patterns):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if vocabulary != 256:
        raise ValueError(f"{directory}: has no tokenizer, and a vocabulary of {vocabulary} is not that of bytes, 256")
    return None
