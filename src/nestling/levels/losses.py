"""What a pre-trained model learns from: the error that its levels are written with."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.part import Part


class Loss(Part, family=True):
    """Where the error of a pre-trained model comes from."""

    reads: str = ""  # what it is read with


@dataclass(frozen=True, repr=False)
class next_token(Loss):
    """Nats of every token, predicted from those before it: what a decoder is trained with, and `Reader` learns from."""

    reads = "Reader"


@dataclass(frozen=True, repr=False)
class masked_tokens(Loss):
    """Nats of tokens that were replaced by the mask token, predicted from those on both sides.

    share: of the tokens of every piece, at least one. The choice depends on the seed and on the piece's position in
    the stream, so that a stream is learned alike wherever calls begin and end.
    """

    mask_token: int
    share: float = 0.15
    seed: int = 0
    reads = "MaskedReader"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"masked_tokens: share must be in (0, 1], got {self.share}")

    def hidden(self, tokens: int, position: int) -> Tensor:
        """Which of a piece's tokens are masked, bool [tokens]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
        order = torch.randperm(tokens, generator=generator)
        chosen = torch.zeros(tokens, dtype=torch.bool)
        chosen[order[: max(1, round(self.share * tokens))]] = True
        return chosen


@dataclass(frozen=True, repr=False)
class seen_classes(Loss):
    """Nats of an example's class among the classes seen so far, this one included: class-incremental learning, in which
    a class that has not come yet is not pushed down."""

    reads = "ExampleReader"

    def nats(self, logits: Tensor, label: int, seen: Tensor) -> Tensor:
        """logits [classes], seen bool [classes] -> the loss, a scalar."""
        known = seen.clone()
        known[label] = True
        return F.cross_entropy(logits.masked_fill(~known, -torch.inf), torch.tensor(label, device=logits.device))
