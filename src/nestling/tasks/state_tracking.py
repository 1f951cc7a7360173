"""Formal languages that need a state: at every position of a string, is the prefix up to it in the language?

The tasks of Bhattamishra et al. (2020) and Irie et al. (2023), as in Nested Learning's Table 5. Strings of lengths 2 to
50 are for training and the first bin of the test, those of 51 to 100 for the second; a string counts as solved when
the answer is right at every one of its positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.memory import known

YES, NO = 2, 3  # the answers, as symbols beside the two that strings are made of
VOCABULARY = 4
BINS = {"to 50": (2, 50), "51 to 100": (51, 100)}


@dataclass(frozen=True)
class Language:
    """strings: (shares of ones [n], length, generator) -> symbols [n, length]. member: symbols [n, t] -> which
    prefixes are in the language [n, t]. step: lengths of strings are multiples of it."""

    strings: Callable[[Tensor, int, torch.Generator], Tensor]
    member: Callable[[Tensor], Tensor]
    step: int
    several: bool  # is there more than one string of a length


class Strings:
    """Strings of one language, side by side."""

    def __init__(self, symbols: Tensor, answers: Tensor, lengths: Tensor) -> None:
        self.symbols = symbols  # [n, t], 0 after a string's end
        self.answers = answers  # [n, t], YES or NO
        self.lengths = lengths  # [n]

    def solved(self, logits: Tensor) -> float:
        """The share of strings with the right answer [n, t, V] at every position."""
        right = logits[..., YES : NO + 1].argmax(-1) + YES == self.answers
        return (right | ~self.inside).all(1).double().mean().item()

    def margins(self, logits: Tensor) -> Tensor:
        """The right answer's logit [n, t, V] less the other's, at every position inside a string [positions]."""
        ahead = logits[..., YES] - logits[..., NO]
        return torch.where(self.answers == YES, ahead, -ahead)[self.inside]

    @property
    def inside(self) -> Tensor:
        """Which positions are in a string, and not after its end [n, t]."""
        return torch.arange(self.symbols.shape[1]) < self.lengths[:, None]


def draw(language: str, count: int, shortest: int, longest: int, seed: int, *, varied: bool = False) -> Strings:
    """`count` strings with lengths uniform over those of the language from `shortest` to `longest`; every length
    once where a length has one string only. varied: each string has its own share of ones, uniform over [0, 1], so
    that there are long runs of one symbol among them; else the symbols are equally likely. Raises ValueError when
    there is no such length, or language."""
    kind = known(language, LANGUAGES, "language")
    lengths = torch.tensor([n for n in range(shortest, longest + 1) if n % kind.step == 0])
    if not len(lengths):
        raise ValueError(f"{language} has no strings of {shortest} to {longest} symbols")
    generator = torch.Generator().manual_seed(seed)
    if kind.several:
        lengths = lengths[torch.randint(len(lengths), (count,), generator=generator)]
    shares = torch.rand(len(lengths), generator=generator) if varied else torch.full((len(lengths),), 0.5)
    rows = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    for length in lengths.unique().tolist():
        where = lengths == length
        rows[where, :length] = kind.strings(shares[where], length, generator)
    return Strings(rows, torch.where(kind.member(rows), YES, NO), lengths)


def _even(shares: Tensor, length: int, generator: torch.Generator) -> Tensor:
    bits = (torch.rand(len(shares), length, generator=generator) < shares[:, None]).long()
    bits[:, -1] = bits[:, :-1].sum(1) % 2
    return bits


def _repeated(*pattern: int) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    def strings(shares: Tensor, length: int, _: torch.Generator) -> Tensor:
        return torch.tensor(pattern).repeat(length // len(pattern) + 1)[:length].expand(len(shares), -1)

    return strings


def _multiple_of(number: int) -> Callable[[Tensor], Tensor]:
    return lambda symbols: ((torch.arange(symbols.shape[1]) + 1) % number == 0).expand(symbols.shape)


LANGUAGES = {
    "parity": Language(_even, lambda symbols: symbols.cumsum(1) % 2 == 0, 1, True),
    "(aa)*": Language(_repeated(0), _multiple_of(2), 2, False),
    "(abab)*": Language(_repeated(0, 1), _multiple_of(4), 4, False),
}
"""Parity: an even number of ones; the last bit of a string makes it even."""
