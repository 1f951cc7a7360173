"""Models that are points of the design space: Moneta, Yaad, Memora and LaCT's memory, against their recurrences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from miras import LENGTHS, Data, assert_is_oracle, fast, make
from nestling.checks import check
from nestling.levels import level
from nestling.memory import (
    biased,
    dot,
    every,
    features,
    gated_mlp,
    gradient_descent,
    kl,
    l2,
    lq,
    matrix,
    mlp,
    momentum,
    normed,
    plain,
    residual_l2,
    retain,
    row_norm,
    sigmoid,
)
from nestling.memory.naive_miras import Run, naive_memora, naive_moneta, naive_yaad, plain_step
from nestling.memory.structure import side_by_side, together
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data
from nestling.sequence import Memory, memora, moneta, self_modifying, yaad
from nestling.sequence.scan import Writes


@pytest.mark.parametrize(("way", "length"), [("chunked", n) for n in LENGTHS] + [("recurrent", n) for n in (7, 19)])
@pytest.mark.parametrize("model", ["moneta", "yaad", "memora"])
def test_the_models_of_miras(model, way, length):
    chunk = 16 if way == "chunked" or length > 7 else 1
    expression = {"moneta": moneta(chunk=chunk), "yaad": yaad(2.0, chunk), "memora": memora(1.5, chunk)}[model]
    read = expression.read if chunk > 1 else "after"
    memory = Memory(expression.structure, expression.attentional_bias, expression.rule, chunk, "chunk", read, way)
    data = make(memory, length, step_size=0.003)  # LN magnifies: larger steps leave fewer digits
    oracle = {
        "moneta": lambda starts, flow: naive_moneta(starts, flow, p=3.0, q=4.0, sharpness=10.0, chunk=chunk, read=read),
        "yaad": lambda starts, flow: naive_yaad(starts, flow, bound=2.0, sharpness=10.0, chunk=chunk, read=read),
        "memora": lambda starts, flow: naive_memora(starts, flow, scale=1.5, chunk=chunk, read=read),
    }[model]
    assert_is_oracle(memory, data, oracle)


@pytest.mark.parametrize("build", [moneta, yaad, memora])
def test_the_models_as_layers(build):
    layer = build(chunk=8).build(16, 2, torch.Generator().manual_seed(0))
    x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(1))
    y, _ = layer(x)
    first, state = layer(x[:, :5])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 5:], state)[0]], 1), y, rtol=2e-5, atol=2e-5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert all(start.grad.any() for start in layer.start)
    shifted = x.clone()
    shifted[:, 12:] += 1.0
    torch.testing.assert_close(layer(shifted)[0][:, :12], y[:, :12], rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [moneta, yaad, memora])
def test_the_models_pass_the_kit(build):
    """All but the coverage of gradients: the layer makes a momentum gate, and these rules have no momentum."""
    names = ["causality", "rows_independent", "split_invariance", "surprise_falls"]
    config = ModelConfig(vocabulary=7, dim=8, heads=2, blocks=1, mixer=build(chunk=4), levels=(level(8),))
    report = check(Decoder(config), only=names)
    assert report.passed, str(report)
    assert not any(finding.skipped for finding in report)
    assert from_data(ModelConfig, to_data(config)) == config


@pytest.mark.parametrize("structure", [gated_mlp(residual=True), biased(mlp()), features(matrix())], ids=str)
def test_memories_that_modify_themselves(structure):
    expression = self_modifying(structure, rule=retain(kl(), momentum()), read="boundary", chunk=4, projection_chunk=4)
    layer = expression.build(8, 2, torch.Generator().manual_seed(0)).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, _ = layer(x)
    first, state = layer(x[:, :6])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 6:], state)[0]], 1), y, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in layer.starts.parameters())
    with pytest.raises(ValueError, match=r"can be made to end in a gate, not normed\(\)"):
        self_modifying(normed()).build(8, 2)


def test_lact_writes_a_chunk_and_makes_its_rows_as_long_as_before():
    """Old weights answer the chunk's queries, then one step on the chunk's sum, rows renormalised (LaCT)."""
    chunk, rule = 4, every(4, retain(row_norm(), momentum()))
    memory = Memory(gated_mlp(), dot(), rule, chunk, "chunk", "boundary", "recurrent")
    data: Data = make(memory, 12, step_size=0.2)
    with torch.no_grad():
        data.gates.step_size.fill_(0.4)
        data.gates.log_retention.zero_()
    data.gates = data.gates._replace(momentum=0.6)
    y, state = fast(memory, data)
    weights = [w.detach().requires_grad_() for w in data.starts]
    buffers, reads = [torch.zeros_like(w) for w in weights], []
    for opens in range(0, 12, chunk):
        k, v, q = (x[..., opens : opens + chunk, :] for x in (data.keys, data.values, data.queries))
        reads.append(memory.structure.forward(plain(tuple(weights)), q)[0])
        gate = k @ weights[0].mT
        answer = (gate * gate.sigmoid() * (k @ weights[1].mT)) @ weights[2].mT
        gradient = torch.autograd.grad(-(answer * v).sum(), weights)
        buffers = [0.6 * s - 0.4 / chunk * g for s, g in zip(buffers, gradient, strict=True)]
        moved = [w + s for w, s in zip(weights, buffers, strict=True)]
        weights = [
            (F.normalize(w, dim=-1) * first.norm(dim=-1, keepdim=True)).detach().requires_grad_()
            for w, first in zip(moved, data.starts, strict=True)
        ]
    torch.testing.assert_close(y, torch.cat(reads, -2), rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(state.running, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
@pytest.mark.parametrize("length", LENGTHS)
def test_lact_with_a_step_size_for_every_token(length, way):
    """W <- rows(a W - sum of eta_t grad_t) once a chunk, the gradients at the old weights, which answer the queries."""
    rule = retain(row_norm(each="chunk"), gradient_descent())
    memory = Memory(gated_mlp(), dot(), rule, 16, "chunk", "boundary", way)
    data = make(memory, length, step_size=0.1)

    def oracle(starts, flow):
        weights, reads = starts, []
        for t in range(length):
            if t % 16 == 0:
                opened = weights = tuple(rows(w, start) for w, start in zip(weights, starts, strict=True))
            gate, up = opened[0] @ flow.keys[t], opened[1] @ flow.keys[t]
            back = -opened[2].mT @ flow.values[t]
            slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
            gradient = (
                torch.outer(back * up * slope, flow.keys[t]),
                torch.outer(back * gate * gate.sigmoid(), flow.keys[t]),
                torch.outer(-flow.values[t], gate * gate.sigmoid() * up),
            )
            steps = zip(weights, gradient, strict=True)
            weights = tuple(plain_step(w, g, flow.step_size[t], flow.retention[t]) for w, g in steps)
            gate = opened[0] @ flow.queries[t]
            reads.append(opened[2] @ (gate * gate.sigmoid() * (opened[1] @ flow.queries[t])))
        return Run(torch.stack(reads), weights)

    assert_is_oracle(memory, data, oracle)


def rows(weight: Tensor, like: Tensor) -> Tensor:
    return torch.stack([row * first.norm() / row.norm() for row, first in zip(weight, like, strict=True)])


ALONE = [
    (matrix(), kl()),
    (mlp(residual=False), lq()),
    (mlp(), row_norm(each="chunk")),
    (gated_mlp(), kl(2.0)),
    (normed(), lq()),
    (biased(mlp(residual=False)), sigmoid()),
    (features(), row_norm(each="chunk")),
]


@pytest.mark.parametrize("way", ["chunked", "recurrent"])
@pytest.mark.parametrize(("structure", "retention"), ALONE, ids=str)
def test_memories_that_run_together_are_as_each_alone(structure, retention, way):
    """Written with their own answers, as self-modifying memories are, and the residual target where it is legal."""
    rule = retain(retention, momentum())
    bias = l2() if structure.residual else residual_l2()
    alone = Memory(structure, bias, rule, 4, "chunk", "boundary", way)
    members = Memory(together(structure), bias, rule, 4, "chunk", "boundary", way)
    data = [make(alone, 10, step_size=0.05, seed=seed) for seed in (0, 1, 2)]
    first = data[0]
    state = members.begin(side_by_side([one.starts for one in data]))
    states = [alone.begin(one.starts) for one in data]
    for opens in range(0, 10, 4):
        at = slice(opens, opens + 4)
        gates = first.gates.at(at)._replace(momentum=0.5 * torch.ones_like(first.gates.step_size[..., at]))
        writes = Writes(first.keys[..., at, :], first.values[..., at, :], gates, own_targets=True)
        state = members.open(state, True)
        y = members.at_anchor(state, first.queries[..., at, :])
        _, state = members.run(state, writes)
        for index in range(3):
            expected, states[index] = alone.run(alone.open(states[index], True), writes, first.queries[..., at, :])
            torch.testing.assert_close(y[:, :, index], expected, rtol=1e-10, atol=1e-10)
    for index, one in enumerate(states):
        for mine, theirs in zip(state.running, one.running, strict=True):
            torch.testing.assert_close(mine[:, :, index], theirs, rtol=1e-10, atol=1e-10)
