"""SIGKILL at seeded random moments in everything that a life can do (100 each: `make test-kill`)."""

from pathlib import Path

import pytest

from life_kills import ACTIONS, survive


@pytest.mark.parametrize("action", ACTIONS)
def test_killed_in_the_middle(action: str, tmp_path: Path) -> None:
    found = survive(tmp_path / action, action, kills=5, seed=5)
    assert found["kills"] == 5
