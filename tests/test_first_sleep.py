"""The first study of sleep: a small form of it, and what it measures with, against examples by hand."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from nestling.levels import Reader
from nestling.sleep import SeedConfig, SleepConfig
from nestling.sleep.arms import extra_passes

FOLDER = Path(__file__).parent.parent / "studies" / "sleep" / "first"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


study = loaded()
SMALL = replace(
    study.QUICK,
    dim=8,
    train_steps=2,
    night=64,
    sleep=SleepConfig(seeding=SeedConfig(steps=0), dreams=2, held_out=2, length=6, rehearsal=0.0),
)
BODIES = {name: (f"{name} and {name}s, {name} again; " * 9).encode()[:128] for name in ("english", "reed", "heron")}


def life_of(learned: float, forgotten: float, arm: str = "none", run: int = 0) -> dict:
    return {"run": run, "arm": arm, "scale": 0.5, "learned": learned, "forgotten": forgotten}


def test_a_forgetting_matrix_with_and_without_sleep() -> None:
    """Every body after every body, the first row at birth; two nights a body, and what they cost: with sleep, without,
    and without at equal compute, as many tokens being read again as a sleep reads and writes."""
    model = study.scaled(study.pretrained(SMALL, BODIES["english"] * 20, 0), 8.0)
    probes = {name: study._probe(model, text) for name, text in BODIES.items()}
    days = [(name, BODIES[name]) for name in ("reed", "heron")]
    lives = {
        arm: study.live(model, study.arms(SMALL)[arm], days, probes, SMALL.night, "life")
        for arm in ("none", "sleep", "extra passes")
    }
    compute, one_pass = (lives[arm]["tokens at rest"] for arm in ("sleep", "extra passes"))
    again = extra_passes(-(-compute // one_pass), study.arms(SMALL)["extra passes"].tokens)
    lives["equal compute"] = study.live(model, again, days, probes, SMALL.night, "life")
    birth = {name: probe(Reader(model).begin()) for name, probe in probes.items()}
    for life in lives.values():
        assert [set(row) for row in life["bits"]] == [set(BODIES)] * 3
        assert life["bits"][0] == birth
        assert life["bytes stored"] <= 16
        assert life["bits"][1]["reed"] < birth["reed"], "it was just read"
    assert len(lives["sleep"]["pairs"]) == 8
    assert lives["sleep"]["bytes stored"] == lives["none"]["tokens at rest"] == 0
    assert 0 < lives["extra passes"]["tokens at rest"] < lives["sleep"]["tokens at rest"]
    assert compute <= lives["equal compute"]["tokens at rest"] < compute + one_pass
    assert len({life["bits"][2]["english"] for life in lives.values()}) == 4


def test_what_was_learned_and_forgotten() -> None:
    table = [
        {"english": 3.0, "a": 5.0, "b": 6.0},
        {"english": 3.5, "a": 4.0, "b": 5.5},
        {"english": 3.25, "a": 4.5, "b": 4.0},
    ]
    found = study.measures(table, ["a", "b"])
    assert found["learned"] == ((5.0 - 4.0) + (6.0 - 4.0)) / 2
    assert found["forgotten"] == ((3.25 - 3.0) + (4.5 - 4.0)) / 2
    assert found["all bodies at the end"] == (3.25 + 4.5 + 4.0) / 3


def test_plasticity_is_compared_on_the_frontier_of_the_same_run() -> None:
    frontier = [life_of(0.2, 0.1), life_of(0.4, 0.5), life_of(0.6, 0.9), life_of(0.3, 9.0, run=1)]
    lives = [*frontier, life_of(0.3, 0.15, "sleep"), life_of(0.7, 0.2, "sleep")]
    inside, outside = study.at_equal_plasticity(lives)
    assert inside["none forgets"] == pytest.approx(0.3)
    assert inside["recovered"] == pytest.approx(0.5)
    assert outside["none forgets"] is None
    assert outside["recovered"] is None


def test_the_stored_result_is_of_this_form() -> None:
    stored = json.loads((FOLDER / "results" / "full.json").read_text())
    assert stored["form"] == repr(study.FULL)
    found = {(life["run"], life["arm"], life["scale"]) for life in stored["lives"]}
    assert len(found) == len(stored["lives"])
    assert found <= {
        (run, arm, scale)
        for run in study.FULL.runs
        for arm in study.FULL.arms
        for scale in (study.FULL.frontier if arm == "none" else study.FULL.scales)
    }
