"""TNT: one memory for the whole document in large chunks, and several that start anew every shard, side by side."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nestling.memory.attentional_bias import AttentionalBias, dot, l2
from nestling.memory.rule import Gates, Rule, clip, gradient_descent, normalize
from nestling.memory.state import select
from nestling.memory.structure import Structure, Weights, matrix, mlp

from .compiled import chunk_step
from .layer import SequenceMemory, sequence_memory
from .layout import Piece, lay_out
from .mixer import Mixer, MixerModule
from .scan import Memory, MemoryState, States, Writes


@dataclass(frozen=True, repr=False)
class shards(Mixer):
    """A memory that starts anew every `shard` tokens (a multiple of its chunk): the expression of `Shards`.
    queries: "projected" on the keys of the shard so far, or "raw". Source: TNT 6, 7. Oracle:
    `naive_blocks.shards`."""

    memory: sequence_memory = sequence_memory(chunk=16)
    shard: int = 2048
    queries: Literal["projected", "raw"] = "projected"

    def __post_init__(self) -> None:
        if not isinstance(self.memory, sequence_memory):
            raise ValueError(f"shards: what starts anew is a sequence_memory(), not {self.memory}")
        if self.shard < 1 or self.shard % self.memory.chunk:
            raise ValueError(
                f"shards: shard must be a multiple of the memory's chunk {self.memory.chunk}, got {self.shard}"
            )
        if self.queries not in ("projected", "raw"):
            raise ValueError(f"shards: queries must be 'projected' or 'raw', got {self.queries!r}")

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "Shards":
        return Shards(dim, heads, self, generator)


class ShardState(NamedTuple):
    """phase: tokens since the shard opened [b]; tail, memory: of the memory; keys: sum of the outer products of the
    shard's keys with themselves (one map [b, h, k, k]; without a projection, none)."""

    phase: Tensor
    tail: Tensor
    memory: MemoryState
    keys: Weights


