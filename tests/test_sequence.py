"""Memories run over tokens: forward, final state and every outer gradient against the naive oracle."""

import dataclasses
import math
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory.attentional_bias import dot, l2
from nestling.memory.naive import Choices, naive_memory
from nestling.memory.retention import decay, decay_to_start
from nestling.memory.rule import (
    Gates,
    clip,
    dampen,
    delta_gradient_descent,
    every,
    gradient_descent,
    momentum,
    normalize,
    retain,
    scale,
    surprise,
)
from nestling.memory.state import flatten, map_tensors
from nestling.memory.structure import matrix, mlp
from nestling.sequence import Memory, sequence_memory
from nestling.sequence.scan import MemoryState, Writes

F64 = torch.float64
HEADS, DIM, VALUE = 2, 4, 3
LENGTHS = (1, 7, 63, 100)

hope = delta_gradient_descent(momentum(dampen()))
outside = scale(momentum(surprise()))
deep = mlp(depth=3, expansion=1.5, residual=False, activation="silu")
EXACT = [
    Memory(matrix(), l2(), gradient_descent(), 16, "token"),
    Memory(matrix(), dot(), gradient_descent(), 16, "token"),
    Memory(matrix(), l2(), retain(), 16, "token", "before"),
    Memory(matrix(), l2(), retain(decay_to_start()), 16, "token"),
    Memory(matrix(), l2(), retain(decay(), momentum()), 16, "token"),
    Memory(matrix(), dot(), retain(decay(), momentum(dampen())), 16, "token", "before"),
    Memory(matrix(), dot(), retain(decay(), delta_gradient_descent()), 16, "token"),
    Memory(matrix(), l2(), retain(decay_to_start(), hope), 16, "token", "before"),
    Memory(matrix(), l2(), retain(decay(), momentum(normalize())), 16, "token"),
    Memory(matrix(), l2(), retain(decay(), delta_gradient_descent(outside)), 16, "token"),
]
FROZEN = [
    Memory(matrix(), l2(), retain(decay(), momentum()), 16, "chunk", "boundary"),
    Memory(matrix(), dot(), retain(decay_to_start(), momentum(normalize())), 16, "chunk", "before"),
    Memory(matrix(), l2(), retain(decay(), hope), 16, "chunk"),
    Memory(mlp(), l2(), gradient_descent(), 16, "chunk"),
    Memory(mlp(), l2(), retain(decay(), momentum()), 16, "chunk", "before"),
    Memory(mlp(), l2(), retain(decay(), momentum(normalize())), 16, "chunk"),
    Memory(mlp(), dot(), delta_gradient_descent(), 16, "chunk", "before"),
    Memory(mlp(), l2(), retain(decay_to_start(), hope), 16, "chunk"),
    Memory(mlp(), l2(), retain(decay_to_start(), delta_gradient_descent(momentum(dampen(clip())))), 16, "chunk"),
    Memory(mlp(depth=3), dot(), retain(decay(), momentum(dampen(normalize(clip(bound=0.5))))), 16, "chunk", "before"),
    Memory(mlp(), l2(), normalize(outside), 16, "chunk", "boundary"),
    Memory(mlp(depth=3), l2(), delta_gradient_descent(momentum(normalize())), 16, "chunk"),
    Memory(deep, l2(), retain(decay(), delta_gradient_descent(outside)), 16, "chunk", "before"),
    Memory(deep, dot(), retain(decay_to_start(), momentum(dampen())), 16, "chunk"),
]


def named(memory: Memory) -> str:
    return f"{memory.structure} {memory.attentional_bias} {memory.rule} at {memory.gradient_at}, read {memory.read}"


class Data(NamedTuple):
    """Everything an outer gradient can reach. weights: of each map; the rest [1, h, t, ...]."""

    weights: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    queries: Tensor
    gates: Gates


def leaves(data: Data) -> dict[str, Tensor]:
    return flatten(data)


def make(memory: Memory, length: int, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)

    heads = HEADS if length < 50 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, heads, length, *shape, dtype=F64, generator=generator)

    value = DIM if getattr(memory.structure, "residual", False) else VALUE
    weights = tuple(w.to(F64) for w in memory.structure.init(DIM, value, (1, heads), generator))
    largest = 1.0 if memory.exact else 1.0 / (1 + memory.chunk / DIM + 2 * (memory.chunk / DIM) ** 0.5)
    gates = Gates(largest * normal().sigmoid(), normal().sigmoid(), F.logsigmoid(normal() + 4))
    keys = F.normalize(normal(DIM), dim=-1) * normal(1).sigmoid() * 2
    data = Data(weights, keys, normal(value), normal(DIM), gates)
    for leaf in leaves(data).values():
        leaf.requires_grad_()
    return data


