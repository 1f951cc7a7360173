"""Documents, padding and phases: every row of a batch is what it is alone, however its tokens arrive."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.attentional_bias import dot, l2
from nestling.memory.retention import decay, decay_to_start, row_norm
from nestling.memory.rule import dampen, delta_gradient_descent, every, momentum, retain, retain_first, scale, surprise
from nestling.memory.state import clone, detach, flatten, unflatten
from nestling.memory.structure import gated_mlp, matrix, mlp
from nestling.sequence import (
    MixerModule,
    attention,
    caching,
    comba_streams,
    hgrn2_streams,
    kda_gates,
    lay_out,
    linear_mixer,
    lstm,
    mac,
    mag,
    mal,
    map_gates,
    mesa_streams,
    rwkv7_streams,
    self_modifying,
    sequence_memory,
    shards,
    srwm,
    tnt,
    unit_steps,
    window_gates,
    yaad,
)
from nestling.sequence.attention import AttentionState
from nestling.sequence.convolution import ShortConvolution

F64 = torch.float64
DIM, HEADS = 8, 2
outside = scale(momentum(dampen(surprise())))
delta = retain(decay_to_start(), delta_gradient_descent(momentum()))
lact = retain(row_norm(), momentum())
MIXERS = [
    sequence_memory(chunk=4),
    sequence_memory(matrix(), l2(), delta, 4, "token"),
    sequence_memory(matrix(), l2(), retain_first(), 4, "token", gating=kda_gates(rank=2)),
    sequence_memory(mlp(), l2(), retain(decay(), delta_gradient_descent(outside)), 4, read="before"),
    sequence_memory(mlp(), l2(), every(3, delta), 4, way="recurrent"),
    sequence_memory(mlp(), l2(), retain(decay(), momentum()), 4, steps=2),
    sequence_memory(matrix(), l2(), retain_first(), 4, "token", "before", gating=kda_gates(rank=2), steps=3),
    sequence_memory(mlp(), l2(), every(5, momentum()), 4, read="boundary", way="stepped", steps=2),
    self_modifying(chunk=4, projection_chunk=4),
    self_modifying(chunk=8, projection_chunk=4),
    self_modifying(chunk=2, projection_chunk=4, gate_structure=matrix()),
    attention(window=5),
    attention(window=1, convolution=1),
    attention(window=5, persistent=2),
    mag(sequence_memory(chunk=4), window=5, persistent=3),
    mal(sequence_memory(matrix(), l2(), delta, 4, "token"), window=3, persistent=1),
    mac(sequence_memory(chunk=4), segment=6, persistent=2),
    mac(self_modifying(matrix(), chunk=4, projection_chunk=4), segment=4, persistent=0, convolution=1),
    caching(sequence_memory(chunk=4), segment=4, read="residual", slots=2),
    caching(sequence_memory(matrix(), l2(), delta, 2, "token"), segment=4, slots=3),
    caching(sequence_memory(chunk=2), segment=4, read="soup", slots=2),
    caching(sequence_memory(chunk=2, steps=2, read="before"), segment=4, read="soup", slots=2),
    caching(sequence_memory(chunk=2), segment=2, read="sparse", slots=4, top=2),
    caching(linear_mixer(hgrn2_streams(), chunk=2), segment=4, slots=2),
    caching(linear_mixer(comba_streams(), chunk=4), segment=3, read="sparse", slots=3, top=1),
    caching(linear_mixer(rwkv7_streams(rank=2), way="recurrent"), segment=3, read="residual", slots=2),
    caching(self_modifying(chunk=2, projection_chunk=4), segment=4, read="residual", slots=3),
    caching(self_modifying(chunk=2, projection_chunk=2), segment=2, read="soup", slots=2),
    caching(srwm(), segment=3, read="sparse", slots=3, top=1),
    shards(sequence_memory(chunk=2), shard=4),
    shards(sequence_memory(chunk=2, steps=2), shard=4),
    tnt(matrix(), chunk=8, local=(2, 4), shard=4, queries="raw"),
    sequence_memory(matrix(), rule=retain(decay(), momentum()), chunk=4, gating=window_gates(window=3), window=3),
    sequence_memory(mlp(), rule=momentum(), chunk=4, gating=window_gates(window=3), window=3, steps=2),
    sequence_memory(
        matrix(), rule=momentum(), chunk=4, gating=window_gates(window=6), window=6, read="boundary", way="stepped"
    ),
    yaad(chunk=4),
    sequence_memory(
        gated_mlp(), dot(), lact, chunk=4, gating=map_gates(unit_steps(), start=0.2), read="boundary", way="stepped"
    ),
    attention(window=None),
    attention(window=None, convolution=1, persistent=2),
    lstm(),
    srwm(),
    linear_mixer(hgrn2_streams(), chunk=4, way="recurrent"),
    linear_mixer(comba_streams(), chunk=4),
    linear_mixer(mesa_streams(), chunk=4),
    linear_mixer(rwkv7_streams(rank=2), chunk=4, convolution=2),
]


def make(expression: Any) -> MixerModule:
    """A mixer none of whose parameters is at its neutral start."""
    generator = torch.Generator().manual_seed(0)
    layer = expression.build(DIM, HEADS, generator).to(F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return layer.requires_grad_(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def alone(layer: MixerModule, x: Tensor, state: Any, reset: Tensor, valid: Tensor) -> tuple[Tensor, Any]:
    """One row [t, d] document by document, its padding cut out; y is zero where there is padding."""
    y = torch.zeros_like(x)
    document = (reset & valid).cumsum(0)
    for number in range(int(document.max()) + 1):
        tokens = ((document == number) & valid).nonzero()[:, 0]
        if number:
            state = None
        if len(tokens):
            found, state = layer(x[None, tokens], state)
            y[tokens] = found[0]
    return y, state


def assert_state(found: Any, row: int, expected: Any) -> None:
    """Row `row` of a state is the only row of the other; what an attention's cache lacks may be anything."""
    mine, theirs = flatten(found), flatten(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        here, there = tensor[row : row + 1], theirs[name]
        if isinstance(found, AttentionState) and name != "tail":  # one that grows is as long as that of the longest row
            dim = 1 if name == "exists" else 2
            least = min(here.shape[dim], there.shape[dim])
            more = found.exists[row, : found.exists.shape[1] - least]
            assert not more.any()
            here, there = (x.narrow(dim, x.shape[dim] - least, least) for x in (here, there))
        place, _, field = name.rpartition("keys" if name.endswith("keys") else "values")
        if not field and f"{place}exists" in theirs:
            exists = theirs[f"{place}exists"][:, None, :, None]
            here, there = here * exists, there * exists
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def tokens_of(b: int, t: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, document starts and tokens present; rows 0 to 3: plain, all padding, starting anew, ending early."""
    generator = torch.Generator().manual_seed(seed)
    reset = torch.rand(b, t, generator=generator) < 0.1
    valid = torch.rand(b, t, generator=generator) < 0.75
    reset[0], valid[0], valid[1] = False, True, False
    reset[2], valid[2] = torch.arange(t) == 0, True
    reset[3], valid[3] = False, torch.arange(t) < t // 3
    return normal(b, t, DIM, seed=seed), reset, valid


@pytest.mark.parametrize("expression", MIXERS, ids=str)
class TestRows:
    def test_each_row_is_what_it_is_alone(self, expression):
        layer = make(expression)
        state, states = None, [None] * 7
        for call, length in enumerate((13, 1, 9, 22)):
            x, reset, valid = tokens_of(7, length, seed=call)
            y, state = layer(x, state, reset=reset, valid=valid)
            for row in range(7):
                expected, states[row] = alone(layer, x[row], states[row], reset[row], valid[row])
                torch.testing.assert_close(y[row][valid[row]], expected[valid[row]], rtol=1e-10, atol=1e-10)
                if states[row] is None:
                    states[row] = layer.init_state(1)
                assert_state(state, row, states[row])

    @pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2]], ids=["some", "all"])
    def test_documents_that_begin_with_the_call(self, expression, rows):
        layer = make(expression)
        x, more = normal(3, 8, DIM), normal(3, 6, DIM, seed=1)
        _, state = layer(x)
        reset = torch.zeros(3, 6, dtype=torch.bool)
        reset[rows, 0] = True
        y, after = layer(more, state, reset=reset)
        for row in range(3):
            _, before = layer(x[row : row + 1])
            expected, alone_after = layer(more[row : row + 1], None if row in rows else before)
            torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-10, atol=1e-10)
            assert_state(after, row, alone_after)

    @pytest.mark.parametrize("length", [1, 5])
    def test_padding_alone_changes_nothing(self, expression, length):
        layer = make(expression)
        _, state = layer(normal(2, 7, DIM), valid=torch.arange(7).expand(2, 7) < torch.tensor([[7], [5]]))
        kept = clone(state)
        nothing = torch.zeros(2, length, dtype=torch.bool)
        x, reset = normal(2, length, DIM, seed=1), torch.ones(2, length, dtype=torch.bool)
        y, after = layer(x, state, valid=nothing, reset=reset)
        assert y.shape == x.shape
        for name, tensor in flatten(after).items():
            assert torch.equal(tensor, flatten(kept)[name]), name

    def test_what_stands_in_padding_does_not_matter(self, expression):
        layer = make(expression)
        x, reset, valid = tokens_of(7, 19, seed=3)
        valid[4, 0] = False
        y, state = layer(x, reset=reset, valid=valid)
        poisoned = x.masked_fill(~valid[..., None], torch.nan)
        again, state_again = layer(poisoned, reset=reset, valid=valid)
        assert torch.equal(again[valid], y[valid])
        for name, tensor in flatten(state).items():
            assert torch.equal(tensor, flatten(state_again)[name]), name

    def test_no_output_knows_a_later_token(self, expression):
        layer = make(expression)
        x, reset, valid = tokens_of(5, 17, seed=5)
        reset[0], valid[0] = False, True
        y, _ = layer(x, reset=reset, valid=valid)
        for at in (3, 8, 16):
            changed = x.clone()
            changed[:, at] += 1.0
            z, _ = layer(changed, reset=reset, valid=valid)
            same = valid.clone()
            same[:, at:] = False
            torch.testing.assert_close(z[same], y[same], rtol=1e-12, atol=1e-12)
            assert (z[0, at] - y[0, at]).abs().max() > 1e-3
        assert y[0].isfinite().all()

    def test_split_passes_are_one_pass(self, expression):
        layer = make(expression)
        x = normal(2, 23, DIM)
        y, _ = layer(x)
        for lengths in ((1, 6, 0, 9, 7), (4, 4, 4, 11), (1,) * 23):
            found, after = [], None
            for part in x.split(lengths, 1):
                out, after = layer(part, detach(after))
                found.append(out)
            torch.testing.assert_close(torch.cat(found, 1), y, rtol=1e-10, atol=1e-10)
            for row in range(2):
                assert_state(after, row, layer(x[row : row + 1])[1])

    def test_the_outer_gradient_of_a_row_is_what_it_is_alone(self, expression):
        layer = make(expression)
        start = layer.init_state(1)
        x, reset, valid = tokens_of(5, 15, seed=2)
        x.requires_grad_()
        weight = normal(5, 15, DIM, seed=9) * valid[..., None]
        y, _ = layer(x, reset=reset, valid=valid)
        (found,) = torch.autograd.grad((y * weight).sum(), x)
        for row in range(5):
            if not valid[row].any():
                assert not found[row].any()
                continue
            out, _ = alone(layer, x[row], start, reset[row], valid[row])
            (expected,) = torch.autograd.grad((out * weight[row]).sum(), x)
            torch.testing.assert_close(found[row], expected[row], rtol=1e-9, atol=1e-9)


def test_the_convolution_stays_inside_its_document():
    convolution = ShortConvolution(DIM, 3).to(F64).requires_grad_(False)
    convolution.weight.copy_(normal(DIM, 3))
    x, tail = normal(1, 6, DIM, seed=1), normal(1, 2, DIM, seed=2)
    reset = torch.tensor([[False, False, True, False, False, False]])
    layout = lay_out(torch.tensor([0]), 6, (1,), reset)
    y, after = convolution(layout.spread(x), tail, layout)
    history = torch.cat([tail, x], 1)
    for t in range(6):
        inside = [s for s in range(3) if t >= 2 + s or t < 2]  # the document begins at token 2
        expected = sum(convolution.weight[:, 2 - s] * history[0, 2 + t - s] for s in inside)
        torch.testing.assert_close(layout.gather(y)[0, t], expected)
    assert torch.equal(after, x[:, -2:])


@pytest.mark.parametrize("window", [1, 4, 64])
def test_attention_is_a_softmax_over_its_window(window):
    layer = make(attention(window=window))
    x = normal(2, 19, DIM)
    mixed = F.pad(layer.qkv(x), (0, 0, 3, 0))
    mixed = sum(mixed[:, shift : shift + 19] * layer.convolution.weight[:, shift] for shift in range(4))
    q, k, v = mixed.view(2, 19, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    rates = torch.tensor([1.0, 10_000.0**-0.5], dtype=F64)  # one angle a pair of the 4 channels
    turn = torch.polar(torch.ones(19, 2, dtype=F64), torch.arange(19)[:, None] * rates)
    q, k = (torch.complex(part[..., :2], part[..., 2:]) * turn for part in (q, k))
    scores = torch.einsum("bhik,bhjk->bhij", q, k.conj()).real / 2
    distance = torch.arange(19)[:, None] - torch.arange(19)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    expected = layer.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_chunk_sizes_that_do_not_line_up_are_refused():
    with pytest.raises(ValueError, match=r"must divide the largest of them, got \(4, 6\)"):
        lay_out(torch.tensor([0]), 5, (4, 6))


@pytest.mark.parametrize("expression", MIXERS, ids=str)
def test_a_state_is_a_dict_of_named_tensors_and_back(expression):
    layer = make(expression)
    _, state = layer(normal(2, 7, DIM))
    flat = flatten(state)
    rebuilt = unflatten(layer.init_state(2), {name: tensor.clone() for name, tensor in flat.items()})
    x = normal(2, 5, DIM, seed=1)
    assert torch.equal(layer(x, rebuilt)[0], layer(x, state)[0])
    assert flatten(rebuilt).keys() == flat.keys()
    first = next(iter(flat))
    with pytest.raises(ValueError, match=f"has no tensor '{first}'"):
        unflatten(state, {name: tensor for name, tensor in flat.items() if name != first})
    with pytest.raises(ValueError, match=f"'{first}' has shape .*, needed"):
        unflatten(state, flat | {first: flat[first][:1]})


@pytest.mark.parametrize("expression", MIXERS, ids=str)
def test_under_autocast_a_memory_stays_in_float32(expression):
    layer = make(expression).float()
    x = normal(2, 11, DIM).float()
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert (y.float() - exact).abs().max() < 0.2 * exact.abs().max()
    for name, tensor in flatten(state).items():
        inner = "memor" in name and not name.endswith("tail")
        assert not inner or tensor.dtype in (torch.float32, torch.int64, torch.bool), name


@pytest.mark.parametrize(
    "expression", [linear_mixer(hgrn2_streams()), caching(linear_mixer(mesa_streams()), segment=4)], ids=str
)
def test_a_recurrence_runs_outside_of_autocast(expression, monkeypatch):
    layer, seen = make(expression).float(), []
    streams = layer.streams if hasattr(layer, "streams") else layer.memory.streams
    run = streams.run

    def told(*given):
        seen.append(torch.is_autocast_enabled("cpu"))
        return run(*given)

    monkeypatch.setattr(streams, "run", told)
    with torch.autocast("cpu", torch.bfloat16):
        layer(normal(1, 9, DIM).float())
    assert seen
    assert not any(seen)


def test_empty_calls_change_nothing():
    for expression in MIXERS:
        layer = make(expression)
        _, state = layer(normal(2, 5, DIM))
        y, after = layer(normal(2, 0, DIM), state)
        assert y.shape == (2, 0, DIM)
        assert all(torch.equal(tensor, flatten(state)[name]) for name, tensor in flatten(after).items())
