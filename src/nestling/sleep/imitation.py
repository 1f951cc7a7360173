"""Learning to imitate: how near what a student wrote comes to what the teacher dreamt, as a reward."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nestling.memory.part import Part


def edit_distance(written: Int[Tensor, "b n"], dreamt: Int[Tensor, "b m"]) -> Int[Tensor, " b"]:
    """Levenshtein distance of every row: insertions, deletions and substitutions of tokens.

    A row of the table at a time, for the whole batch; the insertions along it are a running minimum.
    """
    a, b = written.cpu().numpy(), dreamt.cpu().numpy()
    steps = np.arange(b.shape[1] + 1)
    row = np.broadcast_to(steps, (len(a), b.shape[1] + 1))
    for i in range(a.shape[1]):
        changed = np.minimum(row[:, 1:] + 1, row[:, :-1] + (a[:, i : i + 1] != b))
        first = np.full((len(a), 1), i + 1)
        row = np.minimum.accumulate(np.concatenate([first, changed], 1) - steps, axis=1) + steps
    return torch.from_numpy(row[:, -1].astype(np.int64)).to(written.device)


def likeness(written: Int[Tensor, "b n"], dreamt: Int[Tensor, "b m"], within: float = 0.5) -> Float[Tensor, " b"]:
    """r_abs = 1 - z / max(n, m) where the edit distance z <= within * max(n, m), else 0 (Eq. 4).

    The paper's threshold z_0 is given as a share of the longer text: lengths differ.
    """
    longest = max(written.shape[1], dreamt.shape[1])
    z = edit_distance(written, dreamt).double()
    return torch.where(z <= within * longest, 1 - z / longest, torch.zeros_like(z))


class Heard(NamedTuple):
    """What a judge is told: what the student wrote and what the teacher dreamt, tokens [b, n] each, and for both the
    nats a token [b] that the teacher is surprised by it."""

    written: Tensor
    dreamt: Tensor
    surprise_written: Tensor
    surprise_dreamt: Tensor


class Meaning(Part, family=True):
    """Whether two texts say the same: the semantic part of the reward, 0 or 1."""

    @abstractmethod
    def agrees(self, heard: Heard) -> Float[Tensor, " b"]: ...


@dataclass(frozen=True, repr=False)
class as_likely(Meaning):
    """1 where the teacher finds the student's text no more than `nats` a token less likely than its own.

    This stands for the paper's frozen reward model, which a life of bytes does not have. It says that the text reads
    like the teacher's, not that it means the same.
    """

    nats: float = 0.5

    def agrees(self, heard: Heard) -> Float[Tensor, " b"]:
        return (heard.surprise_written <= heard.surprise_dreamt + self.nats).double()


@dataclass(frozen=True, repr=False)
class nothing(Meaning):
    """Never: the ablation without a semantic reward."""

    def agrees(self, heard: Heard) -> Float[Tensor, " b"]:
        return torch.zeros_like(heard.surprise_written, dtype=torch.float64)


@dataclass(frozen=True, repr=False)
class judged(Meaning):
    """By any judge of two texts (tokens [n] each), such as a frozen reward model. Not part of a saved configuration."""

    judge: Callable[[Tensor, Tensor], bool]

    def agrees(self, heard: Heard) -> Float[Tensor, " b"]:
        found = [float(self.judge(a, b)) for a, b in zip(heard.written, heard.dreamt, strict=True)]
        return torch.tensor(found, dtype=torch.float64, device=heard.written.device)


class Reward(Part, family=True):
    """How what a student wrote is rewarded."""

    @abstractmethod
    def of(self, heard: Heard) -> Float[Tensor, " b"]: ...


@dataclass(frozen=True, repr=False)
class imitation(Reward):
    """r = share * r_sem + (1 - share) * r_abs (Eq. 3; `share` is its gamma). Continuations are compared, without the
    prefix that both were given, which would be worth something for nothing."""

    share: float = 0.5
    within: float = 0.5
    meaning: Meaning = as_likely()

    def __post_init__(self) -> None:
        for name in ("share", "within"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"imitation: {name} must be in [0, 1], got {getattr(self, name)}")

    def of(self, heard: Heard) -> Float[Tensor, " b"]:
        spelled = likeness(heard.written, heard.dreamt, self.within)
        return self.share * self.meaning.agrees(heard) + (1 - self.share) * spelled


def advantages(rewards: Float[Tensor, "p g"]) -> Float[Tensor, "p g"]:
    """Each reward less the mean of the others of its prefix: the leave-one-out baseline of REINFORCE."""
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"a leave-one-out baseline needs at least 2 completions of a prefix, got {group}")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (group - 1)
