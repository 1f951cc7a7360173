"""Neurons with periods of their own: one product, and as many clocks as there are groups."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling.checks import options_live
from nestling.levels import Reader, level, neurons, spectrum
from nestling.levels.neurons import join_neurons, split_neurons
from nestling.memory import (
    adam,
    biased,
    clip,
    decay,
    delta_gradient_descent,
    gated_mlp,
    matrix,
    mlp,
    momentum,
    normalize,
    normed,
    parse,
    retain,
)
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data
from nestling.sequence import attention
from nestling.train import Stream, TrainConfig, Trainer

TEXT = torch.randint(0, 256, (151,), generator=torch.Generator().manual_seed(5))
STRUCTURES = {
    "mlp": mlp(expansion=1.5, residual=False),
    "residual mlp": mlp(activation="silu"),
    "gated_mlp": gated_mlp(expansion=2.0),
    "normed": normed(mlp(residual=False)),
}
RULE = retain(decay(), momentum())


def build(*levels, seed: int = 0) -> Decoder:
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=8), levels=levels)
    return Decoder(config, seed=seed).double()


def read(model: Decoder, text: torch.Tensor):
    reader = Reader(model)
    return reader.read(reader.begin(), text)


def whole(model: Decoder, levels) -> list[tuple[torch.Tensor, ...]]:
    """Level weights of a model with one divided block in each of two blocks, as those of undivided blocks."""
    count = len(levels) // 2
    return [join_neurons(levels[:count]), join_neurons(levels[count:])]


def test_a_spectrum_is_log_spaced_in_powers_of_two() -> None:
    assert [lvl.period for lvl in spectrum(4, 64).levels] == [4, 8, 16, 32, 64]
    maps = (torch.randn(13, 6), torch.randn(6, 13))
    groups = split_neurons(maps, 5)
    period = [4 * 2 ** math.floor(5 * i / 13) for i in range(13)]  # of each neuron
    assert [len(rows) for rows, _ in groups] == [period.count(p) for p in (4, 8, 16, 32, 64)]
    joined = join_neurons(groups)
    assert torch.equal(joined[0], maps[0])
    assert torch.equal(joined[1], maps[1])


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_forward_is_the_undivided_block_bit_for_bit(structure) -> None:
    divided, plain = build(spectrum(4, 32, structure)), build(level(4, structure))
    logits, _ = divided(TEXT[None, :40])
    assert torch.equal(logits, plain(TEXT[None, :40])[0])


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("rule", [RULE, adam()], ids=repr)
def test_groups_of_one_period_are_one_level(structure, rule) -> None:
    one = level(16, structure, rule, step_size=0.2, retention=0.9)
    divided, plain = build(neurons((one,) * 3)), build(one)
    state, out = read(divided, TEXT)
    expected, expected_out = read(plain, TEXT)
    torch.testing.assert_close(out.nll, expected_out.nll, rtol=0, atol=1e-10, equal_nan=True)
    for found, maps in zip(whole(divided, state.levels.weights), expected.levels.weights, strict=True):
        torch.testing.assert_close(found, maps, rtol=0, atol=1e-10)
    assert float(expected_out.moved[:, 1:].min()) > 0


def test_a_spectrum_of_one_clock_is_a_level_bit_for_bit() -> None:
    state, out = read(build(spectrum(16, 16, rule=RULE, retention=0.9)), TEXT)
    expected, expected_out = read(build(level(16, rule=RULE, retention=0.9)), TEXT)
    assert torch.equal(out.moved, expected_out.moved)
    for name, tensor in flatten(expected.levels).items():
        assert torch.equal(flatten(state.levels)[name], tensor), name


def test_a_group_changes_at_its_ticks_only() -> None:
    model = build(spectrum(8, 32, gated_mlp(), RULE, retention=0.5))
    periods, reader = [lvl.period for lvl in model.levels], Reader(model)
    state = reader.begin()
    changed = {index: set() for index in range(len(periods))}
    for position, token in enumerate(TEXT[:100]):  # the step at position n is taken when token n arrives
        before = state.levels.weights
        state, _ = reader.read(state, token[None])
        for index, (old, new) in enumerate(zip(before, state.levels.weights, strict=True)):
            same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
            assert len(set(same)) == 1, "all maps of a group keep one clock"
            if not same[0]:
                changed[index].add(position)
    for index, period in enumerate(periods):
        assert changed[index] == {n for n in range(1, 100) if n % period == 0}


def test_a_tick_is_the_sum_of_per_token_gradients() -> None:
    """Of every group: minus step_size / period times the sum, over its period, of per-token gradients of the
    undivided MLP, where faster groups have moved meanwhile; by plain autograd, with hand-written products."""
    fast, slow, dim, step = 4, 8, 16, 0.7
    structure = gated_mlp()
    model = build(spectrum(fast, slow, structure, step_size=step))
    state, _ = read(model, TEXT[: slow + 1])
    found = whole(model, state.levels.weights)
    own = [[w.detach().clone() for w in maps] for maps in whole(model, model.level_weights())]
    half = own[0][0].shape[0] // 2  # the first half of the neurons is fast
    assert 2 * half == own[0][0].shape[0]
    masks = []
    for rows in (slice(0, half), slice(half, None)):
        mask = [torch.zeros_like(w) for w in own[0]]
        mask[0][rows], mask[1][rows], mask[2][:, rows] = 1, 1, 1
        masks.append(mask)
    totals = [[[torch.zeros_like(w) for w in maps] for maps in own] for _ in (fast, slow)]
    before = None
    for first in (0, fast):
        end = first + fast
        for t in range(first, end):
            leaves = [[w.clone().requires_grad_() for w in maps] for maps in own]
            logits = naive_logits(model, leaves, TEXT[first:end], before)
            loss = F.cross_entropy(logits[t - first], TEXT[t + 1])
            gradients = iter(torch.autograd.grad(loss, [w for maps in leaves for w in maps]))
            for block, maps in enumerate(own):
                for index in range(len(maps)):
                    gradient = next(gradients)
                    for total in totals:
                        total[block][index] += gradient
        with torch.no_grad():
            before = naive_state(model, own, TEXT[first:end], before)
        for total, mask, period in zip(totals, masks, (fast, slow), strict=True):
            if end % period == 0:
                for block in range(2):
                    for index in range(3):
                        own[block][index] -= step / period * mask[index] * total[block][index]
                        total[block][index].zero_()
    for maps, expected in zip(found, own, strict=True):
        for weight, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-11)
    assert dim == own[0][2].shape[0]


def naive_logits(model, own, tokens, before):
    return _naive(model, own, tokens, before)[0]


def naive_state(model, own, tokens, before):
    return tuple(s for s in _naive(model, own, tokens, before)[1])


def _naive(model, own, tokens, before):
    """The decoder with its mixers, and products by hand in place of the continuum."""
    x = model.embedding[tokens][None] / 0.02
    after = []
    for block, (gate, up, down), state in zip(model.blocks, own, before or (None, None), strict=True):
        state = block.mixer.init_state(1) if state is None else state
        y, state = block.mixer(F.rms_norm(x, (16,), block.norm, eps=1e-6), state)
        after.append(state)
        x = x + y
        normed = F.rms_norm(x, (16,), block.continuum.norms[0], eps=1e-6)
        x = x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    x = F.rms_norm(x, (16,), model.norm, eps=1e-6)
    return (x @ model.embedding.T)[0], after


@pytest.mark.parametrize("pieces", [[1] * 151, [7, 50, 1, 1, 92]], ids=lambda p: str(p[:4]))
def test_one_pass_is_split_passes_with_a_rule_of_whole_maps(pieces: list[int]) -> None:
    rule = retain(decay(), delta_gradient_descent(momentum(clip())))
    model = build(spectrum(8, 32, gated_mlp(), rule, retention=0.9), level(40, rule=rule, retention=0.8))
    expected, out = read(model, TEXT)
    reader = Reader(model)
    state, nll = reader.begin(), []
    for part in TEXT.split(pieces):
        state, got = reader.read(state, part)
        nll.append(got.nll)
    torch.testing.assert_close(torch.cat(nll), out.nll, rtol=0, atol=1e-10, equal_nan=True)
    for name, tensor in flatten(expected.levels).items():
        torch.testing.assert_close(flatten(state.levels)[name], tensor, rtol=0, atol=1e-10, msg=name)


def test_frozen_neurons_beside_learning_ones() -> None:
    model = build(neurons((level(8, rule=RULE), level(math.inf, rule=RULE))))
    start = flatten(model.level_weights())
    after = flatten(read(model, TEXT)[0].levels.weights)
    for name, tensor in start.items():
        assert torch.equal(after[name], tensor) == (int(name.split(".")[0]) % 2 == 1)


def test_configurations_come_back() -> None:
    config = ModelConfig(
        dim=16, heads=2, levels=(spectrum(8, 64, gated_mlp(), RULE), neurons((level(64), level(100, rule=adam()))))
    )
    with pytest.raises(ValueError, match="one structure"):
        neurons((level(8), level(16, matrix())))
    assert from_data(ModelConfig, to_data(config)) == config
    for block in config.levels:
        assert parse(repr(block)) == block


def test_pre_training_keeps_a_clock_for_every_group() -> None:
    model = build(spectrum(16, 64), level(128)).float()
    config = TrainConfig(steps=8, rows=1, length=16, warmup_steps=0)
    trainer = Trainer(model, config)
    stream = Stream.of([bytes(TEXT.tolist()) * 20], rows=1, length=16, reset_share=0.0, seed=0)
    assert [clock.period for clock in trainer.clocks] == [16, 32, 64, 128] * 2
    steps = {index: [] for index in range(8)}
    for step in range(8):
        before = [[w.detach().clone() for w in maps] for maps in model.level_weights()]
        trainer.run_step(stream)
        for index, (old, new) in enumerate(zip(before, model.level_weights(), strict=True)):
            if any(not torch.equal(a, b) for a, b in zip(old, new, strict=True)):
                steps[index].append(step)
    for index, period in enumerate([16, 32, 64, 128] * 2):
        assert steps[index] == [step for step in range(8) if (step + 1) * 16 % period == 0]


def test_options_of_divided_blocks_are_alive() -> None:
    rule = retain(decay(), momentum(normalize()))
    finding = options_live(
        ModelConfig(blocks=1, mixer=attention(), levels=(spectrum(4, 8, rule=rule), neurons((level(8), level(16)))))
    )
    assert finding.passed, finding.detail


@pytest.mark.parametrize(
    ("build_it", "said"),
    [
        (lambda: spectrum(3, 64), "fastest must be a power of two"),
        (lambda: spectrum(4, math.inf), "slowest must be a power of two"),
        (lambda: spectrum(0.5, 4), "fastest must be a power of two"),
        (lambda: spectrum(64, 4), "fastest must be <= slowest"),
        (lambda: spectrum(4, 64, step_size=-1.0), "step_size must be >= 0"),
        (lambda: spectrum(4, 64, matrix()), "one hidden layer"),
        (lambda: spectrum(4, 64, mlp(depth=3)), "one hidden layer"),
        (lambda: spectrum(4, 64, biased(mlp())), "no biases"),
        (lambda: neurons(()), "at least one level"),
        (lambda: neurons((level(8), level(4))), "fast to slow"),
        (lambda: build(spectrum(1, 2**20, mlp())), "16 neurons cannot be divided into 21 groups"),
    ],
    ids=lambda told: told if isinstance(told, str) else "",
)
def test_what_is_refused(build_it, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_it()


def test_edges_of_groups_differ_by_one_at_most() -> None:
    sizes = [len(rows) for rows, _ in split_neurons((torch.randn(23, 4), torch.randn(4, 23)), 6)]
    assert sum(sizes) == 23
    assert max(sizes) - min(sizes) <= 1
    assert all(size > 0 for size in sizes)
