"""One way to compare a Memory with its naive oracle: reads, final state and every gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.naive_miras import Flow, Run
from nestling.memory.rule import Gates
from nestling.sequence import Memory, MemoryState
from nestling.sequence.scan import Writes

F64 = torch.float64
HEADS = 2
LENGTHS = (1, 7, 63)


@dataclasses.dataclass
class Data:
    """starts [1, h, out, in] of each map; keys, queries [1, h, t, k], values [1, h, t, v]; gates [1, h, t]."""

    starts: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    queries: Tensor
    gates: Gates

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.starts, self.keys, self.values, self.queries, self.gates.step_size, self.gates.log_retention]  # type: ignore[list-item]

    def flow(self, head: int) -> Flow:
        gates = (self.gates.step_size, self.gates.log_retention.exp())  # type: ignore[union-attr]
        return Flow(*(x[0, head] for x in (self.keys, self.values, self.queries, *gates)))


def make(memory: Memory, length: int, *, key: int = 4, value: int = 4, step_size: float = 0.1, seed: int = 0) -> Data:
    """Numbers that leave no gate, key or start neutral."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, HEADS, length, *shape, dtype=F64, generator=generator)

    starts = tuple(w.to(F64) for w in memory.structure.init(key, value, (1, HEADS), generator))
    starts = tuple(w + 0.1 * torch.randn(w.shape, dtype=F64, generator=generator) for w in starts)
    keys = F.normalize(normal(key), dim=-1) * (0.5 + normal(1).sigmoid())
    gates = Gates(step_size * (0.2 + normal().sigmoid()), 0.0, F.logsigmoid(normal() + 3))
    data = Data(starts, keys, normal(value), normal(key), gates)
    for leaf in data.leaves:
        leaf.requires_grad_()
    return data


def fast(memory: Memory, data: Data, split: int | None = None) -> tuple[Tensor, MemoryState]:
    """Chunk by chunk, each in pieces of at most `split` tokens."""
    state, reads, length = memory.begin(data.starts), [], data.keys.shape[2]
    for opens in range(0, length, memory.chunk):
        state = memory.open(state, True)
        stop = min(opens + memory.chunk, length)
        for first in range(opens, stop, split or memory.chunk):
            at = slice(first, min(first + (split or memory.chunk), stop))
            pairs = Writes(data.keys[..., at, :], data.values[..., at, :], data.gates.at(at))
            y, state = memory.run(state, pairs, data.queries[..., at, :])
            reads.append(y)
    return torch.cat(reads, 2), state


def slow(data: Data, oracle: Callable[[tuple[Tensor, ...], Flow], Run]) -> list[Tensor]:
    """The oracle's reads [1, h, t, v] and what stands at the end [1, h, out, in] of each map."""
    runs = [oracle(tuple(w[0, head] for w in data.starts), data.flow(head)) for head in range(HEADS)]
    ends = [torch.stack(parts)[None] for parts in zip(*(run.standing for run in runs), strict=True)]
    return [torch.stack([run.reads for run in runs])[None], *ends]


def gradients(found: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of a loss on every number found."""
    generator = torch.Generator().manual_seed(1)
    outer = torch.zeros((), dtype=F64)
    for tensor in found:
        outer = outer + (tensor * torch.randn(tensor.shape, dtype=F64, generator=generator)).sum()
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, torch.autograd.grad(outer, leaves, allow_unused=True), strict=True)
    ]


def near(found: Any, expected: Any, name: str = "", rtol: float = 1e-10) -> None:
    """To `rtol` of the largest number."""
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_same(found: list[Tensor], expected: list[Tensor], data: Data, rtol: float = 1e-10) -> None:
    assert len(found) == len(expected)
    assert all(tensor.isfinite().all() for tensor in expected)
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        near(mine, theirs, f"reads, ends [{index}]", rtol)
    pairs = zip(gradients(found, data.leaves), gradients(expected, data.leaves), strict=True)
    for index, (mine, theirs) in enumerate(pairs):
        near(mine, theirs, f"gradient of leaf {index}", rtol)


def assert_is_oracle(memory: Memory, data: Data, oracle: Callable[..., Run], rtol: float = 1e-10) -> None:
    """Reads, the weights at the end as the memory answers with them, and all gradients are the oracle's."""
    y, state = fast(memory, data)
    assert_same([y, *memory.exposed(state.running, state)], slow(data, oracle), data, rtol)
