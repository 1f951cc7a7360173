"""Ways to spend a night: sleep, and what it has to be better than, behind one interface."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.levels import Growing, LevelsState, Reader, ReadingState
from nestling.memory.part import Part
from nestling.memory.structure import Weights

from .dreams import any_token, dream
from .grow import draws
from .night import SleepConfig, sleep
from .report import SleepReport
from .reservoir import Reservoir, keep, no_reservoir, reservoir
from .seed import detached_weights


class Anchor(NamedTuple):
    """What elastic weight consolidation holds to: weights of the levels, and how much each matters."""

    weights: tuple[Weights, ...]
    fisher: tuple[Weights, ...]


class Kept(NamedTuple):
    """What an arm keeps beside the life: pieces of wake text, the last of it, an anchor."""

    reservoir: Reservoir
    last: Tensor
    anchor: Anchor | None = None

    @property
    def bytes_stored(self) -> int:
        """Of wake text."""
        return self.reservoir.bytes_stored + Reservoir(self.last[None], 1, 1, self.last[:0]).bytes_stored


class Rest(NamedTuple):
    """What a night cost, and its report where it was a sleep. tokens: that passed through the model."""

    tokens: int
    bytes_stored: int
    report: SleepReport | None = None


class Arm(Part, family=True):
    """What a life does between days."""

    def begin(self) -> Kept:
        """What is kept at the start of a life: nothing."""
        return Kept(no_reservoir(), torch.zeros(0, dtype=torch.int64))

    def awake(self, kept: Kept, tokens: Tensor, key: object) -> Kept:
        """What is kept after so many tokens [n] more were read."""
        return kept

    @abstractmethod
    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]: ...


@dataclass(frozen=True, repr=False)
class no_sleep(Arm):
    """The night is passed over."""

    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]:
        return state, kept, Rest(0, 0)


@dataclass(frozen=True, repr=False)
class sleeping(Arm):
    """A sleep. pieces of `piece` tokens: the reservoir, for sources of dreams that draw on one."""

    config: SleepConfig = field(default_factory=SleepConfig)
    pieces: int = 0
    piece: int = 64  # tokens

    def begin(self) -> Kept:
        return Arm.begin(self)._replace(reservoir=reservoir(self.pieces, self.piece))

    def awake(self, kept: Kept, tokens: Tensor, key: object) -> Kept:
        return kept._replace(reservoir=keep(kept.reservoir, tokens, key))

    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]:
        state, report = sleep(model, state, self.config, key, reservoir=kept.reservoir)
        return state, kept, Rest(report.tokens, kept.bytes_stored, report)


def off_policy(config: SleepConfig) -> sleeping:
    """The same sleep by off-policy distillation: on the teacher's own text, without imitation."""
    seeding = replace(config.seeding, on_policy=0.0, divergence_share=1.0)
    return sleeping(replace(config, seeding=seeding))


