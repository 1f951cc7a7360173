"""Retention gates that expose or settle: their equations, their laws, and memories that are kept by them."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from miras import F64, LENGTHS, assert_is_oracle, fast, gradients, make
from nestling.levels import level
from nestling.memory import (
    Gates,
    Retention,
    Summed,
    clip,
    decay,
    dot,
    elastic_net,
    elastic_net_ftrl,
    every,
    gradient_descent,
    kl,
    l2,
    lq,
    matrix,
    mlp,
    momentum,
    parse,
    retain,
    row_norm,
    sigmoid,
)
from nestling.memory.naive_miras import naive_miras, plain_step
from nestling.models.data import from_data, to_data
from nestling.optim import to_optimizer
from nestling.sequence import Memory, sequence_memory

EXPOSING = [lq(), lq(5.0), lq(1.5), lq(3.0), kl(), kl(2.5), sigmoid(), elastic_net_ftrl(0.3)]
SETTLING = [elastic_net(0.3), elastic_net(0.1, 0.5), row_norm()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def soft(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """Number by number: toward zero by the threshold, and not past it."""
    return torch.where(
        weight > threshold, weight - threshold, torch.where(weight < -threshold, weight + threshold, 0.0)
    )


def exposed(retention, accumulated: Tensor) -> Tensor:
    """W of one map's A [out, in], from the paper's equation."""
    match retention:
        case lq(q):
            return accumulated / accumulated.abs().pow(q).sum().pow((q - 2) / q)
        case kl(scale):
            return torch.stack([scale * row.exp() / row.exp().sum() for row in accumulated])
        case sigmoid():
            return 1 / (1 + (-accumulated).exp())
    return soft(accumulated, retention.threshold)


def concealed(retention, start: Tensor) -> Tensor:
    match retention:
        case lq(q):
            return start if q == 3 else start * start.abs().pow(q).sum().pow((q - 2) / (3 - q) / q)
        case elastic_net_ftrl():
            return torch.where(start > 0, start + retention.threshold, start - retention.threshold)
    return start


def function(weights, key):
    return weights[1] @ F.gelu(weights[0] @ key) if len(weights) == 2 else weights[0] @ key


def slope(read, value, key):
    return read - value


@pytest.mark.parametrize("retention", EXPOSING + SETTLING, ids=str)
def test_prints_and_parses(retention):
    assert parse(repr(retain(retention, momentum()))) == retain(retention, momentum())


@pytest.mark.parametrize("retention", EXPOSING, ids=str)
class TestExposing:
    def test_in_a_memory_it_is_the_oracle(self, retention):
        """At every token, read after and before; and in chunks, read at their boundaries, both ways."""
        whole = dict(expose=lambda a: exposed(retention, a))
        for read, gradient_at, way, chunk, length in [
            ("after", "token", "recurrent", 1, 7),
            ("before", "chunk", "recurrent", 5, 13),
            *(("boundary", "chunk", way, 16, n) for way, n in [("chunked", n) for n in LENGTHS] + [("recurrent", 20)]),
        ]:
            structure = matrix() if gradient_at == "token" else mlp(residual=False)
            rule = retain(retention, gradient_descent())
            memory = Memory(structure, l2(), rule, max(chunk, 2), gradient_at, read, way)
            if gradient_at == "chunk":
                memory = Memory(structure, l2(), rule, chunk, gradient_at, read, way)
            data = make(memory, length, step_size=0.05)

            def oracle(starts, flow, chunk=chunk, read=read):
                standing = tuple(concealed(retention, start) for start in starts)
                run = naive_miras(function, slope, standing, flow, chunk=chunk, read=read, **whole)
                return run._replace(standing=tuple(exposed(retention, a) for a in run.standing))

            assert_is_oracle(memory, data, oracle)

    @pytest.mark.parametrize("read", ["after", "before"])
    def test_a_chunk_at_once_can_be_read_at_its_boundary_only(self, retention, read):
        rule = retain(retention, gradient_descent())
        with pytest.raises(
            ValueError, match=re.escape(str(retention)) + f".*read='{read}'.*read='boundary'.*recurrent"
        ):
            Memory(mlp(), l2(), rule, 16, "chunk", read)
        with pytest.raises(ValueError, match=f"read='{read}'"):
            Memory(matrix(), l2(), rule, 16, "token", read)
        assert Memory(mlp(), l2(), rule, 16, "chunk", read, "recurrent").rule.exposes

    def test_with_momentum_and_however_a_chunk_is_split(self, retention):
        rule = retain(retention, momentum(clip(bound=2.0)))
        chunked = Memory(mlp(residual=False), l2(), rule, 8, "chunk", "boundary")
        recurrent = Memory(mlp(residual=False), l2(), rule, 8, "chunk", "boundary", "recurrent")
        data = make(chunked, 21, step_size=0.05)
        data.gates = data.gates._replace(momentum=0.5 + 0.5 * torch.rand_like(data.gates.step_size))
        expected, state = fast(recurrent, data)
        for split in (None, 3):
            found, after = fast(chunked, data, split)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            for mine, theirs in zip(after.running, state.running, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    def test_the_start_is_exposed_where_it_can_be(self, retention):
        start = normal(2, 3, 4)
        rule = every(4, retain(retention))
        accumulated = rule.conceal(start)
        found = rule.expose(accumulated, rule.init(accumulated))
        for one, a in zip(found, accumulated, strict=True):
            torch.testing.assert_close(one, exposed(retention, a))
        if isinstance(retention, kl | sigmoid):
            assert torch.equal(accumulated, start), "logits"
        elif retention == lq(3.0):
            torch.testing.assert_close(found.abs().pow(3).sum((-1, -2)), torch.ones(2, dtype=F64))
        else:
            torch.testing.assert_close(found, start)

    def test_gates_at_their_extremes(self, retention):
        memory = Memory(mlp(residual=False), l2(), retain(retention, gradient_descent()), 4, "chunk", "boundary")
        data = make(memory, 20, step_size=0.05)
        with torch.no_grad():
            data.gates.log_retention[..., 5:9] = -math.inf
            data.gates.log_retention[..., 10:13] = 0.0
            data.gates.step_size[..., 7:15] = 0.0
            data.gates.step_size[..., 16] = 5.0
        y, state = fast(memory, data)
        assert y.isfinite().all()
        assert all(w.isfinite().all() for w in memory.exposed(state.running, state))
        assert all(gradient.isfinite().all() for gradient in gradients([y, *state.running], data.leaves))

    def test_where_the_weight_itself_is_stepped_it_is_refused(self, retention):
        rule = retain(retention, gradient_descent())
        with pytest.raises(ValueError, match=re.escape(str(rule)) + ".*steps an accumulator"):
            to_optimizer(rule, nn.Linear(2, 2).parameters())
        with pytest.raises(ValueError, match="steps an accumulator"):
            level(4, rule=rule)


def settled(retention, start: Tensor):
    """The step of one map that stood at `start` in the beginning, from the paper's equation."""

    def step(standing: Tensor, gradient: Tensor, step_size: Tensor, kept: Tensor) -> Tensor:
        if isinstance(retention, elastic_net):
            # Miras 22 with alpha, beta = 1 / lasso, 1 / ridge: zeta, lambda, gamma
            shrink = 1 / (1 + step_size * retention.ridge)
            zeta, gamma = step_size * shrink, step_size * retention.lasso * shrink
            return soft(shrink * kept * standing - zeta * gradient, gamma)
        return rows(plain_step(standing, gradient, step_size, kept), start)

    return step


