"""torch.compile of an optimizer's step, and of what a mixer does with a chunk."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler, and there is none",
)


def rows(script: str, *arguments: str) -> dict[str, list[float]]:
    """What a script of this folder prints: a name and numbers a line."""
    command = [sys.executable, str(HERE / script), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return {name: [float(x) for x in numbers] for name, *numbers in map(str.split, run.stdout.splitlines())}


@needs_compiler
@pytest.mark.slow
def test_compiled_optimizers_are_the_plain_ones():
    found = rows("compiled_steps.py")
    assert set(found) == {"AdamW", "Muon", "M3"}
    for name, (difference,) in found.items():
        assert difference < 1e-12, name


@pytest.mark.slow
def test_compiled_mixers_are_the_plain_ones():
    """Without a code generator: what torch traces and derives. One form of a step with gradients and one without, for
    calls of any length, from the start or from a state; none broken into several graphs."""
    found = rows("compiled_mixers.py", "aot_eager")
    whole = {name: numbers for name, numbers in found.items() if name not in ("decoder", "around")}
    assert len(whole) == 9
    for name, (difference, forms, breaks) in whole.items():
        assert difference < 1e-11, name
        assert forms == (0 if name in ("attention", "linear") else 2), name
        assert breaks == 0, name
    assert found["decoder"][:2] == [pytest.approx(0.0, abs=1e-11), 1], "blocks share the form of their mixers"
    assert found["around"][0] < 1e-11
    assert found["around"][1] < 10, "a compiler around a model has gone into the walk over chunks"


@needs_compiler
@pytest.mark.slow
def test_generated_code_for_a_chunk_is_the_plain_chunk():
    ((difference, forms, breaks),) = rows("compiled_mixers.py", "inductor", "delta").values()
    assert difference < 1e-11
    assert (forms, breaks) == (2, 0)