class Found(NamedTuple):
    """What a run leaves behind: reads [1, h, t, v], and of each map its weights and momentum."""

    reads: Tensor
    weights: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]


def fast(memory: Memory, data: Data, split: int | None = None) -> Found:
    """Chunk by chunk, each chunk in pieces of at most `split` tokens."""
    state, reads, length = memory.begin(data.weights), [], data.keys.shape[2]
    for opened in range(0, length, memory.chunk):
        state = memory.open(state, True)
        stop = min(opened + memory.chunk, length)
        step = split or memory.chunk
        for first in range(opened, stop, step):
            at = slice(first, min(first + step, stop))
            gates = Gates(*(gate[..., at] for gate in data.gates))
            pairs = Writes(data.keys[..., at, :], data.values[..., at, :], gates)
            y, state = memory.run(state, pairs, data.queries[..., at, :])
            reads.append(y)
    return Found(torch.cat(reads, 2), state.running, buffers(state))


def buffers(state: MemoryState) -> tuple[Tensor, ...]:
    return tuple(tensor for name, tensor in flatten(state.rule).items() if name.endswith("buffer"))


def slow(memory: Memory, data: Data) -> Found:
    """By the naive oracle, head by head; its choices are read off the expression."""
    words = set(re.findall(r"\w+", repr(memory.rule)))
    bound = re.search(r"bound=([\d.]+)", repr(memory.rule))
    choices = Choices(
        objective="dot" if memory.attentional_bias == dot() else "l2",
        residual=getattr(memory.structure, "residual", False),
        activation=F.silu if getattr(memory.structure, "activation", "gelu") == "silu" else F.gelu,
        decay_to="start" if "decay_to_start" in words else "zero",
        delta="delta_gradient_descent" in words,
        normalized="normalize" in words,
        clip=float(bound[1]) if bound else 1.0 if "clip" in words else math.inf,
        dampened="dampen" in words,
        step_size="outside" if "scale" in words else "inside",
        chunk=1 if memory.exact else memory.chunk,
        read=memory.read,
    )
    heads = [
        naive_memory(
            choices,
            tuple(w[0, head] for w in data.weights),
            *(x[0, head] for x in (data.keys, data.values, data.queries, data.gates.step_size)),
            momentum=data.gates.momentum[0, head] if "momentum" in words else None,
            log_retention=data.gates.log_retention[0, head] if "retain" in words else None,
        )
        for head in range(data.keys.shape[1])
    ]

    def joined(part: str) -> tuple[Tensor, ...]:
        return tuple(torch.stack(of)[None] for of in zip(*(getattr(head, part) for head in heads), strict=True))

    reads = torch.stack([head.reads for head in heads])[None]
    return Found(reads, joined("weights"), joined("momentum") if "momentum" in words else ())


def gradients(run: Found, data: Data) -> dict[str, Tensor | None]:
    """Of a loss on every number that the run left."""
    generator = torch.Generator().manual_seed(1)
    outer = torch.zeros((), dtype=F64)
    for tensor in flatten(run).values():
        outer = outer + (tensor * torch.randn(tensor.shape, dtype=F64, generator=generator)).sum()
    of = leaves(data)
    return dict(
        zip(of, torch.autograd.grad(outer, list(of.values()), retain_graph=True, allow_unused=True), strict=True)
    )


def assert_same(found: Found, expected: Found, data: Data, rtol: float = 1e-10) -> None:
    assert flatten(found).keys() == flatten(expected).keys()
    for (name, mine), theirs in zip(flatten(found).items(), flatten(expected).values(), strict=True):
        assert_near(mine, theirs, name, rtol)
    for (name, mine), theirs in zip(gradients(found, data).items(), gradients(expected, data).values(), strict=True):
        if mine is None or theirs is None:  # what the rule does not use
            assert not any(gradient.any() for gradient in (mine, theirs) if gradient is not None), name
        else:
            assert_near(mine, theirs, f"gradient of {name}", rtol)


def assert_near(found: Tensor, expected: Tensor, name: str, rtol: float) -> None:
    """To `rtol` of the largest number."""
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("memory", EXACT + FROZEN, ids=named)
def test_a_memory_is_the_papers_equation(memory, length):
    data = make(memory, length)
    assert_same(fast(memory, data), slow(memory, data), data)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("memory", [EXACT[7], FROZEN[2], FROZEN[5], FROZEN[7]], ids=named)
