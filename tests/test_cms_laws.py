"""The laws of the continuum for every variant of it, in the stream and in context, with momentum and retention."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import (
    InContext,
    Level,
    LevelsState,
    Reader,
    Wiring,
    chain,
    heads,
    initialization,
    level,
    local,
    neurons,
    reptile,
    spectrum,
)
from nestling.memory import decay, momentum, retain
from nestling.memory.state import clone, detach, flatten, map_tensors
from nestling.memory.structure import gated_mlp
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention

TEXT = torch.randint(0, 61, (3, 50), generator=torch.Generator().manual_seed(5))
RULE = retain(decay(), momentum())
FAST = level(8, rule=RULE, step_size=0.6, momentum=0.7, retention=0.9)
SLOW = level(20, rule=RULE, step_size=0.4, momentum=0.8, retention=0.8)  # no multiple of the fast one's
VARIANTS: dict[str, tuple[tuple[Level, ...], Wiring]] = {
    "chain": ((FAST, SLOW), chain()),
    "nested, MAML": ((replace(FAST, transfer=initialization(order=1)), SLOW), chain()),
    "nested, Reptile": ((replace(FAST, transfer=reptile()), SLOW), chain()),
    "heads": ((FAST, SLOW), heads()),
    "neurons": ((neurons((FAST, replace(FAST, period=12), SLOW)),), chain()),
    "spectrum": ((spectrum(4, 16, gated_mlp(), RULE, 0.6, 0.7, 0.9), SLOW), chain()),
    "local": ((local(replace(FAST, step_size=0.05)), SLOW), chain()),
}
STACKED = {f"stacked, {how}": how for how in ("layers", "neurons", "low_rank")}
IN_CONTEXT = pytest.mark.parametrize("name", VARIANTS)
STREAM = pytest.mark.parametrize("name", [*VARIANTS, *STACKED])


def build(name: str, change: Callable[[level], level] = lambda lvl: lvl) -> Any:
    """A variant, with each of its levels changed."""
    if name in STACKED:
        pretrained = pytest.importorskip("pretrained", reason="needs transformers: pip install 'nestling[hf]'")
        from nestling.levels import stack

        return stack(pretrained.DECODERS["llama"]().double(), [change(FAST), change(SLOW)], STACKED[name], rank=2)
    blocks, wiring = VARIANTS[name]
    levels = tuple(changed(block, change) for block in blocks)
    config = ModelConfig(
        vocabulary=61, dim=8, heads=1, blocks=1, mixer=attention(window=6), levels=levels, wiring=wiring
    )
    return Decoder(config).double()


def changed(block: Level, change: Callable[[level], level]) -> Level:
    if isinstance(block, neurons):
        return neurons(tuple(map(change, block.of)))
    if isinstance(block, local):
        return replace(block, of=change(block.of))
    if isinstance(block, spectrum):
        one = change(block.levels[0])
        return replace(block, step_size=one.step_size, momentum=one.momentum, retention=one.retention)
    return change(block)  # type: ignore[arg-type]


def cuts(periods: list[float], end: int) -> Iterator[tuple[int, int]]:
    """Where segments begin and end, up to `end`: at every multiple of any period."""
    ends = [n for n in range(1, end + 1) if any(n % period == 0 for period in periods)]
    return zip([0, *ends[:-1]], ends, strict=True)


def read(model: Any, text: torch.Tensor):
    reader = Reader(model)
    return reader.read(reader.begin(), text)


def same(one: LevelsState, other: LevelsState) -> None:
    found = flatten(one)
    for key, tensor in flatten(other).items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", [name for name in (*VARIANTS, *STACKED) if name != "local"])
def test_weights_are_those_of_the_equation(name: str) -> None:
    """Equation 71 with momentum and retention, equation 72 for levels that start again: each segment's gradient by
    plain autograd at the weights that stand, and clocks, momenta and starts by hand. (local: tests/test_local.py)"""
    model, text = build(name), TEXT[0, :49]
    levels = model.levels
    weights = [[w.detach().clone() for w in maps] for maps in model.level_weights()]
    zeros = [[torch.zeros_like(w) for w in maps] for maps in weights]
    sums, buffers = clone(tuple(map(tuple, zeros))), clone(tuple(map(tuple, zeros)))
    sums, buffers = [list(maps) for maps in sums], [list(maps) for maps in buffers]
    nested = [i for i, lvl in enumerate(levels) if lvl.restarts]
    starts = {i: [list(weights[i]), list(zeros[i]), list(zeros[i])] for i in nested}  # start, its sum, its momentum
    state = None

    def step(maps, total, buffer, lvl):  # type: ignore[no-untyped-def]
        for j, gradient in enumerate(total):
            buffer[j] = lvl.momentum * buffer[j] - lvl.step_size / lvl.period * gradient
            maps[j] = lvl.retention * maps[j] + buffer[j]
            total[j] = torch.zeros_like(gradient)

    for begin, end in cuts([lvl.period for lvl in levels], 48):
        leaves = tuple(tuple(w.clone().requires_grad_() for w in maps) for maps in weights)
        logits, state = model(text[None, begin:end], state, weights=leaves)
        loss = F.cross_entropy(logits[0], text[begin + 1 : end + 1], reduction="sum")
        found = iter(torch.autograd.grad(loss, [w for maps in leaves for w in maps]))
        state = detach(state)
        for i, maps in enumerate(weights):
            for j in range(len(maps)):
                gradient = next(found)
                sums[i][j] = sums[i][j] + gradient
                if i in starts:
                    starts[i][1][j] = starts[i][1][j] + gradient
        for i, lvl in enumerate(levels):
            if end % lvl.period == 0:
                step(weights[i], sums[i], buffers[i], lvl)
            if i in starts and end % levels[i + 1].period == 0:
                slow, (start, since, moving) = levels[i + 1], starts[i]
                if lvl.transfer == reptile():
                    since[:] = [(s - w) * slow.period for s, w in zip(start, weights[i], strict=True)]
                step(start, since, moving, slow)
                weights[i], sums[i], buffers[i] = list(start), list(zeros[i]), list(zeros[i])
    got = read(model, text)[0].levels
    for maps, expected in zip(got.weights, weights, strict=True):
        for weight, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-11)


def ticks(model: Any, index: int, end: int) -> set[int]:
    """Where a level's weights change: at its ticks, and where the one that it starts from ticks."""
    lvl = model.levels[index]
    periods = [lvl.period, model.levels[index + 1].period] if lvl.restarts else [lvl.period]
    return {n for n in range(1, end + 1) if any(n % period == 0 for period in periods)}


