"""Several steps a token: layers against a loop over tokens and their steps under plain autograd, and what they obey."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.checks import check, options_live
from nestling.memory import (
    Gates,
    decay,
    delta_gradient_descent,
    dot,
    every,
    gated_mlp,
    gradient_descent,
    huber_switch,
    kl,
    l2,
    matrix,
    mlp,
    momentum,
    normalize,
    parse,
    retain,
    retain_first,
)
from nestling.memory.retention import decay_to_anchor
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data
from nestling.sequence import (
    Memory,
    Mixer,
    averaged_gates,
    bare,
    caching,
    fixed_gates,
    gated_delta_gates,
    kda_gates,
    low_rank_gates,
    mac,
    mamba2_gates,
    map_gates,
    rwkv7_gates,
    sequence_memory,
    shards,
    sigmoid_gates,
    silu,
    silu_unit,
    unit_keys,
    unit_steps,
)
from nestling.sequence.gating import Asked
from nestling.sequence.named import Model
from nestling.sequence.scan import Writes
from nestling.sequence.steps import gates_in_turn
from nestling.sequence.zoo import zoo
from oracles import assert_same, convolved, gradients, moved, normal, normed
from oracles import silu as swish

F64 = torch.float64
DIM, HEADS, WIDTH = 6, 2, 3
titans = retain(decay(), momentum())
DEEP = sequence_memory(mlp(), l2(), titans, 4, gating=sigmoid_gates(0.5), steps=2)
EXACT = sequence_memory(matrix(), l2(), titans, 4, "token", steps=3)
PRODUCT = dataclasses.replace(zoo["delta_product"].mixer, chunk=4)
WHOLE = 10**9  # tokens: no shard is as long


def build(expression: Any) -> Any:
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def choose(mixer: sequence_memory, p: dict[str, Tensor], x: Tensor, head: int) -> tuple[Any, Any, Tensor]:
    """Step sizes and momenta of a token's steps, and its retention: sigmoids, or those of the gated delta rule."""
    n = mixer.steps
    rows = [j * HEADS + head for j in range(n)]
    if isinstance(mixer.gating, gated_delta_gates):
        spent = F.softplus(p["gates.project.weight"][head] @ x + p["gates.bias"][head])
        steps = [2 * torch.sigmoid(p["gates.step.weight"][row] @ x) for row in rows]
        return steps, [0.0] * n, torch.exp(-p["gates.log_rate"][head].exp() * spent)
    told = torch.sigmoid(p["gates.weight"] @ x + p["gates.bias"])
    crowd = mixer.chunk * n / WIDTH
    bound = 1.0 if mixer.exact else 0.5 * 1.5 / (1 + crowd + 2 * math.sqrt(crowd))
    return [bound * told[row] for row in rows], [told[n * HEADS + row] for row in rows], told[2 * n * HEADS + head]


