"""Reading and writing without learning: a sequence state of one's own, over levels that stand still."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nestling.levels import LevelledModel, LevelsState, Reader
from nestling.memory.state import detach
from nestling.memory.structure import Weights
from nestling.models.generate import sample

from .machine import flushing

PART = 2048  # tokens of one forward pass


def draws(seed: int, key: str) -> torch.Generator:
    """A generator of random numbers for one purpose of one life: no other draw changes it."""
    found = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(found[:7], "big"))


class Voice:
    """What reads and writes with a model and the weights of a life's levels, and remembers it in `state` alone.

    logits: of the next token [V]; None before the first. Levels do not learn and their clocks do not tick.
    """

    def __init__(self, model: LevelledModel, weights: tuple[Weights, ...]) -> None:
        self.model, self.weights = model, weights
        self.state: Any = detach(model.init_state(1))
        self.logits: Tensor | None = None

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read tokens [n]."""
        for part in tokens.split(PART) if tokens.numel() else ():
            with flushing():
                logits, self.state = self.model(part[None], self.state, weights=self.weights)
            self.logits = logits[0, -1]

    def write(self, tokens: int, *, temperature: float, generator: torch.Generator) -> Iterator[int]:
        """Yields tokens, each read before it is given: the last one is remembered too. Raises ValueError where
        nothing was read yet."""
        if self.logits is None:
            raise ValueError("the prompt is empty; a model goes on from at least one token")
        if tokens < 0:
            raise ValueError(f"tokens must be >= 0, got {tokens}")
        for _ in range(tokens):
            token = sample(self.logits, temperature, generator)
            self.read(torch.tensor([token]))
            yield token


def go_on(
    model: LevelledModel, weights: tuple[Weights, ...], prompt: Tensor, tokens: int, temperature: float, seed: int
) -> Iterator[int]:
    """Yields tokens that go on from a prompt [n], from a fresh sequence state."""
    voice = Voice(model, weights)
    voice.read(prompt)
    return voice.write(tokens, temperature=temperature, generator=draws(seed, "generate"))


@torch.no_grad()
def surprises(model: LevelledModel, levels: LevelsState, texts: Iterable[Tensor]) -> list[float]:
    """Mean nats of a token of each text [n], each from a fresh sequence state; nothing is learned."""
    reader = Reader(model, learning=False)
    read = [reader.read(reader.begin(levels), text)[1] for text in texts]
    return [float(out.nll[1:].double().mean()) for out in read]