@STREAM
def test_in_the_stream_a_level_changes_at_its_ticks_and_nowhere_else(name: str) -> None:
    """Token by token, to the bit, retention and momentum included; the step at n is taken when token n arrives."""
    model = build(name)
    reader = Reader(model)
    state, found = reader.begin(), [set() for _ in model.levels]
    for position, token in enumerate(TEXT[0, :42]):
        before = flatten(state.levels.weights)
        state, _ = reader.read(state, token[None])
        for key, weight in flatten(state.levels.weights).items():
            if not torch.equal(before[key], weight):
                found[int(key.split(".")[0])].add(position)
    assert found == [ticks(model, index, 41) for index in range(len(found))]


@IN_CONTEXT
@pytest.mark.parametrize("depth", [0, math.inf], ids=["first order", "second order"])
def test_in_context_a_level_changes_at_its_ticks_and_nowhere_else(name: str, depth: float) -> None:
    model = build(name)
    reader = InContext(model, depth)
    state, found = reader.begin(3), [set() for _ in model.levels]
    for begin, end in cuts([lvl.period for lvl in model.levels], 40):
        before = clone(flatten(detach(state.levels.weights)))
        state, _ = reader.read(state, TEXT[:, begin:end], TEXT[:, begin + 1 : end + 1])
        for key, weight in flatten(state.levels.weights).items():
            same = {torch.equal(a, b) for a, b in zip(before[key], weight, strict=True)}
            assert len(same) == 1, "the rows are at one position"
            if same == {False}:
                found[int(key.split(".")[0])].add(end)
    assert found == [ticks(model, index, 40) for index in range(len(found))]


@STREAM
def test_in_the_stream_one_pass_is_split_passes(name: str) -> None:
    model, text = build(name), TEXT[0]
    whole, out = read(model, text)
    reader = Reader(model)
    state, nll = reader.begin(), []
    for part in text.split([7, 13, 1, 1, 1, 1, 26]):
        given = flatten(clone(state))
        after, got = reader.read(state, part)
        assert all(torch.equal(x, given[key]) for key, x in flatten(state).items()), "what was given stays"
        state = after
        nll.append(got.nll)
    torch.testing.assert_close(torch.cat(nll), out.nll, rtol=0, atol=1e-10, equal_nan=True)
    same(state.levels, whole.levels)


