"""Other people's training scripts, before and after the few lines that docs/pretrained.md changes in them."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nestling
from nestling.optim import for_model
from nestling.train import OnClocks

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pretrained.md").read_text()
CHANGES = dict(re.findall(r"```diff\n--- (\S+)\n(.*?)```", PAGE, re.S))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(400)))
    return path


def changed(name: str, folder: Path) -> Path:
    """The script with its changes made: lines taken away are replaced, other new lines are imports."""
    source = (ROOT / name).read_text()
    lines = CHANGES[name].splitlines()
    added = [line[1:] for line in lines if line.startswith("+")]
    taken = [line[1:] for line in lines if line.startswith("-")]
    assert len(added) <= 3
    *imports, replacement = added
    (old,) = taken
    assert source.count(old) == 1
    source = source.replace(old, replacement).replace("import torch\n", "import torch\n" + "\n".join(imports) + "\n", 1)
    path = folder / Path(name).name
    path.write_text(source)
    return path


def run(script: Path, *arguments: object) -> str:
    path = f"{Path(nestling.__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def held_out(told: str) -> float:
    return float(re.search(r"held out: ([\d.]+) nats", told)[1])


def test_the_page_shows_both_scripts() -> None:
    assert sorted(CHANGES) == ["examples/gpt.py", "examples/trainer.py"]
    assert len((ROOT / "examples/gpt.py").read_text().splitlines()) < 120


def test_a_loop_like_nanogpt(tmp_path: Path, text: Path) -> None:
    small = [text, "--steps", 80, "--width", 32, "--layers", 3, "--heads", 2, "--length", 32, "--rows", 32]
    small += ["--rate", 1e-2]
    before = run(ROOT / "examples/gpt.py", *small)
    after = run(changed("examples/gpt.py", tmp_path), *small)
    assert "AdamW" in before
    assert "OnClocks" in after
    chance = math.log(20)  # letters
    assert held_out(before) < 0.8 * chance
    assert held_out(after) < 0.8 * chance
    assert held_out(before) != held_out(after)


def test_the_trainer_of_transformers(tmp_path: Path, text: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'nestling[hf]'")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install 'nestling[hf]'")
    small = ["--steps", 24, "--width", 32, "--length", 32, "--rows", 16]
    before = run(ROOT / "examples/trainer.py", text, tmp_path / "before", *small)
    script = changed("examples/trainer.py", tmp_path)
    after = run(script, text, tmp_path / "after", *small)
    assert held_out(before) < 0.8 * math.log(256)
    assert held_out(after) < 0.8 * math.log(256)
    half = tmp_path / "half"  # stopped half way, and gone on from its checkpoint
    (half).mkdir()
    (tmp_path / "after" / "checkpoint-12").rename(half / "checkpoint-12")
    resumed = run(script, text, half, *small, "--resume")
    assert held_out(resumed) == held_out(after)


def simple() -> torch.nn.Module:
    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.act(self.up(x)))

    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Layer() for _ in range(3))})


def test_levels_move_at_their_ticks_with_the_mean_gradient() -> None:
    model, twin = simple(), simple()
    optimizer = OnClocks(torch.optim.SGD(model.parameters(), lr=0.005), model, [4, 8], tokens=4)
    xs = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1))
    moved: dict[str, list[int]] = {name: [] for name, _ in model.named_parameters()}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name, _ in twin.named_parameters()}
    for step, x in enumerate(xs):
        for one in (model, twin):
            one.zero_grad()
            y = x
            for layer in one["layers"]:
                y = layer(y)
            y.square().sum().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():  # by hand: layer 1 is the slow level, its maps wait for every second step
            for name, p in twin.named_parameters():
                kept[name].append(p.grad.clone())
                slow = name.startswith("layers.1") and name.endswith("weight")
                if not slow or step % 2 == 1:
                    p -= 0.005 * torch.stack(kept[name]).mean(0)
                    kept[name].clear()
        for name, p in model.named_parameters():
            if not torch.equal(p, before[name]):
                moved[name].append(step)
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=0, atol=1e-6)
    for name, steps in moved.items():
        slow = name.startswith("layers.1") and name.endswith("weight")
        assert steps == ([1, 3] if slow else [0, 1, 2, 3])


def test_clocks_survive_in_the_state_of_the_optimizer() -> None:
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            y = torch.full((2, 4), 0.1 * (step + 1))
            for layer in model["layers"]:
                y = layer(y)
            y.square().sum().backward()
            optimizer.step()

    whole = simple()
    train(whole, OnClocks(for_model(whole), whole, [4, 12], tokens=4), range(7))
    first, again = simple(), simple()
    optimizer = OnClocks(for_model(first), first, [4, 12], tokens=4)
    train(first, optimizer, range(4))
    again.load_state_dict(first.state_dict())
    other = OnClocks(for_model(again), again, [4, 12], tokens=4)
    other.load_state_dict(optimizer.state_dict())
    train(again, other, range(4, 7))
    for name, p in whole.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


@pytest.mark.parametrize(
    ("periods", "tokens", "said"), [([], 4, "periods"), ([8, 4], 4, "fast to slow"), ([4], 0, "tokens must be")]
)
def test_what_is_refused(periods: list[int], tokens: int, said: str) -> None:
    model = simple()
    with pytest.raises(ValueError, match=said):
        OnClocks(torch.optim.SGD(model.parameters()), model, periods, tokens=tokens)
