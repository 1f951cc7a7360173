"""The memory of a family of processes."""

import subprocess
import sys

import pytest

from nestling.tasks import footprint
from nestling.tasks.footprint import footprint_bytes

HOLD = "held = bytearray(60_000_000); print('ready', flush=True); input()"


def test_children_are_counted() -> None:
    before = footprint_bytes()
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert footprint_bytes() - before > 50_000_000
    child.communicate(b"\n")
    assert footprint_bytes() - before < 30_000_000


def test_without_the_system_s_word(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(footprint, "_PROC", tmp_path)
    assert footprint_bytes() > 10_000_000
