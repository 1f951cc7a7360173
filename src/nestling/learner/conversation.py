"""Conversations: each with a sequence state of its own, over the levels of one snapshot, saved after every turn."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.state import flatten, unflatten

from .files import Contents, newest, numbered, read_generation, remove_folders, sync_folder, write_generation
from .lock import take
from .pins import FOLDER
from .voice import Voice, draws

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Turn(NamedTuple):
    """What one side said, or a document that was read to it. who: "user", "model" or "document"."""

    who: str
    tokens: list[int]


class Conversation:
    """A conversation with a life. `Learner.conversation` opens or begins one; close it, or use it in a `with`.

    What is said changes this conversation's sequence state and nothing else: no level, no clock, no other
    conversation. What the life is to learn of it, it is told by `Learner.learn_conversation`.
    """

    def __init__(self, life: Path, name: str, voice: Voice, seed: int, snapshot: int, event: int) -> None:
        self.folder, self.name, self.voice, self.seed = life / FOLDER / name, name, voice, seed
        self.snapshot, self.event = snapshot, event
        self.turns: list[Turn] = []
        self.learned = 0  # turns that the life has learned from
        self._make_folder()
        self._lock: int | None = take(self.folder / ".lock", f"conversation {name}")
        try:
            if newest(self.folder) is not None:
                self._restore()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def hear(self, tokens: Tensor, who: str = "user") -> None:
        """Read what is said, or a document, without an answer and without learning."""
        self.voice.read(tokens)
        self.turns.append(Turn(who, tokens.tolist()))
        self.save()

    def answer(self, tokens: int, *, temperature: float = 0.8, stop: int | None = None) -> Iterator[int]:
        """Yields up to `tokens` tokens, the last of them `stop` where it comes. What was said is remembered and saved
        at the end, or where the listener stops listening."""
        said: list[int] = []
        generator = draws(self.seed, f"conversation {self.name} turn {len(self.turns)}")
        try:
            for token in self.voice.write(tokens, temperature=temperature, generator=generator):
                said.append(token)
                yield token
                if token == stop:
                    break
        finally:
            if said:
                self.turns.append(Turn("model", said))
                self.save()

    def save(self) -> None:
        """Write the conversation, whole or not at all; the two newest turns are kept on the disk."""
        if self._lock is None or not (self.folder / ".lock").exists():
            raise ValueError(f"conversation {self.name} was closed, or removed because of what it knew was forgotten")
        about = {
            "format": FORMAT,
            "snapshot": self.snapshot,
            "event": self.event,
            "learned": self.learned,
            "turns": [list(turn) for turn in self.turns],
        }
        sequence = flatten(self.voice.state, "state.")
        if self.voice.logits is not None:
            sequence["logits"] = self.voice.logits
        contents: Contents = {"conversation.json": json.dumps(about), "sequence.safetensors": sequence}
        existing = numbered(self.folder)
        write_generation(self.folder, int(existing[-1].name) + 1 if existing else 0, contents)

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            for parent in (self.folder.parent, self.folder.parent.parent):  # the first conversation makes both
                sync_folder(parent)

    def _restore(self) -> None:
        tensors, about = read_newest(self.folder)
        self.voice.state = unflatten(self.voice.state, tensors, "state.")
        self.voice.logits = tensors.get("logits")
        self.turns = [Turn(*turn) for turn in about["turns"]]
        self.learned = about["learned"]


def read_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The newest good generation of a conversation. Raises ValueError where none is left."""
    said = []
    for generation in reversed(numbered(folder)):
        try:
            found = read_generation(generation)
            about = found.data["conversation"]
            if about["format"] != FORMAT:
                raise ValueError(f"{generation}: format {about['format']!r}; this version reads {FORMAT}")
            return found.tensors["sequence"], about
        except (ValueError, KeyError) as error:
            said.append(str(error))
    raise ValueError("; ".join(said) or f"{folder}: no such conversation")


def conversations(life: Path) -> list[str]:
    """The names of a life's conversations."""
    return sorted(folder.name for folder in (life / FOLDER).glob("[!.]*") if newest(folder) is not None)


def check_name(name: str) -> str:
    """Raises ValueError for what cannot be a conversation's name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a conversation's name is up to 64 letters, digits, - and _, got {name!r}")
    return name


def remove_conversation(life: Path, name: str) -> None:
    """Remove a conversation for good. Raises ValueError where there is none."""
    if name not in conversations(life):
        raise ValueError(f"{life}: there is no conversation {name!r}")
    remove_folders([life / FOLDER / name])


def spoken(turns: list[Turn], *, own_words: bool) -> Tensor:
    """The tokens of what was said in turns, one after the other: by the user, and with `own_words` by the model.
    Documents were only to be read."""
    speakers = ("user", "model") if own_words else ("user",)
    chosen = [turn.tokens for turn in turns if turn.who in speakers]
    return torch.tensor([token for tokens in chosen for token in tokens], dtype=torch.int64)
