"""The command line on good and bad input: one clear line, exit code 2, nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest

from nestling.cli import main, training
from nestling.learner import read_generation

TINY = ["--preset", "tiny", "--steps", "4", "--rows", "2", "--length", "24", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_bytes(bytes(range(256)) * 8)  # not UTF-8, and that is fine
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "model"), *TINY]) == 0
    return folder / "model"


def test_train_learn_generate_info(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "new.txt").write_text("something that it has not read before. " * 8)
    assert main(["learn", str(model), str(tmp_path)]) == 0
    assert "bits/byte" in capfd.readouterr().out
    assert main(["generate", str(model), "--prompt", "some", "--tokens", "12", "--seed", "3"]) == 0
    first = capfd.readouterr().out
    assert first.startswith("some")
    assert main(["generate", str(model), "--prompt", "some", "--tokens", "12", "--seed", "3"]) == 0
    assert capfd.readouterr().out == first
    assert main(["info", str(model)]) == 0
    told = capfd.readouterr().out
    assert "self_modifying(" in told
    assert "projection_chunk=16" in told
    assert "312 tokens read" in told


def test_learning_in_two_calls_goes_on(model: Path, tmp_path: Path) -> None:
    """The clocks, accumulators and levels of a life survive from one command to the next."""
    import shutil

    from nestling.learner import newest, read_generation

    one, two = tmp_path / "one", tmp_path / "two"
    for copy in (one, two):
        shutil.copytree(model, copy)
        shutil.rmtree(copy / "life", ignore_errors=True)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"document {name}, read on its own. " * 5)
    assert main(["learn", str(one), str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == 0
    assert main(["learn", str(two), str(tmp_path / "a.txt")]) == 0
    assert main(["learn", str(two), str(tmp_path / "b.txt")]) == 0
    lives = [newest(copy / "life") for copy in (one, two)]
    assert lives[0] is not None
    assert lives[1] is not None
    tensors = [read_generation(life).tensors for life in lives if life is not None]
    for file, named in tensors[0].items():
        for name, tensor in named.items():
            assert tensor.equal(tensors[1][file][name]), (file, name)


def bad(arguments: list[str], capfd: pytest.CaptureFixture[str], *said: str) -> None:
    assert main(arguments) == 2
    printed = capfd.readouterr()
    line = printed.err.strip()
    assert "\n" not in line
    for word in said:
        assert word in line, line


@pytest.mark.parametrize("command", ["train", "learn"])
def test_bad_text(command: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.bin").write_bytes(b"\0\1\2")
    before = sorted(str(path) for path in model.rglob("*"))
    out = tmp_path / "out"
    for name, said in (("missing", "no such file"), ("empty.txt", "empty"), ("folder", "no text")):
        path = str(tmp_path / name)
        arguments = (
            ["train", "--data", path, "--out", str(out), *TINY] if command == "train" else ["learn", str(model), path]
        )
        bad(arguments, capfd, path, said)
    assert not out.exists()
    assert sorted(str(path) for path in model.rglob("*")) == before


def test_a_diverged_life_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps of a level that are far too large: what is not finite is refused, counted and told, and not saved."""
    text, out = tmp_path / "text.txt", tmp_path / "wild"
    text.write_text("text of some kind " * 30)
    levels = ["--levels", "level(32, step_size=1e30)"]
    assert main(["train", "--data", str(text), "--out", str(out), *TINY, *levels]) == 0
    for _ in range(2):
        assert main(["learn", str(out), str(text)]) == 0
        said = capfd.readouterr().out
        assert "not finite: " in said
    assert main(["generate", str(out), "--prompt", "te"]) == 0  # what diverged was not taken in