def naive(mixer: sequence_memory, p: dict[str, Tensor], x: Tensor, shard: int = WHOLE) -> tuple[Tensor, list[Tensor]]:
    """y [t, d], and of every head the weights and momenta at the end: S <- m S - eta dl/dW, W <- a W + S for each of a
    token's steps, a for the first alone; for the gated delta rule W <- a W before the gradient is taken. In shards,
    queries go through the sum of the outer products of the shard's keys, those of all steps."""
    n, first = mixer.steps, isinstance(mixer.gating, gated_delta_gates)
    rows = [p["qkv.weight"] @ token for token in x]
    mixed = [swish(convolved(p["convolution.weight"], rows[: t + 1])) for t in range(len(x))]

    def answer(W: list[Tensor], k: Tensor) -> Tensor:
        return W[0] @ k if len(W) == 1 else k + W[1] @ F.gelu(W[0] @ k)

    def loss(W: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (answer(W, k) - v).square().sum()

    said: list[list[Tensor]] = [[] for _ in x]
    ends = []
    for head in range(HEADS):
        start = [p[name][head] for name in p if "start." in name]
        for t, token in enumerate(x):
            if t % shard == 0:
                W, S, C = start, [torch.zeros_like(w) for w in start], torch.zeros(WIDTH, WIDTH, dtype=F64)
            if t % mixer.chunk == 0:
                anchor = W
            q, *each = (mixed[t][i * DIM :][head * WIDTH :][:WIDTH] for i in range(1 + 2 * n))
            before, (steps, kept, a) = W, choose(mixer, p, token, head)
            for j in range(n):
                k, v = each[j] / each[j].norm(), each[n + j]
                C, a = C + torch.outer(k, k), a if j == 0 else 1.0
                W = [a * w for w in W] if first else W
                slopes = torch.func.grad(loss)(W if mixer.exact else anchor, k, v)
                S = [kept[j] * s - steps[j] * g for s, g in zip(S, slopes, strict=True)]
                W = [(1.0 if first else a) * w + s for w, s in zip(W, S, strict=True)]
            q = q / q.norm() if shard == WHOLE else C @ q / q.norm()
            said[t].append(normed(answer({"after": W, "before": before, "boundary": anchor}[mixer.read], q)))
        ends += [*W, *([] if first else S)]
    gated = [swish(p["output.gate.weight"] @ token) * p["output.norm"] for token in x]
    reads = [torch.cat(heads) * gate for heads, gate in zip(said, gated, strict=True)]
    return torch.stack([p["output.project.weight"] @ read for read in reads]), ends


def ends_of(memory: Any) -> list[Tensor]:
    momenta = [tensor for name, tensor in flatten(memory).items() if name.endswith("buffer")]
    return [part[0, head] for head in range(HEADS) for part in (*memory.running, *momenta)]


def assert_is_naive(mixer: Any, length: int, **told: int) -> None:
    """Outputs, what is remembered, and every gradient of both."""
    layer, x = build(mixer), normal(length, DIM, seed=length).requires_grad_()
    y, state = layer(x[None])
    inner = mixer.memory if told else mixer
    p = {name.removeprefix("memory."): parameter for name, parameter in layer.named_parameters()}
    expected, wanted = naive(inner, p, x, **told)
    found = ends_of(state.memory)
    for mine, theirs in zip([y[0], *found], [expected, *wanted], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    pairs = ((y, found), (expected, wanted))
    every_number = (torch.cat([out.flatten(), *(end.flatten() for end in ends)]) for out, ends in pairs)
    assert_same(*(gradients(numbers, layer, x) for numbers in every_number))


CASES = [(dataclasses.replace(DEEP, chunk=chunk), length) for chunk in (1, 4) for length in (1, 7, 63)]
CASES += [(dataclasses.replace(DEEP, read=read, steps=3), 7) for read in ("before", "boundary")]
CASES += [(dataclasses.replace(DEEP, read="before", way="recurrent"), 7)]
CASES += [(dataclasses.replace(DEEP, read="before", checkpoint=True), 7)]
CASES += [(EXACT, 7), (dataclasses.replace(EXACT, read="before"), 7), (dataclasses.replace(EXACT, chunk=16), 63)]
CASES += [(PRODUCT, length) for length in (1, 7, 63)] + [(dataclasses.replace(PRODUCT, read="before"), 7)]


@pytest.mark.parametrize(("mixer", "length"), CASES, ids=str)
def test_is_a_loop_over_tokens_and_steps(mixer: sequence_memory, length: int) -> None:
    assert_is_naive(mixer, length)


def test_shards_project_queries_on_the_keys_of_all_steps() -> None:
    assert_is_naive(shards(DEEP, shard=8), 11, shard=8)


@pytest.mark.parametrize("read", ["residual", "gated", "soup", "sparse"])
def test_a_cache_of_no_segment_is_the_memory_itself(read: str) -> None:
    layer, x = build(caching(DEEP, segment=8, read=read)), normal(1, 8, DIM)
    torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], rtol=1e-10, atol=1e-10)


def test_frozen_steps_depend_on_the_chunk_and_others_do_not() -> None:
    x = normal(1, 11, DIM)

    def apart(mixer: sequence_memory) -> float:
        layers = [build(dataclasses.replace(mixer, chunk=chunk)) for chunk in (1, 4)]
        layers[1].step_bound = layers[0].step_bound  # the same steps
        return float((layers[0](x)[0] - layers[1](x)[0]).detach().abs().max())

    assert apart(DEEP) > 1e-4
    assert max(apart(EXACT), apart(PRODUCT)) < 1e-10


