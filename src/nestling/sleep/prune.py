"""Pruning and compressing slots: how much each is used, the least used merged or let go, weights set to zero."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestling.levels import Growing, Slots, Taps
from nestling.levels.slots import opening
from nestling.memory.part import Part
from nestling.memory.structure import Weights

from .dreams import Dreams
from .grow import active, bank, change_banks, put_slot, replace_bank


@torch.no_grad()
def importance(
    model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
) -> Float[Tensor, " s"]:
    """How much each slot says: the mean over dreams of gate * |its answer| / |the block's answer|, over all hosts; 0
    for slots that are not active."""
    total, count = torch.zeros(model.slots, dtype=torch.float64), 0
    for part in dreams:
        taps: list[Taps] = []
        model(part.tokens, weights=weights, taps=taps)
        for host in hosts:
            found, h, answered = bank(model, weights, host), taps[host].inputs[0], taps[host].outputs[-1]
            said = torch.einsum("...d,srd,svr->...sv", h, found.down, found.up).norm(dim=-1) * opening(found, h)
            shares = said / answered.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            total += shares.double().flatten(0, -2).sum(0).cpu()
            count += shares[..., 0].numel()
    return total / max(1, count)


class Low(NamedTuple):
    """A map of low rank, up [v, r] down [r, d], and the root of the squares that were left out of it."""

    down: Tensor
    up: Tensor
    error: float


def merge_maps(downs: Sequence[Tensor], ups: Sequence[Tensor], rank: int) -> Low:
    """The map of rank `rank` nearest to sum_e up_e down_e: QR of both stacks and an SVD of the small core between
    them; error = sqrt(sum of the squares of the singular values left out)."""
    down, up = torch.cat(list(downs)).double(), torch.cat(list(ups), 1).double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT)
    size = values[:rank].sqrt()
    found_up, found_down = q_up @ left[:, :rank] * size, size[:, None] * (q_down @ right[:rank].mT).mT
    error = float(values[rank:].square().sum().sqrt())
    return Low(_padded(found_down, rank, 0).to(downs[0]), _padded(found_up, rank, 1).to(ups[0]), error)


def _padded(map_: Tensor, rank: int, dim: int) -> Tensor:
    missing = list(map_.shape)
    missing[dim] = rank - map_.shape[dim]
    return torch.cat([map_, map_.new_zeros(missing)], dim)


def merge_slots(found: Slots, first: int, second: int) -> tuple[Slots, float]:
    """The bank with slot `second` merged into `first` and free again, and the error.

    Exact up to the rank where both gates are constant (w = 0): each gate is folded into its map at its bias. Gates that
    bend are replaced by that constant, which a few steps of seeding onto itself can mend.
    """
    gates = [torch.sigmoid(found.gate[e, -1]) for e in (first, second)]
    ups = [found.up[e] * gate for e, gate in zip((first, second), gates, strict=True)]
    low = merge_maps([found.down[first], found.down[second]], ups, found.down.shape[1])
    none = torch.zeros_like(found.gate[0])
    merged = put_slot(found, first, (low.down, low.up / torch.sigmoid(none[-1]), none), 1.0)
    zeros = (torch.zeros_like(low.down), torch.zeros_like(low.up), none)
    return put_slot(merged, second, zeros, 0.0), low.error


class Made(NamedTuple):
    """Room that was made in full banks: the weights, the slot that is free now (None: there is none), and what it
    took, in words."""

    weights: tuple[Weights, ...]
    slot: int | None
    how: str


class WhenFull(Part, family=True):
    """What is done when a level has no free slot left."""

    @abstractmethod
    def room(
        self, model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
    ) -> Made: ...


@dataclass(frozen=True, repr=False)
class refuse(WhenFull):
    """Nothing: the pair is left as it is, and the report says so."""

    def room(
        self, model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
    ) -> Made:
        return Made(weights, None, "full: nothing was moved")


@dataclass(frozen=True, repr=False)
class merge(WhenFull):
    """The two least used slots become one, by SVD."""

    def room(
        self, model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
    ) -> Made:
        if model.slots < 2:
            return Made(weights, None, "full: one slot cannot be merged with another")
        first, second = sorted(importance(model, weights, hosts, dreams).argsort()[:2].tolist())
        errors: list[float] = []

        def merged(found: Slots) -> Slots:
            found, error = merge_slots(found, first, second)
            errors.append(error)
            return found

        weights = change_banks(model, weights, hosts, merged)
        return Made(weights, second, f"merged slots {first} and {second}, error {max(errors):.3g}")


@dataclass(frozen=True, repr=False)
class evict(WhenFull):
    """The least used slot is emptied, and what it held is lost."""

    def room(
        self, model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
    ) -> Made:
        said = importance(model, weights, hosts, dreams)
        least = int(said.argmin())
        return Made(
            drop(model, weights, hosts, least), least, f"evicted slot {least}, importance {float(said[least]):.3g}"
        )


def drop(model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], slot: int) -> tuple[Weights, ...]:
    """The banks with one slot free and zero."""

    def without(found: Slots) -> Slots:
        zeros = (torch.zeros_like(found.down[0]), torch.zeros_like(found.up[0]), torch.zeros_like(found.gate[0]))
        return put_slot(found, slot, zeros, 0.0)

    return change_banks(model, weights, hosts, without)


def within_budget(
    model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], slots: int, dreams: Sequence[Dreams]
) -> tuple[tuple[Weights, ...], list[str]]:
    """The banks with at most `slots` active ones, merged two by two, and what was done."""
    if slots < 1:
        raise ValueError(f"a budget is >= 1 slot, got {slots}")
    done = []
    while int(active(model, weights, hosts).sum()) > slots:
        said = importance(model, weights, hosts, dreams)
        said[~active(model, weights, hosts).cpu()] = torch.inf
        first, second = sorted(said.argsort()[:2].tolist())
        weights = change_banks(model, weights, hosts, lambda b, pair=(first, second): merge_slots(b, *pair)[0])  # type: ignore[misc]
        done.append(f"merged slots {first} and {second}")
    return weights, done


def keep_largest(scores: Float[Tensor, "out in_"], sparsity: float, *, by_row: bool) -> Bool[Tensor, "out in_"]:
    """Which weights stay: all but the `sparsity` share with the smallest scores, of the map or of every row."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    table = scores if by_row else scores.flatten()[None]
    lose = int(table.shape[1] * sparsity)
    kept = torch.ones_like(table, dtype=torch.bool)
    return kept.scatter(1, table.argsort(1)[:, :lose], False).view_as(scores)


