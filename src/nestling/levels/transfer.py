"""How knowledge moves between two levels (Nested Learning section 3.3): what the slower one is handed, what the faster
one starts from, and through which of them a gradient flows."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.attentional_bias import AttentionalBias, l2
from nestling.memory.part import Part
from nestling.memory.rule import Gates, Pairs, Rule, gradient_descent
from nestling.memory.state import detach
from nestling.memory.structure import Structure, Weights, mlp, plain


class Context(NamedTuple):
    """Pairs of a context flow: keys [..., n, k], values [..., n, v]."""

    keys: Tensor
    values: Tensor


class Learned(NamedTuple):
    """A box in the middle of its context: its weights, and its rule's states, one for each linear map."""

    weights: Weights
    rules: tuple[Any, ...]


@dataclass(frozen=True)
class Box:
    """One problem of a nested system (Definition 4): a memory that learns the pairs of its own context.

    learn: `steps` steps of the rule on the objective summed over the pairs, all at the weights before each step.
    Every operation is differentiable, the inner derivative included. Oracle: torch.func (tests/test_transfer.py).
    """

    structure: Structure = mlp()
    attentional_bias: AttentionalBias = l2()
    rule: Rule = gradient_descent()
    steps: int = 1
    step_size: float = 0.1
    momentum: float = 0.0
    log_retention: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Box: steps must be >= 1, got {self.steps}")
        if self.rule.exposes or self.rule.reopens:
            raise ValueError(f"Box: {self.rule!r} keeps an accumulator or opens chunks; a box's weights are its own")

    def begin(self, weights: Weights) -> Learned:
        """The start of a context."""
        return Learned(weights, tuple(self.rule.init(weight) for weight in weights))

    def read(self, weights: Weights, keys: Tensor) -> Tensor:
        """The values [..., n, v] of keys [..., n, k]."""
        return self.structure.forward(plain(weights), keys)[0]

    def loss(self, weights: Weights, context: Context) -> Tensor:
        """The objective, summed over the pairs [...]."""
        target = self.attentional_bias.target(context.keys, context.values)
        return self.attentional_bias.loss(self.read(weights, context.keys), target).sum(-1)

    def learn(self, state: Learned, context: Context) -> Learned:
        """The box after it has learned the pairs of a context, in one go."""
        gates = Gates(self.step_size, self.momentum, self.log_retention)
        target = self.attentional_bias.target(context.keys, context.values)
        for _ in range(self.steps):
            read, inputs, outputs = self.structure.forward(plain(state.weights), context.keys)
            error = self.attentional_bias.error(read, target)
            errors = self.structure.backward(state.weights, outputs, error)
            after = [
                self.rule.step(weight, Pairs(e, x), self.rule.anchor(rule), gates)
                for weight, rule, e, x in zip(state.weights, state.rules, errors, inputs, strict=True)
            ]
            state = Learned(tuple(weight for weight, _ in after), tuple(rule for _, rule in after))
        return state


class Transfer(Part, family=True):
    """The wire between a slow box and a fast one.

    flows: does a gradient of what the slow box makes of it reach what the fast box learned?
    """

    flows: bool = False

    @abstractmethod
    def hand(self, start: Weights, learned: Weights, context: Context) -> Any:
        """What the slow box is handed of a fast one that started somewhere and learned a context."""

    def write(self, context: Context) -> Context:
        """The pairs as the fast box gets them from the slow one."""
        return context if self.flows else detach(context)

    def start(self, weights: Weights) -> Weights:
        """The weights from which the fast box starts a context, of those that the slow one has for it."""
        return weights if self.flows else detach(weights)


@dataclass(frozen=True, repr=False)
class direct(Transfer):
    """M0(. ; Theta1): the slow box reads through the fast one's weights, which are constants to it (equations 24 to
    26). Linear attention, fast weights. Oracle: a fast-weight RNN."""

    def hand(self, start: Weights, learned: Weights, context: Context) -> Weights:
        return detach(learned)


@dataclass(frozen=True, repr=False)
class direct_context(Transfer):
    """M0(. ; C1): the slow box is given the fast one's context itself (equation 27). Oracle: softmax attention."""

    def hand(self, start: Weights, learned: Weights, context: Context) -> Context:
        return detach(context)


