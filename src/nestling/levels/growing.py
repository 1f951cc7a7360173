"""A model with slots beside its levels: what a life needs that is to sleep."""

import math
from typing import Any

from torch import Tensor, nn

from nestling.memory.structure import Weights

from .continuum import Taps, level
from .slots import Slots
from .stacking import StackedEncoder
from .writing import LevelsState, begin


class Growing(nn.Module):
    """A model, and beside each of its levels a bank of `slots` low-rank slots of rank `rank`: one level more each, of
    period inf, so that nothing but sleep moves it.

    A `Reader` of it lives, saves and forks as it does with the model alone, and its logits are those of the model, bit
    for bit, until a slot is filled. Slots belong to a life: they are in its `LevelsState`, after the levels of the
    model, and the model stays as it is. model: a `Decoder`, a pre-trained decoder that
    was stacked, or any `LevelledModel` that takes `slots=`.
    """

    def __init__(self, model: nn.Module, slots: int = 5, rank: int = 8) -> None:
        super().__init__()
        if slots < 1 or rank < 1:
            raise ValueError(f"slots and rank must be >= 1, got {slots} and {rank}")
        if isinstance(model, StackedEncoder):
            name = type(model.base).__name__
            raise ValueError(f"{name} is an encoder and writes no dreams to sleep on; slots are for decoders")
        self.model, self.slots, self.rank = model, slots, rank

    @property
    def own(self) -> tuple[level, ...]:
        """The levels of the model itself."""
        return self.model.levels  # type: ignore[return-value]

    @property
    def levels(self) -> tuple[level, ...]:
        return (*self.own, *(level(math.inf) for _ in self.own))

    def level_weights(self) -> tuple[Weights, ...]:
        """Those of the model, then an empty bank for each level."""
        own: tuple[Weights, ...] = self.model.level_weights()  # type: ignore[operator]
        banks = (
            Slots.empty(self.slots, self.rank, maps[0].detach(), maps[0].shape[-1], maps[-1].shape[-2]) for maps in own
        )
        return (*own, *(tuple(bank) for bank in banks))

    def init_state(self, batch: int) -> Any:
        return self.model.init_state(batch)  # type: ignore[operator]

    def split(self, weights: tuple[Weights, ...]) -> tuple[tuple[Weights, ...], tuple[Slots, ...]]:
        """The weights of a life as those of the model's levels, and the banks beside them."""
        count = len(self.own)
        if len(weights) != 2 * count:
            raise ValueError(f"weights must have {count} levels and {count} banks of slots, got {len(weights)} entries")
        return weights[:count], tuple(Slots(*maps) for maps in weights[count:])

    def forward(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        own, slots = (None, ()) if weights is None else self.split(weights)
        logits, state = self.model(tokens, state, weights=own, taps=taps, slots=slots, valid=valid)
        if taps is not None:
            taps.extend(Taps((), ()) for _ in self.own)
        return logits, state

    def grown(self, levels: LevelsState) -> LevelsState:
        """The levels of a life of the model alone, with empty banks beside them: so that it can sleep. Raises
        ValueError where they are not those of the model."""
        if len(levels.weights) != len(self.own):
            raise ValueError(f"a life of {len(self.own)} levels grows banks of slots, got {len(levels.weights)} levels")
        fresh = begin(self.levels, self.level_weights())
        count = len(self.own)
        starts = (*levels.starts, *fresh.starts[count:]) if levels.starts else ()
        return LevelsState((*levels.weights, *fresh.weights[count:]), (*levels.rules, *fresh.rules[count:]), starts)
