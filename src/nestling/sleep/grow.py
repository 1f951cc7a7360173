"""Growth: which slots there are, filling the next one, emptying them. Functions from a life's levels to others."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestling.levels import Growing, Slots
from nestling.memory.structure import Weights


def draws(*words: object) -> torch.Generator:
    """A generator keyed by words, such as a life's seed and an event's key: the same words, the same draws."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def levels_of(model: Growing, period: float) -> tuple[int, ...]:
    """The indices of a model's own levels that have this period: one in each block."""
    return tuple(i for i, lvl in enumerate(model.own) if lvl.period == period)


def bank(model: Growing, weights: tuple[Weights, ...], host: int) -> Slots:
    """The slots beside level `host`."""
    return Slots(*weights[len(model.own) + host])


def replace_bank(model: Growing, weights: tuple[Weights, ...], host: int, new: Slots) -> tuple[Weights, ...]:
    """The weights with another bank beside level `host`; all others are the same tensors."""
    at = len(model.own) + host
    return (*weights[:at], tuple(new), *weights[at + 1 :])


def change_banks(
    model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], change: Callable[[Slots], Slots]
) -> tuple[Weights, ...]:
    """The weights with some banks changed."""
    for host in hosts:
        weights = replace_bank(model, weights, host, change(bank(model, weights, host)))
    return weights


def active(model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int]) -> Tensor:
    """Which slots are active in any of the banks, bool [s]."""
    masks = [bank(model, weights, host).active > 0 for host in hosts]
    return torch.stack(masks).any(0)


def used(model: Growing, weights: tuple[Weights, ...]) -> dict[float, int]:
    """How many slots are active beside the levels of each period."""
    periods = sorted({lvl.period for lvl in model.own})
    return {period: int(active(model, weights, levels_of(model, period)).sum()) for period in periods}


def first_free(model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int]) -> int | None:
    """The first slot that is free in all of the banks; None where they are full."""
    taken = active(model, weights, hosts).tolist()
    return taken.index(False) if False in taken else None


def activate(
    model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], slot: int, generator: torch.Generator
) -> tuple[Weights, ...]:
    """Slot `slot` of the banks becomes active: down normal of deviation 1/sqrt(d), up and gate zero. No logit changes;
    the first gradient reaches up, and through it the others."""

    def fresh(found: Slots) -> Slots:
        width = found.down.shape[-1]
        drawn = torch.randn(found.down.shape[1:], generator=generator, dtype=torch.float64) / math.sqrt(width)
        new = (drawn.to(found.down), torch.zeros_like(found.up[0]), torch.zeros_like(found.gate[0]))
        return put_slot(found, slot, new, 1.0)

    return change_banks(model, weights, hosts, fresh)


def put_slot(found: Slots, slot: int, new: tuple[Tensor, Tensor, Tensor], mask: float) -> Slots:
    """The bank with other maps and another mask in one slot: every other row is as it was, bit for bit."""
    down, up, gate = (
        torch.cat([old[:slot], row[None], old[slot + 1 :]]) for old, row in zip(found[:3], new, strict=True)
    )
    masks = found.active.clone()
    masks[slot] = mask
    return Slots(down, up, gate, masks)


def empty(model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int]) -> tuple[Weights, ...]:
    """The banks with every slot free and zero: what a faster level gives up once it has been consolidated."""
    return change_banks(model, weights, hosts, lambda found: Slots(*(torch.zeros_like(part) for part in found)))


def masked(model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], slot: int) -> tuple[Weights, ...]:
    """The weights as read without one slot."""

    def without(found: Slots) -> Slots:
        masks = found.active.clone()
        masks[slot] = 0.0
        return found._replace(active=masks)

    return change_banks(model, weights, hosts, without)
