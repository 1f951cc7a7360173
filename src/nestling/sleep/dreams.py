"""Dreams: what the teacher writes in its sleep, and what it is given to begin with."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from nestling.levels import Growing
from nestling.memory.part import Part
from nestling.memory.structure import Weights

from .bound import Ask, unbounded
from .reservoir import Reservoir


class Dreams(NamedTuple):
    """Texts of one length that a teacher wrote: tokens [n, t], of which the first `prompt` were given to it."""

    tokens: Tensor
    prompt: int


ROWS = 16
"""Dreams that are read at once: a sleep is to take no more memory than a step of training."""


def few_by_few(dreams: Sequence[Dreams], rows: int = ROWS) -> Iterator[Dreams]:
    """The same dreams, at most so many at a time."""
    for part in dreams:
        for tokens in part.tokens.split(rows):
            yield Dreams(tokens, part.prompt)


class Source(Part, family=True):
    """What dreams begin with."""

    def for_model(self, model: Growing) -> "Source":
        """The same for a model: what was left open is the model's own."""
        return self

    @abstractmethod
    def prompts(self, count: int, reservoir: Reservoir, generator: torch.Generator) -> list[Tensor]:
        """`count` prompts in all, int64 [n, t] by length."""


@dataclass(frozen=True, repr=False)
class own_samples(Source):
    """One token, and from there on the model's own: nothing of what was read has to be kept. first: the token that
    begins a document, such as the line break of a byte model (10)."""

    first: int = 10

    def prompts(self, count: int, reservoir: Reservoir, generator: torch.Generator) -> list[Tensor]:
        return [torch.full((count, 1), self.first)]


@dataclass(frozen=True, repr=False)
class any_token(Source):
    """One token, each of the vocabulary as often as the others: wider than own samples, and as little is kept.
    vocabulary: how many there are; None: as many as the model predicts."""

    vocabulary: int | None = None

    def for_model(self, model: Growing) -> "any_token":
        if self.vocabulary is not None:
            return self
        device = next(model.parameters()).device
        return any_token(model(torch.zeros(1, 1, dtype=torch.int64, device=device))[0].shape[-1])

    def prompts(self, count: int, reservoir: Reservoir, generator: torch.Generator) -> list[Tensor]:
        if self.vocabulary is None:
            raise ValueError("any_token() does not know how many tokens there are: say vocabulary=, or for_model(...)")
        return [torch.randint(0, self.vocabulary, (count, 1), generator=generator)]


@dataclass(frozen=True, repr=False)
class prefixes(Source):
    """The first `tokens` tokens of pieces that the reservoir kept of what was read."""

    tokens: int = 16

    def prompts(self, count: int, reservoir: Reservoir, generator: torch.Generator) -> list[Tensor]:
        if reservoir.filled == 0:
            raise ValueError(
                f"{self!r} needs pieces of wake text, and the reservoir holds none; keep some, or own_samples()"
            )
        if reservoir.pieces.shape[1] < self.tokens:
            raise ValueError(f"{self!r}: the reservoir's pieces are {reservoir.pieces.shape[1]} tokens long")
        chosen = torch.randint(0, reservoir.filled, (count,), generator=generator)
        return [reservoir.pieces[chosen, : self.tokens]]


SELF_STUDY = {
    "structuring": "\n\nThe same as a table of facts:\n",
    "summarization": "\n\nIn short:\n",
    "question": "\n\nQuestion: ",
    "use_case": "\n\nThis can be used to",
    "creative": "\n\nThis reminds me of",
}
"""What is said after a piece of text, by kind of self-study (the five kinds of Cartridges); the words are ours."""


