"""Multi-query associative recall: pairs of keys and values, then the keys again; what was the value of each?

The task of Arora et al. (2023, arXiv 2312.04927) as in Zoology: the standard probe of how many pairs a state can hold.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Recall:
    """Sequences side by side, each with its own pairs."""

    tokens: Int[Tensor, "n t"]
    targets: Int[Tensor, "n t"]  # the value of the key that stands here, where it is asked for; else 0
    asked: Bool[Tensor, "n t"]  # where it is: the loss counts these positions only

    def accuracy(self, logits: Float[Tensor, "n t v"]) -> float:
        """The share of questions to which the most likely token is the answer."""
        return (logits.argmax(-1) == self.targets)[self.asked].double().mean().item()


def draw(
    count: int,
    length: int,
    pairs: int,
    seed: int,
    *,
    vocabulary: int = 8192,
    power: float | None = 0.01,
    noise: bool = False,
) -> Recall:
    """`count` sequences k_1 v_1 ... k_K v_K, then every key once more, K = `pairs`.

    Keys come from the first half of the vocabulary without 0, values from the second, each without repetition. After
    the pairs every second place is free for a question, and keys take places drawn without repetition, the i-th with
    a chance that goes as i^(power - 1): most are asked soon, some late. power=None: every place alike. All other
    places hold 0, or with `noise` any token at all. The same seed gives the same sequences. A guess among the values
    is right as often as `chance(vocabulary)` says. Raises ValueError for lengths that do not hold the questions.
    """
    half = vocabulary // 2
    if not 1 <= pairs <= half - 1:
        raise ValueError(f"pairs must be 1 to {half - 1}, the keys in a vocabulary of {vocabulary}, got {pairs}")
    if length < 4 * pairs:
        raise ValueError(f"length must be at least 4 * pairs = {4 * pairs} tokens, got {length}")
    if power is not None and not power > 0:
        raise ValueError(f"power must be more than 0, or None, got {power}")
    generator = torch.Generator().manual_seed(seed)
    keys = 1 + _without_repetition(count, half - 1, pairs, generator)
    values = half + _without_repetition(count, vocabulary - half, pairs, generator)
    places = (length - 2 * pairs) // 2
    rank = torch.arange(1, places + 1, dtype=torch.float64)
    chances = torch.ones_like(rank) if power is None else rank ** (power - 1.0)
    gaps = torch.multinomial(chances.expand(count, -1), pairs, generator=generator)
    at = 2 * pairs + 2 * gaps
    tokens = torch.zeros(count, length, dtype=torch.int64)
    if noise:
        tokens = torch.randint(vocabulary, (count, length), generator=generator)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens.scatter_(1, at, keys)
    targets = torch.zeros_like(tokens).scatter_(1, at, values)
    asked = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, at, True)
    return Recall(tokens, targets, asked)


def chance(vocabulary: int) -> float:
    """How often a guess among all values is right."""
    return 1.0 / (vocabulary - vocabulary // 2)


def _without_repetition(rows: int, of: int, some: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, of, generator=generator).argsort(1)[:, :some]
