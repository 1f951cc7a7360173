"""Rooms import only from rooms above them, and importing the package does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import nestling

ROOMS = ["memory", "sequence", "optim", "levels", "models", "checks", "sleep", "learner", "train", "tasks", "cli"]
SOURCE = Path(nestling.__file__).parent


def test_rooms_import_only_upward() -> None:
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).with_suffix("").parts[0]
        if own in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            depth = len(file.relative_to(SOURCE).parts)
            assert getattr(node, "level", 0) < depth, f"{file}: name another room by its full name"
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("nestling.") and (room := name.split(".")[1]) != own:
                    assert ROOMS.index(room) < ROOMS.index(own), f"{file}: {own} imports {room}"


def test_every_folder_is_a_room() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name[0] != "_"} <= set(ROOMS)


def test_import_does_no_work() -> None:
    code = "import sys, nestling; sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist() -> None:
    for name in nestling.__all__:
        assert getattr(nestling, name) is not None


def test_shapes_are_checked_in_the_tests() -> None:
    """Of the functions that tell them: a hook over no module would check nothing, and nobody would see it."""
    model = nestling.Decoder(nestling.ModelConfig(dim=8, heads=1, blocks=1), seed=0)
    with pytest.raises(TypeCheckError, match="tokens"):
        model(torch.zeros(1, 2, 3, dtype=torch.int64))
