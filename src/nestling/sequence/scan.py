"""Run one memory over tokens: state, and the recurrent and the chunked way of writing and reading it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nestling.memory.attentional_bias import AttentionalBias, Bounded, l2
from nestling.memory.gradient import SquaredNorms
from nestling.memory.part import check_families
from nestling.memory.retention import decay_to_anchor, decay_to_start
from nestling.memory.rule import (
    ChunkEnd,
    Gates,
    Norms,
    Pairs,
    Plan,
    Rule,
    clip,
    dampen,
    delta_gradient_descent,
    momentum,
    retain,
)
from nestling.memory.state import select
from nestling.memory.structure import Structure, Weights, matrix, mlp, plain, together

from . import chunk as chunks
from . import stepped
from . import window as windows
from .by_channel import run_as_linear_memory
from .layout import Layout, Piece
from .recompute import recompute


class MemoryState(NamedTuple):
    """A memory in the middle of a document: it can be stopped and gone on with at any token.

    anchor: the weights at which this chunk's gradients are taken, each [b, h, out, in]; () where every token's
    own weights serve. running: the weights as they stand. rule: the rule's state for each linear map. Where the
    rule's retention gate exposes other weights than it accumulates, both are accumulators.
    """

    anchor: Weights
    running: Weights
    rule: tuple[Any, ...]
    recent: windows.Recent | tuple[()] = ()  # of a memory with a window


States = tuple[Any, ...]
"""What a step carries from piece to piece: states of memories, and tensors [b, ...] that a document's start resets."""