@dataclass(frozen=True, repr=False)
class replay(Arm):
    """Pieces of what was read awake are read again, each from a fresh sequence state: plain replay."""

    pieces: int
    piece: int = 64  # tokens
    tokens: int = 2048  # of a night

    def begin(self) -> Kept:
        return Arm.begin(self)._replace(reservoir=reservoir(self.pieces, self.piece))

    def awake(self, kept: Kept, tokens: Tensor, key: object) -> Kept:
        return kept._replace(reservoir=keep(kept.reservoir, tokens, key))

    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]:
        held = kept.reservoir
        if not held.filled:
            return state, kept, Rest(0, kept.bytes_stored)
        order = torch.randint(0, held.filled, (-(-self.tokens // self.piece),), generator=draws(key, "replay"))
        state = read_again(model, state, [held.pieces[i] for i in order.tolist()])
        return state, kept, Rest(len(order) * self.piece, kept.bytes_stored)


@dataclass(frozen=True, repr=False)
class extra_passes(Arm):
    """The last `tokens` tokens are read `times` more."""

    times: int = 1
    tokens: int = 1024

    def awake(self, kept: Kept, tokens: Tensor, key: object) -> Kept:
        return kept._replace(last=torch.cat([kept.last, tokens.cpu()])[-self.tokens :])

    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]:
        if kept.last.numel() < 2:
            return state, kept, Rest(0, kept.bytes_stored)
        state = read_again(model, state, [kept.last] * self.times)
        return state, kept, Rest(self.times * kept.last.numel(), kept.bytes_stored)


@dataclass(frozen=True, repr=False)
class fall_back(Arm):
    """Every level goes a share of the way back to the weights that it began life with: what a sleep that resets has to
    be better than."""

    share: float = 0.5

    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]:
        state = Reader(model).settle(state)
        first = detached_weights(model.level_weights())
        own = [
            tuple(torch.lerp(w, start, self.share) for w, start in zip(maps, starts, strict=True))
            for maps, starts in zip(state.levels.weights[: len(model.own)], first, strict=False)
        ]
        weights = (*own, *state.levels.weights[len(own) :])
        return state._replace(levels=state.levels._replace(weights=weights)), kept, Rest(0, 0)


@dataclass(frozen=True, repr=False)
class ewc(Arm):
    """Elastic weight consolidation, as a step at night: each weight w goes to the minimum of (w' - w)^2 +
    strength F (w' - a)^2, between itself and its anchor a; then the anchor is renewed.

    F is the diagonal of the Fisher information on the model's own text, so that no wake text is kept; divided by its
    mean, and summed over nights (the online form: Schwarz et al. 2018). Anchors are double the size of the levels.
    """

    strength: float = 1.0
    dreams: int = 32
    length: int = 64  # tokens

    def rest(self, model: Growing, state: ReadingState, kept: Kept, key: object) -> tuple[ReadingState, Kept, Rest]:
        state = Reader(model).settle(state)
        weights = state.levels.weights
        if kept.anchor is not None:
            weights = pull(weights, kept.anchor, self.strength)
        state = state._replace(levels=state.levels._replace(weights=weights))
        found = fisher(model, weights, self.dreams, self.length, key)
        if kept.anchor is not None:
            found = tuple(
                tuple(a + b for a, b in zip(new, old, strict=True))
                for new, old in zip(found, kept.anchor.fisher, strict=True)
            )
        anchor = Anchor(weights[: len(model.own)], found)
        return state, kept._replace(anchor=anchor), Rest(4 * self.dreams * self.length, 0)


def pull(weights: tuple[Weights, ...], anchor: Anchor, strength: float) -> tuple[Weights, ...]:
    """w <- (w + strength F a) / (1 + strength F), for the model's own levels."""
    own = [
        tuple((w + strength * f * a) / (1 + strength * f) for w, a, f in zip(maps, to, by, strict=True))
        for maps, to, by in zip(weights, anchor.weights, anchor.fisher, strict=False)
    ]
    return (*own, *weights[len(own) :])


def fisher(model: Growing, weights: tuple[Weights, ...], dreams: int, length: int, key: object) -> tuple[Weights, ...]:
    """The mean square of the gradient of the log-likelihood of texts that the model writes itself, over that of all
    weights of its levels."""
    source, empty = any_token(), no_reservoir()
    (texts,) = dream(model, weights, source, dreams, length, draws(key, "fisher"), reservoir=empty)
    leaves = [[w.detach().clone().requires_grad_() for w in maps] for maps in weights[: len(model.own)]]
    banks = detached_weights(weights[len(model.own) :])
    total = [[torch.zeros_like(w) for w in maps] for maps in leaves]
    for text in texts.tokens:
        with torch.enable_grad():
            logits, _ = model(text[None], weights=(*(tuple(maps) for maps in leaves), *banks))
            loss = F.cross_entropy(logits[0, :-1], text[1:], reduction="sum")
            flat = [w for maps in leaves for w in maps]
            gradients = iter(torch.autograd.grad(loss, flat))
        for maps in total:
            for sums in maps:
                sums += next(gradients).square()
    count = sum(w.numel() for maps in total for w in maps)
    mean = sum(float(w.sum()) for maps in total for w in maps) / count
    return tuple(tuple(w / max(mean, 1e-30) for w in maps) for maps in total)


def read_again(model: Growing, state: ReadingState, texts: Sequence[Tensor]) -> ReadingState:
    """The life after it has read some texts again, each as a document of its own, and learned from them. Its sequence
    state, its position and its clocks stay where they were."""
    reader = Reader(model)
    state = reader.settle(state)
    levels = state.levels
    for text in texts:
        reading, _ = reader.read(reader.begin(levels), text.to(levels.weights[0][0].device))
        levels = reader.end_document(reading)[0].levels
    return state._replace(levels=_at_the_same_time(levels, state.levels))


def _at_the_same_time(levels: LevelsState, clocks: LevelsState) -> LevelsState:
    rules = tuple(
        tuple(rule._replace(elapsed=clock.elapsed) for rule, clock in zip(maps, old, strict=True))
        for maps, old in zip(levels.rules, clocks.rules, strict=True)
    )
    return levels._replace(rules=rules)
