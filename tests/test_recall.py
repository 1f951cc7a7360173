"""Multi-query associative recall: what the sequences are, and what counts as an answer."""

import pytest
import torch
from torch.nn import functional as F

from nestling.tasks.recall import chance, draw


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(64, 16, 64), (65, 4, 33), (8, 1, 8), (20, 5, 12)])
def test_every_key_is_asked_once_and_its_value_is_wanted(length: int, pairs: int, vocabulary: int, noise: bool) -> None:
    drawn = draw(50, length, pairs, seed=1, vocabulary=vocabulary, noise=noise)
    assert drawn.tokens.shape == drawn.targets.shape == drawn.asked.shape == (50, length)
    for tokens, targets, asked in zip(drawn.tokens.tolist(), drawn.targets.tolist(), drawn.asked.tolist(), strict=True):
        known = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(known) == pairs
        assert len(set(known.values())) == pairs
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in known.items())
        questions = [t for t, there in enumerate(asked) if there]
        assert {tokens[t] for t in questions} == known.keys()
        assert len(questions) == pairs
        assert all(t >= 2 * pairs and t % 2 == 0 for t in questions)
        assert all(targets[t] == known[tokens[t]] for t in questions)
        assert all(targets[t] == 0 for t in range(length) if not asked[t])
        others = [tokens[t] for t in range(2 * pairs, length) if not asked[t]]
        assert all(0 <= token < vocabulary for token in others)
        assert noise or not any(others)
    if noise:
        after = drawn.tokens[:, 2 * pairs :][~drawn.asked[:, 2 * pairs :]]
        assert after.unique().numel() > vocabulary // 2, "any token at all"


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("pairs", "writes"), [(1, 9), (4, 5), (8, 8), (5, 32)])
def test_of_a_key_that_returns_the_last_value_is_wanted(pairs: int, writes: int, noise: bool) -> None:
    length = 2 * (writes + pairs) + 7
    drawn = draw(50, length, pairs, seed=1, writes=writes, vocabulary=64, noise=noise)
    assert drawn.tokens.shape == (50, length)
    for tokens, targets, asked in zip(drawn.tokens.tolist(), drawn.targets.tolist(), drawn.asked.tolist(), strict=True):
        known: dict[int, int] = {}
        for at in range(0, 2 * writes, 2):
            known[tokens[at]] = tokens[at + 1]  # a later one replaces it
        assert len(known) == pairs
        assert len(set(tokens[1 : 2 * writes : 2])) == writes, "each time another value"
        assert all(1 <= key < 32 <= value < 64 for key, value in known.items())
        questions = [t for t, there in enumerate(asked) if there]
        assert sorted(tokens[t] for t in questions) == sorted(known)
        assert all(t >= 2 * writes and t % 2 == 0 for t in questions)
        assert all(targets[t] == known[tokens[t]] for t in questions)
        assert all(targets[t] == 0 for t in range(length) if not asked[t])
        assert noise or all(tokens[t] == 0 for t in range(2 * writes, length) if not asked[t])


def test_keys_return_as_chance_has_it() -> None:
    """Three keys, seven pairs: four besides the first three. A key has 1 + X pairs, X binomial with mean 4 / 3 and
    variance 8 / 9, so that two places hold the same key with a chance of 3 E[(1 + X) X] / 42 = 2 / 7, wherever."""
    keys = draw(6000, 20, 3, seed=0, writes=7, vocabulary=16).tokens[:, 0:14:2]
    alike = (keys[:, :, None] == keys[:, None]).double().mean(0)
    torch.testing.assert_close(alike, torch.where(torch.eye(7) > 0, 1.0, 2 / 7).double(), rtol=0, atol=0.025)
    times = torch.stack([(keys == key).sum(1) for key in range(1, 8)], 1)
    found = torch.bincount(times[times > 0] - 1, minlength=5) / (3 * 6000)
    wanted = torch.distributions.Binomial(4, torch.tensor(1 / 3)).log_prob(torch.arange(5.0)).exp()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)


