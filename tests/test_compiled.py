"""torch.compile of an optimizer's step."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled_steps.py"


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler, and there is none",
)
@pytest.mark.slow
def test_compiled_is_plain():
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    found = dict(line.split() for line in run.stdout.splitlines())
    assert set(found) == {"AdamW", "Muon", "M3"}
    for name, difference in found.items():
        assert float(difference) < 1e-12, name