def test_at_other_chunk_sizes(memory, chunk):
    memory = dataclasses.replace(memory, chunk=chunk)
    data = make(memory, 100)
    assert_same(fast(memory, data), slow(memory, data), data)


@pytest.mark.parametrize("memory", [EXACT[7], FROZEN[7]], ids=named)
def test_a_long_chunk_and_a_token_of_the_next(memory):
    memory = dataclasses.replace(memory, chunk=256)
    data = make(memory, 257)
    assert_same(fast(memory, data), slow(memory, data), data)


UNUSUAL = [
    dataclasses.replace(FROZEN[4], rule=rule)
    for rule in (dampen(), dampen(momentum()), retain(decay(), dampen(scale(dampen(outside)))))
]


@pytest.mark.parametrize("memory", EXACT + FROZEN + UNUSUAL, ids=named)
def test_recurrent_is_chunked_however_a_chunk_is_split(memory):
    data = make(memory, 24)
    found = fast(memory, data)
    assert_same(found, fast(dataclasses.replace(memory, way="recurrent"), data), data)
    assert_same(found, fast(memory, data, split=5), data)


@pytest.mark.parametrize("memory", EXACT[:1] + EXACT[4:], ids=named)
def test_gradients_at_the_token_do_not_know_the_chunk(memory):
    data = make(memory, 70)
    for chunk in (1, 64):
        assert_same(fast(dataclasses.replace(memory, chunk=chunk), data), fast(memory, data), data)


