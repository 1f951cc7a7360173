"""The poison study in its quick form: what it says must hold at any size."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "studies" / "poison" / "run.py"


@pytest.mark.slow
def test_poison_quick() -> None:
    spec = importlib.util.spec_from_file_location("poison", FILE)
    assert spec is not None
    assert spec.loader is not None
    poison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(poison)
    found = poison.run(poison.QUICK)
    assert found["forgotten is clean, bit for bit"]
    for name in ("held_out_bits", "exposure", "false_facts_nats"):
        assert found["forgotten"][name] == found["clean"][name]
    for arm in ("clean", "guards on"):
        assert found[arm]["clean_quarantined"] <= 0.01
    assert found["guards on"]["quarantined"] == ["garbage"]
    assert found["guards on"]["damage_bits"] < found["guards off"]["damage_bits"]