@dataclass(frozen=True, repr=False)
class Memory:
    """Miras' four choices, and when gradients are taken and reads are made: everything but the weights.

    structure, attentional_bias, rule: the parts. gradient_at="token": at every token's own weights, W_{t-1}; the
    chunk is then only how the work is split. gradient_at="chunk": errors and layer inputs frozen at the weights on
    which the chunk opened; the chunk size is part of the model. read="after": token t reads the weights after its
    own write; "before": as they stood before it; "boundary": those on which its chunk opened (equation 90).
    way="chunked": a chunk at once, for rules with a plan; "recurrent": one `rule.step` a token, for any rule;
    "stepped": one `rule.step` a chunk on the chunk's summed gradient, taken when the next one opens, for any rule;
    "kernels": as "chunked", of a matrix() at every token's own weights, by flash-linear-attention on a GPU, in float32.
    window: how many of the last tokens' pairs each token's step is on (the Omega rule).
    checkpoint: in training, keep the states between chunks only, and compute each chunk again for its gradients.
    Oracle: `memory.naive`.
    """

    structure: Structure = mlp()
    attentional_bias: AttentionalBias = l2()
    rule: Rule = retain(decay_to_start(), delta_gradient_descent(momentum(dampen(clip()))))
    chunk: int = 64
    gradient_at: Literal["token", "chunk"] = "chunk"
    read: Literal["after", "before", "boundary"] = "after"
    way: Literal["chunked", "recurrent", "stepped", "kernels"] = "chunked"
    checkpoint: bool = False
    window: int = 1

    def __post_init__(self) -> None:
        check_families(self)
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        self.attentional_bias.fits(self.structure)
        if self.rule.exposes and self.way == "chunked" and self.read != "boundary":
            raise ValueError(
                f"{self.rule} answers with other weights than it accumulates, and read={self.read!r} would need them "
                "for every token of a chunk; use read='boundary' with gradient_at='chunk', or way='recurrent'"
            )
        if self.way == "kernels":
            self._check_kernels()
        if self.rule.reopens and self.exact:
            raise ValueError(f"{self.rule} acts where a chunk opens; gradient_at='token' has no chunks")
        if self.exact and self.way == "chunked":
            if not self.structure.linear:
                raise ValueError(
                    f"gradient_at='token' has a chunked form for one linear map, not for {self.structure}; "
                    "use gradient_at='chunk' or way='recurrent'"
                )
            if self.attentional_bias.slope is None:
                raise ValueError(
                    f"gradient_at='token' has a chunked form for biases that are linear in the read, not for "
                    f"{self.attentional_bias}; use gradient_at='chunk' or way='recurrent'"
                )
        if self.way == "stepped" and (self.exact or self.read != "boundary"):
            raise ValueError(
                "way='stepped' takes one step a chunk and reads what stood before it: it needs gradient_at='chunk' and "
                f"read='boundary', got {self.gradient_at!r} and {self.read!r}"
            )
        if self.way == "stepped" and isinstance(getattr(self.rule, "retention", None), decay_to_anchor):
            raise ValueError(f"{self.rule} forgets what a chunk wrote; way='stepped' writes only when it is over")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}")
        if self.window > 1 and self.way == "chunked" and self._alone:
            raise ValueError(
                f"window={self.window} has a chunked form with gradient_at='chunk' for rules that do not look at a "
                f"map's inputs, not for {self.rule} at {self.gradient_at!r} in way={self.way!r}; use way='recurrent'"
            )
        if self.exact and self.read == "boundary":
            raise ValueError("read='boundary' needs gradient_at='chunk': at every token there is no boundary")

    @property
    def _alone(self) -> bool:
        """Can a chunk only be computed where every step is on one pair?"""
        return self.exact or self.rule.needs_inputs or self.rule.scales_buffer

    @property
    def exact(self) -> bool:
        return self.gradient_at == "token"

    @property
    def chunk_pairs(self) -> int:
        """How many pairs a whole chunk writes: what a rule's clock counts."""
        return self.chunk

    def begin(self, weights: Weights, widths: tuple[int, int] | None = None) -> MemoryState:
        """The state at a document's start, from initial weights [b, h, out, in]; widths: of keys and values, where a
        window remembers some and they are not those of the first and the last map."""
        begin = partial(stepped.begin, self.rule) if self.way == "stepped" else self.rule.init
        recent: Any = ()
        if self.window > 1:
            widths = widths or (weights[0].shape[-1], weights[-1].shape[-2])
            recent = windows.begin(weights[0], self.window - 1, *widths)
        weights = tuple(self.rule.conceal(weight) for weight in weights)
        return MemoryState(() if self.exact else weights, weights, tuple(begin(w) for w in weights), recent)

    def open(self, state: MemoryState, rows: bool | Tensor) -> MemoryState:
        """The state with a new chunk opened in `rows`: gradients are taken at the current weights from here."""
        if self.exact or rows is False:
            return state
        if self.way == "stepped":
            maps = zip(state.running, state.rule, strict=True)
            running, rules = zip(*(stepped.tick(self.rule, *pair, self.chunk_pairs) for pair in maps), strict=True)
            reopened = (self.rule.reopen(w, rule.of) for w, rule in zip(running, rules, strict=True))
            running, inner = zip(*reopened, strict=True)
            rules = tuple(rule._replace(of=s) for rule, s in zip(rules, inner, strict=True))
        else:
            anchored = (self.rule.anchor(s) for s in state.rule)
            reopened = (self.rule.reopen(w, s) for w, s in zip(state.running, anchored, strict=True))
            running, rules = zip(*reopened, strict=True)
        opened = state._replace(anchor=running, running=running, rule=rules)
        return opened if rows is True or bool(rows.all()) else select(rows, opened, state)

    def exposed(self, weights: Weights, state: MemoryState) -> Weights:
        """What the memory answers with where `weights` stand, each [b, h, out, in]."""
        rules = [rule.of if isinstance(rule, stepped.Pending) else rule for rule in state.rule]
        return tuple(self.rule.expose(weight, rule) for weight, rule in zip(weights, rules, strict=True))

    def standing(self, state: MemoryState) -> Weights:
        """The weights [b, h, out, in] that the memory answers with after all that was written to it: also what the
        open chunk has pending, where one step is taken a chunk."""
        if self.way == "stepped":
            state = self.open(state, True)
        return self.exposed(state.running, state)

    def at_anchor(self, state: MemoryState, x: Tensor) -> Tensor:
        """The memory's answer [b, h, c, v] at the weights on which the chunk opened ([b, h, n, c, v] of memories
        that run together)."""
        return self.structure.forward(plain(self.exposed(state.anchor, state)), x)[0]

    def run(
        self, state: MemoryState, pairs: "Writes", queries: Tensor | None = None, *, graph_only: bool = False
    ) -> tuple[Tensor, MemoryState]:
        """Write the tokens of one piece that lies inside a chunk, and read it for queries [b, h, c, k], each after (or
        before) all that its token writes.

        Returns what was read [b, h, c, v] (the values, where nothing is asked) and the new state. graph_only: they are
        there for their gradients, and may hold anything.
        """
        if pairs.gates.by_channel:
            self._check_by_channel()
        if self.window > 1 and pairs.bound is not None:
            raise ValueError(f"a bound for every token is for steps on one pair, not for window={self.window}")
        if pairs.map_steps is not None and self.way == "chunked":
            raise ValueError(f"a step size for every map has no chunked form for {self.rule}; use way='stepped'")
        if self.way == "kernels":
            return self._as_linear_memory(state, pairs, queries)
        if self.way == "chunked":
            return self._chunked(state, pairs, queries, graph_only)
        return (self._recurrent if self.way == "recurrent" else self._stepped)(state, pairs, queries)

    def _check_kernels(self) -> None:
        if not isinstance(self.structure, matrix) or not self.exact or self.window > 1 or self.read != "after":
            raise ValueError(
                "way='kernels' is for matrix() memories with gradient_at='token', read='after' and a window of one, "
                f"not for {self.structure} with {self.gradient_at!r}, {self.read!r} and {self.window}"
            )
        if self.attentional_bias.slope is None or self.rule.exposes:
            raise ValueError(
                f"way='kernels' is for the linear family, which {self.attentional_bias} under {self.rule} is none of"
            )

    def _check_by_channel(self) -> None:
        if not isinstance(self.structure, matrix) or not self.exact:
            raise ValueError(
                "retention by channel is for matrix() memories with gradient_at='token', not for "
                f"{self.structure} with gradient_at={self.gradient_at!r}"
            )

    def _chunked(
        self, state: MemoryState, pairs: "Writes", queries: Tensor | None, graph_only: bool
    ) -> tuple[Tensor, MemoryState]:
        if pairs.gates.by_channel:
            return self._as_linear_memory(state, pairs, queries)
        recent = state.recent
        if isinstance(recent, windows.Recent):
            joined = windows.join(recent, pairs.keys, pairs.values, pairs.held(), pairs.shares)
            (maps, norms), recent = self._write_windows(state, pairs, joined), joined.after
        else:
            maps, norms = self._write(state, pairs, graph_only)
        y = pairs.values
        if queries is not None and self.read == "boundary":
            y = self.at_anchor(state, queries)
        elif queries is not None:
            last = len(maps) - 1 if graph_only and self.structure.ends_plainly else -1
            read = partial(chunks.read, before=self.read == "before", steps=pairs.steps)
            y = self.structure.forward(lambda i, x: read(maps[i], x, graph_only=i == last), queries)[0]
        rules = tuple(
            self.rule.close(rule_state, ChunkEnd(chunk.buffer, norm.sum(-1)))
            for rule_state, norm, chunk in zip(state.rule, norms, maps, strict=True)
        )
        return y, MemoryState(state.anchor, tuple(chunk.weight for chunk in maps), rules, recent)

    def _write_windows(
        self, state: MemoryState, pairs: "Writes", joined: windows.Joined
    ) -> tuple[list[chunks.MapChunk], list[Tensor]]:
        """`_write` where every token's step is on the pairs of its window."""
        joined_pairs = pairs._replace(keys=joined.keys, values=joined.values)
        inputs, errors = self._errors(self.exposed(state.anchor, state), joined_pairs)
        n = pairs.keys.shape[-2]
        maps, all_norms = [], []
        for i, (weight, x, error) in enumerate(zip(state.running, inputs, errors, strict=True)):
            plan, norms = self._plan(pairs, x[..., -n:, :], None, state.rule[i])
            carry = windows.spread(self._carry(pairs, plan), plan.write, joined.band)
            once = plan._replace(write=torch.ones_like(error[..., 0]), sight=None)  # of steps at every token alone
            maps.append(chunks.write(once, carry, weight, x, error))
            all_norms.append(norms)
        return maps, all_norms

    def _as_linear_memory(
        self, state: MemoryState, pairs: "Writes", queries: Tensor | None
    ) -> tuple[Tensor, MemoryState]:
        alone = pairs._replace(gates=pairs.gates._replace(log_retention=0.0))
        plan, norms = self._plan(alone, pairs.keys, None, state.rule[0])
        target = self.attentional_bias.target(pairs.keys, pairs.values)
        fixed = self.attentional_bias.error(torch.zeros_like(target), target)
        log_retention, slope, counted = pairs.gates.log_retention, self.attentional_bias.slope, pairs.counted()
        assert slope is not None
        if not isinstance(log_retention, Tensor):
            log_retention = torch.full_like(norms, log_retention)
        if counted is not None:
            log_retention = log_retention * (counted[..., None] if pairs.gates.by_channel else counted)
        before, n = self.read == "before", pairs.steps
        # this form reads at every step: a token asks at each of its own, and one of the answers is taken
        asked = queries if queries is None or n == 1 else queries.repeat_interleave(n, 2)
        y, weight = run_as_linear_memory(
            *(plan, log_retention, state.running[0], pairs.keys, fixed, slope, asked), before=before, way=self.way
        )
        y = y if asked is None or n == 1 else y[:, :, (0 if before else n - 1) :: n]
        rule = self.rule.close(state.rule[0], ChunkEnd(None, norms.sum(-1)))
        return y, MemoryState(state.anchor, (weight,), (rule,))

    def _write(
        self, state: MemoryState, pairs: "Writes", graph_only: bool
    ) -> tuple[list[chunks.MapChunk], list[Tensor]]:
        """A chunk of writes to every linear map, and the squared norms [..., c] of each map's inputs."""
        if self.exact:
            x = self.structure.map_keys(pairs.keys)
            plan, norms = self._plan(pairs, x, None, state.rule[0])
            slope = self.attentional_bias.slope
            assert slope is not None
            carry = self._carry(pairs, plan)
            target = self.attentional_bias.target(pairs.keys, pairs.values)
            fixed = self.attentional_bias.error(torch.zeros_like(target), target)
            return [chunks.write(plan, carry, state.running[0], x, fixed, slope, graph_only=graph_only)], [norms]
        inputs, errors = self._errors(self.exposed(state.anchor, state), pairs)
        shared = not self.rule.scales_buffer  # else what is read out may depend on each map's own inputs
        maps: list[chunks.MapChunk] = []
        all_norms = []
        for i, (weight, x, error) in enumerate(zip(state.running, inputs, errors, strict=True)):
            plan, norms = self._plan(pairs, x, error, state.rule[i])
            carry = maps[0].carry if i and shared else self._carry(pairs, plan)
            maps.append(chunks.write(plan, carry, weight, x, error, graph_only=graph_only))
            all_norms.append(norms)
        return maps, all_norms

    def transfer(self, state: MemoryState, gates: Gates) -> chunks.Transfer | None:
        """What the gates [b, h, c] of a piece, or [n, b, h, c] of several, make of it; None where that takes more."""
        if self.way != "chunked" or self.rule.scales_buffer or gates.by_channel:
            return None
        nothing = torch.zeros_like(gates.step_size)  # type: ignore[arg-type]
        return self._transfer(self.rule.plan(gates, Norms(nothing, nothing), state.rule[0], self.exact))

    def transfers(self, state: MemoryState, gates: list[Gates]) -> list[chunks.Transfer | None]:
        """`transfer` of every piece, several of one length at once."""
        if self.way != "chunked" or self.rule.scales_buffer or any(gate.by_channel for gate in gates):
            return [None] * len(gates)
        found: list[chunks.Transfer | None] = []
        while len(found) < len(gates):
            some = gates[len(found) : len(found) + SIDE_BY_SIDE]
            alike = list(itertools.takewhile(lambda g: g.step_size.shape == some[0].step_size.shape, some))  # type: ignore[union-attr]  # noqa: B023
            joined = self.transfer(state, Gates(*(torch.stack(parts) for parts in zip(*alike, strict=True))))
            found += [None] * len(alike) if joined is None else joined.unbind()
        return found

    def _carry(self, pairs: "Writes", plan: Plan) -> chunks.Transfer:
        if pairs.carry is None:
            return self._transfer(plan)
        return pairs.carry.map(lambda x: x.unsqueeze(2)) if isinstance(self.structure, together) else pairs.carry

    def _transfer(self, plan: Plan) -> chunks.Transfer:
        return chunks.transfer(plan, before=self.exact or self.read == "before")

    def _errors(self, weights: Weights, pairs: "Writes") -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs of every linear map and errors at its output, with the given weights for all tokens."""
        values = pairs.values
        if pairs.own_targets:
            values = self.structure.forward(plain(weights), values)[0]
        answers, inputs, outputs = self.structure.forward(plain(weights), pairs.keys)
        keys, bound, bias = pairs.keys, pairs.bound, self.attentional_bias
        if isinstance(self.structure, together):
            keys, bound = keys.unsqueeze(2), None if bound is None else bound.unsqueeze(2)
        values = bias.target(keys, values)
        if bound is None:
            error = bias.error(answers, values)
        elif isinstance(bias, Bounded):
            error = bias.error_within(answers, values, bound[..., None])
        else:
            raise ValueError(f"a bound for every token is for huber_switch() and its kin, not for {bias}")
        return inputs, self.structure.backward(weights, outputs, error)

    def _gates(self, pairs: "Writes") -> tuple[Gates, Tensor | None]:
        """Gates and tokens that count [b, h, c], or [b, h, 1, c] where memories run together."""
        gates, counted = pairs.gates, pairs.counted()
        if isinstance(self.structure, together):
            gates = Gates(*(gate.unsqueeze(2) if isinstance(gate, Tensor) else gate for gate in gates))
            counted = None if counted is None else counted.unsqueeze(2)
        return gates, counted

    def _plan(self, pairs: "Writes", inputs: Tensor, error: Tensor | None, rule_state: Any) -> tuple[Plan, Tensor]:
        """The rule's plan for one linear map with inputs [b, h, c, in], or [b, h, n, c, in] where memories run
        together; and the squared norms of those inputs."""
        gates, counted = self._gates(pairs)
        squared = SquaredNorms.apply(inputs)
        squared = squared if counted is None else squared * counted
        norms = Norms(squared, None if error is None else SquaredNorms.apply(error))
        plan = self.rule.plan(gates, norms, rule_state, self.exact)
        if counted is None:
            return plan, squared
        # a slot without a token changes nothing: nothing written or erased, all kept, and S not read out
        read_out = None
        if plan.momentum is not None:
            read_out = counted.expand_as(plan.momentum) if plan.read_out is None else plan.read_out * counted
        plan = Plan(
            write=plan.write * counted,
            log_keep=None if plan.log_keep is None else plan.log_keep * counted,
            momentum=None if plan.momentum is None else plan.momentum * counted + (1.0 - counted),
            read_out=read_out,
            erase=None if plan.erase is None else plan.erase * counted,
            buffer=plan.buffer,
            start=plan.start,
            sight=plan.sight,
        )
        return plan, squared

    def _recurrent(self, state: MemoryState, pairs: "Writes", queries: Tensor | None) -> tuple[Tensor, MemoryState]:
        reads, alone, n = [], pairs._replace(steps=1), pairs.steps
        for t in range(pairs.keys.shape[-2] // n):
            after = state
            for step in range(t * n, t * n + n):
                after = self._step(after, alone.at(step))
            if pairs.valid is not None:
                after = select(pairs.valid[:, t], after, state)
            if queries is not None:
                standing = {"after": after.running, "before": state.running, "boundary": state.anchor}[self.read]
                weights = self.exposed(standing, after if self.read == "after" else state)
                reads.append(self.structure.forward(plain(weights), queries[..., t : t + 1, :])[0])
            state = after
        return (torch.cat(reads, -2) if reads else pairs.values), state

    def _stepped(self, state: MemoryState, pairs: "Writes", queries: Tensor | None) -> tuple[Tensor, MemoryState]:
        recent, band, written = state.recent, None, pairs
        if isinstance(recent, windows.Recent):
            joined = windows.join(recent, pairs.keys, pairs.values, pairs.held(), pairs.shares)
            written = pairs._replace(keys=joined.keys, values=joined.values)
            band, recent = joined.band, joined.after
        inputs, errors = self._errors(self.exposed(state.anchor, state), written)
        gates, counted = self._gates(pairs)
        rules = tuple(
            stepped.add(pending, error, x, gates, counted, band, pairs.map_step(i))
            for i, (pending, error, x) in enumerate(zip(state.rule, errors, inputs, strict=True))
        )
        y = pairs.values if queries is None else self.at_anchor(state, queries)
        return y, state._replace(rule=rules, recent=recent)

    def _step(self, state: MemoryState, pair: "Writes") -> MemoryState:
        """One pair by the rule itself."""
        recent = state.recent
        if isinstance(recent, windows.Recent):
            joined = windows.join(recent, pair.keys, pair.values, None, pair.shares)
            pair, recent = pair._replace(keys=joined.keys, values=joined.values), joined.after
        at, gates = state.anchor, self._gates_at(pair)
        if self.exact:
            each = zip(state.running, state.rule, strict=True)
            at = tuple(self.rule.point(weight, rule, gates) for weight, rule in each)
        inputs, errors = self._errors(self.exposed(at, state), pair)
        if isinstance(recent, windows.Recent):
            band = joined.band[:, :, 0, :, None]
            inputs = tuple(torch.where(band == 0, 0.0, x) for x in inputs)  # what is outside has no norm either
            errors = tuple(error * band for error in errors)
        running, rules, steps = [], [], pair.map_steps
        for i, (weight, x, error) in enumerate(zip(state.running, inputs, errors, strict=True)):
            before = self.rule.anchor(state.rule[i]) if self.exact else state.rule[i]
            own = gates if steps is None else gates._replace(step_size=gates.step_size * steps[..., 0, i])
            weight, after = self.rule.step(weight, Pairs(error, x), before, own)
            running.append(weight)
            rules.append(after)
        return MemoryState(state.anchor, tuple(running), tuple(rules), recent)

    def _gates_at(self, pair: "Writes") -> Gates:
        """One token's gates [b, h]; [b, h, 1] stands for [b, h, n] where memories run together."""
        return pair.gates if isinstance(self.structure, together) else pair.gates.at(0)