def test_a_resumed_run_logs_every_step_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a killed run logged after its last checkpoint, whole lines and a torn one, is made again, and not twice."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("text of some kind " * 30)
    train = ["train", "--data", str(text), "--out", str(out), *TINY]
    assert main(train) == 0
    with open(out / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 5, "loss": 99.0}) + '\n{"step": 6, "lo')
    capfd.readouterr()
    bad([*train, "--resume", "--steps", "3"], capfd, "--steps 3", "step 4")
    assert main([*train, "--resume", "--steps", "6"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["loss"] < 99.0
    assert main(["learn", str(out), str(text)]) == 0
    capfd.readouterr()
    bad([*train, "--resume", "--steps", "8"], capfd, "a life has begun in it")


def test_a_run_from_before_there_was_an_option_goes_on_with_its_default(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("text of some kind " * 30)
    train = ["train", "--data", str(text), "--out", str(out), *TINY]
    assert main(train) == 0

    def older(folder: Path) -> Any:
        generation = read_generation(folder)
        del generation.data["config"]["train"]["compile"]
        return generation

    monkeypatch.setattr(training, "read_generation", older)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    capfd.readouterr()
    bad([*train, "--resume", "--steps", "6", "--compile"], capfd, "compile was False", "True now")
    assert main([*train, "--resume", "--steps", "6"]) == 0


def test_compile_without_a_compiler_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text of some kind " * 30)
    monkeypatch.setattr("shutil.which", lambda name: None)
    bad(
        ["train", "--data", str(text), "--out", str(tmp_path / "out"), *TINY, "--compile"], capfd, "g++, clang++ or c++"
    )
    assert not (tmp_path / "out").exists()


def test_diverging_training_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text of some kind " * 30)
    wild = ["train", "--data", str(text), "--out", str(tmp_path / "out"), *TINY, "--learning-rate", "1e30"]
    bad(wild, capfd, "not finite", "--learning-rate")


def test_bad_model_folders(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text " * 40)
    (tmp_path / "not-a-model").mkdir()
    bad(["info", str(tmp_path / "nowhere")], capfd, "nowhere", "no such folder")
    bad(["learn", str(tmp_path / "not-a-model"), str(text)], capfd, "not-a-model", "not a model folder")
    bad(["generate", str(text), "--prompt", "x"], capfd, "text.txt")
    damaged = tmp_path / "damaged" / "train" / "000000000001"
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{")
    bad(["info", str(tmp_path / "damaged")], capfd, "config.json", "damaged")
    bad(["generate", str(model), "--prompt", ""], capfd, "prompt is empty")
    bad(["train", "--data", str(text), "--out", str(model), *TINY], capfd, "holds a run already", "--resume")
    bad(["train", "--data", str(text), "--out", str(tmp_path / "new"), *TINY, "--resume"], capfd, "nothing to resume")
    bad(["train", "--data", str(text), "--out", str(model), *TINY, "--resume", "--rows", "4"], capfd, "rows was 2")
    resumed = ["train", "--data", str(text), "--out", str(model), *TINY, "--resume"]
    bad(resumed, capfd, "--resume: the text of", "differ", str(text), "200 bytes")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[model]\ndmi = 3", ["model", "unknown key dmi", "dim"]),
        ('[train]\nsteps = "many"', ["train.steps", "whole number"]),
        ("[modle]\ndim = 3", ["unknown table 'modle'"]),
        ('[model]\nlevels = ["level(0)"]', ["levels[0]", "period must be >= 1 token", "got 0"]),
        ('[model]\nmixer = "self_modifyin()"', ["did you mean 'self_modifying'"]),
        ("[model", ["not TOML"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_config(toml: str, said: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(toml)
    (tmp_path / "text.txt").write_text("text " * 40)
    arguments = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    bad([*arguments, "--config", str(tmp_path / "run.toml")], capfd, "run.toml", *said)
    assert not (tmp_path / "out").exists()


def test_config_file_flags_and_saved_config(tmp_path: Path) -> None:
    """Preset, then TOML, then flags; the resolved configuration is saved beside the weights."""
    (tmp_path / "run.toml").write_text(
        '[model]\ndim = 16\nlevels = ["level(8)", "level(24, step_size=0.1)"]\n[train]\nsteps = 9\nseed = 4\n'
    )
    (tmp_path / "text.txt").write_text("text " * 200)
    arguments = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *TINY]
    arguments += ["--config", str(tmp_path / "run.toml"), "--mixer", "attention(window=8)", "--steps", "3"]
    assert main(arguments) == 0
    (folder,) = (tmp_path / "out" / "train").iterdir()
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model"]["dim"] == 16
    assert saved["model"]["mixer"] == {"kind": "attention", "window": 8, "convolution": 4, "persistent": 0}
    assert [lvl["period"] for lvl in saved["model"]["levels"]] == [8, 24]
    assert (saved["train"]["steps"], saved["train"]["seed"]) == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dim", "x"], "--dim: invalid"),
        (["--mixer", "mlp()"], "--mixer"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--dimm", "3"], "--dim INT"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--weight-decay", "nan"], "weight_decay must be >= 0 and finite, got nan"),
        (["--beta1", "1"], "beta1 must be in [0, 1), got 1"),
        (["--threads", "-1"], "threads must be >= 0"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("text " * 40)
    bad(["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *arguments], capfd, said)
    assert not (tmp_path / "out").exists()