@pytest.mark.parametrize("retention", SETTLING, ids=str)
class TestSettling:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_in_a_memory_it_is_the_oracle(self, retention, length):
        memory = Memory(matrix(), l2(), retain(retention, gradient_descent()), 16, "token", "after", "recurrent")
        data = make(memory, length, value=3, step_size=0.3)
        assert_is_oracle(
            memory,
            data,
            lambda starts, flow: naive_miras(function, slope, starts, flow, step=settled(retention, starts[0])),
        )

    def test_there_is_no_chunked_form(self, retention):
        memory = Memory(mlp(), l2(), retain(retention, gradient_descent()), 16, "chunk", "boundary")
        with pytest.raises(ValueError, match=re.escape(str(retention)) + ".*no chunked form; use way='recurrent'"):
            fast(memory, make(memory, 5))

    def test_gates_at_their_extremes(self, retention):
        rule = retain(retention, gradient_descent())
        memory = Memory(mlp(residual=False), l2(), rule, 4, "chunk", "after", "recurrent")
        data = make(memory, 12, step_size=0.05)
        with torch.no_grad():
            data.gates.log_retention[..., 3:6] = -math.inf
            data.gates.step_size[..., 5:8] = 0.0
            data.gates.step_size[..., 9] = 100.0
        y, state = fast(memory, data)
        found = gradients([y, *state.running], data.leaves)
        assert all(tensor.isfinite().all() for tensor in (y, *state.running, *found))


