"""Slots beside levels: allocated and masked, read with a gate of their own, moved by nothing but sleep."""

import math

import pytest
import torch

from nestling.levels import Growing, Reader, heads, level, spectrum
from nestling.levels.slots import Slots, opening, read_slots
from nestling.memory.state import detach, flatten, unflatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention

TEXT = torch.randint(0, 256, (101,), generator=torch.Generator().manual_seed(5))
F64 = torch.float64
BLOCKS = {
    "chain": {"levels": (level(16), level(48))},
    "heads": {"levels": (level(16), level(48)), "wiring": heads()},
    "neurons": {"levels": (spectrum(16, 64),)},
}


def build(**told) -> Decoder:
    return Decoder(ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=24), **told)).double()


def filled(bank: Slots, seed: int = 0) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(part.shape, generator=generator, dtype=F64) for part in bank[:3]]
    return Slots(*drawn, torch.ones_like(bank.active))


def with_banks(growing: Growing, change) -> tuple:
    own, banks = growing.split(detach(growing.level_weights()))
    return (*own, *(tuple(change(i, bank)) for i, bank in enumerate(banks)))


def test_a_bank_is_the_sum_of_its_gated_experts() -> None:
    bank = filled(Slots.empty(3, 2, torch.zeros(1, dtype=F64), 5, 4))._replace(
        active=torch.tensor([1.0, 0.0, 1.0]).double()
    )
    h = torch.randn(7, 5, dtype=F64)
    expected = torch.zeros(7, 4, dtype=F64)
    for t in range(7):
        for e in (0, 2):
            gate = 1 / (1 + math.exp(-float(bank.gate[e, :5] @ h[t] + bank.gate[e, 5])))
            expected[t] += gate * (bank.up[e] @ (bank.down[e] @ h[t]))
            assert float(opening(bank, h)[t, e]) == pytest.approx(gate)
    torch.testing.assert_close(read_slots(bank, h), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("told", BLOCKS.values(), ids=BLOCKS)
def test_empty_and_fresh_slots_change_no_logit(told) -> None:
    model = build(**told)
    growing = Growing(model, slots=3, rank=4)
    plain, _ = model(TEXT[None])
    for weights in (
        None,
        growing.level_weights(),
        with_banks(growing, lambda i, bank: filled(bank)._replace(active=bank.active)),  # masked, whatever they hold
        with_banks(growing, lambda i, bank: filled(bank)._replace(up=bank.up)),  # activated
    ):
        assert torch.equal(growing(TEXT[None], weights=weights)[0], plain)


@pytest.mark.parametrize("told", BLOCKS.values(), ids=BLOCKS)
def test_every_bank_is_read_and_gets_gradients(told) -> None:
    growing = Growing(build(**told), slots=2, rank=3)
    plain = growing(TEXT[None])[0]
    for host in range(len(growing.own)):
        weights = with_banks(growing, lambda i, bank, host=host: filled(bank) if i == host else bank)
        bank = [part.requires_grad_() for part in weights[len(growing.own) + host]]
        logits, _ = growing(TEXT[None], weights=weights)
        assert (logits - plain).abs().max() > 1e-3
        assert all(part.any() for part in torch.autograd.grad(logits.logsumexp(-1).sum(), bank[:3]))


def test_a_chain_reads_a_bank_where_its_block_reads() -> None:
    model = build(levels=(level(16), level(48)))
    growing = Growing(model, slots=1, rank=3)
    weights = with_banks(growing, lambda i, bank: filled(bank, i))
    own, banks = growing.split(weights)
    x = torch.randn(1, 5, 16, dtype=F64)
    continuum, y = model.blocks[0].continuum, x
    for maps, bank, norm in zip(own[:2], banks[:2], continuum.norms, strict=True):
        h = torch.nn.functional.rms_norm(y, (16,), norm, eps=1e-6)
        y = y + torch.nn.functional.gelu(h @ maps[0].mT) @ maps[1].mT + read_slots(bank, h)
    torch.testing.assert_close(continuum(x, own[:2], None, banks[:2]), y, rtol=0, atol=1e-12)


def test_a_life_reads_through_its_slots_and_does_not_move_them() -> None:
    model = build(levels=(level(16), level(48)))
    growing = Growing(model, slots=2, rank=3)
    alone, beside = Reader(model), Reader(growing)
    lived, out = beside.read(beside.begin(), TEXT)
    expected, expected_out = alone.read(alone.begin(), TEXT)
    torch.testing.assert_close(out.nll, expected_out.nll, rtol=0, atol=0, equal_nan=True)
    for ours, theirs in zip(lived.levels.weights, expected.levels.weights, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    start = beside.begin()
    levels = start.levels._replace(weights=with_banks(growing, lambda i, bank: filled(bank)))
    lived, out = beside.read(start._replace(levels=levels), TEXT)
    assert not torch.equal(out.nll[1:], expected_out.nll[1:])
    count = len(growing.own)
    for before, after in zip(levels.weights[count:], lived.levels.weights[count:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(levels.weights[0], lived.levels.weights[0], strict=True))


def test_levels_learn_the_gradient_of_what_is_read_through_slots() -> None:
    """One tick of every level by autograd, with filled slots in the forward pass."""
    growing = Growing(build(levels=(level(32, step_size=0.7),)), slots=2, rank=3)
    reader = Reader(growing)
    start = reader.begin()
    weights = with_banks(growing, lambda i, bank: filled(bank))
    lived, _ = reader.read(start._replace(levels=start.levels._replace(weights=weights)), TEXT[:33])
    leaves = tuple(tuple(w.detach().clone().requires_grad_() for w in maps) for maps in weights)
    logits, _ = growing(TEXT[None, :32], weights=leaves)
    loss = torch.nn.functional.cross_entropy(logits[0], TEXT[1:33], reduction="sum")
    own = [w for maps in leaves[:2] for w in maps]
    learned = [w for maps in lived.levels.weights[:2] for w in maps]
    for w, gradient, after in zip(own, torch.autograd.grad(loss, own), learned, strict=True):
        torch.testing.assert_close(after, w - 0.7 / 32 * gradient, rtol=0, atol=1e-11)


def test_a_life_with_slots_is_saved_like_any_other() -> None:
    growing = Growing(build(levels=(level(16), level(48))), slots=2, rank=3)
    reader = Reader(growing)
    start = reader.begin()
    state = start._replace(levels=start.levels._replace(weights=with_banks(growing, lambda i, b: filled(b))))
    again = unflatten(reader.begin(), {name: tensor.clone() for name, tensor in flatten(state).items()})
    assert all(torch.equal(a, b) for a, b in zip(flatten(state).values(), flatten(again).values(), strict=True))


def test_a_life_without_slots_can_grow_them() -> None:
    model = build(levels=(level(16), level(48)))
    growing = Growing(model, slots=2, rank=3)
    alone, beside = Reader(model), Reader(growing)
    lived, _ = alone.read(alone.begin(), TEXT[:50])
    onward, out = beside.read(lived._replace(levels=growing.grown(lived.levels)), TEXT[50:])
    expected, expected_out = beside.read(beside.begin(), TEXT)
    torch.testing.assert_close(out.nll, expected_out.nll[50:], rtol=0, atol=1e-10)
    for name, tensor in flatten(expected).items():
        torch.testing.assert_close(flatten(onward)[name], tensor, rtol=0, atol=1e-10, msg=name)


def test_what_does_not_fit_is_said() -> None:
    model = build(levels=(level(16), level(48)))
    growing = Growing(model)
    with pytest.raises(ValueError, match="slots and rank must be >= 1, got 0 and 8"):
        Growing(model, slots=0)
    with pytest.raises(ValueError, match="weights must have 4 levels and 4 banks of slots, got 4 entries"):
        growing(TEXT[None], weights=model.level_weights())
    with pytest.raises(ValueError, match="weights must have one entry for each of 4 levels, got 8"):
        model(TEXT[None], weights=growing.level_weights())
    with pytest.raises(ValueError, match="grows banks of slots, got 8 levels"):
        growing.grown(Reader(growing).begin().levels)
