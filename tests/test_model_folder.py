"""A model's folder: what does not fit is refused by name, and nothing is read in its place."""

import json
from pathlib import Path

import pytest
import torch

from nestling.learner import load_model, newest, open_life, save_life
from nestling.levels import Reader
from nestling.train import save_run
from test_handover import build, trained
from test_whole import adamw

TOKENS = torch.tensor(list(b"some text to read"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a life in it, which has read."""
    save_run(tmp_path, trained(build(adamw(16)).float(), 1), {})
    saved = load_model(tmp_path)
    reader = Reader(saved.model)
    state, _ = reader.read(reader.begin(), TOKENS)
    save_life(tmp_path, saved, state, {})
    return tmp_path


def change(folder: Path, name: str, **facts: object) -> None:
    """As a folder of another version, or a life of another model, would have it."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    (folder / "checksums.json").unlink()


def test_a_life_comes_back(folder: Path) -> None:
    saved = load_model(folder)
    reader = Reader(saved.model)
    expected, _ = reader.read(reader.begin(), TOKENS)
    found = open_life(folder, saved, reader)
    assert int(found.position) == TOKENS.numel()
    assert torch.equal(found.levels.weights[0][0], expected.levels.weights[0][0])


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model": "another"}, "a life of model another, but the model in"),
        ({"format": 99}, r"life\.json: format 99; this version reads 1"),
    ],
    ids=["model", "format"],
)
def test_a_life_that_does_not_fit(facts: dict[str, object], said: str, folder: Path) -> None:
    life = newest(folder / "life")
    assert life is not None
    change(life, "life.json", **facts)
    saved = load_model(folder)
    with pytest.raises(ValueError, match=said):
        open_life(folder, saved, Reader(saved.model))


def test_a_model_of_another_version(folder: Path) -> None:
    run = newest(folder / "train")
    assert run is not None
    change(run, "config.json", format=99)
    with pytest.raises(ValueError, match=r"config\.json: format 99; this version reads 1"):
        load_model(folder)
