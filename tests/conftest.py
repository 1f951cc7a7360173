"""One thread, the same random cases each time; types and shapes of nestling's functions checked in its tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

torch.set_num_threads(1)

hypothesis.settings.register_profile("nestling", deadline=None, derandomize=True)  # the same cases on every machine
hypothesis.settings.load_profile("nestling")

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand where a float is asked for


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Type-checked, but for constructors: what they refuse, and in which words, is under test."""
    return function if function.__name__ == "__init__" else _checked(function)


install_import_hook("nestling", "conftest.check")


@pytest.fixture(autouse=True)
def _as_torch_comes() -> None:
    """The command line flushes denormal numbers for its whole process; each test starts without that."""
    torch.set_flush_denormal(False)
