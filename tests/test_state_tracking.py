"""The formal languages: strings that are in them, answers by an automaton of their own, and what counts as solved."""

import pytest
import torch
from torch.nn import functional as F

from nestling.tasks.state_tracking import BINS, LANGUAGES, NO, VOCABULARY, YES, draw

AUTOMATA = {  # (state, symbol) -> state, accepting state
    "parity": ({(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 0}, 0),
    "(aa)*": ({(0, 0): 1, (1, 0): 0}, 0),
    "(abab)*": ({(0, 0): 1, (1, 1): 2, (2, 0): 3, (3, 1): 0}, 0),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("shortest_longest", BINS.values())
def test_answers_are_those_of_the_automaton(language, shortest_longest):
    strings = draw(language, 40, *shortest_longest, seed=3)
    steps, accepting = AUTOMATA[language]
    assert strings.symbols.max() < 2
    assert shortest_longest[0] <= strings.lengths.min()
    assert strings.lengths.max() <= shortest_longest[1]
    for row, answers, length in zip(strings.symbols, strings.answers, strings.lengths.tolist(), strict=True):
        state = 0
        for symbol, answer in zip(row[:length].tolist(), answers[:length].tolist(), strict=True):
            state = steps[state, symbol]
            assert answer == (YES if state == accepting else NO)
        assert state == accepting, "the whole string is in the language"


def test_a_length_with_one_string_comes_once():
    assert draw("(aa)*", 500, 2, 50, seed=0).lengths.tolist() == list(range(2, 51, 2))
    assert draw("(abab)*", 500, 51, 100, seed=0).lengths.tolist() == list(range(52, 101, 4))
    assert len(draw("parity", 500, 2, 50, seed=0).lengths) == 500


def test_a_string_is_solved_when_every_answer_is_right():
    strings = draw("parity", 8, 5, 9, seed=1)
    perfect = F.one_hot(strings.answers, VOCABULARY).double()
    assert strings.solved(perfect) == 1.0
    wrong = perfect.clone()
    wrong[0, int(strings.lengths[0]) - 1] = perfect[0, int(strings.lengths[0]) - 1].roll(1)
    assert strings.solved(wrong) == 7 / 8
    short = int(strings.lengths.argmin())
    after = perfect.clone()
    after[short, int(strings.lengths[short]) :] = 0.0
    assert strings.solved(after) == 1.0, "what follows a string's end does not count"


def test_seeds_repeat_and_differ():
    one, again, other = (draw("parity", 20, 2, 50, seed=seed).symbols for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_varied_strings_have_shares_of_their_own():
    even, varied = (draw("parity", 300, 50, 50, seed=0, varied=flag) for flag in (False, True))
    spread = [strings.symbols.double().mean(1).std() for strings in (even, varied)]
    assert spread[0] < 0.1
    assert 0.25 < spread[1] < 0.33  # a uniform share: 1 / sqrt(12)
    assert torch.equal(varied.answers == YES, varied.symbols.cumsum(1) % 2 == 0)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"\(abab\)\* has no strings of 1 to 3 symbols"):
        draw("(abab)*", 4, 1, 3, seed=0)
    with pytest.raises(ValueError, match="unknown language 'dyck'"):
        draw("dyck", 4, 2, 50, seed=0)


def test_margins_are_those_of_positions_inside():
    strings = draw("(aa)*", 1, 2, 6, seed=0)
    logits = 2.0 * F.one_hot(strings.answers, VOCABULARY).double()
    logits[0, 1] = torch.tensor([9.0, 9.0, 0.5, 0.75])  # right is YES; other symbols do not count
    assert strings.margins(logits).tolist() == [2.0, -0.25] + [2.0] * 10, "2 + 4 + 6 positions, and none after an end"
