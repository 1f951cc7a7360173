"""What a sleep is made of: schedules, divergences, rewards, dreams, reservoirs, pruning."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestling.levels import level
from nestling.levels.slots import Slots, read_slots
from nestling.sleep import (
    Heard,
    Pair,
    after,
    as_likely,
    at_ticks,
    by_hand,
    divergence,
    draws,
    due,
    edit_distance,
    imitation,
    judged,
    keep,
    likeness,
    merge_slots,
    mixture,
    nights,
    no_reservoir,
    nothing,
    own_samples,
    pairs,
    prefixes,
    reduced_rank,
    reservoir,
    self_study,
    when_slots_fill,
    when_surprised,
)
from nestling.sleep.bound import Bound
from nestling.sleep.imitation import advantages
from nestling.sleep.prune import by_magnitude, by_wanda, merge_maps
from nestling.sleep.schedule import CONTEXT, Moment
from nestling.sleep.warm_start import RIDGE, Rows, discriminant

F64 = torch.float64
LEVELS = (level(1_000), level(5_000), level(10_000)) * 2  # two blocks
FAST, SLOW = Pair(1_000, 5_000), Pair(5_000, 10_000)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class TestSchedule:
    def test_the_published_example(self) -> None:
        slept = list(nights(LEVELS, at_ticks(), 10_000))
        assert [position for position, _ in slept] == [1_000 * k for k in range(1, 11)]
        assert sum(FAST in chosen for _, chosen in slept) == 10
        assert sum(SLOW in chosen for _, chosen in slept) == 2
        assert dict(slept)[5_000] == dict(slept)[10_000] == (SLOW, FAST)  # the slow pair first
        assert dict(slept)[4_000] == (FAST,)

    def test_a_period_need_not_divide_another(self) -> None:
        levels = (level(40), level(100), level(math.inf))
        slept = dict(nights(levels, at_ticks(), 240))
        assert sorted(slept) == [40, 80, 100, 120, 160, 200, 240]
        assert slept[100] == (Pair(100, math.inf),)
        assert slept[200] == (Pair(100, math.inf), Pair(40, 100))
        assert due(levels, 0) == ()

    def test_short_periods_can_be_passed_over(self) -> None:
        assert dict(nights(LEVELS, at_ticks(at_least=5_000), 12_000)) == {5_000: (SLOW,), 10_000: (SLOW,)}

    def test_after_so_many_tokens_every_pair(self) -> None:
        assert dict(nights(LEVELS, after(4_000), 9_000)) == {4_000: (SLOW, FAST), 8_000: (SLOW, FAST)}
        assert list(nights(LEVELS, by_hand(), 9_000)) == []

    def test_surprise(self) -> None:
        part = when_surprised(0.5, at_least=100)
        assert part.pairs(LEVELS, Moment(200, 200, surprise=3.5, best=3.0)) == (SLOW, FAST)
        assert part.pairs(LEVELS, Moment(200, 200, surprise=3.4, best=3.0)) == ()
        assert part.pairs(LEVELS, Moment(200, 50, surprise=3.5, best=3.0)) == ()
        assert part.pairs(LEVELS, Moment(200, 200)) == ()
        assert part.next(LEVELS, 255) == part.next(LEVELS, 0) == 256

    def test_slots(self) -> None:
        part = when_slots_fill(0.8, each=100)
        assert part.pairs(LEVELS, Moment(200, 200, used={1_000: 0.9, 5_000: 0.8, 10_000: 1.0})) == (SLOW, FAST)
        assert part.pairs(LEVELS, Moment(200, 200, used={1_000: 0.0, 5_000: 0.8})) == (SLOW,)
        assert part.pairs(LEVELS, Moment(200, 200)) == ()
        assert part.next(LEVELS, 100) == 200

    def test_the_context_is_faster_than_any_level(self) -> None:
        assert pairs(LEVELS, context=True) == (SLOW, FAST, Pair(CONTEXT, 1_000))


def test_a_bound_is_passed_once_its_seconds_are() -> None:
    assert [Bound(lambda now=now: now, 2.0, 1.0).passed() for now in (2.9, 3.0, 3.1)] == [False, True, True]


class TestDivergence:
    P, Q = random(5, 7), random(5, 7, seed=1)

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_by_the_definition(self, beta: float) -> None:
        p, q = self.P.softmax(-1), self.Q.softmax(-1)
        m = beta * p + (1 - beta) * q
        expected = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        torch.testing.assert_close(divergence(self.P, self.Q, beta), expected, rtol=0, atol=1e-12)
        assert (divergence(self.P, self.Q, 0.5) < math.log(2)).all()

    def test_its_ends_are_the_two_directions_of_kl(self) -> None:
        log_p, log_q = self.P.log_softmax(-1), self.Q.log_softmax(-1)
        forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(divergence(self.P, self.Q, 0.0), forward, rtol=0, atol=1e-12)
        torch.testing.assert_close(divergence(self.P, self.Q, 1.0), reverse, rtol=0, atol=1e-12)
        near = 1e-6
        torch.testing.assert_close(divergence(self.P, self.Q, near) / near, forward, rtol=1e-4, atol=0)
        torch.testing.assert_close(divergence(self.P, self.Q, 1 - near) / near, reverse, rtol=1e-4, atol=0)
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 1.5"):
            divergence(self.P, self.Q, 1.5)

    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_gradients(self, beta: float) -> None:
        q = self.Q.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: divergence(self.P, x, beta), q)


def slow_distance(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return len(a) + len(b)
    same = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


class TestReward:
    def test_edit_distance(self) -> None:
        a = torch.randint(0, 3, (20, 6), generator=torch.Generator().manual_seed(0))
        b = torch.randint(0, 3, (20, 4), generator=torch.Generator().manual_seed(1))
        expected = [slow_distance(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert edit_distance(a, b).tolist() == expected

    @pytest.mark.parametrize(
        ("written", "dreamt", "same", "expected"),
        [
            ([1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 5, 6], True, 0.9),  # one substitution
            ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6], True, 0.4 + 0.6 * 6 / 7),  # one insertion
            ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], False, 0.6),  # an exact copy that the judge refuses
            ([9, 9, 9, 9, 5, 6], [1, 2, 3, 4, 5, 6], True, 0.4),  # too far apart
        ],
    )
    def test_check_values(self, written, dreamt, same: bool, expected: float) -> None:
        reward = imitation(share=0.4, meaning=judged(lambda a, b: same))
        zero = torch.zeros(1)
        got = reward.of(Heard(torch.tensor([written]), torch.tensor([dreamt]), zero, zero))
        assert float(got) == pytest.approx(expected, abs=1e-12)

    def test_the_threshold_is_inclusive(self) -> None:
        a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 9]])
        assert float(likeness(a, b, 0.5)) == 0.5
        assert float(likeness(a, b, 0.49)) == 0.0

    def test_meanings(self) -> None:
        text = torch.zeros(3, 2, dtype=torch.int64)
        heard = Heard(text, text, torch.tensor([1.0, 1.5, 1.6]), torch.ones(3))
        assert as_likely(0.5).agrees(heard).tolist() == [1, 1, 0]
        assert nothing().agrees(heard).tolist() == [0, 0, 0]

    def test_the_baseline_leaves_one_out(self) -> None:
        got = advantages(torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2]]))
        torch.testing.assert_close(got, torch.tensor([[0.75, -0.75, 0.0], [0.0, 0.0, 0.0]]))
        with pytest.raises(ValueError, match="at least 2 completions"):
            advantages(torch.ones(3, 1))


class TestReservoir:
    def test_by_default_nothing_is_kept(self) -> None:
        held = keep(no_reservoir(), torch.arange(100), "life")
        assert held.bytes_stored == 0
        assert held.pieces.numel() == held.rest.numel() == 0

    def test_parts_make_no_difference(self) -> None:
        text = torch.randint(0, 256, (1_003,), generator=torch.Generator().manual_seed(0))
        whole, parts = keep(reservoir(4, 10), text, "life"), reservoir(4, 10)
        for part in text.split([3, 500, 7, 493]):
            parts = keep(parts, part, "life")
        assert torch.equal(whole.pieces, parts.pieces)
        assert torch.equal(whole.rest, parts.rest)
        assert whole.filled == 4
        assert whole.seen == 100
        assert whole.bytes_stored == 43

    def test_every_piece_is_kept_as_often(self) -> None:
        counts = torch.zeros(20)
        for seed in range(400):
            held = keep(reservoir(5, 1), torch.arange(20), seed)
            counts[held.pieces[:, 0]] += 1
        assert (counts - 100).abs().max() < 45  # five deviations

    def test_sources(self) -> None:
        held = keep(reservoir(4, 10), torch.arange(200), "life")
        generator = draws("night")
        assert [p.tolist() for p in own_samples().prompts(2, held, generator)] == [[[10], [10]]]
        (given,) = prefixes(6).prompts(3, held, generator)
        assert given.shape == (3, 6)
        assert ((given[:, 1:] - given[:, :-1]) == 1).all()
        assert (given[:, 0] % 10 == 0).all()
        asked = self_study(kinds=("question", "creative"), tokens=5).prompts(5, held, generator)
        assert [len(p) for p in asked] == [3, 2]
        assert bytes(asked[0][0, 5:].tolist()) == b"\n\nQuestion: "
        mixed = mixture((own_samples(), prefixes(6)), (0.25, 0.75)).prompts(8, held, generator)
        assert [tuple(p.shape) for p in mixed] == [(2, 1), (6, 6)]
        with pytest.raises(ValueError, match=r"prefixes\(tokens=6\) needs pieces of wake text"):
            prefixes(6).prompts(3, no_reservoir(), generator)
        with pytest.raises(ValueError, match="a share in"):
            mixture((own_samples(),), (0.5,))
        with pytest.raises(ValueError, match="kinds are structuring"):
            self_study(kinds=("poetry",))

    def test_draws_are_those_of_their_words(self) -> None:
        one, same, other = (torch.rand(3, generator=draws(7, key)) for key in ("a", "a", "b"))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestCompressing:
    def test_a_merge_is_the_best_map_of_its_rank(self) -> None:
        downs, ups = [random(3, 10, seed=s) for s in (0, 1)], [random(8, 3, seed=s) for s in (2, 3)]
        low = merge_maps(downs, ups, 3)
        total = sum(u @ d for u, d in zip(ups, downs, strict=True))
        left, values, right = torch.linalg.svd(total)
        best = left[:, :3] * values[:3] @ right[:3]
        torch.testing.assert_close(low.up @ low.down, best, rtol=0, atol=1e-10)
        assert low.error == pytest.approx(float(values[3:6].square().sum().sqrt()))
        assert float((total - low.up @ low.down).norm()) == pytest.approx(low.error)

    def test_slots_of_low_rank_are_merged_exactly(self) -> None:
        bank = Slots(random(3, 4, 6), random(3, 5, 4, seed=1), torch.zeros(3, 7, dtype=F64), torch.ones(3, dtype=F64))
        gate = bank.gate.clone()
        gate[:, -1] = torch.tensor([0.3, -0.4, 0.1])
        down, up = bank.down.clone(), bank.up.clone()
        down[0, 2:] = down[1, 2:] = 0  # rank 2 each
        bank = Slots(down, up, gate, bank.active)
        h = random(9, 6, seed=3)
        merged, error = merge_slots(bank, 0, 1, h, random(5, 6, seed=4))
        torch.testing.assert_close(read_slots(merged, h), read_slots(bank, h), rtol=0, atol=1e-10)
        assert error < 1e-10
        assert merged.active.tolist() == [1, 0, 1]
        assert not any(part[1].any() for part in merged[:3])
        assert all(torch.equal(a[2], b[2]) for a, b in zip(merged, bank, strict=True))

    def test_gates_that_bend_are_merged_as_they_answer(self) -> None:
        """The error is what was lost on rows that were not learned from; one gate for both loses nothing."""
        h, held = random(400, 6, seed=3), random(90, 6, seed=4)
        gate = 2 * random(2, 7, seed=5)
        down, up = random(2, 4, 6), random(2, 5, 4, seed=1)
        down[:, 2:] = 0  # rank 2 each

        def said(bank: Slots) -> torch.Tensor:
            rows = [
                sum(
                    bank.active[e]
                    * torch.sigmoid(bank.gate[e, :-1] @ x + bank.gate[e, -1])
                    * bank.up[e]
                    @ bank.down[e]
                    @ x
                    for e in range(2)
                )
                for x in held
            ]
            return torch.stack(rows)

        bank = Slots(down, up, gate, torch.ones(2, dtype=F64))
        merged, error = merge_slots(bank, 0, 1, h, held)
        assert error == pytest.approx(float((said(merged) - said(bank)).norm() / said(bank).norm()))
        folded = torch.sigmoid(gate[:, -1])[:, None, None] * up @ down  # every gate as it is at its bias
        constant = float((held @ folded.sum(0).mT - said(bank)).norm() / said(bank).norm())
        assert 0.05 < error < 0.7 * constant
        same = Slots(down, up, gate[:1].expand(2, -1).clone(), bank.active)
        assert merge_slots(same, 0, 1, h, held)[1] < 1e-9

    def test_magnitude_and_wanda(self) -> None:
        weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
        assert by_magnitude(weight, 0.5).tolist() == [[4, -3, 2, 1], [0, 0, 0, 0]]
        inputs = torch.tensor([[0.1, 1.0, 1.0, 8.0]])
        expected = [[0.0, -3.0, 0.0, 1.0], [0.0, 0.0, 0.3, 0.4]]  # 0.4 3 2 8; 0.01 0.2 0.3 3.2
        torch.testing.assert_close(by_wanda(weight, inputs, 0.5), torch.tensor(expected))
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
            by_magnitude(weight, 1)

    def test_reduced_rank_regression_is_the_optimum(self) -> None:
        h, y = random(60, 8), random(60, 6, seed=1) + random(60, 8) @ random(8, 6, seed=2)
        fit = reduced_rank([Rows(h[:13], y[:13]), Rows(h[13:], y[13:])], 2)
        down, up = (random(2, 8, seed=4).requires_grad_(), random(6, 2, seed=5).requires_grad_())
        optimizer = torch.optim.LBFGS([down, up], max_iter=2_000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = (y - h @ down.mT @ up.mT).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        found = float((y - h @ fit.down.mT @ fit.up.mT).square().sum())
        assert found == pytest.approx(float(loss().detach()), rel=1e-8)
        assert fit.left == pytest.approx(found / float(y.square().sum()))
        left, values, right = torch.linalg.svd(torch.linalg.lstsq(h, y).solution)
        cut = left[:, :2] * values[:2] @ right[:2]
        assert found < float((y - h @ cut).square().sum())  # which truncating the weights does not reach

    def test_directions_that_dreams_hardly_have_stay_bounded(self) -> None:
        """W is at most |y| / (2 sqrt(ridge)); without one, text that has the direction is answered by hundreds."""
        h, y = random(200, 6), random(200, 5, seed=1)
        h[:, 5] *= 1e-4
        text = torch.zeros(6, dtype=F64)
        text[5] = 1.0
        sizes = []
        for ridge in (0.0, RIDGE):
            fit = reduced_rank([Rows(h, y)], 4, ridge)
            sizes.append(float((fit.up @ fit.down @ text).norm()))
        assert sizes[0] > 100
        assert sizes[1] < 1e-2
        least = RIDGE * float(h.square().sum()) / 6
        assert float((fit.up @ fit.down).norm()) <= float(y.norm()) / (2 * math.sqrt(least))

    def test_the_discriminant_is_the_chance_of_the_first_kind(self) -> None:
        """Of normal rows with one covariance: by Bayes' rule, on rows that it was not made from."""
        mix, a, b = random(3, 3, seed=1), random(3, seed=2) * 0.3, random(3, seed=3) * 0.3
        these, others = random(20_000, 3, seed=4) @ mix + a, random(10_000, 3, seed=5) @ mix + b
        gate = discriminant(these.split(900), others.split(7_000), ridge=0.0)
        h = random(5, 3, seed=6) @ mix
        covariance = mix.mT @ mix
        chances = [torch.distributions.MultivariateNormal(mean, covariance).log_prob(h) for mean in (a, b)]
        expected = torch.sigmoid(chances[0] - chances[1] + math.log(2))
        torch.testing.assert_close(torch.sigmoid(h @ gate[:3] + gate[3]), expected, rtol=0, atol=0.02)

    def test_rank_beyond_what_there_is(self) -> None:
        fit = reduced_rank([Rows(random(30, 4), random(30, 3, seed=1))], 5)
        assert fit.down.shape == (5, 4)
        assert fit.up.shape == (3, 5)
