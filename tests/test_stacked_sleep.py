"""A pre-trained model of transformers sleeps as a byte model does: slots beside its MLPs, nothing else moves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.cli import main
from nestling.learner import Learner
from nestling.levels import Growing, Reader, Slots, stack
from nestling.memory.state import detach, flatten
from nestling.sleep import SeedConfig, SleepConfig, any_token, evict, merge, no_reservoir, prune_slots, sleep
from nestling.sleep.dreams import dream
from nestling.sleep.grow import activate, bank, draws
from pretrained import DECODERS, ENCODERS
from test_stacked_folder import pretrained

TEXT = torch.randint(0, 61, (41,), generator=torch.Generator().manual_seed(1))
QUICK = SleepConfig(
    dreams=4, held_out=2, length=4, seeding=SeedConfig(steps=1, prefixes=2, completions=2), least_recovered=-1e9
)
HOWS = pytest.mark.parametrize("how", ["layers", "neurons", "low_rank"])


def growing(layout: str = "llama", how: str = "layers", double: bool = False) -> Growing:
    base = DECODERS[layout]()
    return Growing(stack(base.double() if double else base, [4, 12], how, step_size=0.5), slots=2, rank=2)


def filled(model: Growing, host: int, seed: int = 0) -> tuple:
    """The model's own weights, with one bank open and full of random maps."""
    generator = torch.Generator().manual_seed(seed)
    weights = detach(model.level_weights())
    drawn = [torch.randn(part.shape, generator=generator).to(part) for part in bank(model, weights, host)[:3]]
    full = (*drawn, torch.ones_like(bank(model, weights, host).active))
    at = len(model.own) + host
    return (*weights[:at], full, *weights[at + 1 :])


@pytest.mark.parametrize("layout", DECODERS)
@HOWS
def test_empty_and_fresh_slots_change_no_logit(layout: str, how: str) -> None:
    model = growing(layout, how)
    expected, _ = model.model(TEXT[None, :30])
    weights = detach(model.level_weights())
    fresh = activate(model, weights, range(len(model.own)), 1, draws("slot"))
    for given in (None, weights, fresh):
        assert torch.equal(model(TEXT[None, :30], weights=given)[0], expected)


@HOWS
def test_slots_add_to_what_the_mlp_gives(how: str) -> None:
    """Oracle: the MLP of one layer replaced by one that adds the sum of gated experts to its answer."""
    model = growing("llama", how, double=True)
    each = len(model.own) // 3
    host = each + each - 1  # the slowest level of the second layer
    weights = filled(model, host)
    found = Slots(*weights[len(model.own) + host])
    naive = DECODERS["llama"]().double()
    mlp = naive.model.layers[1].mlp
    plain = mlp.forward

    def forward(h: Tensor) -> Tensor:
        answer = plain(h)
        for e in range(2):
            gate = torch.sigmoid((h * found.gate[e, :-1]).sum(-1, keepdim=True) + found.gate[e, -1])
            answer = answer + gate * torch.einsum("vr,rd,btd->btv", found.up[e], found.down[e], h)
        return answer

    mlp.forward = forward
    torch.testing.assert_close(
        model(TEXT[None, :30], weights=weights)[0], naive(TEXT[None, :30]).logits, rtol=0, atol=1e-10
    )


@HOWS
def test_a_level_learns_beside_slots_as_by_autograd(how: str) -> None:
    """A tick moves a level by the gradient of the whole model, filled slots included."""
    model = growing("gpt2", how, double=True)
    reader = Reader(model)
    state = reader.begin()
    state = state._replace(levels=state.levels._replace(weights=filled(model, 1)))
    after, _ = reader.read(state, TEXT[:5])
    own = [[w.clone().requires_grad_() for w in maps] for maps in state.levels.weights]
    logits, _ = model(TEXT[None, :4], weights=tuple(map(tuple, own)))
    F.cross_entropy(logits[0], TEXT[1:5], reduction="sum").backward()
    moved = 0
    for index, lvl in enumerate(model.own):
        for new, old in zip(after.levels.weights[index], own[index], strict=True):
            expected = old - 0.5 / 4 * old.grad if lvl.period == 4 else old
            torch.testing.assert_close(new, expected.detach(), rtol=0, atol=1e-12)
            moved += lvl.period == 4 and bool(old.grad.any())
    assert moved