@pytest.mark.parametrize("memory", FROZEN, ids=named)
def test_gradients_at_the_chunk_are_a_chunk_of_ones_only(memory):
    """Chunk 1 is the recurrent run at every token's own weights, and no other chunk is."""
    data = make(memory, 24)
    single = fast(dataclasses.replace(memory, chunk=1), data)
    token = {"gradient_at": "token", "way": "recurrent", "read": "before" if memory.read == "boundary" else memory.read}
    assert_same(single, fast(dataclasses.replace(memory, **token), data), data)
    for mine, theirs in zip(flatten(fast(memory, data)).values(), flatten(single).values(), strict=True):
        assert (mine - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("memory", EXACT[3:] + FROZEN, ids=named)
def test_gates_of_exactly_zero_and_one(memory):
    assert_same_at_extreme_gates(memory, 40)


@pytest.mark.parametrize("chunk", [1, 64, 256])
@pytest.mark.parametrize("memory", [EXACT[7], FROZEN[2], FROZEN[7]], ids=named)
def test_gates_of_exactly_zero_and_one_at_other_chunk_sizes(memory, chunk):
    assert_same_at_extreme_gates(dataclasses.replace(memory, chunk=chunk), 40 if chunk == 1 else chunk + 6)


def assert_same_at_extreme_gates(memory: Memory, length: int) -> None:
    data = make(memory, length)
    with torch.no_grad():
        for part, gate in enumerate(data.gates):
            gate[..., 3 + part :: 7] = -torch.inf if part == 2 else 0.0
            gate[..., 5 + part :: 7] = 0.0 if part == 2 else 1.0
            gate[..., 20:23] = -torch.inf if part == 2 else 0.0
    if not memory.exact:
        data.gates.step_size.data.mul_(0.05)
    found, expected = fast(memory, data), slow(memory, data)
    for (name, mine), theirs in zip(flatten(found).items(), flatten(expected).values(), strict=True):
        assert_near(mine, theirs, name, 1e-10)
    for (name, mine), theirs in zip(gradients(found, data).items(), gradients(expected, data).values(), strict=True):
        if mine is not None and theirs is not None:
            by_log = data.gates.momentum if name == "gates.momentum" else 1.0  # chunked, its gradient at 0 is 0
            assert_near(mine * by_log, theirs * by_log, f"gradient of {name}", 1e-10)


@pytest.mark.parametrize("memory", [EXACT[4], EXACT[7], FROZEN[5], FROZEN[7]], ids=named)
def test_in_float32(memory):
    data = make(memory, 100)
    with torch.no_grad():  # products of many small gates must cost no precision after them
        data.gates.log_retention[..., 18:28] = -60.0
        data.gates.momentum[..., 19:29] = 1e-25
    half = map_tensors(lambda x: x.detach().float().requires_grad_(), data)
    expected, found = slow(memory, data), fast(memory, half)
    assert all(tensor.dtype == torch.float32 for tensor in flatten(found).values())
    for (name, mine), theirs in zip(flatten(found).items(), flatten(expected).values(), strict=True):
        assert_near(mine.double(), theirs, name, 2e-5)
    for (name, mine), theirs in zip(gradients(found, half).items(), gradients(expected, data).values(), strict=True):
        by_log = data.gates.momentum if name == "gates.momentum" else 1.0
        assert_near(mine.double() * by_log, theirs * by_log, f"gradient of {name}", 2e-5)


def test_any_rule_runs_recurrently_and_a_clock_ticks_once_a_chunk():
    memory = Memory(matrix(), l2(), every(16, retain(decay_to_start())), 16, "chunk", "after", "recurrent")
    data = make(memory, 33)
    found = fast(memory, data)
    weight = data.weights[0]
    for opened in (0, 16):
        at = slice(opened, opened + 16)
        k, v, q = (x[..., at, :] for x in (data.keys, data.values, data.queries))
        torch.testing.assert_close(found.reads[..., at, :][..., :15, :], (q @ weight.mT)[..., :15, :])
        last = Gates(*(gate[..., opened + 15, None, None] for gate in data.gates))
        kept = data.weights[0] + last.log_retention.exp() * (weight - data.weights[0])
        weight = kept - last.step_size / 16 * (k @ weight.mT - v).mT @ k
        torch.testing.assert_close(found.reads[..., opened + 15, :], (q[..., -1:, :] @ weight.mT)[..., 0, :])
    torch.testing.assert_close(found.weights[0], weight)


@pytest.mark.parametrize(
    "expression",
    [
        sequence_memory(chunk=16),
        sequence_memory(matrix(), l2(), retain(decay(), delta_gradient_descent()), 16, "token"),
    ],
    ids=str,
)
def test_the_layer_is_the_oracle_between_its_projections(expression):
    layer = expression.build(8, HEADS, torch.Generator().manual_seed(0)).to(F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(1, 40, 8, dtype=F64, generator=torch.Generator().manual_seed(2))
    qkv = F.pad(layer.qkv(x), (0, 0, 3, 0))
    mixed = F.silu(sum(qkv[:, shift : shift + 40] * layer.convolution.weight[:, shift] for shift in range(4)))
    q, k, v = mixed.view(1, 40, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    step_size, *kept, raw_retention = layer.gates(x).view(1, 40, -1, HEADS).permute(2, 0, 3, 1)
    momenta = kept[0].sigmoid() if kept else torch.zeros_like(step_size)  # of a rule without one none is learned
    gates = Gates(layer.step_bound * step_size.sigmoid(), momenta, raw_retention.sigmoid().log())
    starts = tuple(start[None] for start in layer.start)
    k, q = k / k.norm(dim=-1, keepdim=True), q / q.norm(dim=-1, keepdim=True)
    reads = slow(expression, Data(starts, k, v, q, gates)).reads
    normed = reads / (reads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    joined = normed.transpose(1, 2).flatten(2) * layer.output.norm
    expected = layer.output.project(joined * F.silu(layer.output.gate(x)))
    found, _ = layer(x)
    assert_near(found, expected, "output", 1e-10)
    parameters = list(layer.parameters())
    weight = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    mine = torch.autograd.grad((found * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for (name, _), a, b in zip(layer.named_parameters(), mine, theirs, strict=True):
        assert_near(a, b, f"gradient of {name}", 1e-10)
        assert a.any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1 token, got 0"),
        ({"gradient_at": "step"}, r"gradient_at must be one of \('token', 'chunk'\), got 'step'"),
        ({"read": "never"}, "read must be one of .*got 'never'"),
        ({"way": "fast"}, "way must be one of .*got 'fast'"),
        ({"gradient_at": "token"}, r"chunked form for one linear map, not for mlp\(\)"),
        ({"structure": matrix(), "gradient_at": "token", "read": "boundary"}, "read='boundary' needs"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Memory(**changes)


def test_clipped_errors_at_every_token_have_no_chunked_form():
    memory = Memory(matrix(), l2(), clip(), 16, "token")
    data = make(memory, 20)
    with pytest.raises(ValueError, match=r"clip\(\) has no chunked form with gradient_at='token'"):
        fast(memory, data)
    memory = dataclasses.replace(memory, way="recurrent")
    assert_same(fast(memory, data), slow(memory, data), data)


@pytest.mark.parametrize("rule", [every(4), momentum(momentum())], ids=str)
def test_a_rule_without_a_chunked_form_says_so(rule):
    memory = Memory(matrix(), l2(), rule, 16)
    with pytest.raises(ValueError, match=re.escape(str(rule)) + ".*no chunked form; use way='recurrent'"):
        fast(memory, make(memory, 4))
