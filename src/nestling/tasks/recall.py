"""Multi-query associative recall: pairs of keys and values, then the keys again; what was the value of each?

The task of Arora et al. (2023, arXiv 2312.04927) as in Zoology: the standard probe of how many pairs a state can hold.
With more pairs written than there are keys it is the other standard probe, whether what is bound can be bound anew
(Schlag et al. 2021, arXiv 2102.11174, their second setting).
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
    writes: int | None = None,
    vocabulary: int = 8192,
    power: float | None = 0.01,
    noise: bool = False,
) -> Recall:
    """`count` sequences k_1 v_1 ... k_K v_K, then every key once more, K = `pairs`.

    Keys come from the first half of the vocabulary without 0, values from the second, each without repetition. With
    `writes` more than `pairs`, so many pairs come first, in which each of the K keys returns as chance has it, once at
    least and each time with another value: the last value of a key is wanted. After the pairs every second place is
    free for a question, and keys take places drawn without repetition, the i-th with a chance that goes as
    i^(power - 1): most are asked soon, some late. power=None: every place alike. All other
    places hold 0, or with `noise` any token at all. The same seed gives the same sequences. A guess among the values
    is right as often as `chance(vocabulary)` says. Raises ValueError for lengths that do not hold the questions.
    """
    half = vocabulary // 2
    if not 1 <= pairs <= half - 1:
        raise ValueError(f"pairs must be 1 to {half - 1}, the keys in a vocabulary of {vocabulary}, got {pairs}")
    writes = pairs if writes is None else writes
    if not pairs <= writes <= vocabulary - half:
        allowed = f"{pairs} to {vocabulary - half}, the pairs and the values in a vocabulary of {vocabulary}"
        raise ValueError(f"writes must be {allowed}, got {writes}")
    if length < 2 * (writes + pairs):
        needed = f"2 * (writes + pairs) = {2 * (writes + pairs)}"
        raise ValueError(f"length must be at least {needed} tokens, got {length}")
    if power is not None and not power > 0:
        raise ValueError(f"power must be more than 0, or None, got {power}")
    generator = torch.Generator().manual_seed(seed)
    keys = 1 + _without_repetition(count, half - 1, pairs, generator)
    values = half + _without_repetition(count, vocabulary - half, writes, generator)
    places = (length - 2 * writes) // 2
    rank = torch.arange(1, places + 1, dtype=torch.float64)
    chances = torch.ones_like(rank) if power is None else rank ** (power - 1.0)
    gaps = torch.multinomial(chances.expand(count, -1), pairs, generator=generator)
    at = 2 * writes + 2 * gaps
    tokens = torch.zeros(count, length, dtype=torch.int64)
    if noise:
        tokens = torch.randint(vocabulary, (count, length), generator=generator)
    which = _each_once_at_least(count, pairs, writes, generator)
    tokens[:, 0 : 2 * writes : 2], tokens[:, 1 : 2 * writes : 2] = keys.gather(1, which), values
    tokens.scatter_(1, at, keys)
    written = (which[:, :, None] == torch.arange(pairs)) * torch.arange(1, writes + 1)[:, None]
    targets = torch.zeros_like(tokens).scatter_(1, at, values.gather(1, written.argmax(1)))
    asked = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, at, True)
    return Recall(tokens, targets, asked)


def chance(vocabulary: int) -> float:
    """How often a guess among all values is right."""
    return 1.0 / (vocabulary - vocabulary // 2)


def _without_repetition(rows: int, of: int, some: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, of, generator=generator).argsort(1)[:, :some]


def _each_once_at_least(rows: int, of: int, some: int, generator: torch.Generator) -> Tensor:
    """Which of 0 to `of` - 1 stands in each of `some` places [rows, some]; in order, where there is one place each."""
    which = torch.arange(of).expand(rows, of)
    if some == of:  # no number is drawn: sequences of keys that stand once are what they were
        return which
    which = torch.cat([which, torch.randint(of, (rows, some - of), generator=generator)], 1)
    return which.gather(1, _without_repetition(rows, some, some, generator))
