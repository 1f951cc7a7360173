"""Dreaming: which dreams are tried, what a trial may touch, and what is learned of them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import Growing, Reader, level
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import Place, draws
from nestling.sleep.dreaming import DreamConfig, Task, dream_of, importance, learn, mean_nats, with_random_experts
from nestling.sleep.grow import activate, bank, levels_of

F64 = torch.float64
TEXT = torch.tensor(list(b"to be or not to be, that is the question: " * 8))
CONFIG = DreamConfig(rounds=2, dreams=5, length=12, best=2, others=1, trial_steps=2, steps=3)
TASK = Task(TEXT[:6], TEXT[20:80].view(4, 15), TEXT[90:150].view(4, 15))


@pytest.fixture(scope="module")
def model() -> Growing:
    levels = (level(16, step_size=2.0), level(48, step_size=2.0))
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=24), levels=levels)
    return Growing(Decoder(config).double().requires_grad_(False), 3, 4)


@pytest.fixture(scope="module")
def levels(model):
    reader = Reader(model)
    return reader.read(reader.begin(), TEXT[:200])[0].levels


def test_what_helped_is_learned_in_one_new_slot(model, levels) -> None:
    after, report = dream_of(model, levels, TASK, CONFIG, "night")
    assert report.outcome == "kept", str(report)
    assert report.after < report.before
    assert report.before == mean_nats(model, levels.weights, TASK.tuning)
    assert report.after == mean_nats(model, after.weights, TASK.tuning)
    hosts = [len(model.own) + host for host in levels_of(model, 48)]
    for name, tensor in flatten(levels).items():
        room, index, *rest = name.split(".")
        new = flatten(after)[name]
        if room == "weights" and int(index) in hosts:
            assert torch.equal(tensor[1:], new[1:])
            assert not torch.equal(tensor[0], new[0]) or rest == ["2"]
        else:
            assert torch.equal(tensor, new)
    again, _ = dream_of(model, levels, TASK, CONFIG, "night")
    assert all(torch.equal(a, b) for a, b in zip(flatten(after).values(), flatten(again).values(), strict=True))


def test_a_round_is_dream_try_and_keep(model, levels) -> None:
    _, report = dream_of(model, levels, TASK, replace(CONFIG, rounds=1), "night")
    (dreamt,) = report.rounds
    assert len(dreamt.importance) == 5
    assert len(set(dreamt.tried)) == len(dreamt.rewards) == 3
    order = sorted(range(5), key=lambda i: -dreamt.importance[i])
    assert dreamt.tried[:2] == order[:2]
    assert set(dreamt.rewards) <= {0, 1}


def test_importance_is_the_alignment_of_gradients(model, levels) -> None:
    hosts = levels_of(model, 48)
    weights = activate(model, levels.weights, hosts, 0, draws("slot"))
    place, texts = Place(hosts, 0), TEXT[:45].view(3, 15)

    def gradient(rows: torch.Tensor, first: int) -> torch.Tensor:
        leaves = [bank(model, weights, host).up[0].clone().requires_grad_() for host in hosts]
        banks = {len(model.own) + h: bank(model, weights, h) for h in hosts}
        whole = list(weights)
        for leaf, (index, found) in zip(leaves, banks.items(), strict=True):
            whole[index] = (found.down, torch.cat([leaf[None], found.up[1:]]), found.gate, found.active)
        logits, _ = model(rows, weights=tuple(whole))
        loss = F.cross_entropy(logits[:, first - 1 : -1].flatten(0, 1), rows[:, first:].flatten())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    wanted = gradient(TASK.reference, 1)
    found = importance(model, weights, place, texts, 6, TASK.reference)
    for text, got in zip(texts, found, strict=True):
        mine = gradient(text[None], 6)
        assert float(got) == pytest.approx(float(mine @ wanted / mine.norm() / wanted.norm()))
    sizes = importance(model, weights, place, texts, 6, TASK.reference[:0])
    assert float(sizes[0]) == pytest.approx(float(gradient(texts[:1], 6).norm()))


def test_a_random_expert_is_wide_open(model, levels) -> None:
    hosts = levels_of(model, 48)
    weights = activate(model, levels.weights, hosts, 1, draws("slot"))
    for host in hosts:
        bank(model, weights, host).up[1] += torch.randn(16, 4, generator=draws(host), dtype=F64)
    opened = with_random_experts(model, weights, draws("open"))
    for i in range(len(model.own)):
        before, after = bank(model, weights, i), bank(model, opened, i)
        assert torch.equal(before.up, after.up)
        if i in hosts:
            assert torch.sigmoid(after.gate[1, -1]) > 1 - 1e-12
            assert not after.gate[1, :-1].any()
            assert torch.equal(before.gate[[0, 2]], after.gate[[0, 2]])
        else:
            assert torch.equal(before.gate, after.gate)
    assert not torch.equal(model(TEXT[None, :9], weights=opened)[0], model(TEXT[None, :9], weights=weights)[0])


def test_learning_moves_only_its_slot_on_a_copy(model, levels) -> None:
    hosts = levels_of(model, 48)
    weights = activate(model, levels.weights, hosts, 0, draws("slot"))
    copy = {name: tensor.clone() for name, tensor in flatten(weights).items()}
    learned = learn(model, weights, Place(hosts, 0), TEXT[None, :30], 3, 5, 1e-2)
    assert all(torch.equal(copy[name], tensor) for name, tensor in flatten(weights).items())
    assert mean_nats(model, learned, TEXT[None, :30]) < mean_nats(model, weights, TEXT[None, :30])
    assert learn(model, weights, Place(hosts, 0), TEXT[None, :30], 3, 3, float("inf")) is weights


def test_where_nothing_helps_nothing_changes(model, levels) -> None:
    foreign = torch.randint(128, 256, (4, 15), generator=torch.Generator().manual_seed(0))
    still = replace(CONFIG, learning_rate=1e-30)
    after, report = dream_of(model, levels, TASK._replace(tuning=foreign), still, "night")
    assert report.outcome in ("no dream helped", "no gain")
    assert after is levels
    full = levels
    for slot in range(3):
        hosts = levels_of(model, 48)
        full = full._replace(weights=activate(model, full.weights, hosts, slot, draws(slot)))
    assert dream_of(model, full, TASK, CONFIG, "night")[1].outcome == "full: nothing was dreamt"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"best": 6}, r"best \+ others must be in \[1, dreams = 5\]"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_bounds(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)


@pytest.mark.parametrize("told", [{"random_expert": False}, {"select_by_gradient": False}], ids=repr)
def test_ablations_run(model, levels, told) -> None:
    _, report = dream_of(model, levels, TASK, replace(CONFIG, rounds=1, **told), "night")
    assert len(report.rounds[0].tried) == 3
