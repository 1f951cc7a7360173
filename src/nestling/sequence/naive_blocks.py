"""Naive oracles of what stands around a memory: Titans' blocks, TNT, Memory Caching, one token at a time.

As in `naive_layers`: parameters by name and tokens x [t, d] in, y [t, d] and what is remembered by name out; one row,
one document, nothing shared with the fast code. What the memory itself does is `memory.naive`'s; where the memory of
an earlier moment is read, the memory is run again from where it began up to that moment.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.naive import Choices, Maps, NaiveRun, naive_memory

from .naive_layers import Parameters, Told, _convolved, _head, _said, _silu, _turned, _unit, windowed

Around = Callable[[Any, Parameters, Tensor, int], Told]
"""(the mixer, the layer's parameters, tokens [t, d], heads) -> y [t, d] and what it remembers, by name."""


class _Head(NamedTuple):
    """One head of a memory before its first token: its start, and what comes in [t, k], gates [t]."""

    choices: Choices
    start: Maps
    keys: Tensor
    values: Tensor
    queries: Tensor
    gates: tuple[Tensor, ...]  # step size, momentum, retention; the step size alone, where the rule asks for no more

    def run(self, first: int, stop: int, queries: Tensor | None = None) -> NaiveRun:
        """From the start over the tokens first to stop."""
        at = slice(first, stop)
        step_size, *others = (gate[at] for gate in self.gates)
        momentum, retention = others or (None, None)
        kept = None if retention is None else retention.log()
        asked = self.queries[at] if queries is None else queries
        return naive_memory(self.choices, self.start, self.keys[at], self.values[at], asked, step_size, momentum, kept)

    def answer(self, weights: Maps, q: Tensor) -> Tensor:
        """M(q)."""
        x = q
        for i, weight in enumerate(weights):
            x = weight @ (self.choices.activation(x) if i else x)
        return q + x if self.choices.residual else x


def _heads(choices: Choices, p: Parameters, x: Tensor, heads: int, exact: bool = False) -> list[_Head]:
    """The heads of a memory whose gates are sigmoids, and whose steps are bounded by 1.5 / (1 + sqrt(C / k))^2; by 1
    where gradients are exact."""
    width = x.shape[1] // heads
    bound = 1.0 if exact else 1.5 / (1.0 + math.sqrt(choices.chunk / width)) ** 2
    q, k, v = _silu(_convolved(p, x @ p["qkv.weight"].T)).chunk(3, -1)
    raw = torch.sigmoid(x @ p["gates.weight"].T + p["gates.bias"])
    each = []
    for head in range(heads):
        step_size, *others = raw[:, head::heads].unbind(1)
        asked, keys = (torch.stack([_unit(row) for row in _head(part, head, heads)]) for part in (q, k))
        start = tuple(p[name][head] for name in sorted(p) if name.startswith("start."))
        gates = (bound * step_size, *others)
        each.append(_Head(choices, start, keys, _head(v, head, heads), asked, gates))
    return each


def _layer(choices: Choices, p: Parameters, x: Tensor, heads: int, exact: bool = False) -> Told:
    """The memory as a layer of its own."""
    runs = [head.run(0, len(x)) for head in _heads(choices, p, x, heads, exact)]
    return _said(p, [run.reads for run in runs], x), _weights("memory.running", [run.weights for run in runs])


def _weights(name: str, ends: list[Maps]) -> dict[str, Tensor]:
    """Weights of every head, by the names that they have in a state."""
    return {f"{name}.{i}": torch.stack(maps) for i, maps in enumerate(zip(*ends, strict=True))}


def _of(p: Parameters, part: str) -> Parameters:
    """The parameters of one part, by the names that it gives them itself."""
    return {name.removeprefix(part): weight for name, weight in p.items() if name.startswith(part)}


def _as(part: str, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part + name: tensor for name, tensor in kept.items()}


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _gated(p: Parameters, y: Tensor, m: Tensor) -> Tensor:
    return _rms(y) * p["gate.of_attention"] * _silu(_rms(m) * p["gate.of_memory"])


def mag(choices: Choices) -> Around:
    """o_t = norm(attention(x)_t) * SiLU(norm(memory(x)_t)): Titans 26 to 28."""

    def oracle(mixer: Any, p: Parameters, x: Tensor, heads: int) -> Told:
        m, remembered = _layer(choices, _of(p, "memory."), x, heads, mixer.memory.exact)
        y, attended = windowed(mixer.window, _of(p, "attention."), x, heads)
        return _gated(p, y, m), _as("memory.", remembered) | _as("attention.", attended)

    return oracle


def mal(choices: Choices) -> Around:
    """o = attention(norm(memory(x))): Titans 29 to 31."""

    def oracle(mixer: Any, p: Parameters, x: Tensor, heads: int) -> Told:
        m, remembered = _layer(choices, _of(p, "memory."), x, heads, mixer.memory.exact)
        y, attended = windowed(mixer.window, _of(p, "attention."), _rms(m) * p["norm"], heads)
        return y, _as("memory.", remembered) | _as("attention.", attended)

    return oracle


def mac(choices: Choices) -> Around:
    """Titans 21 to 25, segment by segment: what the memory reads as it stood when the segment opened stands beside the
    segment's tokens; what is attended to is written, and gated by what the memory then reads for it."""

    def oracle(mixer: Any, p: Parameters, x: Tensor, heads: int) -> Told:
        of, said = _of(p, "memory."), x[:0]
        for first in range(0, len(x), mixer.segment):
            memories = _heads(choices, of, said if first else x, heads, mixer.memory.exact)
            opened = [memory.run(0, first).weights if first else memory.start for memory in memories]
            y, keys, values = _segment(p, x[: first + mixer.segment], first, memories, opened)
            said = torch.cat([said, y])
        m, kept = _layer(choices, of, said, heads, mixer.memory.exact)
        room = torch.zeros(heads, 2, mixer.segment - keys.shape[2], keys.shape[3], dtype=x.dtype)
        kept = _as("memory.", kept) | _weights("opened", opened)
        kept |= {"keys": torch.cat([keys, room], 2), "values": torch.cat([values, room], 2)}
        return _gated(p, said, m), kept

    return oracle


def _segment(
    p: Parameters, x: Tensor, first: int, memories: list[_Head], opened: list[Maps]
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the tokens from `first` on over [persistent | reads | tokens]: y [n, d], and the keys and values of
    reads and tokens [h, 2, n, k]."""
    heads, d = len(memories), x.shape[1]
    q, k, v = _convolved(p, x @ p["qkv.weight"].T)[first:].chunk(3, -1)
    asked = _silu(x[first:] @ p["query.weight"].T)
    read = []
    for n, memory in enumerate(memories):
        found = [memory.answer(opened[n], _unit(row)) for row in _head(asked, n, heads)]
        read.append(_rms(torch.stack(found)))
    h = torch.cat(read, -1) * p["norm"]
    k_read, v_read = (h @ p["qkv.weight"][d:].T).chunk(2, -1)
    k_always, v_always = (p["persistent"] @ p["qkv.weight"][d:].T).chunk(2, -1)
    turned = [
        torch.cat(
            [torch.stack([_turned(_head(row, n, heads), i) for i, row in enumerate(part)]) for part in (k_read, k)]
        )
        for n in range(heads)
    ]
    y = []
    for t in range(len(q)):
        each, seen = [], [*range(t + 1), *range(len(q), len(q) + t + 1)]
        for n in range(heads):
            query = _head(q[t], n, heads)
            scores = torch.cat([_head(k_always, n, heads) @ query, turned[n][seen] @ _turned(query, t)])
            weights = torch.exp(scores / math.sqrt(len(query)))
            values = torch.cat([_head(part, n, heads) for part in (v_always, v_read[: t + 1], v[: t + 1])])
            each.append(weights @ values / weights.sum())
        y.append(p["project.weight"] @ torch.cat(each))
    keys, values = (
        torch.stack([torch.stack([_head(part, n, heads) for part in both]) for n in range(heads)])
        for both in ((k_read, k), (v_read, v))
    )
    return torch.stack(y), keys, values


def tnt(choices: Choices) -> Around:
    """TNT 6 and 7: a memory read as its large chunk opened, and for each chunk in `local` one that begins anew every
    shard and is read for C_t q_t, C_t the sum of k k^T over the shard so far."""

    def oracle(mixer: Any, p: Parameters, x: Tensor, heads: int) -> Told:
        whole = replace(choices, chunk=mixer.chunk, read="boundary")
        y, kept = _layer(whole, _of(p, "mixers.0."), x, heads)
        kept = _as("mixers.0.", kept)
        for i, chunk in enumerate(mixer.local, 1):
            own = _of(p, f"mixers.{i}.memory.")
            more, remembered = _sharded(replace(choices, chunk=chunk), mixer, own, x, heads)
            y, kept = y + more, kept | _as(f"mixers.{i}.", remembered)
        return y, kept

    return oracle


def shards(choices: Choices) -> Around:
    """One of TNT's local memories, read for q_t itself where queries are "raw"."""
    return lambda mixer, p, x, heads: _sharded(choices, mixer, _of(p, "memory."), x, heads, mixer.memory.exact)


def _sharded(choices: Choices, mixer: Any, p: Parameters, x: Tensor, heads: int, exact: bool = False) -> Told:
    reads, ends, sums = [], [], []
    for head in _heads(choices, p, x, heads, exact):
        each = []
        for first in range(0, len(x), mixer.shard):
            stop, asked = min(first + mixer.shard, len(x)), []
            total = torch.zeros(x.shape[1] // heads, x.shape[1] // heads, dtype=x.dtype)
            for k, q in zip(head.keys[first:stop], head.queries[first:stop], strict=True):
                total = total + torch.outer(k, k)
                asked.append(total @ q if mixer.queries == "projected" else q)
            run = head.run(first, stop, torch.stack(asked))
            each.append(run.reads)
        reads.append(torch.cat(each))
        ends.append(run.weights)
        sums.append(total)
    kept = {"keys.0": torch.stack(sums)} if mixer.queries == "projected" else {}
    return _said(p, reads, x), _weights("memory.running", ends) | kept


def caching(choices: Choices) -> Around:
    """Memory Caching over the last `slots` segments that ended, M_i what stood at the end of one::

        residual  y_t = M_t(q_t) + sum_i M_i(q_t)                   gated   y_t = g_t M_t(q_t) + sum_i g_i M_i(q_t)
        soup      y_t = M(q_t), weights g_t W_t + sum_i g_i W_i     sparse  as gated, over the `top` of them

    g = softmax of `scores`."""

    def oracle(mixer: Any, p: Parameters, x: Tensor, heads: int) -> Told:
        stops = range(mixer.segment, len(x), mixer.segment)
        reads, last, cached = [], [], []
        for n, head in enumerate(_heads(choices, _of(p, "memory."), x, heads, mixer.memory.exact)):
            run, ended = head.run(0, len(x)), {stop: head.run(0, stop).weights for stop in stops}
            each = []
            for t, now in enumerate(run.reads):
                seen = [stop for stop in stops if stop <= t][-mixer.slots :]
                if mixer.read == "residual":
                    each.append(now + sum(head.answer(ended[stop], head.queries[t]) for stop in seen))
                    continue
                gates = segment_gates(mixer, p["asks.weight"], x, t, n, heads)
                if mixer.read == "soup":
                    standing = [head.run(0, t + 1).weights, *(ended[stop] for stop in gates if stop)]
                    each.append(head.answer(_averaged(gates, standing), head.queries[t]))
                else:
                    found = [now, *(head.answer(ended[stop], head.queries[t]) for stop in gates if stop)]
                    each.append(sum(g * y for g, y in zip(gates.values(), found, strict=True)))
            reads.append(torch.stack(each))
            last.append(run.weights)
            cached.append([ended[stop] for stop in stops][-mixer.slots :])
        means = {stop: x[stop - mixer.segment : stop].mean(0) for stop in stops}
        y = _said(_of(p, "memory."), reads, x)
        return y, _weights("memory.running", last) | _cached(mixer.slots, cached, last, means, x)

    return oracle


def segment_gates(mixer: Any, asks: Tensor, x: Tensor, t: int, head: int, heads: int) -> dict[int, Tensor]:
    """Of token t: softmax_i of (W_u x_t) . p_i / sqrt k, p_i the mean of a segment's x, of the present one's up to t;
    by where each segment ended, the present one first, as 0. With read="sparse" over the present and the `top` best."""
    asked = _head(asks @ x[t], head, heads)

    def score(first: int, stop: int) -> Tensor:
        return asked @ _head(x[first:stop].mean(0), head, heads) / math.sqrt(len(asked))

    stops = [stop for stop in range(mixer.segment, t + 1, mixer.segment)][-mixer.slots :]
    scores = {stop: score(stop - mixer.segment, stop) for stop in stops}
    if mixer.read == "sparse":
        best = sorted(scores, key=lambda stop: float(scores[stop].detach()))[-mixer.top :]
        scores = {stop: scores[stop] for stop in best}
    scores = {0: score(t // mixer.segment * mixer.segment, t + 1)} | scores
    return dict(zip(scores, torch.softmax(torch.stack(list(scores.values())), 0), strict=True))


def _averaged(gates: dict[int, Tensor], standing: list[Maps]) -> Maps:
    """Weights summed by their gates, map by map."""
    each = list(zip(gates.values(), standing, strict=True))
    return tuple(sum(g * maps[i] for g, maps in each) for i in range(len(standing[0])))  # type: ignore[misc]


def _cached(slots: int, cached: list[list[Maps]], like: list[Maps], means: dict[int, Tensor], x: Tensor) -> dict:
    """The slots of every head, the newest last; zero where no segment has ended yet."""
    kept: dict[str, Tensor] = {}
    for i, weight in enumerate(like[0]):
        empty = [torch.zeros_like(weight)] * (slots - len(cached[0]))
        kept[f"cached.{i}"] = torch.stack([torch.stack([*empty, *(end[i] for end in ends)]) for ends in cached])
    pools = list(means.values())[-slots:]
    return kept | {"means": torch.stack([*[torch.zeros_like(x[0])] * (slots - len(pools)), *pools])}
