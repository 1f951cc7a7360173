"""The toy study in its quick form: it runs, and says what it must."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "studies" / "optimizers" / "toy"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    subprocess.run([sys.executable, str(FOLDER / "toy.py"), "--quick", "--out", str(out)], check=True, timeout=300)
    assert (out / "paths.svg").stat().st_size > 10_000
    return json.loads((out / "toy.json").read_text())


def rows(result) -> dict:
    return {row["method"]: row for row in result["rows"]}


@pytest.mark.slow
def test_the_quick_form(quick):
    found = rows(quick)
    assert quick["quick"]
    assert found["momentum"]["turning"] < 1e-9, "the field of momentum is a gradient"
    assert found["delta, erase bounded"]["turning"] > 1e-4
    assert found["momentum"]["beside_momentum"] == [1.0, 1.0, 1.0]
    assert any(row["converged"] > 0 for row in found.values())


@pytest.mark.slow
def test_the_stored_result_is_of_these_methods(quick):
    stored = json.loads((FOLDER / "toy.json").read_text())
    assert not stored["quick"]
    assert {name: row["rule"] for name, row in rows(stored).items()} == {
        name: row["rule"] for name, row in rows(quick).items()
    }
    assert stored["commit"]
