"""Encoders with levels: masked tokens, and classes that come one after the other."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling.learner.guards import Guard, Guards, GuardState
from nestling.levels import ExampleReader, MaskedReader, level, masked_tokens, seen_classes, stack
from nestling.memory.state import flatten
from pretrained import ENCODERS

TEXT = torch.randint(4, 61, (90,), generator=torch.Generator().manual_seed(2))
HOWS = pytest.mark.parametrize("how", ["layers", "neurons", "low_rank"])


def masked(how: str = "layers", periods=(8, 20), **options):
    base = ENCODERS["bert, masked"]().double()
    return stack(base, periods, how, loss=masked_tokens(3, share=0.3, seed=7), step_size=0.5, **options)


@HOWS
@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_are_the_models_own_at_the_start(encoder: str, how: str) -> None:
    model, naive = stack(ENCODERS[encoder](), [8, 20], how), ENCODERS[encoder]()
    rows = TEXT[:40].view(2, 20)
    out = naive(rows)
    expected = out.logits if hasattr(out, "logits") else out.last_hidden_state
    assert torch.equal(model(rows)[0], expected)
    assert torch.equal(model(rows, weights=model.level_weights())[0], expected)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 15:] = False
    if encoder != "bert, classes":
        alone = model(rows[1:, :15])[0]
        torch.testing.assert_close(model(rows, valid=valid)[0][1:, :15], alone)


@HOWS
def test_masked_reading_is_plain_autograd(how: str) -> None:
    """The levels of one tick, against a gradient of the masked loss on the model itself."""
    model = masked(how, periods=[8, 8])
    reader = MaskedReader(model)
    state, out = reader.read(reader.begin(), TEXT[:8])
    hidden = model.config.loss.hidden(8, 0)
    assert int(hidden.sum()) == round(0.3 * 8)
    shown = torch.where(hidden, 3, TEXT[:8])
    if how == "low_rank":
        leaves = tuple(tuple(w.detach().clone().requires_grad_() for w in maps) for maps in model.level_weights())
        losses = F.cross_entropy(model(shown[None], weights=leaves)[0][0], TEXT[:8], reduction="none")
        losses[hidden].sum().backward()
        after = flatten(state.levels.weights)
        for name, start in flatten(leaves).items():
            expected = start.detach() - 0.5 / 8 * start.grad
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-12, msg=name)
    else:
        naive = ENCODERS["bert, masked"]().double()
        losses = F.cross_entropy(naive(shown[None]).logits[0], TEXT[:8], reduction="none")
        losses[hidden].sum().backward()
        for name, after in model.placed(state.levels.weights).items():
            start = naive.get_parameter(name)
            torch.testing.assert_close(after, start - 0.5 / 8 * start.grad, rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(out.nll[hidden], losses.detach()[hidden], rtol=0, atol=1e-12)
    assert bool(out.nll[~hidden].isnan().all())


@HOWS
def test_masked_reading_is_the_same_in_pieces(how: str) -> None:
    reader = MaskedReader(masked(how), segment=16)
    whole, out = reader.read(reader.begin(), TEXT)
    assert out.moved[:, 0].tolist() == [8, 16, 20, 24, 32, 40, 48, 56, 60, 64, 72, 80, 88]
    for pieces in ([1] * 90, [7, 50, 1, 32]):
        state, nll = reader.begin(), []
        for part in TEXT.split(pieces):
            state, got = reader.read(state, part)
            nll.append(got.nll)
        torch.testing.assert_close(torch.cat(nll), out.nll, rtol=0, atol=1e-10, equal_nan=True)
        for name, tensor in flatten(whole).items():
            torch.testing.assert_close(flatten(state)[name], tensor, rtol=0, atol=1e-10, msg=name)
    closed, rest = reader.end_document(whole)
    assert rest.nll.numel() == 2
    assert closed.segment.numel() == 0
    assert int(closed.levels.rules[0][0].elapsed) == 90 % 8
    assert reader.end_document(closed)[1].nll.numel() == 0


def test_masks_depend_on_position_and_seed_alone() -> None:
    loss = masked_tokens(3, share=0.25, seed=1)
    assert torch.equal(loss.hidden(16, 32), loss.hidden(16, 32))
    assert int(loss.hidden(16, 32).sum()) == 4
    assert not torch.equal(loss.hidden(16, 32), loss.hidden(16, 48))
    assert not torch.equal(loss.hidden(16, 32), masked_tokens(3, share=0.25, seed=2).hidden(16, 32))
    assert int(loss.hidden(1, 0).sum()) == 1


class Judge:
    """Refuses pieces, or ticks of levels, by their numbers; keeps what it was shown."""

    def __init__(self, pieces: tuple[int, ...] = (), levels: tuple[int, ...] = ()) -> None:
        self.pieces, self.levels = pieces, levels
        self.shown: list[tuple[float, int]] = []
        self.moved: list[tuple[int, float]] = []

    def takes(self, before, gradients, loss, tokens) -> bool:  # type: ignore[no-untyped-def]
        self.shown.append((float(loss), tokens))
        return len(self.shown) - 1 not in self.pieces

    def moves(self, index: int, square: float) -> bool:
        self.moved.append((index, square))
        return index not in self.levels


def test_masked_writes_are_judged() -> None:
    """What is refused teaches nothing, a level whose tick is refused stays, and the clocks go on in both."""
    model = masked(periods=[8, 16])
    free, out = MaskedReader(model).read(MaskedReader(model).begin(), TEXT[:48])
    nothing = Judge()
    same, told = MaskedReader(model, accept=nothing).read(MaskedReader(model).begin(), TEXT[:48])
    assert all(torch.equal(x, flatten(same)[name]) for name, x in flatten(free).items())
    torch.testing.assert_close(told.moved, out.moved, rtol=1e-9, atol=1e-14)
    assert [tokens for _, tokens in nothing.shown] == [8] * 6
    for piece, (loss, _) in enumerate(nothing.shown):
        assert loss == pytest.approx(float(told.nll[8 * piece : 8 * piece + 8].nansum()), rel=1e-9)
    judge = Judge(pieces=(0, 1), levels=(2,))
    held, _ = MaskedReader(model, accept=judge).read(MaskedReader(model).begin(), TEXT[:17])
    assert all(square == 0.0 for _, square in judge.moved), "nothing was learned, and a tick of nothing moves nothing"
    after, _ = MaskedReader(model, accept=judge).read(held, TEXT[17:48])
    start, lived = model.level_weights(), after.levels
    assert torch.equal(held.levels.weights[0][0], start[0][0])
    assert torch.equal(lived.weights[2][0], start[2][0])
    assert not torch.equal(lived.weights[0][0], start[0][0])
    for one, other in zip(lived.rules, free.levels.rules, strict=True):
        assert int(one[0].elapsed) == int(other[0].elapsed)


def test_judged_reading_is_the_same_in_pieces() -> None:
    model = masked()
    whole = MaskedReader(model, accept=Judge(pieces=(2, 3), levels=(1,))).read(MaskedReader(model).begin(), TEXT)[0]
    reader = MaskedReader(model, accept=Judge(pieces=(2, 3), levels=(1,)))
    state = reader.begin()
    for part in TEXT.split([7, 50, 1, 32]):
        state, _ = reader.read(state, part)
    for name, tensor in flatten(whole).items():
        torch.testing.assert_close(flatten(state)[name], tensor, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("loss", ["masked", "classes"])
def test_what_is_not_finite_never_gets_in(loss: str) -> None:
    """An encoder that breaks on one token: the pieces that hold it are refused, and the others are learned."""
    base = ENCODERS[f"bert, {loss}"]()
    told = masked_tokens(3) if loss == "masked" else seen_classes()
    model = stack(base, [8, 16], loss=told, step_size=0.5)
    base.get_input_embeddings().register_forward_hook(
        lambda _, given, out: out.masked_fill((given[0] == 60)[..., None], torch.inf)
    )
    guard = Guard(Guards(surprise_jump=math.inf, level_jump=math.inf), model.levels, GuardState.begin(3), "text")
    poisoned = TEXT[:48].clamp(max=59)
    poisoned[16:24] = 60
    if loss == "masked":
        reader = MaskedReader(model, accept=guard)
        state, _ = reader.read(reader.begin(), poisoned)
    else:
        classes = ExampleReader(model, accept=guard)
        state, _ = classes.read(classes.begin(), poisoned[24:32], 0)
        for first in range(0, 48, 8):
            state, _ = classes.read(state, poisoned[first : first + 8], first // 8 % 2)
    assert guard.refused == {"not finite": 1}
    assert all(bool(tensor.isfinite().all()) for tensor in flatten(state).values())
    assert not torch.equal(state.levels.weights[0][0], model.level_weights()[0][0])


def examples(count: int):
    """Class c talks mostly in tokens 10 c .. 10 c + 10; classes come in blocks, one after the other."""
    generator = torch.Generator().manual_seed(4)
    for label in range(3):
        for _ in range(count):
            yield torch.randint(4 + 10 * label, 14 + 10 * label, (6,), generator=generator), label


@HOWS
def test_a_class_is_judged_among_those_seen(how: str) -> None:
    model = stack(ENCODERS["bert, classes"]().double(), [6], how, loss=seen_classes(), step_size=0.5)
    naive = ENCODERS["bert, classes"]().double()
    reader = ExampleReader(model)
    (first, _), (second, _) = list(examples(1))[:2]
    state, out = reader.read(reader.begin(), first, 4)
    assert out.predicted == -1
    assert float(out.nll) == 0.0, "one class alone is certain, and nothing is learned of it"
    assert float(out.moved[1:].abs().max()) == 0.0
    after, out = reader.read(state, second, 1)
    assert after.seen.tolist() == [False, True, False, False, True]
    assert out.predicted == 4
    loss = F.cross_entropy(naive(second[None]).logits[:, [1, 4]], torch.tensor([0]))
    torch.testing.assert_close(out.nll, loss.detach(), rtol=0, atol=1e-12)
    if how == "layers":
        loss.backward()
        for name, weight in model.placed(after.levels.weights).items():
            start = naive.get_parameter(name)
            torch.testing.assert_close(weight, start - 0.5 / 6 * start.grad, rtol=0, atol=1e-12, msg=name)


def test_classes_are_learned_one_after_the_other() -> None:
    base = ENCODERS["bert, classes"]()
    with torch.no_grad():  # as wide awake as a trained model: at their start Bert's weights hardly answer
        for parameter in base.parameters():
            parameter *= 8.0 if parameter.dim() == 2 else 1.0
    model = stack(base, [level(6, step_size=3.0)], "neurons", loss=seen_classes())
    reader, still = ExampleReader(model), ExampleReader(model, learning=False)
    state, fixed, right, guessed = reader.begin(), still.begin(), [], []
    for tokens, label in examples(12):
        state, out = reader.read(state, tokens, label)
        fixed, unlearned = still.read(fixed, tokens, label)
        right.append(out.predicted == label)
        guessed.append(unlearned.predicted == label)
    assert sum(right) > 28  # of 36
    assert sum(guessed) < 18
    assert all(torch.equal(a, b) for a, b in zip(fixed.levels.weights[0], model.level_weights()[0], strict=True))
    assert int(state.position) == 36 * 6
    assert int(reader.predict(state, tokens)[:3].argmax()) == 2


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: MaskedReader(stack(ENCODERS["bert"](), [8])), "loss=None"),
        (lambda: MaskedReader(stack(ENCODERS["bert"](), [8], loss=seen_classes())), "reads with masked_tokens"),
        (lambda: ExampleReader(stack(ENCODERS["bert"](), [8], loss=seen_classes())), "gives no classes"),
        (lambda: MaskedReader(masked(), segment=0), "segment must be >= 1"),
        (lambda: masked_tokens(3, share=0.0), "share must be"),
        (lambda: masked_tokens(3, share=math.nan), "share must be"),
    ],
    ids=lambda told: told if isinstance(told, str) else "",
)
def test_what_is_refused(build, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()


def test_a_label_out_of_range_is_refused() -> None:
    reader = ExampleReader(stack(ENCODERS["bert, classes"](), [8], loss=seen_classes()))
    with pytest.raises(ValueError, match=r"label must be in 0 \.\. 4, got 5"):
        reader.read(reader.begin(), TEXT[:4], 5)
