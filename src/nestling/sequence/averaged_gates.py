"""Steps that are averaged over a chunk: gates that know a token's place in it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.memory.retention import decay_to_anchor
from nestling.memory.rule import Gates, retain

from .gating import Asked, GatingModule, around, positive
from .scan import Memory


@dataclass(frozen=True, repr=False)
class averaged_gates(around):
    """step size p_i eta_i, retention p_i / p_{i-1} of what `of` keeps, at place i = 1 .. `chunk` of a chunk::

        W_i = W_c - p_i sum_{j<=i} eta_j g_j,    p_i = exp(s_i) / i, s learned and 0 at the start

    with retain(decay_to_anchor(), ...), W_c the weights on which the chunk opened. TTT (2407.04620), its published
    code, where p_i = max(0, 1/i + s_i): here it stays positive. Of `of` the step size alone is learned; being
    averaged, its steps go up to 1. Oracle: tests/test_averaged_gates.py.
    """

    chunk: int = 16
    placed = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "chunk")

    def fits(self, memory: Memory) -> None:
        self.of.fits(memory)
        if memory.chunk != self.chunk:
            raise ValueError(f"{self} averages over {self.chunk} tokens, but the memory's chunk is {memory.chunk}")
        if not isinstance(memory.rule, retain) or not isinstance(memory.rule.retention, decay_to_anchor):
            raise ValueError(
                f"{self} is for rules that return to where a chunk opened, retain(decay_to_anchor(), ...), not for "
                f"{memory.rule}"
            )

    def build(
        self, dim: int, heads: int, head_dim: int, generator: torch.Generator | None = None, asked: Asked = Asked()
    ) -> GatingModule:
        asked = asked._replace(names=tuple(name for name in asked.names if name != "log_retention"))
        return AveragedGates(self.of.build(dim, heads, head_dim, generator, asked), self.chunk)


class AveragedGates(GatingModule):
    def __init__(self, inner: GatingModule, chunk: int) -> None:
        super().__init__()
        self.inner, self.log_share = inner, nn.Parameter(torch.zeros(chunk))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def choose(self, raw: Tensor, bound: float) -> Gates:
        return self.inner.choose(raw, 1.0)

    def placed(self, gates: Gates, place: Tensor) -> Gates:
        count = torch.ones_like(self.log_share).cumsum(0)
        share = self.log_share - count.log()  # log p_i
        kept = torch.cat([torch.zeros_like(share[:1]), share.diff()])  # where a chunk opens nothing can be forgotten
        gates = self.inner.placed(gates, place)
        return gates._replace(
            step_size=gates.step_size * share.exp()[place], log_retention=gates.log_retention + kept[place]
        )

    def more(self, raw: Tensor) -> dict[str, Tensor]:
        return self.inner.more(raw)
