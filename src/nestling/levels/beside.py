"""Slots beside the MLPs of a pre-trained model, for the length of a call: what lets a stacked model sleep."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .layouts import Feedforward
from .slots import Slots, read_slots


def read_beside(base: nn.Module, feedforward: Feedforward, banks: Sequence[Slots]) -> list[Any]:
    """Add what some banks answer to an MLP's input to what the MLP gives: y <- y + sum_k slots_k(h).

    Hooks, for one call, to be put after those that listen: what they hear is the MLP's answer without slots. Slots are
    read in their own dtype; empty ones add an exact zero.
    """
    came: list[Tensor] = []

    def arrive(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        came.append(given[0])

    def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        h = came.pop()
        for bank in banks:
            output = output + read_slots(bank, h).to(output.dtype)
        return output

    first, last = (base.get_submodule(each.path) for each in (feedforward.first[0], feedforward.last))
    return [first.register_forward_pre_hook(arrive), last.register_forward_hook(add)]