@dataclass(frozen=True, repr=False)
class backpropagation(Transfer):
    """One gradient flow through both boxes, each stepping at its own period: how the continuum is wired."""

    flows = True

    def hand(self, start: Weights, learned: Weights, context: Context) -> Weights:
        return learned


class Meta(Transfer, abstract=True):
    """Theta1 starts from what the slow level learned for it (equation 28): its start is the slow level's weight."""

    flows = True

    def gradient(self, fast: Box, start: Weights, support: Context, query: Context) -> Weights:
        """What the slow level's rule steps `start` by: of the loss on `query`, after `support` was learned; summed
        over the leading dims of the contexts."""
        with torch.enable_grad():
            leaves = tuple(weight.detach().requires_grad_() for weight in start)
            each = _for_each(leaves, support)
            learned = fast.learn(fast.begin(each), support).weights
            loss = fast.loss(self.hand(each, learned, support), query).sum()
            return torch.autograd.grad(loss, leaves)


@dataclass(frozen=True, repr=False)
class initialization(Meta):
    """MAML: the start is moved down the gradient of the loss after learning. order 2: through the steps of learning;
    order 1: as if they had not depended on the start. Oracle: MAML on sine regression."""

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"initialization: order must be 1 or 2, got {self.order}")

    def hand(self, start: Weights, learned: Weights, context: Context) -> Weights:
        return learned if self.order == 2 else straight_through(start, learned)


@dataclass(frozen=True, repr=False)
class reptile(Meta):
    """Reptile (Nichol et al. 2018): the start moves toward where learning ends; no gradient of any loss is needed."""

    def hand(self, start: Weights, learned: Weights, context: Context) -> Weights:
        return straight_through(start, learned)

    def gradient(self, fast: Box, start: Weights, support: Context, query: Context) -> Weights:
        with torch.no_grad():
            both = Context(*(torch.cat(pair, -2) for pair in zip(support, query, strict=True)))
            learned = fast.learn(fast.begin(_for_each(start, both)), both).weights
            return tuple((a - b).sum_to_size(a.shape) for a, b in zip(start, learned, strict=True))


@dataclass(frozen=True, repr=False)
class generation(Transfer):
    """Theta1 = g(M0): the slow box makes the fast one's weights, anew for every context. Oracle: a hypernetwork."""

    flows = True

    def hand(self, start: Weights, learned: Weights, context: Context) -> Weights:
        return learned


@dataclass(frozen=True, repr=False)
class context_generation(Transfer):
    """C1 = g(M0): the slow box makes the pairs that the fast one learns, as a network makes the gradients that its
    optimizer remembers. A gradient flows back through what was learned of them, to the pairs."""

    flows = True

    def start(self, weights: Weights) -> Weights:
        return detach(weights)

    def hand(self, start: Weights, learned: Weights, context: Context) -> Weights:
        return learned


def _for_each(weights: Weights, context: Context) -> Weights:
    """The same weights for every context [...] of a batch [..., out, in]."""
    return tuple(weight.expand(*context.keys.shape[:-2], *weight.shape[-2:]) for weight in weights)


def straight_through(start: Weights, learned: Weights) -> Weights:
    """The learned weights, to the bit, as if they were the start moved by constants: the gradient goes to the start."""
    return tuple(b.detach() + (a - a.detach()) for a, b in zip(start, learned, strict=True))


Write = Callable[[Tensor, Any], Context]
"""(input, the slow box's last output) -> the pairs [..., n, k], [..., n, v] that the fast box is to learn."""
Read = Callable[[Tensor, Any, Any], Any]
"""(input, the slow box's last output, what it is handed) -> its next output."""


def run(
    fast: Box, transfer: Transfer, start: Weights, inputs: Sequence[Tensor], *, write: Write, read: Read
) -> tuple[list[Any], Learned]:
    """Both boxes over a sequence of inputs: at each, the slow one writes pairs, the fast one learns them, and the
    slow one reads what it is handed. Returns the slow box's outputs and the fast box at the end."""
    begun = transfer.start(start)
    state, seen, outputs = fast.begin(begun), None, []
    last: Any = None
    for given in inputs:
        pairs = transfer.write(write(given, last))
        state = fast.learn(state, pairs)
        seen = pairs if seen is None else Context(*(torch.cat(p, -2) for p in zip(seen, pairs, strict=True)))
        last = read(given, last, transfer.hand(begun, state.weights, seen))
        outputs.append(last)
    return outputs, state
