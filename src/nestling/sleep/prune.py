"""Pruning and compressing slots: how much each is used, the least used merged or let go, weights set to zero."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestling.levels import Growing, Slots, Taps
from nestling.levels.slots import opening, read_slots
from nestling.memory.part import Part
from nestling.memory.structure import Weights

from .dreams import ROWS, Dreams, few_by_few
from .grow import active, bank, change_banks, put_slot, replace_bank
from .warm_start import RIDGE, lowered

PIECE = 1024  # rows that are held in float64 at once


@torch.no_grad()
def importance(
    model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
) -> Float[Tensor, " s"]:
    """How much each slot says: the mean over dreams of gate * |its answer| / |the block's answer|, over all hosts; 0
    for slots that are not active."""
    total, count = torch.zeros(model.slots, dtype=torch.float64), 0
    for texts in few_by_few(dreams):
        taps: list[Taps] = []
        model(texts.tokens, weights=weights, taps=taps)
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


@torch.no_grad()
def merge_slots(
    found: Slots, first: int, second: int, heard: Float[Tensor, "n d"], held: Float[Tensor, "m d"]
) -> tuple[Slots, float]:
    """The bank with slot `second` merged into `first` and free again, and the error: what the merged slot answers
    otherwise than both did, as a share of what they did (roots of squares), on the rows `held`.

    Of four gates (either slot's, their mean, an even one) the one under which a map of rank r comes nearest to the
    gated answers of both over the rows `heard`. Each map is first folded by how far its gate is open beside the new
    one, and what that leaves is learned by regression, so that slots of one gate are merged exactly up to the rank.
    """
    pair = torch.tensor([first, second], device=found.gate.device)
    down, up, gates = (part[pair].double() for part in found[:3])
    both = _Both(down, up, gates, heard.split(PIECE))
    best = min((both.under(gate) for gate in both.candidates()), key=lambda way: way.left)
    new_slot = (best.down.to(found.down), best.up.to(found.up), best.gate.to(found.gate))
    none = (torch.zeros_like(new_slot[0]), torch.zeros_like(new_slot[1]), torch.zeros_like(new_slot[2]))
    merged = put_slot(put_slot(found, first, new_slot, 1.0), second, none, 0.0)
    only = torch.zeros_like(found.active)
    only[pair] = 1.0
    was = read_slots(found._replace(active=only), held).double()
    now = read_slots(merged._replace(active=only * merged.active), held).double()
    return merged, float((was - now).norm() / was.norm().clamp_min(1e-300))


class _Way(NamedTuple):
    """One slot in the place of two, and the squares that it leaves."""

    left: float
    down: Tensor
    up: Tensor
    gate: Tensor


class _Both(NamedTuple):
    """Two slots (their maps and gates, stacked), and what they hear, some rows [n, d] at a time."""

    down: Tensor
    up: Tensor
    gate: Tensor
    heard: Sequence[Tensor]

    def candidates(self) -> tuple[Tensor, ...]:
        """Gates for the one: either's, their mean, an even one."""
        return (self.gate[0], self.gate[1], self.gate.mean(0), torch.zeros_like(self.gate[0]))

    def under(self, gate: Tensor) -> _Way:
        """The slot with this gate that comes nearest to what both answer."""
        both, alone = gate.new_zeros(2), gate.new_zeros(())
        for _, opened, new in self._rows(gate):
            both, alone = both + (opened * new).sum(0), alone + new.square().sum()
        folded = torch.einsum("e,evr,erd->dv", both / alone, self.up, self.down)
        gram, cross = folded.new_zeros(len(folded), len(folded)), torch.zeros_like(folded)
        for h, opened, new in self._rows(gate):
            inputs = h * new
            gram, cross = gram + inputs.mT @ inputs, cross + inputs.mT @ (self._told(h, opened) - inputs @ folded)
        ridge = RIDGE * gram.trace() / len(gram)
        full = folded + torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), cross)
        down, up = lowered(gram, full, self.down.shape[1])
        missed = (self._told(h, opened) - h * new @ down.mT @ up.mT for h, opened, new in self._rows(gate))
        return _Way(sum(float(rest.square().sum()) for rest in missed), down, up, gate)

    def _told(self, h: Tensor, opened: Tensor) -> Tensor:
        """What both answer [n, v]."""
        return torch.einsum("nd,erd,evr,ne->nv", h, self.down, self.up, opened)

    def _rows(self, gate: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, and how far both are open to them [n, 2] and a slot with this gate [n, 1]."""
        for some in self.heard:
            h = some.double()
            opened = torch.sigmoid(h @ self.gate[:, :-1].mT + self.gate[:, -1])
            new = torch.sigmoid(h @ gate[:-1] + gate[-1])[:, None]
            yield h, opened, new


@torch.no_grad()
def merged(
    model: Growing,
    weights: tuple[Weights, ...],
    hosts: Sequence[int],
    pair: tuple[int, int],
    dreams: Sequence[Dreams],
) -> tuple[tuple[Weights, ...], float] | None:
    """The weights with two slots of every bank merged on dreams (`merge_slots`), and the largest error on every fourth
    dream, from which nothing was learned. None where there are too few dreams to hold any out."""
    learned: dict[int, list[Tensor]] = {host: [] for host in hosts}
    held: dict[int, list[Tensor]] = {host: [] for host in hosts}
    for part in dreams:
        for some, rows in ((learned, part.tokens[_kept_out(part, False)]), (held, part.tokens[_kept_out(part, True)])):
            for texts in rows.split(ROWS) if len(rows) else ():
                taps: list[Taps] = []
                model(texts, weights=weights, taps=taps)
                for host in hosts:
                    some[host].append(taps[host].inputs[0].flatten(0, -2))
    if not all(held.values()):
        return None
    errors = []
    for host in hosts:
        told = torch.cat(learned[host]), torch.cat(held[host])
        new, error = merge_slots(bank(model, weights, host), *pair, *told)
        weights = replace_bank(model, weights, host, new)
        errors.append(error)
    return weights, max(errors)


def _kept_out(part: Dreams, held: bool) -> Tensor:
    fourth = torch.arange(len(part.tokens), device=part.tokens.device) % 4 == 3
    return fourth if held else ~fourth


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
    """The two least used slots become one, as near as one can come to both on the dreams (`merge_slots`)."""

    def room(
        self, model: Growing, weights: tuple[Weights, ...], hosts: Sequence[int], dreams: Sequence[Dreams]
    ) -> Made:
        if model.slots < 2:
            return Made(weights, None, "full: one slot cannot be merged with another")
        first, second = sorted(importance(model, weights, hosts, dreams).argsort()[:2].tolist())
        done = merged(model, weights, hosts, (first, second), dreams)
        if done is None:
            return Made(weights, None, "full: too few dreams to merge slots on")
        return Made(done[0], second, _how(first, second, done[1]))


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
    done: list[str] = []
    while int(active(model, weights, hosts).sum()) > slots:
        said = importance(model, weights, hosts, dreams)
        said[~active(model, weights, hosts).cpu()] = torch.inf
        first, second = sorted(said.argsort()[:2].tolist())
        found = merged(model, weights, hosts, (first, second), dreams)
        if found is None:
            raise ValueError(
                "slots are merged on dreams: give 4 or more texts in one part, of which a fourth is held out"
            )
        weights = found[0]
        done.append(_how(first, second, found[1]))
    return weights, done


def _how(first: int, second: int, error: float) -> str:
    return f"merged slots {first} and {second}, error {error:.1%} of what they said on held-out dreams"


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
            for texts in few_by_few(dreams):
                taps: list[Taps] = []
                model(texts.tokens, weights=weights, taps=taps)
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