def test_pairs_that_are_written_once_are_what_they_were() -> None:
    """By default, and where as many pairs are written as there are keys."""
    plain, same = (draw(9, 20, 5, 1, vocabulary=12, **more) for more in ({}, {"writes": 5}))
    assert torch.equal(plain.tokens, same.tokens)
    assert torch.equal(plain.targets, same.targets)
    assert plain.tokens[0].tolist() == [5, 11, 2, 7, 3, 9, 4, 10, 1, 8, 3, 0, 5, 0, 1, 0, 4, 0, 2, 0]


def test_keys_values_and_places_are_all_used() -> None:
    drawn = draw(2000, 32, 4, seed=0, vocabulary=16, power=None)
    assert set(drawn.tokens[:, 0].tolist()) == set(range(1, 8))
    assert set(drawn.tokens[:, 1].tolist()) == set(range(8, 16))
    assert set(drawn.asked.nonzero()[:, 1].tolist()) == set(range(8, 32, 2))


def test_gaps_follow_the_power_law() -> None:
    """One question: the i-th place has a chance of i^(power - 1) over their sum; without a power all are alike."""
    places = torch.arange(1, 16, dtype=torch.float64)
    for power, chances in ((0.01, places ** (-0.99)), (0.5, places ** (-0.5)), (None, torch.ones_like(places))):
        found = draw(20_000, 32, 1, seed=3, vocabulary=8, power=power).asked[:, 2::2].double().mean(0)
        torch.testing.assert_close(found, chances / chances.sum(), rtol=0, atol=0.015)


def test_the_seed_says_it_all() -> None:
    random = torch.get_rng_state()
    one, again, other = (draw(9, 64, 8, seed=seed, noise=True) for seed in (5, 5, 6))
    assert torch.equal(one.tokens, again.tokens)
    assert torch.equal(one.targets, again.targets)
    assert torch.equal(one.asked, again.asked)
    assert not torch.equal(one.tokens, other.tokens)
    assert torch.equal(random, torch.get_rng_state())


def test_accuracy_counts_the_questions_only() -> None:
    drawn = draw(10, 32, 8, seed=2, vocabulary=32)
    right = F.one_hot(drawn.targets, 32).double()
    assert drawn.accuracy(right) == 1.0
    wrong_elsewhere = torch.where(drawn.asked[..., None], right, 1.0 - right)
    assert drawn.accuracy(wrong_elsewhere) == 1.0
    half = right.clone()
    half[:5] = F.one_hot((drawn.targets[:5] + 1) % 32, 32).double()
    assert drawn.accuracy(half) == 0.5


def test_a_guess_among_the_values_is_right_by_chance() -> None:
    drawn = draw(3000, 64, 16, seed=4, vocabulary=64)
    guess = torch.zeros(3000, 64, 64)
    guess[..., 32:] = torch.rand(3000, 64, 32, generator=torch.Generator().manual_seed(0))
    assert abs(drawn.accuracy(guess) - chance(64)) < 0.003
    assert chance(64) == 1 / 32
    assert chance(33) == 1 / 17


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": 0}, "pairs must be 1 to 15, the keys in a vocabulary of 32, got 0"),
        ({"pairs": 16}, "pairs must be 1 to 15"),
        ({"length": 31}, r"length must be at least 2 \* \(writes \+ pairs\) = 32 tokens, got 31"),
        ({"writes": 9}, r"length must be at least 2 \* \(writes \+ pairs\) = 34 tokens, got 32"),
        ({"writes": 7}, "writes must be 8 to 16, the pairs and the values in a vocabulary of 32, got 7"),
        ({"writes": 17}, "writes must be 8 to 16"),
        ({"power": 0.0}, "power must be more than 0, or None, got 0.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(**{"count": 2, "length": 32, "pairs": 8, "seed": 0, "vocabulary": 32} | changes)
