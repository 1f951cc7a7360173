"""Checks of what learns while it is used: the levels while a model reads, and a memory while it is written."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.levels import Reader, ReadingState, ReadOut, level
from nestling.memory import Gates, Weights, gradient_descent, plain
from nestling.models import Decoder
from nestling.sequence import Memory, MemoryState
from nestling.sequence.scan import Writes

from .bench import SAME, SequenceModel, apart, bench, sealed, snapshot
from .report import Finding, skip

_LONGEST = 1024  # tokens; ticks of slower levels are not waited for


@sealed()
def reading_invariance(model: SequenceModel, *, seed: int = 0, reader: Callable[..., Reader] = Reader) -> Finding:
    """Reading with learning on: one pass = pieces of odd sizes = token by token, in the loss of every token, what
    each level moved at each tick, and the whole state at the end (levels, accumulators, clocks, open segment);
    then a document's end and more text. The text has three ticks of the fastest level at least, and one of every
    level whose period is at most 1,024 tokens. The levels must move and the model must not."""
    why = _no_levels(model)
    if why:
        return skip("reading_invariance", why)
    on = bench(model, seed)
    weights = snapshot(on.model)
    reading = reader(on.model)
    periods = sorted(int(period) for period in reading.periods if period != math.inf)
    length = max([3 * periods[0], *(period + periods[0] for period in periods if period <= _LONGEST)]) + 5
    text, more = on.tokens(1, length)[0], on.tokens(1, periods[0] + 2)[0]
    odd = [1, periods[0] - 1, 2, periods[0] + 3, 7]
    whole = _read(reading, [text], more)
    apart_by = {
        "in odd pieces": apart(whole, _read(reading, _split(text, odd), more)),
        "at the ticks": apart(whole, _read(reading, _split(text, [periods[0]] * 3), more)),
        "token by token": apart(whole, _read(reading, list(text.split(1)), more)),
    }
    measured = max(apart_by.values())
    faults = [f"{name}: {value:.1e}" for name, value in apart_by.items() if value > SAME]
    if not bool((whole[2][:, 1:] > 0).any()):
        faults.append("no level ever moved")
    if apart(weights, snapshot(on.model)) > 0:
        faults.append("reading changed the model")
    return Finding("reading_invariance", not faults, measured, f"<= {SAME:g}", "; ".join(faults))


def _read(reader: Reader, pieces: list[Tensor], more: Tensor) -> tuple[ReadingState, Tensor, Tensor]:
    """The state, losses and moves of a document in pieces and one more."""
    state, outs = reader.begin(), []
    for piece in pieces:
        state, out = reader.read(state, piece)
        outs.append(out)
    state, out = reader.end_document(state)
    outs.append(out)
    state, out = reader.read(state, more)
    outs.append(out)
    joined = ReadOut(*(torch.cat(parts) for parts in zip(*outs, strict=True)))
    return state, joined.nll, joined.moved


def _split(text: Tensor, sizes: list[int]) -> list[Tensor]:
    pieces, start = [], 0
    for size in [*sizes, text.numel()]:
        pieces.append(text[start : start + size])
        start += size
    return pieces


def _no_levels(model: Any) -> str:
    """Why a model cannot be read with learning, or nothing."""
    if not all(hasattr(model, name) for name in ("levels", "level_weights", "init_state")):
        return "the model has no levels"
    if not any(lvl.period != math.inf and lvl.step_size > 0 for lvl in model.levels):
        return "no level learns: every period is inf or every step_size 0"
    return ""


@sealed()
def surprise_falls(model: SequenceModel | Memory, *, seed: int = 0, times: int = 6) -> Finding:
    """A memory that is written the same chunk again and again is less surprised each time.

    Of a memory's own rule this cannot be asked: retention pulls back, a momentum overshoots, the delta rule's
    erase stops half way. So a model's memory (or the `Memory` given) is taken with its structure, attentional
    bias, chunk, anchor and way of computing, and the rule becomes plain gradient descent with a step of 0.25 over
    the summed squared norm of the keys: far below 1 over the largest curvature, so that the inner objective must
    fall. It is measured where the writes take their errors: a memory whose surprise is always that of its start
    does not fall. Measured: the largest rise from one time to the next, relative to the first surprise.
    """
    memory = model.config.mixer if isinstance(model, Decoder) else model
    if not isinstance(memory, Memory):
        return skip("surprise_falls", "there is no nestling memory in the model")
    memory = dataclasses.replace(memory, rule=gradient_descent())
    generator = torch.Generator().manual_seed(seed)
    heads, width = 2, 8
    keys, values = torch.randn(2, 1, heads, memory.chunk, width, dtype=torch.float64, generator=generator)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    start = memory.structure.init(width, width, (1, heads), generator, unit_keys=True)
    step_size = torch.full((1, heads, memory.chunk), 0.25 / (memory.chunk * memory.window), dtype=torch.float64)
    state: MemoryState = memory.begin(tuple(weight.double() for weight in start))
    targets = memory.attentional_bias.target(keys, values)
    surprises = []
    for _ in range(times):
        state = memory.open(state, True)
        standing: Weights = state.running if memory.exact else state.anchor
        answers = memory.structure.forward(plain(standing), keys)[0]
        surprises.append(float(memory.attentional_bias.loss(answers, targets).sum()))
        _, state = memory.run(state, Writes(keys, values, Gates(step_size)))
    return _falls("surprise_falls", surprises)


@sealed()
def reading_surprise_falls(
    model: SequenceModel, *, seed: int = 0, times: int = 4, reader: Callable[..., Reader] = Reader
) -> Finding:
    """A document of two periods of the fastest level, read again and again by a model that learns, surprises less
    each time.

    Every reading begins with a fresh sequence state, so that nothing but the levels can make the difference. The
    levels' rules become plain gradient descent with a step of 0.02 on the mean gradient of a period, retention 1
    (see `surprise_falls` for why): a small step along the gradient must lower the loss. A level learns when it
    ticks; slow ones may not within the reading. Measured: the largest rise of the mean loss, relative to the first.
    """
    why = _no_levels(model)
    if why:
        return skip("reading_surprise_falls", why)
    on = bench(model, seed)
    reading = reader(_Plain(on.model))
    text = on.tokens(1, 2 * int(min(reading.periods)))[0]
    state, means = reading.begin(), []
    for _ in range(times):
        state, out = reading.read(state, text)
        state, _ = reading.end_document(state)
        means.append(float(out.nll.nanmean()))
    return _falls("reading_surprise_falls", means)


@dataclass(frozen=True)
class _Plain:
    """A model whose levels learn by plain gradient descent with a small step."""

    model: Any

    @property
    def levels(self) -> tuple[level, ...]:
        return tuple(
            dataclasses.replace(lvl, rule=gradient_descent(), step_size=0.02, retention=1.0)
            for lvl in self.model.levels
        )

    def level_weights(self) -> tuple[Weights, ...]:
        return self.model.level_weights()

    def init_state(self, batch: int) -> Any:
        return self.model.init_state(batch)

    def __call__(self, tokens: Tensor, state: Any = None, **more: Any) -> tuple[Tensor, Any]:
        return self.model(tokens, state, **more)


def _falls(name: str, found: list[float]) -> Finding:
    rise = max(after - before for before, after in itertools.pairwise(found)) / (abs(found[0]) + 1e-300)
    detail = f"{found[0]:.6g} -> {found[-1]:.6g} after {len(found) - 1} times"
    return Finding(name, rise < -1e-12, rise, "< 0", detail)
