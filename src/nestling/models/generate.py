"""Writing: one token at a time from the sequence state."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nestling.levels.reading import LevelledModel
from nestling.memory.structure import Weights


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token from logits [V]; temperature 0 takes the most likely. Raises ValueError below it, and for logits that
    are not finite."""
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's answer is not finite: its weights have diverged; go back to an earlier state")
    if temperature == 0:
        return int(logits.argmax())
    chances = (logits.double() / temperature).softmax(-1)
    return int(torch.multinomial(chances, 1, generator=generator))


@torch.no_grad()
def generate(
    model: LevelledModel,
    prompt: bytes,
    tokens: int,
    *,
    weights: tuple[Weights, ...] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields `tokens` bytes after the prompt, each read back into the sequence state before the next.

    Levels do not learn from what is written. Cost per byte is constant. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty; a model goes on from at least one byte")
    if tokens < 0 or temperature < 0:
        raise ValueError(f"tokens and temperature must be >= 0, got {tokens} and {temperature}")
    return _generate(model, prompt, tokens, weights, temperature, torch.Generator().manual_seed(seed))


def _generate(
    model: LevelledModel,
    prompt: bytes,
    tokens: int,
    weights: tuple[Weights, ...] | None,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[int]:
    with torch.no_grad():
        logits, state = model(torch.tensor([list(prompt)]), weights=weights)
        for _ in range(tokens):
            token = sample(logits[0, -1], temperature, generator)
            yield token
            logits, state = model(torch.tensor([[token]]), state, weights=weights)