def test_the_elastic_net_is_the_minimiser():
    """Of <W, g> + |W - W_0|^2 / (2 eta) + ridge |W|^2 / 2 + lasso |W|_1, by a search over a fine grid."""
    weight, gradient, eta, rule = normal(3, 4), normal(3, 4, seed=1), 0.4, retain(elastic_net(0.5, 0.7))
    one = Summed(gradient)
    found, _ = rule.step(weight, one, rule.init(weight), Gates(eta))
    grid = torch.linspace(-4, 4, 80001, dtype=F64)[:, None, None]
    cost = grid * gradient + (grid - weight) ** 2 / (2 * eta) + 0.7 * grid**2 / 2 + 0.5 * grid.abs()
    best = grid.expand_as(cost).gather(0, cost.argmin(0, keepdim=True))[0]
    torch.testing.assert_close(found, best, rtol=0, atol=1.01e-4)
    assert 0 < int((found == 0).sum()) < 12


def test_kl_is_the_minimiser():
    """Of <W, g> + KL(W, W_0) / eta on the simplex: no other point of it costs less."""
    logits, gradient, eta = normal(2, 4), normal(2, 4, seed=1), 0.7
    rule = retain(kl())
    one = Summed(gradient)
    state = rule.init(logits)
    before = rule.expose(logits, state)
    after = rule.expose(rule.step(logits, one, state, Gates(eta))[0], state)

    def cost(w):
        return ((w * gradient) + w * (w / before).log() / eta).sum((-2, -1))

    others = (after.log() + 0.3 * normal(500, 2, 4, seed=2)).softmax(-1)
    assert (cost(others) > cost(after)).all()
    assert cost(before) > cost(after)


tensors = st.builds(lambda seed, size: size * normal(2, 3, 4, seed=seed), st.integers(0, 10**6), st.floats(0.01, 5.0))


@given(tensors, st.floats(0.1, 10.0))
def test_laws_of_the_simplex(weight, scale):
    found = kl(scale).expose(weight, None)
    assert (found > 0).all()
    torch.testing.assert_close(found.sum(-1), torch.full((2, 3), scale, dtype=F64))
    torch.testing.assert_close(kl(scale).expose(weight + normal(2, 3, 1), None), found)
    inside = sigmoid().expose(weight, None)
    assert ((inside > 0) & (inside < 1)).all()


@given(tensors, st.floats(1.1, 6.0).filter(lambda q: abs(q - 3) > 0.2))
def test_laws_of_lq(weight, q):
    assert torch.equal(lq(2.0).expose(weight, None), weight)
    assert not lq(2.0).exposes
    norm = lambda w: w.abs().pow(q).sum((-2, -1)).pow(1 / q)  # noqa: E731
    found = lq(q, floor=1e-9).expose(weight, None)
    torch.testing.assert_close(norm(found), norm(weight).pow(3 - q))
    torch.testing.assert_close(lq(q, floor=1e-9).expose(10 * weight, None), found * 10 ** (3 - q))
    if q > 2:
        tiny = lq(q).expose(1e-12 * weight, None)
        assert (norm(tiny) <= lq(q).floor ** (3 - q) * (1 + 1e-9)).all() or q < 3


