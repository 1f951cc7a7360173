"""The one decoder: blocks of a mixer and a continuum, between tied byte embeddings."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.levels.continuum import Continuum, Taps, level
from nestling.levels.slots import Slots
from nestling.memory.structure import Weights
from nestling.sequence import compile_steps

from .config import ModelConfig

_EMBEDDING_SCALE = 0.02  # of the tied table: logits start near zero, inputs near one


class Block(nn.Module):
    """x <- x + mixer(norm x); x <- continuum(x). With self-modifying Titans as mixer: Hope (equation 97)."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.mixer = config.mixer.build(config.dim, config.heads, generator)
        self.continuum = Continuum(config.dim, config.levels, generator, config.wiring)

    def forward(
        self,
        x: Tensor,
        state: Any,
        weights: tuple[Weights, ...] | None,
        taps: list[Taps] | None,
        slots: tuple[Slots, ...],
        reset: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Any]:
        normed = F.rms_norm(x, (x.shape[-1],), self.norm, eps=1e-6)
        y, state = self.mixer(normed, state, reset=reset, valid=valid)
        return self.continuum(x + y, weights, taps, slots), state


class ModelState(NamedTuple):
    """The sequence states of all blocks: what the model remembers of the document it is in."""

    blocks: tuple[Any, ...]


class Decoder(nn.Module):
    """Tokens [b, t] -> logits [b, t, V] and the state after them. Everything learned in the sequence is in the
    state; the levels' weights and slots may be given from outside; the call changes nothing."""

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        table = torch.randn(config.vocabulary, config.dim, generator=generator)
        self.embedding = nn.Parameter(table * _EMBEDDING_SCALE)
        self.blocks = nn.ModuleList(Block(config, generator) for _ in range(config.blocks))
        self.norm = nn.Parameter(torch.ones(config.dim))

    @property
    def levels(self) -> tuple[level, ...]:
        """Every level of every block, in the order of their weights in a life."""
        return tuple(lvl for block in self.blocks for lvl in block.continuum.levels)  # type: ignore[union-attr]

    def level_weights(self) -> tuple[Weights, ...]:
        return tuple(maps for block in self.blocks for maps in block.continuum.level_weights())  # type: ignore[union-attr, operator]

    def compile(self, **options: Any) -> None:
        """`sequence.compile_steps` of all mixers; `options` are torch.compile's."""
        compile_steps(self, **options)

    def init_state(self, batch: int) -> ModelState:
        return ModelState(tuple(block.mixer.init_state(batch) for block in self.blocks))  # type: ignore[union-attr, operator]

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: ModelState | None = None,
        *,
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
        slots: tuple[Slots, ...] = (),
        reset: Bool[Tensor, "b t"] | None = None,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t v"], ModelState]:
        for name, given in (("weights", weights), ("slots", slots)):
            if given and len(given) != len(self.levels):
                raise ValueError(f"{name} must have one entry for each of {len(self.levels)} levels, got {len(given)}")
        state = self.init_state(tokens.shape[0]) if state is None else state
        x = F.embedding(tokens, self.embedding) / _EMBEDDING_SCALE
        after, count = [], len(self.levels) // len(self.blocks)
        for index, (block, before) in enumerate(zip(self.blocks, state.blocks, strict=True)):
            mine = slice(index * count, (index + 1) * count)
            own = None if weights is None else weights[mine]
            x, block_state = block(x, before, own, taps, slots[mine], reset, valid)
            after.append(block_state)
        x = F.rms_norm(x, (x.shape[-1],), self.norm, eps=1e-6)
        return x @ self.embedding.mT, ModelState(tuple(after))
