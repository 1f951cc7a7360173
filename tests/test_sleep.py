"""A sleep, whole: what moves and what does not, what it costs, what it says."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import Growing, Reader, ReadingState, Taps, level, mean_surprise, reptile
from nestling.levels.slots import read_slots
from nestling.memory import mlp, momentum
from nestling.memory.state import detach, flatten, unflatten
from nestling.memory.structure import plain
from nestling.models import Decoder, ModelConfig
from nestling.models.data import from_data, to_data
from nestling.sequence import attention, self_modifying
from nestling.sleep import (
    DreamConfig,
    Dreams,
    Place,
    SeedConfig,
    SleepConfig,
    Views,
    any_token,
    as_likely,
    distance,
    draws,
    evict,
    imitation,
    importance,
    merge,
    mixture,
    nothing,
    own_samples,
    paper,
    prefixes,
    prune_slots,
    reset,
    seed,
    sleep,
    warm_start,
    within_budget,
)
from nestling.sleep.dreams import write_on
from nestling.sleep.grow import activate, active, bank, first_free, levels_of, masked, replace_bank
from nestling.sleep.schedule import CONTEXT, Pair
from nestling.sleep.seed import Rehearsal, answers, draw, objective

F64 = torch.float64
TEXT = torch.tensor(list(b"the cat sat on the mat and the dog lay on the log. " * 6)[:256])
PERIODS = (16, 48)
FAST, LAST = Pair(16, 48), Pair(48, math.inf)
SEEDING = SeedConfig(steps=8, prefixes=2, completions=2, learning_rate=3e-2)
CONFIG = SleepConfig(
    seeding=SEEDING, source=any_token(), dreams=16, held_out=16, length=8, warm_start=False, rehearsal=0.0
)


def build(slots: int = 3, rank: int = 4, mixer=None, **told) -> Growing:
    levels = (*(level(p, step_size=2.0, rule=momentum(), **told) for p in PERIODS), level(math.inf))
    config = ModelConfig(dim=16, heads=2, blocks=2, mixer=mixer or attention(window=24), levels=levels)
    return Growing(Decoder(config).double().requires_grad_(False), slots, rank)


def lived(model: Growing, text: torch.Tensor = TEXT) -> ReadingState:
    reader = Reader(model)
    return reader.read(reader.begin(), text)[0]


@pytest.fixture(scope="module")
def model() -> Growing:
    return build()


@pytest.fixture(scope="module")
def life(model) -> ReadingState:
    return lived(model)


@pytest.fixture(scope="module")
def slept(model, life):
    return sleep(model, life, CONFIG, "night")


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flatten(a).values(), flatten(b).values(), strict=True))


class Refuses:
    """No write is taken in, and no tick stands."""

    def takes(self, before, gradients, loss, tokens) -> bool:
        return False

    def moves(self, index, square) -> bool:
        return False


class TestGrowth:
    def test_activation_changes_no_logit(self, model, life) -> None:
        weights = life.levels.weights
        plain = model(TEXT[None, :40], weights=weights)[0]
        for period in (16, 48, math.inf):
            hosts = levels_of(model, period)
            grown = activate(model, weights, hosts, 1, draws("grow"))
            assert torch.equal(model(TEXT[None, :40], weights=grown)[0], plain)
            assert active(model, grown, hosts).tolist() == [False, True, False]
            assert first_free(model, grown, hosts) == 0
            assert bank(model, grown, hosts[0]).down[1].any()

    def test_hosts_are_one_level_in_each_block(self, model) -> None:
        assert levels_of(model, 48) == (1, 4)


class TestSleep:
    def test_slow_pair_first_and_every_pair_is_kept(self, slept) -> None:
        _, report = slept
        assert [(pair.fast, pair.slow) for pair in report.pairs] == [LAST, FAST]
        assert [pair.outcome for pair in report.pairs] == ["kept", "kept"], str(report)
        assert report.slots == {16: 0, 48: 1, math.inf: 1}
        assert report.bytes_stored == 0
        assert math.isnan(report.seconds)

    def test_the_divergence_falls(self, slept) -> None:
        for pair in slept[1].pairs:
            assert pair.after < pair.before
            assert pair.without == pytest.approx(pair.before, abs=1e-12)  # the student without its new slot
            assert pair.recovered == 1 - pair.after / pair.before > 0.05
            assert pair.students["reset"] == pair.before

    def test_nothing_but_the_new_slots_is_learned(self, model, life, slept) -> None:
        """Fast levels are where they began, clocks and all else as they stood."""
        state, _ = slept
        settled = Reader(model).settle(life).levels
        first = model.level_weights()
        for i, lvl in enumerate(model.own):
            expected = settled.weights[i] if lvl.period == math.inf else first[i]
            assert all(torch.equal(a, b) for a, b in zip(state.levels.weights[i], expected, strict=True))
            for old, new in zip(settled.rules[i], state.levels.rules[i], strict=True):
                assert torch.equal(old.elapsed, new.elapsed)
        for i in range(len(model.own)):
            before, after = bank(model, life.levels.weights, i), bank(model, state.levels.weights, i)
            kept = 0 if model.own[i].period != 16 else None
            for a, b in zip(before, after, strict=True):
                rows = [row for row in range(3) if row != kept]
                assert torch.equal(a[rows], b[rows])
                assert kept is None or torch.equal(a, b) or not torch.equal(a[kept], b[kept])

    def test_what_was_given_is_not_changed(self, model) -> None:
        life = lived(model)
        copy = detach(unflatten(life, {name: t.clone() for name, t in flatten(life).items()}))
        sleep(model, life, replace(CONFIG, seeding=replace(SEEDING, steps=2)), "night")
        assert same(life, copy)

    def test_no_shape_ever_changes(self, model, life, slept) -> None:
        before, after = flatten(life.levels), flatten(slept[0].levels)
        assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
        again = unflatten(Reader(model).begin().levels, {n: t.clone() for n, t in after.items()})
        assert same(again, slept[0].levels)

    def test_the_same_key_is_the_same_sleep(self, model, life, slept) -> None:
        few = replace(CONFIG, seeding=replace(SEEDING, steps=2))
        nights = [sleep(model, life, few, key, only=[FAST]) for key in ("night", "night", "another")]
        assert same(nights[0][0], nights[1][0])
        assert nights[0][1].pairs[0].divergences == nights[1][1].pairs[0].divergences
        assert not same(nights[0][0], nights[2][0])

    def test_life_goes_on(self, model, slept) -> None:
        state, _ = slept
        reader = Reader(model)
        onward, out = reader.read(state, TEXT[:60])
        assert out.nll.isfinite().all()
        assert int(onward.position) == len(TEXT) + 60
        assert state.segment.numel() == 0

    def test_what_was_open_is_learned_first(self, model, life) -> None:
        assert life.segment.numel() == 16  # whole, but what follows it has not arrived
        settled = Reader(model).settle(life)
        assert settled.segment.numel() == 0
        assert not same(settled.levels, life.levels)
        assert Reader(model).settle(settled) is settled
        assert Reader(model, learning=False).settle(life) is life

    def test_levels_alone_can_sleep(self, model, life) -> None:
        settled = Reader(model).settle(life)
        few = replace(CONFIG, seeding=replace(SEEDING, steps=2))
        alone, report = sleep(model, settled.levels, few, "night")
        beside, expected = sleep(model, settled, few, "night")
        assert same(alone, beside.levels)
        assert alone.weights[0][0].dtype == F64
        assert report.pairs[1].after == expected.pairs[1].after

    def test_probes(self, model, life) -> None:
        document = bytes(TEXT[:51].tolist())
        probes = {"read": lambda weights: mean_surprise(model, [document], weights=weights)}
        state, report = sleep(model, life, CONFIG, "night", probes=probes)
        settled = Reader(model).settle(life).levels.weights
        before, awake, after = report.probes["read"]
        assert before == mean_surprise(model, [document], weights=life.levels.weights)
        assert awake == mean_surprise(model, [document], weights=settled)
        assert after == mean_surprise(model, [document], weights=state.levels.weights)
        emptied = sleep(model, life, replace(CONFIG, seeding=replace(SEEDING, steps=0)), "night")
        assert [pair.outcome for pair in emptied[1].pairs] == ["no gain"] * 2
        forgotten = mean_surprise(model, [document])  # the model as it was born
        assert after < forgotten  # the slow levels' slots still answer what the fast ones had learned
        assert "read: " in str(report)

    def test_some_pairs_only(self, model, life) -> None:
        _, report = sleep(model, life, CONFIG, "night", only=[FAST])
        assert [(pair.fast, pair.slow) for pair in report.pairs] == [FAST]
        with pytest.raises(ValueError, match=r"Pair\(fast=1, slow=2\) is no pair of neighbours; they are: Pair"):
            sleep(model, life, CONFIG, only=[Pair(1, 2)])

    def test_middle_slots_go_to_the_slow_level(self, model, slept) -> None:
        """Slots that the middle level took in are emptied at its own consolidation, and the student reads without."""
        state, first = slept
        assert first.slots[48] == 1
        second, report = sleep(model, state, CONFIG, "second night", only=[LAST])
        pair = report.pairs[0]
        assert pair.outcome == "kept"
        assert report.slots == {16: 0, 48: 0, math.inf: 2}
        assert not any(part.any() for part in bank(model, second.levels.weights, 1))
        assert pair.before > 1e-4  # all that there was to move is what the slots held: the level had been reset

    def test_self_modifying_models_sleep(self) -> None:
        hope = build(mixer=self_modifying(chunk=8, projection_chunk=8))
        few = replace(CONFIG, dreams=8, held_out=4, length=6, seeding=replace(SEEDING, steps=3))
        state, report = sleep(hope, lived(hope, TEXT[:60]), few, "night")
        assert {pair.outcome for pair in report.pairs} <= {"kept", "no gain"}
        assert all(t.isfinite().all() for t in flatten(state.levels).values())

    def test_levels_that_start_again_are_reset_to_their_start(self) -> None:
        levels = (level(16, step_size=2.0, transfer=reptile()), level(48, step_size=0.5), level(math.inf))
        config = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=24), levels=levels)
        growing = Growing(Decoder(config).double().requires_grad_(False), 3, 4)
        state, report = sleep(growing, lived(growing, TEXT[:230]), CONFIG, "night", only=[FAST])
        assert report.pairs[0].kept
        start = state.levels.starts[0]
        assert all(torch.equal(a, b) for a, b in zip(state.levels.weights[0], start.weights, strict=True))


class TestPaper:
    def test_the_student_has_taken_its_update_and_the_teacher_has_not(self, model, life) -> None:
        settled = Reader(model).settle(life).levels
        config = replace(CONFIG, student=paper())
        state, report = sleep(model, life, config, "night")
        fast = next(pair for pair in report.pairs if pair.fast == 16)
        assert 0 < fast.students["paper"] == fast.before < fast.students["reset"]
        for i in range(len(model.own)):  # every level is where it would be awake
            assert all(torch.equal(a, b) for a, b in zip(state.levels.weights[i], settled.weights[i], strict=True))

    def test_between_ticks_there_is_nothing_to_move(self, model, life) -> None:
        settled = Reader(model).settle(life)
        state, report = sleep(model, settled, replace(CONFIG, student=paper()), "night")
        assert [pair.outcome for pair in report.pairs] == ["nothing to move"] * 2
        assert same(state, settled)
        assert report.pairs[0].students["reset"] > 0


class TestContext:
    def test_what_the_sequence_state_holds_goes_to_the_fastest_level(self) -> None:
        model = build()
        life = lived(model)
        config = replace(CONFIG, context=True)
        state, report = sleep(model, life, config, "night", only=[Pair(CONTEXT, 16)])
        (pair,) = report.pairs
        assert pair.kept, str(report)
        assert report.slots[16] == 1
        assert pair.before > 1e-5  # an untrained model hardly looks at its context
        assert same(state.now, life.now)
        with pytest.raises(ValueError, match="give a ReadingState"):
            sleep(model, life.levels, config, "night")


class TestWhatGoesWrong:
    @pytest.mark.parametrize(
        ("change", "outcome"),
        [
            ({"learning_rate": 1e30}, ("not finite", "exploded", "no gain")),
            ({"learning_rate": math.inf}, ("not finite",)),
        ],
    )
    def test_a_broken_pair_is_without_effect(self, model, life, change, outcome) -> None:
        config = replace(CONFIG, seeding=replace(SEEDING, divergence_share=1.0, beta=0.0, **change))
        settled = Reader(model).settle(life)
        state, report = sleep(model, settled, config, "night")
        assert all(pair.outcome in outcome for pair in report.pairs), str(report)
        assert same(state, settled)

    def test_full_banks_refuse_merge_or_evict(self, model, life) -> None:
        few = replace(CONFIG, seeding=replace(SEEDING, steps=6))
        weights = life.levels.weights
        hosts = levels_of(model, 48)
        for slot in range(3):
            weights = activate(model, weights, hosts, slot, draws("full", slot))
            part = bank(model, weights, 1).up[slot]
            part += 0.05 * (slot + 1) * torch.randn(part.shape, generator=draws(slot), dtype=F64)
        full = life.levels._replace(weights=weights)
        state, report = sleep(model, full, few, "night", only=[FAST])
        assert report.pairs[0].outcome == "full: nothing was moved"
        assert same(state, full)
        for policy, word in ((merge(), "merged slots 0 and 1"), (evict(), "evicted slot 0")):
            state, report = sleep(model, full, replace(few, when_full=policy), "night", only=[FAST])
            pair = report.pairs[0]
            assert word in pair.room
            assert pair.kept, str(report)
            assert pair.slot == (1 if policy == merge() else 0)
            assert report.slots[48] == 3
            kept = bank(model, full.weights, 1), bank(model, state.weights, 1)
            assert torch.equal(kept[0].up[2], kept[1].up[2])

    def test_a_bound_in_seconds_stops_cleanly_and_can_be_repeated(self, model, life) -> None:
        told = []
        state, report = sleep(
            model,
            life,
            CONFIG,
            "night",
            clock=lambda: float(len(told)),
            seconds=4.0,
            tell=lambda *step: told.append(step),
        )
        first, second = report.pairs
        assert first.steps == first.cut == 3
        assert second.outcome == "out of time"
        assert report.seconds == 4
        assert str(second) == "16 -> 48: out of time"
        assert told[0] == (LAST, 0, 8)
        again, replayed = sleep(model, life, CONFIG, "night", steps=report.steps)
        assert same(again, state)
        assert [pair.outcome for pair in replayed.pairs] == [first.outcome, "out of time"]
        assert replayed.steps == report.steps == (3, -1)
        with pytest.raises(ValueError, match="one number for each of 2 pairs, got 1"):
            sleep(model, life, CONFIG, "night", steps=[3])

    @pytest.mark.parametrize("passes", [0, 3, 12, 17, 20, 24, 29, 33])
    def test_no_stage_goes_on_out_of_time(self, model, life, passes: int) -> None:
        """The clock counts passes of the model: through dreams, students, rehearsal, warm start."""
        heard = []
        hook = model.register_forward_pre_hook(lambda *_: heard.append(None))
        config = replace(CONFIG, warm_start=True, rehearsal=1.0, seeding=replace(SEEDING, steps=1))
        told = {"only": [FAST], "clock": lambda: float(len(heard)), "seconds": float(passes)}
        try:
            state, report = sleep(model, life, config, "night", **told)
            assert [pair.outcome for pair in report.pairs] == ["out of time"]
            assert len(heard) <= passes + 3
            assert same(state, Reader(model).settle(life))
            dreaming = replace(config, dreaming=DreamConfig(dreams=2, best=1, length=4, trial_steps=1, steps=1))
            heard.clear()
            state, report = sleep(model, life, dreaming, "night", **told | {"only": [], "seconds": passes / 3})
            assert report.dreamt is None
            assert len(heard) <= passes / 3 + 5
            assert same(state, Reader(model).settle(life))
        finally:
            hook.remove()

    @pytest.mark.parametrize("where", ["student", "regression"])
    def test_a_student_that_is_not_finite_ends_its_pair_alone(self, model, life, where: str, monkeypatch) -> None:
        night = sys.modules["nestling.sleep.night"]

        def broken(self, model, learned, levels):
            weights = list(learned.weights)
            for i in levels:
                weights[i] = tuple(torch.full_like(w, math.nan) for w in weights[i])
            return learned._replace(weights=tuple(weights))

        def singular(*_):
            raise torch.linalg.LinAlgError("did not converge")

        if where == "student":
            monkeypatch.setattr(reset, "fast", broken)
        else:
            monkeypatch.setattr(night, "warm_start", singular)
        state, report = sleep(model, life, replace(CONFIG, warm_start=True, rehearsal=0.5), "night")
        assert [pair.outcome for pair in report.pairs] == ["the student is not finite"] * 2
        assert report.steps == (None, None)
        assert same(state, Reader(model).settle(life))

    def test_what_is_open_is_learned_only_where_it_is_accepted(self, model, life) -> None:
        _, report = sleep(model, life, replace(CONFIG, student=paper()), "night", accept=Refuses())
        assert [pair.outcome for pair in report.pairs] == ["nothing to move"] * 2
        assert "KL of a student before it is taught: paper 0.0000, reset 0." in str(report)
        assert "nan" not in str(report)

    def test_a_life_without_slots_is_told_how_to_get_them(self, model) -> None:
        reader = Reader(model.model)
        with pytest.raises(ValueError, match=r"grow them first, by Growing.grown\(levels\)"):
            sleep(model, reader.begin())

    @pytest.mark.parametrize(
        ("config", "change", "words"),
        [
            (CONFIG, {"length": 1}, "length must be >= 2 tokens, got 1"),
            (CONFIG, {"temperature": 0.0}, "temperature must be > 0"),
            (SEEDING, {"completions": 1}, "at least 2 completions"),
            (SEEDING, {"beta": 2.0}, r"beta must be in \[0, 1\]"),
            (SEEDING, {"into": "both"}, "into must be 'slot' or 'weights'"),
        ],
    )
    def test_bounds(self, config, change, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            replace(config, **change)


class TestSeeding:
    @pytest.fixture
    def views(self, model, life) -> tuple[Views, Place, list[Dreams]]:
        hosts = levels_of(model, 48)
        teacher = Reader(model).settle(life).levels
        student = reset().of(model, teacher, teacher, levels_of(model, 16))
        weights = activate(model, student.weights, hosts, 0, draws("slot"))
        for host in hosts:
            up = bank(model, weights, host).up
            up[0] += 0.1 * torch.randn(up.shape[1:], generator=draws(host), dtype=F64)
        return Views(teacher.weights, weights), Place(hosts, 0), [Dreams(TEXT[:96].view(8, 12), 1)]

    @pytest.mark.parametrize(
        "told",
        [{}, {"on_policy": 0.0, "divergence_share": 1.0}, {"on_policy": 0.3, "beta": 0.0}, {"divergence_share": 0.0}],
        ids=repr,
    )
    def test_the_objective_is_its_formula(self, model, views, told) -> None:
        """Loss and gradients token by token, by plain autograd, for the sampled tokens as they are."""
        views, place, dreams = views
        config = replace(SEEDING, reward=imitation(share=0.3, meaning=as_likely(0.2)), **told)
        batch = draw(model, views, views.student, dreams, config, draws("step"))
        if config.divergence_share < 1:  # completions of unlike reward, or the advantages are zero
            copied = batch.written.clone()
            copied[::2] = batch.dreamt
            batch = batch._replace(written=copied)
        leaves = place.leaves(model, views.student)
        loss, _, reward = objective(model, views, place.put(model, views.student, leaves), batch, config)
        again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        student = place.put(model, views.student, again)

        def chances(weights, row: torch.Tensor, t: int) -> torch.Tensor:
            return model(row[None, :t], weights=weights)[0][0, -1].log_softmax(-1)

        def apart(rows: torch.Tensor) -> torch.Tensor:
            found = []
            for row in rows:
                for t in range(batch.prefix, rows.shape[1]):
                    p, q = chances(views.teacher, row, t).detach().exp(), chances(student, row, t).exp()
                    m = 0.5 * (p + q)
                    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
                    found.append(kl(p, q) if config.beta == 0 else 0.5 * kl(p, m) + 0.5 * kl(q, m))
            return sum(found) / len(found)

        off = apart(batch.dreamt) if config.on_policy < 1 and config.divergence_share else 0.0
        on = apart(batch.written) if config.on_policy and config.divergence_share else 0.0
        expected = config.divergence_share * (config.on_policy * on + (1 - config.on_policy) * off)
        if config.divergence_share < 1:
            said, won = [], []
            for index, row in enumerate(batch.written):
                dreamt = batch.dreamt[index // 2]
                nats = lambda w, r: (  # noqa: E731
                    -sum(chances(w, r, t)[r[t]] for t in range(batch.prefix, len(r))) / (len(r) - batch.prefix)
                )
                alike = nats(views.teacher, row) <= nats(views.teacher, dreamt) + 0.2
                won.append(_reward(row[batch.prefix :].tolist(), dreamt[batch.prefix :].tolist(), bool(alike)))
                said.append(nats(student, row))
            assert reward == pytest.approx(sum(won) / len(won))
            others = [won[1], won[0], won[3], won[2]]
            assert won != others
            terms = [(won[i] - others[i]) * said[i] for i in range(4)]
            expected = expected + (1 - config.divergence_share) * sum(terms) / 4
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-11)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, again), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

    def test_only_what_is_named_moves(self, model, views) -> None:
        views, place, dreams = views
        done = seed(model, views, place, dreams, SEEDING, draws("seeding"))
        assert done.outcome == "done"
        before, after = flatten(views.student), flatten(done.weights)
        allowed = {f"{len(model.own) + host}.{part}" for host in place.hosts for part in range(4)}
        for name in before:
            if name in allowed:
                assert torch.equal(before[name][1:], after[name][1:])
                assert name.endswith(".3") or not torch.equal(before[name][0], after[name][0])
            else:
                assert before[name] is after[name] or torch.equal(before[name], after[name])

    def test_into_the_slow_weights(self, model, views) -> None:
        views, _, dreams = views
        config = replace(SEEDING, into="weights", learning_rate=3e-3)
        done = seed(model, views, Place((1, 4), None), dreams, config, draws("seeding"))
        moved = [i for i, (a, b) in enumerate(zip(views.student, done.weights, strict=True)) if not same(a, b)]
        assert moved == [1, 4]

    def test_seeding_on_the_teachers_text_comes_nearer(self, model, views) -> None:
        views, place, dreams = views
        config = replace(SEEDING, steps=40, on_policy=0.0, divergence_share=1.0, beta=0.0)
        done = seed(model, views, place, dreams, config, draws("seeding"))
        assert distance(model, views._replace(student=done.weights), dreams) < 0.7 * distance(model, views, dreams)
        assert sum(done.divergences[-5:]) < sum(done.divergences[:5])

    def test_a_warm_start_comes_nearer_at_once(self, life, model) -> None:
        cold, warm = (
            sleep(
                model, life, replace(CONFIG, warm_start=told, seeding=replace(SEEDING, steps=0)), "night", only=[FAST]
            )
            for told in (False, True)
        )
        assert cold[1].pairs[0].started == cold[1].pairs[0].before
        assert warm[1].pairs[0].started < 0.8 * warm[1].pairs[0].before, str(warm[1])

    def test_a_warm_start_with_a_rehearsal_is_nearer_to_what_was(self, life, model) -> None:
        """The gate tells the teacher's dreams from the student's own."""
        none = replace(CONFIG, warm_start=True, dreams=64, seeding=replace(SEEDING, steps=0))
        apart = {}
        for share in (0.0, 1.0):
            state, report = sleep(model, life, replace(none, rehearsal=share), "night", only=[FAST])
            assert report.pairs[0].kept
            weights = state.levels.weights
            bare = masked(model, weights, levels_of(model, 48), 0)
            own = write_on(model, bare, torch.arange(0, 256, 4)[:, None], 8, draws("own"))
            apart[share] = distance(model, Views(bare, weights), [Dreams(own, 1)])
        assert apart[1.0] < 0.7 * apart[0.0], str(apart)

    def test_a_warm_start_is_fitted_behind_its_gate(self) -> None:
        """Oracle: least squares over every row of both kinds of dreams, each as the gate lets it through."""
        model = build(rank=16)
        teacher = lived(model).levels.weights
        student = activate(model, model.level_weights(), (1,), 0, draws("slot"))
        texts = [write_on(model, w, torch.arange(40)[:, None], 8, draws(i)) for i, w in enumerate((teacher, student))]
        views = Views(teacher, student)
        rehearsal = Rehearsal(student, (Dreams(texts[1], 1),))
        found, _ = warm_start(model, views, Place((1,), 0), (0,), [Dreams(texts[0], 1)], 16, rehearsal)
        slot = bank(model, found, 1)
        inputs, targets = [], []
        for weights, tokens in zip((teacher, student), texts, strict=True):
            theirs, mine = [], []
            model(tokens, weights=weights, taps=theirs)
            model(tokens, weights=student, taps=mine)
            inputs += mine[1].inputs[0].flatten(0, 1)
            targets += (
                theirs[0].outputs[-1] + theirs[1].outputs[-1] - mine[0].outputs[-1] - mine[1].outputs[-1]
            ).flatten(0, 1)
        rows = torch.stack([h / (1 + math.exp(-float(slot.gate[0, :-1] @ h + slot.gate[0, -1]))) for h in inputs])
        ridge = math.sqrt(0.1 * float((rows**2).sum()) / 16) * torch.eye(16, dtype=F64)
        expected = torch.linalg.lstsq(
            torch.cat([rows, ridge]), torch.cat([torch.stack(targets), torch.zeros(16, 16, dtype=F64)])
        ).solution
        torch.testing.assert_close(slot.up[0] @ slot.down[0], expected.mT, rtol=1e-6, atol=1e-10)

    def test_a_wider_rank_carries_more(self) -> None:
        """What a linear slot can carry of the fast level by regression alone."""
        model = build(rank=16)
        life = lived(model)
        few = replace(CONFIG, warm_start=True, seeding=replace(SEEDING, steps=0))
        left = sleep(model, life, few, "night", only=[FAST])[1].pairs[0]
        narrow = build(rank=1)
        more = sleep(narrow, lived(narrow), few, "night", only=[FAST])[1].pairs[0]
        assert left.before == pytest.approx(more.before)
        assert left.started < more.started < left.before

    def test_rehearsal_keeps_the_student_what_it_was(self, model, views) -> None:
        """Taught with and without dreams of its own: on those, it stays nearer to itself."""
        views, place, dreams = views
        views = views._replace(student=masked(model, views.student, place.hosts, 0))
        views = views._replace(student=activate(model, views.student, place.hosts, 0, draws("slot")))
        config = replace(SEEDING, steps=40, on_policy=0.0, divergence_share=1.0, beta=0.0)
        own = Rehearsal(views.student, (Dreams(torch.randint(128, 256, (8, 12), generator=draws("own")), 1),))
        apart = {}
        for name, rehearsal in (("without", None), ("with", own)):
            done = seed(model, views, place, dreams, config, draws("seeding"), rehearsal=rehearsal)
            assert done.outcome == "done"
            apart[name] = distance(model, Views(views.student, done.weights), own.dreams)
            assert distance(model, views._replace(student=done.weights), dreams) < distance(model, views, dreams)
        assert apart["with"] < 0.7 * apart["without"]

    def test_memory_is_at_most_that_of_a_training_step(self, model, views) -> None:
        """Bytes that the graph of a seeding step keeps, against those of a training step on as many tokens."""
        views, place, dreams = views
        config = replace(SEEDING, on_policy=0.3)
        batch = draw(model, views, views.student, dreams, config, draws("step"))

        def kept(run) -> int:
            held: dict[int, int] = {}

            def pack(x: torch.Tensor) -> torch.Tensor:
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                run()
            return sum(held.values())

        def a_training_step() -> None:
            tokens = torch.cat([batch.written, batch.dreamt])
            own = Decoder(model.model.config).double()
            logits = own(tokens)[0]
            F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()

        leaves = place.leaves(model, views.student)
        a_step = lambda: objective(model, views, place.put(model, views.student, leaves), batch, config)  # noqa: E731
        assert kept(a_step) <= 1.15 * kept(a_training_step)


def _reward(a: list[int], b: list[int], alike: bool) -> float:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        row, last = [i + 1], row
        for j, y in enumerate(b):
            row.append(min(last[j + 1] + 1, row[j] + 1, last[j] + (x != y)))
    longest = max(len(a), len(b))
    spelled = 1 - row[-1] / longest if row[-1] <= 0.5 * longest else 0.0
    return 0.3 * alike + 0.7 * spelled


class TestPruning:
    def test_importance_and_budget(self, model, life) -> None:
        hosts, weights = levels_of(model, 48), life.levels.weights
        for slot, size in ((0, 0.3), (2, 0.01)):
            weights = activate(model, weights, hosts, slot, draws("grow", slot))
            for host in hosts:
                up = bank(model, weights, host).up
                up[slot] += size * torch.randn(up.shape[1:], generator=draws(host), dtype=F64)
        dreams = [Dreams(TEXT[:96].view(8, 12), 1)]
        said = importance(model, weights, hosts, dreams)
        assert said[0] > 5 * said[2] > 0
        assert said[1] == 0
        shut = bank(model, weights, 1).gate.clone()
        shut[0, -1] = -30.0
        closed = replace_bank(model, weights, 1, bank(model, weights, 1)._replace(gate=shut))
        assert importance(model, closed, [1], dreams)[0] < 1e-9 < importance(model, weights, [1], dreams)[0]
        one, done = within_budget(model, weights, hosts, 1, dreams)
        assert len(done) == 1
        assert done[0].startswith("merged slots 0 and 2, error ")
        with pytest.raises(ValueError, match="slots are merged on dreams"):
            within_budget(model, weights, hosts, 1, [])
        assert active(model, one, hosts).sum() == 1
        apart = distance(model, Views(weights, one), dreams)
        assert apart < 0.2 * distance(model, Views(weights, masked(model, weights, hosts, 0)), dreams)
        for given in ((), dreams):
            pruned = prune_slots(model, weights, hosts, 0.5, given)
            found, old = bank(model, pruned, 1), bank(model, weights, 1)
            assert float((found.down[0] == 0).double().mean()) == 0.5
            assert torch.equal(found.down[0][found.down[0] != 0], old.down[0][found.down[0] != 0])
            assert torch.equal(found.gate, old.gate)


def test_without_the_semantic_reward(model, life) -> None:
    config = replace(CONFIG, seeding=replace(SEEDING, reward=imitation(meaning=nothing())))
    _, report = sleep(model, life, config, "night", only=[FAST])
    assert all(reward <= 0.5 for reward in report.pairs[0].rewards)


def test_answers_are_the_models(model, life) -> None:
    got = answers(model, life.levels.weights, TEXT[None, :9], None)
    assert torch.equal(got, model(TEXT[None, :9], weights=life.levels.weights)[0])


class Foreign(torch.nn.Module):
    """Not of this library: a table, one MLP a block, a recurrent state; two blocks whose MLPs are levels."""

    levels = (level(8, step_size=0.5, structure=mlp(expansion=2.0, residual=False)), level(32, step_size=0.5)) * 2

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(30, 8, generator=generator, dtype=F64)
        self.maps = [tuple(w.double() for w in lvl.structure.init(8, 8, generator=generator)) for lvl in self.levels]

    def level_weights(self):
        return tuple(self.maps)

    def init_state(self, batch: int):
        return (torch.zeros(batch, 8, dtype=F64),)

    def forward(self, tokens, state=None, *, weights=None, taps=None, slots=(), valid=None):
        (memory,) = self.init_state(len(tokens)) if state is None else state
        outputs = []
        for t in range(tokens.shape[1]):
            memory = 0.5 * memory + self.table[tokens[:, t]]
            outputs.append(memory)
        x = torch.stack(outputs, 1)
        for index, maps in enumerate(self.maps if weights is None else weights):
            h = F.layer_norm(x, (8,))
            read, inputs, given = self.levels[index].structure.forward(plain(maps), h)
            if taps is not None:
                taps.append(Taps(inputs, given))
            x = x + read + (read_slots(slots[index], h) if slots else 0)
        return F.layer_norm(x, (8,)) @ self.table.mT, (memory,)


def test_any_levelled_model_that_takes_slots_can_sleep() -> None:
    model = Growing(Foreign(), slots=2, rank=3)
    text = torch.arange(100) * 7 % 30
    config = replace(CONFIG, source=any_token(vocabulary=30), warm_start=True, rehearsal=1.0)
    state, report = sleep(model, lived(model, text), config, "night")
    assert [pair.outcome for pair in report.pairs] == ["kept"], str(report)
    assert report.slots == {8: 0, 32: 1}
    onward, out = Reader(model).read(state, text[:20])
    assert out.nll.isfinite().all()
    assert int(onward.position) == 120


def test_a_configuration_is_plain_data() -> None:
    config = replace(
        CONFIG, student=paper(), when_full=merge(), source=mixture((own_samples(), prefixes(4)), (0.5, 0.5))
    )
    assert from_data(SleepConfig, to_data(config)) == config