@given(tensors, tensors, st.floats(0.01, 2.0))
def test_laws_of_settling(weight, gradient, eta):
    one = Summed(gradient)
    rule = retain(row_norm())
    state = rule.init(weight)
    found, _ = rule.step(weight, one, state, Gates(eta, 0.0, -0.3))
    torch.testing.assert_close(found.norm(dim=-1), weight.norm(dim=-1))
    plainly, _ = retain(decay()).step(weight, one, retain(decay()).init(weight), Gates(eta, 0.0, -0.3))
    torch.testing.assert_close(F.normalize(found, dim=-1), F.normalize(plainly, dim=-1))
    none, _ = retain(elastic_net(0.0, 0.0)).step(weight, one, state, Gates(eta, 0.0, -0.3))
    torch.testing.assert_close(none, plainly)
    shrunk, _ = retain(elastic_net(0.5)).step(weight, one, state, Gates(eta, 0.0, -0.3))
    assert (shrunk.abs() <= plainly.abs()).all()
    assert torch.equal(shrunk == 0, plainly.abs() <= 0.5 * eta)


def rows(weight: Tensor, like: Tensor) -> Tensor:
    return torch.stack([row * first.norm() / row.norm() for row, first in zip(weight, like, strict=True)])


def test_what_is_done_where_a_chunk_opens_needs_chunks():
    rule = retain(row_norm(each="chunk"))
    with pytest.raises(ValueError, match="has no chunks"):
        Memory(matrix(), dot(), rule, 16, "token")
    with pytest.raises(ValueError, match=r"every\(4, .*no chunks to open"):
        every(4, rule)
    with pytest.raises(ValueError, match="an optimizer has no chunks"):
        to_optimizer(rule, nn.Linear(2, 2).parameters())


def test_row_norm_is_an_optimizers_too():
    net = nn.Linear(4, 3, bias=False, dtype=F64)
    before = net.weight.detach().clone()
    optimizer = to_optimizer(retain(row_norm()), net.parameters(), step_size=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        net(normal(5, 4, seed=seed)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(net.weight.norm(dim=-1), before.norm(dim=-1))
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("part", [*EXPOSING, *SETTLING, row_norm(each="chunk")], ids=str)
def test_round_trips_as_data(part):
    assert from_data(Retention, to_data(part)) == part


def test_a_layer_keeps_its_accumulator_between_calls():
    expression = sequence_memory(mlp(), l2(), retain(lq(), momentum()), 4, read="boundary")
    layer = expression.build(8, 2, torch.Generator().manual_seed(0))
    _, state = layer(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)))
    shown = expression.exposed(state.memory.running, state.memory)
    for mine, accumulated in zip(shown, state.memory.running, strict=True):
        for head in range(2):
            torch.testing.assert_close(mine[0, head], exposed(lq(), accumulated[0, head]))
    start = layer.init_state(1).memory
    for mine, parameter in zip(expression.exposed(start.running, start), layer.start, strict=True):
        torch.testing.assert_close(mine[0], parameter)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lq(1.0), "lq: q must be more than 1.0 and finite, got 1.0"),
        (lambda: lq(floor=0.0), "lq: floor must be more than 0.0 and finite, got 0.0"),
        (lambda: kl(0.0), "kl: scale must be more than 0 and finite, got 0.0"),
        (lambda: elastic_net(-1.0), "elastic_net: lasso must be at least 0 and finite, got -1.0"),
        (lambda: elastic_net(0.1, math.inf), "elastic_net: ridge must be at least 0 and finite, got inf"),
        (lambda: row_norm(each="token"), "row_norm: each must be 'write' or 'chunk', got 'token'"),
        (lambda: elastic_net_ftrl(-0.1), "elastic_net_ftrl: threshold must be at least 0 and finite, got -0.1"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