class Writes(NamedTuple):
    """What is written to a memory in one piece, and how.

    steps: how many of the c pairs are each token's, one after the other; queries and `valid` are by token. keys
    [b, h, c, k]; values [b, h, c, v]; gates: numbers or [b, h, c], retention by channel [b, h, c, k]; valid
    [b, c / steps]: slots that hold a token (None: all). own_targets: what is learned is not the value but the
    memory's own answer to it at the weights on which the chunk opened. carry: what `Memory.transfer` makes of the
    gates, where it is known. bound [b, h, c]: each pair's own, of a bias that has one. shares [b, h, c, window]: how
    much each pair of a window counts, its own first. map_steps [b, h, c, maps]: what the step size of every map is
    multiplied by.
    """

    keys: Tensor
    values: Tensor
    gates: Gates
    valid: Tensor | None = None
    own_targets: bool = False
    carry: chunks.Transfer | None = None
    bound: Tensor | None = None
    shares: Tensor | None = None
    map_steps: Tensor | None = None
    steps: int = 1

    def at(self, t: int) -> "Writes":
        """Token t alone."""
        at = slice(t * self.steps, (t + 1) * self.steps)
        more = {name: getattr(self, name) for name in ("bound", "shares", "map_steps")}
        more = {name: None if told is None else told[:, :, at] for name, told in more.items()}
        pair = self._replace(keys=self.keys[..., at, :], values=self.values[..., at, :], gates=self.gates.at(at))
        return pair._replace(**more)

    def map_step(self, index: int) -> Tensor | float:
        """What the step size of one map is multiplied by [b, h, c], or 1."""
        return 1.0 if self.map_steps is None else self.map_steps[..., index]

    def held(self) -> Tensor | None:
        """Which pairs are of a slot that holds a token [b, c] (None: all)."""
        return self.valid if self.valid is None or self.steps == 1 else self.valid.repeat_interleave(self.steps, 1)

    def counted(self) -> Tensor | None:
        """1 where there is a token and 0 where there is none [b, 1, c]."""
        held = self.held()
        return None if held is None else held[:, None].to(self.keys.dtype)


