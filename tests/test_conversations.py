"""Conversations: sequence states of their own; what one hears, no other and no level ever knows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lives import KEEP, MODEL, text
from nestling.learner import Busy, Learner
from nestling.learner.conversation import conversations
from nestling.learner.files import numbered
from nestling.learner.intake import as_tokens
from nestling.learner.voice import Voice, draws
from nestling.memory.state import flatten


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Learner]:
    with Learner.create(tmp_path / "life", MODEL, config=KEEP) as found:
        found.learn(text(1), "one")
        yield found


def tokens(life: Learner, said: bytes) -> torch.Tensor:
    return as_tokens(said, life.tokens)


def test_the_state_holds_all_that_was_said(life: Learner) -> None:
    """The last token that was written is in the state: it is that of a model that read everything at once."""
    with life.conversation("a") as talk:
        talk.hear(tokens(life, b"hello there"))
        said = list(talk.answer(7))
        talk.hear(tokens(life, b"and again"))
        everything = [token for turn in talk.turns for token in turn.tokens]
        assert everything == [*b"hello there", *said, *b"and again"]
        weights = life.state.reading.levels.weights
        with torch.no_grad():
            logits, state = MODEL(torch.tensor([everything]), weights=weights)
        assert talk.voice.logits is not None
        torch.testing.assert_close(talk.voice.logits, logits[0, -1], rtol=0, atol=1e-5)
        for name, tensor in flatten(talk.voice.state).items():
            torch.testing.assert_close(tensor, flatten(state)[name], rtol=0, atol=1e-5)


def test_a_secret_in_one_changes_no_logit_of_another(life: Learner) -> None:
    def logits_of(secret: bytes, name: str) -> torch.Tensor:
        with life.conversation(f"{name}-other") as other:
            other.hear(tokens(life, secret))
            list(other.answer(5))
        with life.conversation(name) as talk:
            talk.hear(tokens(life, b"what is it?"))
            assert talk.voice.logits is not None
            return talk.voice.logits

    before = life.digest
    assert torch.equal(logits_of(b"the secret is 8731", "a"), logits_of(b"there is nothing", "b"))
    assert life.digest == before


def test_saved_and_opened_it_goes_on_as_if_never_closed(life: Learner) -> None:
    def replies(name: str, closing: bool) -> list[list[int]]:
        found, talk = [], life.conversation(name)
        for number in range(3):
            talk.hear(tokens(life, text(number, 9)))
            talk.seed = 4
            talk.name = "same"  # the draws are keyed by the name
            found.append(list(talk.answer(6)))
            if closing:
                talk.close()
                talk = life.conversation(name)
        talk.close()
        return found

    assert replies("open", closing=False) == replies("closed", closing=True)


def test_learning_goes_on_under_a_conversation_that_stays_where_it_was(life: Learner) -> None:
    """It is pinned to its snapshot, which is kept however much is learned meanwhile."""
    with life.conversation("a") as talk:
        talk.hear(tokens(life, b"hello"))
        first = talk.voice.logits
        weights = talk.voice.weights
    for number in range(9):
        life.learn(text(number), "more")
    with life.conversation("a") as talk:
        kept = flatten(weights)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in flatten(talk.voice.weights).items())
        again = Voice(MODEL, talk.voice.weights)
        again.read(tokens(life, b"hello"))
        assert torch.equal(again.logits, first)  # type: ignore[arg-type]
    with life.conversation("b") as talk:
        talk.hear(tokens(life, b"hello"))
        assert not torch.equal(talk.voice.logits, first)  # type: ignore[arg-type]


def test_draws_depend_on_nothing_but_their_key() -> None:
    one = torch.rand(4, generator=draws(1, "conversation a turn 1"))
    assert torch.equal(one, torch.rand(4, generator=draws(1, "conversation a turn 1")))
    for other in (
        draws(2, "conversation a turn 1"),
        draws(1, "conversation a turn 2"),
        draws(1, "conversation b turn 1"),
    ):
        assert not torch.equal(one, torch.rand(4, generator=other))


def test_each_turn_draws_anew(life: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def heard(seed: int, key: str) -> torch.Generator:
        keys.append(key)
        return draws(seed, key)

    monkeypatch.setattr("nestling.learner.conversation.draws", heard)
    for name in "ab":
        with life.conversation(name) as talk:
            for _ in range(2):
                talk.hear(tokens(life, b"hello"))
                list(talk.answer(1))
    assert keys == [f"conversation {name} turn {turn}" for name in "ab" for turn in (1, 3)]


def test_an_answer_ends_with_what_it_is_to_stop_at(life: Learner) -> None:
    with life.conversation("a") as talk:
        talk.hear(tokens(life, b"hello"))
        said = list(talk.answer(40))
    with life.conversation("b") as talk:
        talk.name = "a"  # the draws are keyed by the name
        talk.hear(tokens(life, b"hello"))
        assert list(talk.answer(40, stop=said[5])) == said[: said.index(said[5]) + 1]


def test_a_damaged_turn_falls_back_to_the_one_before(life: Learner) -> None:
    """A newer format, and one of which nothing is left, are refused in words."""
    with life.conversation("a") as talk:
        for said in (b"one", b"two"):
            talk.hear(tokens(life, said))
        before, newest = numbered(talk.folder)
    (newest / "sequence.safetensors").write_bytes(b"torn")
    with life.conversation("a") as talk:
        assert [bytes(turn.tokens) for turn in talk.turns] == [b"one"]
    about = before / "conversation.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 99'))
    (before / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"damaged.*format 99; this version reads 1"):
        life.conversation("a")


def test_one_at_a_time(life: Learner) -> None:
    with life.conversation("a"), pytest.raises(Busy, match="conversation a is open"):
        life.conversation("a")
    with pytest.raises(ValueError, match="letters, digits"):
        life.conversation("../a")


def test_readers_talk_too(life: Learner) -> None:
    life.snapshot()
    with Learner.open(life.folder, write=False) as reader, reader.conversation("a") as talk:
        talk.hear(tokens(life, b"hello"))
        assert list(talk.answer(3))
    assert conversations(life.folder) == ["a"]


def test_what_was_said_is_learned_only_when_asked(life: Learner) -> None:
    before = life.digest
    with life.conversation("a") as talk:
        talk.hear(tokens(life, b"the user's words"))
        said = bytes(talk.answer(12))
        assert life.digest == before
        life.learn_conversation(talk)
        read = [life.journal.content(event) for event in life.journal.path_events(life.at)][-1]
        assert read == b"the user's words"
        talk.hear(tokens(life, b"more"))
        life.learn_conversation(talk)
        assert life.sources()["conversation a"]["tokens"] == 16 + 4  # nothing twice
    with life.conversation("a") as talk:
        assert life.learn_conversation(talk).tokens == 0  # nor after it was closed
    with life.conversation("b") as talk:
        talk.hear(tokens(life, b"the user's words"))
        talk.hear(tokens(life, b"a document, only to be read"), "document")
        said = bytes(talk.answer(12))
        life.learn_conversation(talk, own_words=True)
    assert life.journal.content(life.journal.event(life.at)) == b"the user's words" + said


def test_forgetting_takes_the_conversations_that_knew(life: Learner) -> None:
    life.snapshot("early")
    with life.conversation("early") as talk:
        talk.hear(tokens(life, b"hello"))
    life.learn(text(2), "two")
    with life.conversation("late") as talk:
        talk.hear(tokens(life, b"hello"))
        life.learn_conversation(talk)
        life.learn(text(3), "three")
        life.forget("two")
        assert conversations(life.folder) == ["early"]
        assert set(life.sources()) == {"one", "three"}
        with pytest.raises(ValueError, match="removed"):
            talk.hear(tokens(life, b"more"))
    life.forget("conversation early")
    assert conversations(life.folder) == []


def test_generate_changes_nothing(life: Learner) -> None:
    before = life.digest
    one = list(life.generate("hello", 9, seed=3))
    assert one == list(life.generate("hello", 9, seed=3))
    assert one != list(life.generate("hello", 9, seed=4))
    assert life.digest == before
    with pytest.raises(ValueError, match="prompt is empty"):
        list(life.generate("", 4))
