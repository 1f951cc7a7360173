"""One thread, the same random cases each time; shapes and types checked where nestling's functions tell shapes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

SOURCE = Path(__file__).parent.parent / "src" / "nestling"

torch.set_num_threads(1)

hypothesis.settings.register_profile("nestling", deadline=None, derandomize=True)  # the same cases on every machine
hypothesis.settings.load_profile("nestling")

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand where a float is asked for


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Type-checked, but for constructors: what they refuse, and in which words, is under test."""
    return function if function.__name__ == "__init__" else _checked(function)


# of all modules the hook would make the suite three times as long, and types without shapes are mypy's
_with_shapes = [file for file in SOURCE.rglob("*.py") if "from jaxtyping" in file.read_text()]
install_import_hook(
    [".".join(file.relative_to(SOURCE.parent).with_suffix("").parts) for file in _with_shapes], "conftest.check"
)


@pytest.fixture(autouse=True)
def _as_torch_comes() -> None:
    """The command line flushes denormal numbers for its whole process; each test starts without that."""
    torch.set_flush_denormal(False)