@IN_CONTEXT
@pytest.mark.parametrize("depth", [1, math.inf], ids=str)
def test_in_context_rows_are_readers_and_calls_may_end_at_any_segment(name: str, depth: float) -> None:
    model, reader = build(name), InContext(build(name), depth)
    whole, losses = reader.read(reader.begin(3), TEXT[:, :40], TEXT[:, 1:41])
    state, parts = reader.begin(3), []
    for part in (slice(0, 8), slice(8, 24), slice(24, 40)):
        state, got = reader.read(state, TEXT[:, :40][:, part], TEXT[:, 1:41][:, part])
        parts.append(got)
    torch.testing.assert_close(torch.cat(parts, 1), losses, rtol=0, atol=1e-10)
    same(state.levels, whole.levels)
    for row in (0, 2):
        lived, out = read(model, TEXT[row, :41])
        torch.testing.assert_close(losses[row], out.nll[1:], rtol=0, atol=1e-10)
        same(map_tensors(lambda tensor, row=row: tensor[row], whole.levels), lived.levels)  # type: ignore[misc]


@STREAM
def test_step_zero_and_full_retention_are_a_frozen_model(name: str) -> None:
    model = build(name, lambda lvl: replace(lvl, step_size=0.0, retention=1.0, momentum=0.9))
    state, out = read(model, TEXT[0])
    still = Reader(model, learning=False)
    _, expected = still.read(still.begin(), TEXT[0])
    for old, new in zip(flatten(model.level_weights()).values(), flatten(state.levels.weights).values(), strict=True):
        assert torch.equal(old, new)
    torch.testing.assert_close(out.nll, expected.nll, rtol=0, atol=1e-10, equal_nan=True)
    if name in VARIANTS:
        reader = InContext(model)
        _, losses = reader.read(reader.begin(3), TEXT[:, :40], TEXT[:, 1:41])
        torch.testing.assert_close(losses[0], expected.nll[1:41], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in (*VARIANTS, *STACKED) if name not in ("spectrum", "nested, MAML")])
def test_infinite_periods_are_a_static_model(name: str) -> None:
    model = build(name, lambda lvl: level(math.inf))
    state, out = read(model, TEXT[0])
    logits, _ = model(TEXT[0][None])
    expected = F.cross_entropy(logits[0, :-1], TEXT[0, 1:], reduction="none")
    torch.testing.assert_close(out.nll[1:], expected.detach(), rtol=0, atol=1e-10)
    for old, new in zip(flatten(model.level_weights()).values(), flatten(state.levels.weights).values(), strict=True):
        assert torch.equal(old, new)


@IN_CONTEXT
def test_second_order_is_the_slope_of_all_losses(name: str) -> None:
    """Central differences along a random direction of all starts, through every update. First order gives another
    gradient, that of every segment's loss by its own weights, whether segments are taken one by one or together."""
    way: list[torch.Tensor] = []

    def mean(by: float) -> float:
        model = build(name)
        with torch.no_grad():
            for weight, direction in zip(flatten(model.level_weights()).values(), way, strict=True):
                weight.add_(by * direction)
        reader = InContext(model)
        return float(reader.read(reader.begin(3), TEXT[:, :40], TEXT[:, 1:41])[1].detach().mean())

    found = {}
    for depth in (0, math.inf):
        model = build(name)
        reader = InContext(model, depth)
        reader.accumulate(reader.begin(3), TEXT[:, :40], TEXT[:, 1:41])
        own = list(flatten(model.level_weights()).values())
        generator = torch.Generator().manual_seed(7)
        way = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in own]
        found[depth] = sum(float((w.grad * d).sum()) for w, d in zip(own, way, strict=True))
        _, losses = reader.read(reader.begin(3), TEXT[:, :40], TEXT[:, 1:41])
        for weight, gradient in zip(own, torch.autograd.grad(losses.mean(), own), strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-8, atol=1e-12)
    slope = (mean(1e-5) - mean(-1e-5)) / 2e-5
    assert found[math.inf] == pytest.approx(slope, rel=1e-6)
    assert abs(found[0] / slope - 1) > 1e-4
