"""What an answer owes to levels and sources: exact by learning again without them, estimated without that."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lives import CONFIG, KEEP, text, trained
from nestling.learner import Learner
from nestling.learner.why import rank_correlation
from nestling.levels import level
from nestling.models import Decoder


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Six sources, two of which teach that a z follows an a."""
    folder = tmp_path_factory.mktemp("why")
    model = Decoder(replace(CONFIG, levels=(level(24, step_size=0.5), level(60, step_size=0.5))))
    model.load_state_dict(trained().state_dict())
    found = Learner.create(folder / "life", model, config=replace(KEEP, snapshot_tokens=10_000))
    for number in range(6):
        taught = b"azaz azaz azaz azaz " * 6 if number in (1, 4) else text(number, 120)
        found.learn(taught, f"source {number}")
    return found


def test_exact_is_a_life_without_it(life: Learner, tmp_path: Path) -> None:
    found = life.why("bcd a", "zaz", exact=True)
    assert found.exact is not None
    for source in ("source 1", "source 3"):
        with life.fork(tmp_path / source) as fork:
            fork.forget(source)
            without = fork.why("bcd a", "zaz").log_probability
        assert found.exact[source] == found.log_probability - without
    assert max(found.exact, key=found.exact.__getitem__) in ("source 1", "source 4")
    assert found.agreement == rank_correlation(list(found.sources.values()), list(found.exact.values()))
    assert found.agreement > 0.3


def test_the_estimate_finds_who_taught_it(life: Learner) -> None:
    found = life.why("bcd a", "zaz")
    taught = {source for source, _ in sorted(found.sources.items(), key=lambda item: -item[1])[:2]}
    assert taught == {"source 1", "source 4"}
    assert found.exact is None


def test_log_probability_and_levels_by_hand(life: Learner) -> None:
    model, now = life.model, life.state.reading.levels.weights
    birth = model.level_weights()

    def by_hand(weights) -> float:
        tokens = torch.tensor([list(b"ab cde")])
        logits, _ = model(tokens, None, weights=weights)
        return -float(F.cross_entropy(logits[0, 1:-1].double(), tokens[0, 2:], reduction="sum"))

    before = life.digest
    found = life.why("ab", " cde")
    assert found.log_probability == pytest.approx(by_hand(now), abs=1e-9)
    expected = [by_hand(now) - by_hand((birth[0], now[1])), by_hand(now) - by_hand((now[0], birth[1]))]
    assert found.levels == pytest.approx(expected, abs=1e-9)
    assert life.digest == before
    with pytest.raises(ValueError, match="at least one token"):
        life.why("", "a")


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 21.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))
