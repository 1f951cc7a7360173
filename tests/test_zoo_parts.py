"""What a token chooses beside its gates, and the baselines: formulas written out, and what they are not for."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling import Decoder, checks, load_state, preset, save_state, zoo
from nestling.memory import (
    Gates,
    decay,
    gated_mlp,
    gradient_descent,
    huber_norm,
    huber_switch,
    l2,
    matrix,
    mlp,
    momentum,
    retain,
)
from nestling.memory.naive_miras import Flow, naive_lact
from nestling.sequence import (
    attention,
    bound_gates,
    comba_streams,
    hgrn2_streams,
    kda_gates,
    linear_mixer,
    lstm,
    map_gates,
    mesa_streams,
    rwkv7_streams,
    sequence_memory,
    sigmoid_gates,
    srwm,
    unit_steps,
    window_gates,
)
from nestling.sequence.named import size
from nestling.sequence.scan import Memory, Writes

X = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
STEPPED = {"read": "boundary", "way": "stepped"}


@pytest.mark.parametrize(
    ("gating", "name", "expected"),
    [
        (window_gates(window=5), "shares", lambda raw: torch.sigmoid(raw)),
        (bound_gates(), "bound", lambda raw: torch.log(1 + torch.exp(raw))[..., 0]),
        (map_gates(maps=2), "map_steps", lambda raw: torch.log(1 + torch.exp(raw))),
        (bound_gates(window_gates(window=2)), "bound", lambda raw: F.softplus(raw)[..., 0]),
    ],
)
def test_what_is_told_and_the_gates_beside_it(gating, name, expected):
    module = gating.build(8, 2, 4, torch.Generator().manual_seed(0))
    raw = X @ module.told.weight.T + module.told.bias
    told = module.more(module(X))[name]
    each = raw.unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(told, expected(each))
    alone = gating.of.build(8, 2, 4, torch.Generator().manual_seed(0))
    for mine, theirs in zip(module.choose(module(X), 0.5), alone.choose(alone(X), 0.5), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_where_they_start():
    nothing = torch.zeros(1, 3, 8)
    for gating, name, value in (
        (window_gates(), "shares", 0.9526),
        (bound_gates(), "bound", 1.0),
        (map_gates(), "map_steps", 0.001),
    ):
        module = gating.build(8, 2, 4)
        told = module.more(module(nothing))[name]
        torch.testing.assert_close(told, torch.full_like(told, value), rtol=1e-4, atol=1e-6)


def test_where_streams_start():
    """At the numbers that their parts name."""
    made = {
        name: dict(streams.build(8, 2, 4, torch.Generator().manual_seed(0)).named_parameters())
        for name, streams in (
            ("hgrn2", hgrn2_streams(floor=0.7)),
            ("mesa", mesa_streams(ridge=0.4)),
            ("comba", comba_streams(feedback=0.3)),
        )
    }
    torch.testing.assert_close(made["hgrn2"]["floor"].sigmoid(), torch.full((8,), 0.7))
    torch.testing.assert_close(F.softplus(made["mesa"]["ridge"]) + 0.4, torch.ones(2, 4))
    assert made["comba"]["feedback"].tolist() == pytest.approx([0.3, 0.3])


def test_unit_steps_are_one_and_forget_nothing():
    module = unit_steps().build(8, 2, 4, torch.Generator().manual_seed(0))
    step_size, kept, log_retention = module.choose(module(X), 0.1)
    assert torch.equal(step_size, torch.ones(2, 2, 9))
    assert not log_retention.any()
    torch.testing.assert_close(kept, (X @ module.momentum.weight.T + module.momentum.bias).sigmoid().transpose(1, 2))


def test_a_step_for_every_map_is_that_map_alone():
    """Steps of zero for two of three maps leave these as they are; token by token and once a chunk."""
    for way in ("stepped", "recurrent"):
        memory = Memory(gated_mlp(), l2(), momentum(), 4, read="boundary", way=way)
        generator = torch.Generator().manual_seed(0)
        weights = gated_mlp().init(4, 4, (1, 1), generator)
        k, v = torch.randn(2, 1, 1, 4, 4, generator=generator)
        steps = torch.tensor([0.0, 0.3, 0.0]).expand(1, 1, 4, 3)
        ones = torch.ones(1, 1, 4)
        state = memory.open(memory.begin(weights), True)
        _, state = memory.run(state, Writes(k, v, Gates(ones, 0.5 * ones, 0.0 * ones), map_steps=steps))
        after = memory.open(state, True).running
        assert torch.equal(after[0], weights[0])
        assert torch.equal(after[2], weights[2])
        assert (after[1] - weights[1]).abs().max() > 1e-3


def test_rows_of_lact_keep_their_length():
    generator = torch.Generator().manual_seed(0)
    starts = tuple(torch.randn(4, 4, generator=generator).double() for _ in range(3))
    k, v, q = torch.randn(3, 8, 4, generator=generator).double()
    flow = Flow(k, v, q, torch.ones(8).double(), torch.ones(8).double())
    run = naive_lact(starts, flow, torch.full((8, 3), 0.1).double(), torch.full((8,), 0.5).double(), chunk=4)
    for start, end in zip(starts, run.standing, strict=True):
        torch.testing.assert_close(end.norm(dim=1), start.norm(dim=1))
        assert (end - start).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: sequence_memory(rule=gradient_descent(), gating=window_gates(), window=3), "the memory's window is 3"),
        (lambda: sequence_memory(gating=bound_gates()), r"not for l2\(\)"),
        (
            lambda: sequence_memory(mlp(), huber_switch(), gradient_descent(), gating=bound_gates(), window=2),
            "for steps on one pair, not for window=2",
        ),
        (lambda: sequence_memory(mlp(), gating=map_gates(), **STEPPED), r"steps for 3 maps, but mlp\(\) has 2"),
        (lambda: sequence_memory(gated_mlp(), gating=map_gates()), "no chunked form"),
        (lambda: window_gates(window=0), "window must be > 0"),
        (lambda: map_gates(maps=0), "maps must be > 0"),
        (
            lambda: sequence_memory(mlp(), rule=retain(decay(), gradient_descent()), gating=window_gates(kda_gates())),
            "is for matrix",
        ),
        (lambda: comba_streams(kda_gates()), "has one retention a head"),
        (lambda: mesa_streams(bound_gates()), "no window, bound, maps or chunk"),
        (lambda: mesa_streams(iterations=0), "iterations must be at least 1"),
        (lambda: mesa_streams(ridge=1.0), "ridge must be between 0 and 1"),
        (lambda: sequence_memory(steps=0), "steps must be at least 1 a token, got 0"),
        (lambda: hgrn2_streams(floor=1.0), "floor must be between 0 and 1"),
        (lambda: rwkv7_streams(rank=0), "rank must be at least 1"),
        (lambda: linear_mixer(comba_streams(), chunk=0), "chunk must be at least 1 token, got 0"),
        (lambda: linear_mixer(comba_streams(), way="stepped"), "way must be one of"),
        (lambda: srwm(step=0.0), "step must be between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_said(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_gates_within_gates_know_their_momentum():
    assert window_gates(sigmoid_gates()).momentum
    assert window_gates(kda_gates()).by_channel
    assert bound_gates(window_gates()).tells == ("shares", "bound")


def test_the_bound_of_a_layer_is_that_of_its_bias_at_the_start():
    layers = [
        sequence_memory(matrix(), huber_norm(0.3), gradient_descent(), 4, gating=gating).build(8, 2, seeded())
        for gating in (bound_gates(), sigmoid_gates())
    ]
    layers[0].load_state_dict(layers[1].state_dict(), strict=False)
    layers[0].gates.inner.load_state_dict(layers[1].gates.state_dict())
    torch.nn.init.zeros_(layers[0].gates.told.weight)
    torch.testing.assert_close(layers[0](X)[0], layers[1](X)[0])
    torch.nn.init.constant_(layers[0].gates.told.bias, 0.1)
    assert (layers[0](X)[0] - layers[1](X)[0]).abs().max() > 1e-4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestGrowing:
    """Attention without a window, whose state grows."""

    def test_it_holds_the_document_and_no_more(self):
        layer = attention(window=None).build(8, 2, seeded())
        _, state = layer(X)
        assert state.keys.shape == (2, 2, 9, 4)
        _, state = layer(X, state)
        assert state.keys.shape[2] == 18
        reset = torch.zeros(2, 9, dtype=torch.bool)
        reset[:, 4] = True
        _, state = layer(X, state, reset=reset)
        assert state.keys.shape[2] == 5, "the new document alone"

    def test_a_short_document_is_attention_with_a_wide_window(self):
        whole, windowed = (attention(window=window).build(8, 2, seeded()) for window in (None, 64))
        torch.testing.assert_close(whole(X)[0], windowed(X)[0])

    def test_a_saved_state_goes_on(self, tmp_path):
        layer = attention(window=None).build(8, 2, seeded())
        _, state = layer(X)
        save_state(tmp_path / "state", state, layer)
        loaded = load_state(tmp_path / "state", layer)
        assert torch.equal(layer(X, state)[0], layer(X, loaded)[0])

    def test_its_cost_is_told(self):
        assert size(attention(window=None)).state == 2 * 64 * 256
        assert size(attention(window=None), length=64).state == 2 * 64 * 64
        assert size(lstm()) == (2 * 64, 2 * 8 * 64 * 64)
        with pytest.raises(ValueError, match="at least 1 token, or None, got 0"):
            attention(window=0)


def test_the_baseline_preset_is_a_transformer():
    config = preset("transformer", dim=16, heads=2, blocks=1)
    assert config.mixer == zoo["transformer"].mixer
    assert [lvl.period for lvl in config.levels] == [math.inf]
    logits, _ = Decoder(config)(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.shape == (1, 3, 256)


def test_every_option_is_alive():
    for mixer in (lstm(), srwm(), attention(window=None), linear_mixer(comba_streams()), linear_mixer(mesa_streams())):
        finding = checks.options_live(mixer)
        assert finding.passed, f"{mixer}: {finding.detail}"
    faults = checks.options_live(sequence_memory(matrix(), l2(), momentum(), gating=window_gates(), window=4, steps=2))
    assert faults.passed, faults.detail