@dataclass(frozen=True, repr=False)
class self_study(Source):
    """Pieces that the reservoir kept, each followed by words that ask for one of five kinds of study of it.

    For models that follow such words. A small byte model does not: to it they are a prefix like any other. The words
    are given as UTF-8 bytes; `asked` gives other tokens, one tuple for each kind, for models with a tokenizer.
    """

    kinds: tuple[str, ...] = tuple(SELF_STUDY)
    tokens: int = 64  # of each piece
    asked: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in SELF_STUDY]
        if unknown or not self.kinds:
            raise ValueError(f"self_study: kinds are {', '.join(SELF_STUDY)}; got {self.kinds}")
        if self.asked and len(self.asked) != len(self.kinds):
            raise ValueError(f"self_study: asked has {len(self.asked)} entries for {len(self.kinds)} kinds")

    def prompts(self, count: int, reservoir: Reservoir, generator: torch.Generator) -> list[Tensor]:
        words = self.asked or tuple(tuple(SELF_STUDY[kind].encode()) for kind in self.kinds)
        found = []
        for which, asked in enumerate(words):
            share = count // len(words) + (which < count % len(words))
            if share:
                (pieces,) = prefixes(self.tokens).prompts(share, reservoir, generator)
                found.append(torch.cat([pieces, torch.tensor(asked).expand(share, -1)], 1))
        return found


@dataclass(frozen=True, repr=False)
class mixture(Source):
    """Several sources, each with its share of the dreams (0 to 1, together 1)."""

    of: tuple[Source, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.of) != len(self.shares) or min(self.shares, default=-1) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"mixture: needs a share in [0, 1] for each source, together 1; got {self.shares}")

    def for_model(self, model: Growing) -> "mixture":
        return mixture(tuple(source.for_model(model) for source in self.of), self.shares)

    def prompts(self, count: int, reservoir: Reservoir, generator: torch.Generator) -> list[Tensor]:
        edges = [round(count * sum(self.shares[:k])) for k in range(len(self.of) + 1)]
        counts = [end - start for start, end in pairwise(edges)]
        return [
            found
            for source, share in zip(self.of, counts, strict=True)
            if share
            for found in source.prompts(share, reservoir, generator)
        ]


@torch.no_grad()
def write_on(
    model: Growing,
    weights: tuple[Weights, ...],
    given: Int[Tensor, "b t"],
    tokens: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    state: Any = None,
    ask: Ask = unbounded,
) -> Int[Tensor, "b n"]:
    """What the model writes after `given`, all rows at once: [b, t + tokens]. Nothing is learned, and no gradient
    flows. state: the sequence state before `given`, of as many rows; a fresh one by default. Raises
    FloatingPointError where the model's logits are not finite. ask: before every token."""
    logits, state = model(given, state, weights=weights)
    written = [given]
    for index in range(tokens):
        ask()
        chances = (logits[:, -1].double() / temperature).softmax(-1)
        if not bool(chances.isfinite().all()):
            raise FloatingPointError(f"logits are not finite after {given.shape[1] + index} tokens")
        token = torch.multinomial(chances.cpu(), 1, generator=generator).to(given.device)
        written.append(token)
        if index < tokens - 1:
            logits, state = model(token, state, weights=weights)
    return torch.cat(written, 1)


def dream(
    model: Growing,
    weights: tuple[Weights, ...],
    source: Source,
    count: int,
    tokens: int,
    generator: torch.Generator,
    *,
    reservoir: Reservoir,
    temperature: float = 1.0,
    states: Any = None,
    rows: int = 64,
    ask: Ask = unbounded,
) -> list[Dreams]:
    """`count` dreams of `tokens` tokens each, prompts not counted, `rows` at a time. states: of so many rows, the
    sequence state that the teacher dreams in (see `sleep`)."""
    device = weights[0][0].device
    found = []
    for prompts in source.for_model(model).prompts(count, reservoir, generator):
        parts = [
            write_on(
                model,
                weights,
                part,
                tokens,
                generator,
                temperature=temperature,
                state=None if states is None else states(len(part)),
                ask=ask,
            )
            for part in prompts.to(device).split(rows)
        ]
        found.append(Dreams(torch.cat(parts), prompts.shape[1]))
    return found


def number(dreams: Sequence[Dreams]) -> int:
    """How many there are."""
    return sum(len(part.tokens) for part in dreams)
