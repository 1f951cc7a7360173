"""The gated delta rule as a rule: gradients at the decayed weights, and retention for every key channel."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.checks.options import variants
from nestling.memory import (
    Gates,
    Rule,
    decay,
    decay_to_start,
    delta_gradient_descent,
    dot,
    every,
    gradient_descent,
    l2,
    matrix,
    mlp,
    momentum,
    normalize,
    parse,
    retain,
    retain_first,
)
from nestling.memory.naive_linear import naive_gated_delta_rule, naive_longhorn
from nestling.optim import to_optimizer
from nestling.sequence import Memory
from nestling.sequence.scan import Writes

B, H, K, V = 2, 2, 4, 3
Inputs = dict[str, Tensor]
Run = Callable[..., tuple[Tensor, Tensor]]


def draw(t: int, by_channel: bool) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(B, H, *shape, dtype=torch.float64, generator=generator)

    gates = normal(t, K) if by_channel else normal(t)
    inputs = {"q": normal(t, K), "k": normal(t, K), "v": normal(t, V), "b": normal(t).sigmoid() / 3}
    return inputs | {"m": normal(t).sigmoid(), "log": -0.4 * gates.abs(), "s": normal(V, K)}


def by_memory(memory: Memory, valid: Tensor | None = None) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, b: Tensor, m: Tensor, log: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        state, reads, gates = memory.begin((s,)), [], Gates(b, m, log)
        for first in range(0, q.shape[2], memory.chunk):
            at = slice(first, first + memory.chunk)
            counts = None if valid is None else valid[:, at]
            pairs = Writes(k[:, :, at], v[:, :, at], gates.at(at), counts)
            y, state = memory.run(memory.open(state, True), pairs, q[:, :, at])
            reads.append(y)
        return torch.cat(reads, 2), state.running[0]

    return run


def by_head(naive: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        heads = [naive(*(x[row, h] for x in given)) for row in range(B) for h in range(H)]
        y, s = (torch.stack(parts).unflatten(0, (B, H)) for parts in zip(*heads, strict=True))
        return y, s

    return run


def compare(inputs: Inputs, run: Run, oracle: Run) -> None:
    """Reads, final state and all gradients."""
    found = []
    for function in (run, oracle):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        y, s = function(*leaves)
        grads = torch.autograd.grad((y.square().sum() + s.square().sum()), leaves, allow_unused=True)
        found.append([y, s, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("way", "chunk"), [("chunked", 1), ("chunked", 16), ("recurrent", 16)])
def test_the_gated_delta_rule(way: Any, chunk: int, by_channel: bool) -> None:
    memory = Memory(matrix(), l2(), retain_first(), chunk, "token", way=way)
    for t in (1, 7, 63):
        oracle = by_head(lambda q, k, v, b, m, log, s: naive_gated_delta_rule(q, k, v, b, log.exp(), s))
        compare(draw(t, by_channel), by_memory(memory), oracle)


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
def test_retain_takes_its_gradient_before_the_decay(way: Any) -> None:
    def naive(q, k, v, b, m, log, s):
        reads = []
        for t in range(len(q)):
            s = s @ torch.diag(log[t].exp()) - b[t] * torch.outer(s @ k[t] - v[t], k[t])
            reads.append(s @ q[t])
        return torch.stack(reads), s

    memory = Memory(matrix(), l2(), retain(decay(), gradient_descent()), 16, "token", way=way)
    compare(draw(21, True), by_memory(memory), by_head(naive))


DIRECTIONS = (
    gradient_descent(),
    delta_gradient_descent(),
    normalize(),
    delta_gradient_descent(momentum()),
    momentum(),
)
RULES = [keeper(decay(), of) for keeper, of in itertools.product((retain, retain_first), DIRECTIONS)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("bias", "read"), [(l2(), "after"), (dot(), "before")])
def test_chunked_is_recurrent(rule: Rule, bias: Any, read: Any) -> None:
    valid = torch.ones(B, 21, dtype=torch.bool)
    valid[0, 3:5], valid[1, 20:] = False, False
    for by_channel in (False, True):
        if by_channel and "momentum" in str(rule):
            continue
        ways = [Memory(matrix(), bias, rule, 8, "token", read, way) for way in ("chunked", "recurrent")]
        inputs = draw(21, by_channel)
        (y, s), (expected, end) = (by_memory(memory, valid)(*inputs.values()) for memory in ways)
        torch.testing.assert_close(y[valid[:, None].expand(B, H, 21)], expected[valid[:, None].expand(B, H, 21)])
        torch.testing.assert_close(s, end)


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
def test_frozen_gradients_stay_where_they_were_frozen(way: Any) -> None:
    """W <- a W (I - b' k k^T) - b' (W_c k - v) k^T with W_c the weights on which the chunk opened."""

    def naive(q, k, v, b, m, log, s):
        reads, opened = [], s
        for t in range(len(q)):
            opened = s if t % 8 == 0 else opened
            step, kept = b[t] / (1 + b[t] * k[t] @ k[t]), log[t].exp() * s
            s = kept - step * torch.outer(kept @ k[t], k[t]) - step * torch.outer(opened @ k[t] - v[t], k[t])
            reads.append(s @ q[t])
        return torch.stack(reads), s

    memory = Memory(matrix(), l2(), retain_first(decay(), delta_gradient_descent()), 8, way=way)
    compare(draw(21, False), by_memory(memory), by_head(naive))


def test_a_frozen_gradient_that_erases_nothing_is_the_same_before_and_after_a_decay() -> None:
    inputs, rules = draw(21, False).values(), [keeper(decay(), gradient_descent()) for keeper in (retain, retain_first)]
    runs = [by_memory(Memory(matrix(), l2(), rule, 8))(*inputs) for rule in rules]
    for mine, theirs in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)
    for at, judged in (("chunk", False), ("token", True)):
        others = variants(Memory(matrix(), l2(), rules[0], 8, at))  # type: ignore[arg-type]
        assert any(isinstance(other.value, retain_first) for other in others if other.path == "rule") is judged


def test_normalize_at_every_token_is_the_implicit_step() -> None:
    def naive(q, k, v, b, m, log, s):
        return naive_longhorn(q, k, v, b[:, None].expand(v.shape), s)

    compare(draw(21, False), by_memory(Memory(matrix(), l2(), normalize(), 8, "token")), by_head(naive))


def test_after_full_forgetting_the_next_token_is_as_the_first_ever() -> None:
    x = draw(1, False)
    first = x["b"][..., None] * x["v"][..., 0, :, None] * x["k"]
    x["log"] = torch.full_like(x["log"], -torch.inf)
    for rule, forgets in ((retain_first(), True), (retain(decay(), gradient_descent()), False)):
        for way in ("chunked", "recurrent"):
            memory = Memory(matrix(), l2(), rule, 8, "token", way=way)  # type: ignore[arg-type]
            _, s = by_memory(memory)(*x.values())
            assert torch.allclose(s, first, rtol=1e-10) is forgets


def test_decay_to_the_start_by_channel_is_recurrent() -> None:
    x = draw(1, True)
    memory = Memory(matrix(), l2(), retain(decay_to_start(), gradient_descent()), 8, "token", way="recurrent")
    _, s = by_memory(memory)(*x.values())
    error = torch.einsum("bhvk,bhk->bhv", x["s"], x["k"][:, :, 0]) - x["v"][:, :, 0]
    wanted = x["s"] - x["b"][..., None] * error[..., None] * x["k"]  # at the start there is nothing to forget
    torch.testing.assert_close(s, wanted)


def test_what_is_refused() -> None:
    scalar, channel = draw(3, False).values(), draw(3, True).values()
    with pytest.raises(ValueError, match="decay\\(\\) only"):
        by_memory(Memory(matrix(), l2(), retain_first(decay_to_start()), 8, "token"))(*scalar)
    with pytest.raises(ValueError, match="without momentum"):
        by_memory(Memory(matrix(), l2(), retain(decay(), momentum()), 8, "token"))(*channel)
    with pytest.raises(ValueError, match="retention by channel is for matrix"):
        by_memory(Memory(matrix(), l2(), retain_first(), 8, "chunk"))(*channel)
    with pytest.raises(ValueError, match="retention by channel is for matrix"):
        by_memory(Memory(mlp(), l2(), retain_first(), 8, "token", way="recurrent"))(*channel)
    with pytest.raises(ValueError, match="not taken at decayed weights"):
        every(4, retain_first())
    with pytest.raises(ValueError, match="gradient at decayed weights"):
        to_optimizer(retain_first(), [torch.nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="retain_first wraps a direction"):
        retain_first(decay(), retain())


def test_prints_as_the_line_that_builds_it() -> None:
    rule = retain_first(decay(), delta_gradient_descent())
    assert parse(str(rule)) == rule
    assert str(retain_first(decay_to_start())) == "retain_first(decay_to_start())"