@pytest.mark.parametrize(
    ("layout", "how"), [("llama", "layers"), ("llama", "neurons"), ("llama", "low_rank"), ("gpt2", "layers")]
)
def test_a_sleep_fills_slots_and_moves_nothing_else(layout: str, how: str) -> None:
    model = growing(layout, how)
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), TEXT)
    rested, report = sleep(model, state, QUICK, key="night")
    assert [pair.outcome for pair in report.pairs] == ["kept"]
    assert report.slots == {4: 0, 12: 1}
    before, after = flatten(state), flatten(rested)
    assert {name: tensor.shape for name, tensor in before.items() if name.startswith("levels")} == {
        name: tensor.shape for name, tensor in after.items() if name.startswith("levels")
    }
    first, learned = model.level_weights(), reader.settle(state).levels.weights
    for index, lvl in enumerate(model.own):
        expected = first if lvl.period == 4 else learned
        assert all(torch.equal(a, b) for a, b in zip(rested.levels.weights[index], expected[index], strict=True))
        assert bank(model, rested.levels.weights, index).active.tolist() == [float(lvl.period == 12), 0.0]
    awake, out = reader.read(rested, TEXT[:20])
    assert bool(out.nll.isfinite().all())
    assert int(awake.position) == 61


def test_seeding_teaches_a_stacked_student() -> None:
    """Off its own dreams the student is nearer to the teacher than before, without a warm start."""
    model = growing()
    with torch.no_grad():  # as random as they are made, its weights hardly let a gradient through
        for parameter in model.model.base.model.layers.parameters():
            parameter *= 6
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), TEXT)
    seeding = SeedConfig(steps=20, learning_rate=5e-2, prefixes=8, completions=1, on_policy=0.0, divergence_share=1.0)
    told = replace(QUICK, seeding=seeding, dreams=16, held_out=8, warm_start=False, rehearsal=0.0)
    _, report = sleep(model, state, told)
    (pair,) = report.pairs
    assert pair.after < 0.9 * pair.before


def test_full_banks_and_pruning() -> None:
    model = growing("llama", "low_rank")
    hosts = tuple(i for i, lvl in enumerate(model.own) if lvl.period == 12)
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), TEXT[:20])
    weights = (*state.levels.weights[:-1], filled(model, len(model.own) - 1)[-1])
    state = state._replace(levels=state.levels._replace(weights=weights))
    told = replace(QUICK, seeding=replace(QUICK.seeding, steps=0))
    for policy, said in ((merge(), "merged slots 0 and 1"), (evict(), "evicted slot")):
        _, report = sleep(model, state, replace(told, when_full=policy))
        assert said in report.pairs[0].room
        assert report.slots[12] <= 2
    dreams = dream(model, weights, any_token(), 4, 6, draws("d"), reservoir=no_reservoir())
    pruned = prune_slots(model, weights, hosts[-1:], 0.5, dreams)
    assert (bank(model, pruned, hosts[-1]).up == 0).float().mean() >= 0.5


def test_half_precision() -> None:
    base = DECODERS["llama"]().bfloat16()
    model = Growing(stack(base, [4, 12], step_size=0.5), slots=2, rank=2)
    plain = model.model(TEXT[None, :20])[0]
    assert torch.equal(model(TEXT[None, :20], weights=model.level_weights())[0], plain)
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), TEXT[:20])
    rested, report = sleep(model, state, QUICK)
    assert report.pairs[0].kept
    assert all(part.dtype == torch.float32 for part in bank(model, rested.levels.weights, 1))


def test_dreams_begin_with_the_models_own_tokens() -> None:
    model = growing()
    (found,) = dream(
        model, model.level_weights(), any_token(), 200, 1, draws("d"), reservoir=no_reservoir(), temperature=1.0
    )
    first = found.tokens[:, 0]
    assert int(first.max()) < 61
    assert len(first.unique()) > 40
    with pytest.raises(ValueError, match="how many tokens"):
        any_token().prompts(1, no_reservoir(), draws("d"))


def test_what_cannot_sleep_is_refused() -> None:
    with pytest.raises(ValueError, match="BertForMaskedLM is an encoder and writes no dreams"):
        Growing(stack(ENCODERS["bert, masked"](), [4]))
    model = growing()
    with pytest.raises(ValueError, match="slots must have one entry for each of 3 levels, got 1"):
        model.model(TEXT[None], slots=(Slots(*model.level_weights()[3]),))


def test_a_stacked_life_sleeps_and_is_replayed(tmp_path: Path) -> None:
    base, stacked, life = pretrained(tmp_path / "base"), str(tmp_path / "stacked"), str(tmp_path / "life")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 3)
    assert main(["stack", str(base), "--out", stacked, "--periods", "8", "24", "--step-size", "0.5"]) == 0
    assert main(["new", life, "--model", stacked, "--slots", "2", "--rank", "2"]) == 0
    assert main(["learn", life, str(text)]) == 0
    with Learner.open(Path(life)) as opened:
        assert isinstance(opened.model, Growing)
        report = opened.sleep(QUICK)
        assert "8 -> 24: kept" in str(report)
    assert main(["verify", life, "--replay"]) == 0
    with Learner.open(Path(life)) as opened:
        assert len(opened.state.reading.levels.weights) == 2 * len(opened.model.own)
