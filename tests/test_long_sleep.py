"""The study of long lives in its quick form, and what it measures with, against definitions written out."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "studies" / "sleep" / "long"
TEXT = b"".join(b"The %d birds that sat on wall %d sang of %d quiet Rivers.\n" % (n, n * n, 7 * n) for n in range(300))


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"long_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


study, summary = loaded("run"), loaded("summary")


def timeless(lives: list[dict]) -> list[dict]:
    return [
        life | {"rows": [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in life["rows"]]}
        for life in lives
    ]


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> list[dict]:
    return study.study(study.QUICK, "quick", tmp_path_factory.mktemp("long"), given=TEXT)["lives"]


def test_sizes_stay_inside_the_budget_and_no_text_is_kept(lives) -> None:
    (slept,) = summary.size(lives)
    assert slept["sleeps"] == study.QUICK.sleeps
    assert slept["inside"]
    assert slept["bytes of text"] == 0
    assert len(slept["state bytes"]) == 1
    assert not summary.size([slept | {"arm": "sleep", "rows": [lives[3]["rows"][0] | {"level bytes": 10**9}]}])[0][
        "inside"
    ]


def test_a_life_that_was_stopped_goes_on_to_the_same_bits(lives, tmp_path, monkeypatch) -> None:
    save, saved, form = study.save, [], replace(study.QUICK, arms=("fresh", "sleep"))

    def stops(*given) -> None:
        save(*given)
        saved.append(given)
        if len(saved) in (1, 4):  # in a fresh model's life, and in the one that sleeps
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "save", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            study.study(form, "quick", tmp_path, resume=True, given=TEXT)
    found = study.study(form, "quick", tmp_path, resume=True, given=TEXT)["lives"]
    whole = timeless([life for life in lives if life["arm"] in form.arms])
    assert timeless(found) == timeless(json.loads((tmp_path / "quick.json").read_text())["lives"]) == whole
    assert len(saved) == sum(len(life["rows"]) for life in whole)


def test_a_fresh_model_forgets_every_body_and_others_do_not(lives) -> None:
    by = {life["arm"]: life["rows"] for life in lives}
    assert by["none"][0]["curve"] == by["fresh"][0]["curve"] == by["sleep"][0]["curve"]
    starts = {arm: rows[1]["curve"][0] for arm, rows in by.items()}
    assert len(set(starts.values())) == 4


def test_a_substitution_is_a_permutation_of_letters() -> None:
    changed = study.substituted(TEXT, 1)
    assert changed != TEXT
    assert changed != study.substituted(TEXT, 2)
    pairs = {(chr(a), chr(b)) for a, b in zip(TEXT, changed, strict=True)}
    assert len(pairs) == len(dict(pairs)) == len({b for _, b in pairs})
    assert all(a == b for a, b in pairs if not a.isalpha())
    assert all(a.isupper() == b.isupper() for a, b in pairs)


def test_dead_units_and_effective_rank() -> None:
    hidden = torch.zeros(50, 4)
    hidden[:25, 0] = hidden[25:, 1] = 2.0
    assert study.dormant(hidden) == 0.5
    assert study.effective_rank(hidden) == pytest.approx(2.0)
    assert study.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_slopes_and_tokens() -> None:
    assert summary.slope([5.0, 4.0, 3.5, 1.0]) == pytest.approx(-1.25)
    assert summary.tokens_until([4.0, 3.0, 1.0], 2.0, 100) == 150.0
    assert summary.tokens_until([4.0, 3.0], 5.0, 100) == 0.0
    assert summary.tokens_until([4.0, 3.0], 2.0, 100) is None
    found = summary.interval([1.0, 2.0, 3.0])
    assert found["high"] - found["mean"] == pytest.approx(4.303 / math.sqrt(3))


def test_the_stored_result_is_of_this_form() -> None:
    stored = json.loads((FOLDER / "results" / "full.json").read_text())
    assert stored["form"] == repr(study.FULL)
    assert stored["commit"]
    found = [life for life in stored["lives"] if life["arm"] in study.FULL.arms]
    lengths = {(life["run"], life["arm"]): len(life["rows"]) for life in found}
    assert lengths == {
        (run, arm): study.FULL.sleeps if arm == "sleep" else study.FULL.bodies
        for run in study.FULL.runs
        for arm in study.FULL.arms
    }