LINEAR = retain_first(decay(), gradient_descent())
STEPPED: dict[str, Any] = {"read": "boundary", "way": "stepped"}
MEMORIES = {
    "deep": Memory(mlp(), l2(), retain(decay(), delta_gradient_descent(momentum(normalize()))), 3),
    "deep, before": Memory(mlp(), l2(), titans, 3, read="before"),
    "window": Memory(mlp(), l2(), titans, 3, window=3),
    "recurrent window": Memory(mlp(), l2(), titans, 3, window=3, way="recurrent"),
    "stepped window": Memory(matrix(), l2(), retain(kl(), momentum()), 3, window=3, **STEPPED),
    "stepped maps": Memory(gated_mlp(), dot(), titans, 3, **STEPPED),
    "bounded": Memory(mlp(), huber_switch(), titans, 3),
    "by channel": Memory(matrix(), l2(), LINEAR, 3, "token"),
    "by channel, before": Memory(matrix(), l2(), LINEAR, 3, "token", "before"),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_step_is_a_token_that_does_not_read(name: str) -> None:
    """Two steps a token, against twice the tokens of which every second reads; an empty slot in the middle."""
    memory, here = MEMORIES[name], torch.tensor([[True] * 3, [True, False, True]])
    k, v, told = F.normalize(normal(2, 1, 6, 4), dim=-1), normal(2, 1, 6, 4, seed=1), normal(2, 1, 6, 9, seed=2)
    told = told.sigmoid()
    parts = {"shares": told[..., :3], "map_steps": told[..., :3], "bound": told[..., 3]}
    more = {"window": "shares", "maps": "map_steps", "bounded": "bound"}
    kept = told[..., 5:9] if "channel" in name else told[..., 2]
    pairs = Writes(k, v, Gates(0.3 * told[..., 0], told[..., 1], kept.log()), here, steps=2)
    pairs = pairs._replace(**{field: parts[field] for word, field in more.items() if word in name})
    twice = pairs._replace(steps=1, valid=here.repeat_interleave(2, 1))
    weights = memory.structure.init(4, 4, (2, 1), torch.Generator().manual_seed(0))
    opened = memory.open(memory.begin(tuple(weight.to(F64) for weight in weights), (4, 4)), True)
    q = normal(2, 1, 3, 4, seed=3)
    y, state = memory.run(opened, pairs, q)
    expected, wanted = memory.run(opened, twice, q.repeat_interleave(2, 2))
    expected = expected[:, :, 0 if memory.read == "before" else 1 :: 2]
    torch.testing.assert_close(y.transpose(1, 2)[here], expected.transpose(1, 2)[here], rtol=1e-12, atol=1e-12)
    for field, tensor in flatten(state).items():
        torch.testing.assert_close(tensor, flatten(wanted)[field], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("way", "moves"), [("recurrent", [False, True, False]), ("stepped", [False, False, True])])
def test_a_rules_clock_counts_pairs(way: str, moves: list[bool]) -> None:
    """Two a token: a clock of six ticks with the third token; where a step is a chunk, as the fourth opens one."""
    read = {"read": "boundary"} if way == "stepped" else {}
    layer = build(sequence_memory(matrix(), l2(), every(6, gradient_descent()), 1, way=way, steps=2, **read))
    weights = [layer(normal(1, 4, DIM)[:, :t])[1].memory.running[0] for t in (1, 2, 3, 4)]
    assert [bool((a - b).abs().max() > 1e-9) for a, b in itertools.pairwise(weights)] == moves


GATINGS = {  # what is projected for the step sizes, and what is made of it
    "sigmoid": (sigmoid_gates(2.0), "", lambda raw: 1.4 * raw.sigmoid()),
    "delta": (gated_delta_gates(reach=2.0), "step.", lambda raw: 1.4 * raw.sigmoid()),
    "kda": (kda_gates(rank=2), "step.", lambda raw: 0.7 * raw.sigmoid()),
    "rwkv7": (rwkv7_gates(rank=2), "step.", lambda raw: 0.7 * raw.sigmoid()),
    "mamba2": (mamba2_gates(), "project.", lambda raw: 0.7 * F.softplus(raw)),
}
X = normal(2, 5, DIM, seed=4)


def moved_gates(gating: Any, steps: int = 3) -> Any:
    return moved(gating.build(DIM, HEADS, WIDTH, torch.Generator().manual_seed(0), Asked(steps=steps)))


@pytest.mark.parametrize("name", GATINGS)
def test_each_step_has_rows_of_its_own_and_the_token_one_retention(name: str) -> None:
    gating, projection, made = GATINGS[name]
    module, alone = moved_gates(gating), moved_gates(gating, 1)
    step_size, _, once = gates_in_turn(module.choose(module(X), 0.7), 3)
    weight = module.get_parameter(f"{projection}weight")
    bias = 0.0 if projection == "step." else module.bias
    raw = (X @ weight.T + bias).transpose(1, 2)
    for step in range(3):
        torch.testing.assert_close(step_size[:, :, step::3], made(raw[:, step * HEADS : (step + 1) * HEADS]))
        assert bool(once[:, :, step::3].all() if step == 0 else not once[:, :, step::3].any())
    if name == "sigmoid":
        expected = F.logsigmoid(raw[:, -HEADS:])
    elif name == "mamba2":
        expected = -module.log_rate.exp()[:, None] * F.softplus(raw[:, :HEADS])
    else:  # the step sizes are apart
        alone.load_state_dict(module.state_dict() | {"step.weight": weight[:HEADS]})
        expected = alone.choose(alone(X), 0.7).log_retention
    torch.testing.assert_close(once[:, :, ::3], expected)


@pytest.mark.parametrize("gating", [fixed_gates(), low_rank_gates(rank=2)], ids=str)
def test_a_step_size_that_is_not_learned_is_that_of_all_steps(gating: Any) -> None:
    module = moved_gates(gating)
    chosen = module.choose(module(X), 0.7)
    step_size, _, once = gates_in_turn(chosen, 3)
    assert torch.equal(step_size, torch.full((2, HEADS, 15), 0.7, dtype=F64))
    assert torch.equal(once[:, :, ::3], chosen.log_retention)
    assert not once.unflatten(2, (5, 3))[:, :, :, 1:].any()


def test_momenta_and_what_else_is_told_are_of_each_step() -> None:
    module = moved_gates(map_gates(unit_steps(), maps=2))
    raw = module(X)
    step_size, kept, once = gates_in_turn(module.choose(raw, 0.7), 3)
    inner, told = module.inner.momentum, module.more(raw)["map_steps"]
    for step in range(3):
        rows = slice(step * HEADS, (step + 1) * HEADS)
        expected = (X @ inner.weight[rows].T + inner.bias[rows]).sigmoid().transpose(1, 2)
        torch.testing.assert_close(kept[:, :, step::3], expected)
        for head, i in itertools.product(range(HEADS), range(2)):
            row = (step * HEADS + head) * 2 + i
            expected = F.softplus(X @ module.told.weight[row] + module.told.bias[row])
            torch.testing.assert_close(told[step, :, head, :, i], expected)
    assert torch.equal(step_size, torch.ones(2, HEADS, 15, dtype=F64))
    assert not once.any()


def test_an_average_is_over_tokens() -> None:
    """W_i = W_c - p_i sum of all steps of j <= i: every step is in p_i times its own, p_i / p_{i-1} comes once."""
    module = moved_gates(averaged_gates(chunk=4), 2)
    place = torch.tensor([0, 1, 2, 3, 0])
    chosen = module.choose(module(X), 1.0)
    placed = gates_in_turn(module.placed(chosen, place), 2)
    share = module.log_share.exp() / torch.arange(1, 5)
    for step in range(2):
        torch.testing.assert_close(placed.step_size[:, :, step::2], chosen.step_size[step] * share[place])
    kept = torch.cat([torch.ones(1, dtype=F64), share[1:] / share[:-1]])[place]
    torch.testing.assert_close(placed.log_retention[:, :, ::2].exp(), kept.expand(2, HEADS, 5))
    assert not placed.log_retention[:, :, 1::2].any()
    rule = retain(decay_to_anchor(), gradient_descent())
    layer = build(sequence_memory(matrix(), l2(), rule, 4, gating=averaged_gates(chunk=4), steps=2))
    assert layer(normal(1, 9, DIM))[0].isfinite().all()


@pytest.mark.parametrize("part", [silu_unit(), silu(), unit_keys(), bare()], ids=str)
def test_preparations_know_keys_from_values(part: Any) -> None:
    """Two keys and two values are prepared as the key and the value beside the same query are."""
    mixed = normal(2, 4, 5 * DIM)
    q, *rest = mixed.chunk(5, -1)
    found = part.streams(mixed, HEADS, 2).unflatten(1, (5, HEADS))
    for j in range(2):
        alone = part.streams(torch.cat([q, rest[j], rest[2 + j]], -1), HEADS).unflatten(1, (3, HEADS))
        torch.testing.assert_close(found[:, [0, 1 + j, 3 + j]], alone, rtol=1e-12, atol=1e-12)


def test_it_keeps_the_laws_and_is_told_of() -> None:
    names = ["causality", "rows_independent", "purity", "split_invariance", "gradient_coverage"]
    for mixer in (DEEP, mac(DEEP, segment=6, persistent=2)):
        report = check(Decoder(ModelConfig(dim=8, heads=2, blocks=1, vocabulary=7, mixer=mixer)), only=names)
        assert report.passed, str(report)
    assert options_live(DEEP).passed
    assert Model(DEEP, "", "").choices[3] == "momentum(), 2 steps a token"
    assert parse(repr(DEEP), Mixer) == DEEP


def test_a_deep_memory_of_two_steps_trains() -> None:
    mixer = sequence_memory(mlp(), l2(), retain(decay(), momentum(normalize())), 8, steps=2)
    model = Decoder(ModelConfig(dim=16, heads=2, blocks=1, mixer=mixer), seed=0)
    text = torch.tensor([list(b"a few words, again and again; " * 3)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_one_step_is_not_in_the_data_of_a_model() -> None:
    """Whose digests were taken before there were several."""
    assert "steps" not in to_data(sequence_memory())
    assert to_data(DEEP)["steps"] == 2
    config = ModelConfig(mixer=DEEP)
    assert from_data(ModelConfig, to_data(config)) == config