def by_magnitude(weight: Tensor, sparsity: float) -> Tensor:
    """The map with the smallest |W_ij| set to zero."""
    return weight * keep_largest(weight.abs(), sparsity, by_row=False)


def by_wanda(weight: Float[Tensor, "out in_"], inputs: Float[Tensor, "n in_"], sparsity: float) -> Tensor:
    """The map with the smallest |W_ij| |X_j|_2 of every output set to zero; X [n, in] are what it receives (Sun et al.
    2024, Wanda)."""
    return weight * keep_largest(weight.abs() * inputs.norm(dim=0), sparsity, by_row=True)


@torch.no_grad()
def prune_slots(
    model: Growing,
    weights: tuple[Weights, ...],
    hosts: Sequence[int],
    sparsity: float,
    dreams: Sequence[Dreams] = (),
) -> tuple[Weights, ...]:
    """Every map of the banks with a share of its weights set to zero: by Wanda where dreams are given, layer after
    layer with what the layers before still answer, else by magnitude."""
    for host in hosts:
        found = bank(model, weights, host)
        if dreams:
            heard = []
            for part in dreams:
                taps: list[Taps] = []
                model(part.tokens, weights=weights, taps=taps)
                heard.append(taps[host].inputs[0].flatten(0, -2))
            h = torch.cat(heard)
            down = torch.stack([by_wanda(w, h, sparsity) for w in found.down])
            up = torch.stack([by_wanda(w, h @ d.mT, sparsity) for w, d in zip(found.up, down, strict=True)])
        else:
            down = torch.stack([by_magnitude(w, sparsity) for w in found.down])
            up = torch.stack([by_magnitude(w, sparsity) for w in found.up])
        changed = found._replace(down=down, up=up)
        weights = replace_bank(model, weights, host, changed)
    return weights