_CHOICES = {
    "gradient_at": ("token", "chunk"),
    "read": ("after", "before", "boundary"),
    "way": ("chunked", "recurrent", "stepped", "kernels"),
}


SIDE_BY_SIDE = 16  # chunks whose transfers are computed at once: more would only leave the caches
Step = Callable[[Piece, Any, States], tuple[Tensor, States]]
"""(piece, what it is given, states) -> what is read [b, h, c, v], states."""


def scan(
    layout: Layout, states: States, starts: States, given: Sequence[Any], step: Step, *, checkpoint: bool = False
) -> tuple[Tensor, States]:
    """Go through a layout's pieces: rows that begin a document there take the start states; `step` opens chunks,
    writes and reads. Returns what was read, [b, h, s, v] by slot, and the states after the last piece.

    given: for every piece, the tensors that `step` needs, in tuples. checkpoint: each step is computed again for its
    gradients, which then reach what is given, and nothing that `step` holds itself; its piece then says so.
    """
    reads = []
    if checkpoint and torch.is_grad_enabled():
        plain = step

        def again(piece: Piece, here: Any, states: States) -> tuple[Tensor, States]:
            return plain(piece._replace(graph_only=True), here, states)

        step = partial(recompute, step, again=again)
    for piece, here in zip(layout.pieces, given, strict=True):
        if piece.reset is not None:
            states = select(piece.reset, starts, states)
        y, states = step(piece, here, states)
        reads.append(y)
    return torch.cat(reads, -2), states