class Shards(MixerModule):
    """A memory cut into shards that know nothing of one another, with queries projected on its keys (TNT, arXiv
    2511.07343, equations 6 and 7)::

        at the first token of every shard: W <- the learned start, C <- 0
        C_t = C_{t-1} + k_t k_t^T            k has norm one; this is linear attention from keys to themselves
        y_t = M(C_t q_t)                     "raw": M(q_t)

    A memory is fitted on keys and read with queries: C takes a query to where keys have been. Its length is left as
    the sum makes it, as in the paper. The short convolution goes on over a shard's edge, a document's start ends both.
    x [b, t, d] -> [b, t, d]. Oracle: `naive_blocks.shards`.
    """

    def __init__(
        self, dim: int, heads: int, expression: shards = shards(), generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.expression = expression
        self.memory = SequenceMemory(dim, heads, expression.memory, generator)
        self.keys = Memory(matrix(), dot(), gradient_descent(), expression.memory.chunk, "token")

    def init_state(self, batch: int) -> ShardState:
        start = self.memory.init_state(batch)
        if self.expression.queries == "raw":
            return ShardState(*start, ())
        dim = self.memory.qkv.in_features
        width = dim // self.memory.heads
        return ShardState(*start, (start.tail.new_zeros(batch, self.memory.heads, width, width),))

    def standing(self, state: ShardState) -> Weights:
        return self.memory.memory.standing(state.memory)

    def forward(
        self,
        x: Tensor,
        state: ShardState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, ShardState]:
        start = self.init_state(x.shape[0])
        state = start if state is None else state
        if x.shape[1] == 0:
            return x, state
        sizes = (self.expression.memory.chunk, self.expression.shard)
        layout = lay_out(state.phase, x.shape[1], sizes, reset, valid)
        if not layout.pieces:  # nothing but padding
            return torch.zeros_like(x), state
        starts = self._packed(start)
        own = [() if piece.opens[1] is False else starts for piece in layout.pieces]
        memory_step = chunk_step(self.memory.step, sizes[0], self.memory.step_options)

        def step(piece: Piece, pairs: Writes, queries: Tensor, own: Any, states: States) -> tuple[Tensor, States]:
            rows = piece.opens[1]
            if rows is not False:
                states = own if rows is True else select(rows, own, states)
            queries, *projection = self._project(pairs, queries, states[1:])
            return memory_step(piece, pairs, queries, (), (states[0], *projection))

        y, (memory, *keys), tail = self.memory.through(x, state.tail, layout, self._packed(state), starts, step, own)
        products = tuple(of_keys.running[0] for of_keys in keys)
        return self.memory.output(y, x), ShardState(layout.phase, tail, memory, products)

    def _packed(self, state: ShardState) -> States:
        return (state.memory, *(self.keys.begin((products,)) for products in state.keys))

    def _project(self, pairs: Writes, queries: Tensor, keys: States) -> tuple[Any, ...]:
        """C_t q_t and the state of C after the piece; the queries themselves where there is no C."""
        if not keys:
            return (queries,)
        gates = Gates(torch.ones_like(pairs.keys[..., 0]))
        own = Writes(pairs.keys, pairs.keys, gates, pairs.valid, steps=pairs.steps)
        return self.keys.run(keys[0], own, queries)


@dataclass(frozen=True, repr=False)
class beside(Mixer):
    """Several mixers of the same input, summed: the expression of `Beside`. Source: TNT 7. Oracle:
    `naive_blocks.tnt`."""

    mixers: tuple[Mixer, ...]

    def __post_init__(self) -> None:
        if not self.mixers or not all(isinstance(mixer, Mixer) for mixer in self.mixers):
            raise ValueError(f"beside: mixers must name at least one mixer, and nothing else, got {self.mixers}")

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "Beside":
        return Beside(dim, heads, self, generator)


class BesideState(NamedTuple):
    """What each of the mixers remembers."""

    mixers: tuple[Any, ...]


class Beside(MixerModule):
    """y = sum_i mixer_i(x), each with its own projections and state. x [b, t, d] -> [b, t, d]."""

    def __init__(self, dim: int, heads: int, expression: beside, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixer.build(dim, heads, generator) for mixer in expression.mixers)

    def init_state(self, batch: int) -> BesideState:
        return BesideState(tuple(mixer.init_state(batch) for mixer in self.mixers))  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        state: BesideState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, BesideState]:
        state = self.init_state(x.shape[0]) if state is None else state
        y, after = torch.zeros_like(x), []
        for mixer, before in zip(self.mixers, state.mixers, strict=True):
            found, own = mixer(x, before, reset=reset, valid=valid)
            y = y + found
            after.append(own)
        return y, BesideState(tuple(after))


@dataclass(frozen=True, repr=False)
class tnt(Mixer):
    """TNT (arXiv 2511.07343): y = M(q; W at the large chunk's start) + sum_i M(C_t q; W_t^i), i over `local` chunks.

    Shorthand for the expression `parts()`: a memory of chunk `chunk` read at its boundary, beside one memory for each
    chunk in `local` that starts anew every `shard` tokens. All have the same structure, bias and rule (the paper's:
    gradient descent, neither momentum nor retention; `normalize` and `clip` keep it from diverging). Each has its own
    projections and output here, and the outputs are summed. A model trained with long local chunks may go on with
    shorter ones (the paper's second stage): their parameters are the same. Oracle: `naive_blocks.tnt`.
    """

    structure: Structure = mlp()
    attentional_bias: AttentionalBias = l2()
    rule: Rule = normalize(clip())
    chunk: int = 2048
    local: tuple[int, ...] = (8, 16)
    shard: int = 2048
    queries: Literal["projected", "raw"] = "projected"

    def __post_init__(self) -> None:
        if not self.local:
            raise ValueError("tnt: local must name the chunk of at least one local memory")
        self.parts()  # says what is wrong with its own numbers

    def parts(self) -> beside:
        """The expression of parts that this is."""
        shared = (self.structure, self.attentional_bias, self.rule)
        locals_ = (shards(sequence_memory(*shared, chunk), self.shard, self.queries) for chunk in self.local)
        return beside((sequence_memory(*shared, self.chunk, read="boundary"), *locals_))

    def build(self, dim: int, heads: int, generator: torch.Generator | None = None) -> "Beside":
        return self.parts().build(dim, heads, generator)
