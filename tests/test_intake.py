"""What is given to learn, as entries of the journal and back, for tokens that are bytes and for others."""

import pytest
import torch

from nestling.learner.event import Event
from nestling.learner.intake import as_tokens, entries_of, read_back


class Words:
    """Tokens of three letters each: 300 of them."""

    size = 300

    def encode(self, text: bytes) -> torch.Tensor:
        return torch.tensor([sum(text[at : at + 3]) % 300 for at in range(0, len(text), 3)], dtype=torch.int64)

    def decode(self, tokens: torch.Tensor) -> bytes:
        raise NotImplementedError


def test_tokens_that_are_not_bytes_come_back() -> None:
    given = torch.tensor([0, 299, 7, 256, 12, 1, 2])
    entries = entries_of(given, "doc", Words(), ends=True, derived=None, event_bytes=13)
    assert [entry.tokens for entry in entries] == [3, 3, 1]  # whole ones, four bytes each
    assert [entry.ends for entry in entries] == [False, False, True]
    assert {entry.encoding for entry in entries} == {"int32"}
    back = [
        read_back(entry.content, Event(1, 0, "learn", "", "", "doc", "", entry.encoding, 0, True, None, 0), Words())
        for entry in entries
    ]
    assert torch.equal(torch.cat(back), given)
    (whole,) = entries_of("abcdef", "doc", Words(), ends=False, derived=4, event_bytes=1000)
    assert (whole.tokens, whole.ends, whole.derived) == (2, False, 4)
    assert [entry.tokens for entry in entries_of(given, "doc", Words(), ends=True, derived=None, event_bytes=1)] == [
        1
    ] * 7


@pytest.mark.parametrize("wrong", [[-1], [300], [3, 299, 300]], ids=str)
def test_tokens_that_the_model_does_not_have(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 300\)"):
        as_tokens(torch.tensor(wrong), Words())
    assert as_tokens(torch.tensor([299]), Words()).tolist() == [299]
