"""Slots: low-rank experts beside a level, allocated from the start and masked, that only sleep fills."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Slots(NamedTuple):
    """A bank of s slots of rank r beside one level, y <- y + sum_e active_e sigmoid(w_e h + c_e) up_e down_e h.

    h: the normed input of the level's block. Each slot has an additive gate of its own, so that no other answer
    changes when one is activated; with up = 0 no logit changes at all. Masks, not shapes, say which slots there are.
    The maps are linear: slots of one gate can be merged exactly (`sleep.merge`), and the gate is what bends.
    """

    down: Tensor  # [s, r, d]
    up: Tensor  # [s, d, r]
    gate: Tensor  # [s, d + 1]: w, and c as the column of a constant input of one
    active: Tensor  # [s], 0 or 1

    @staticmethod
    def empty(slots: int, rank: int, like: Tensor, in_dim: int, out_dim: int) -> "Slots":
        """A bank in which nothing is active, of the dtype and device of `like`."""
        return Slots(
            like.new_zeros(slots, rank, in_dim),
            like.new_zeros(slots, out_dim, rank),
            like.new_zeros(slots, in_dim + 1),
            like.new_zeros(slots),
        )


def read_slots(bank: Slots, h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
    """What the active slots of a bank answer to h [..., d]: [..., v]."""
    h = h.to(bank.down.dtype)
    low = (h @ bank.down.flatten(0, 1).mT).unflatten(-1, bank.down.shape[:2])  # [..., s, r]
    opened = low * opening(bank, h)[..., None]
    return opened.flatten(-2) @ bank.up.mT.flatten(0, 1)


def opening(bank: Slots, h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n s"]:
    """How far each slot is open to h: its gate, 0 where it is not active."""
    h = h.to(bank.gate.dtype)
    return torch.sigmoid(h @ bank.gate[:, :-1].mT + bank.gate[:, -1]) * bank.active
