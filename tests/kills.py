"""Training that is killed again and again, and must end where training that was left alone ends.

    python tests/kills.py --kills 20

Kills `nestling train` by SIGKILL at random moments and goes on with --resume each time; then compares the weights, the
optimizer's moments, the levels' accumulators and the sequence states with those of an unkilled run, bit for bit.
The result goes to benchmarks/results/kill.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nestling.learner import newest
from nestling.tasks.record import write_result

FILES = ("model.safetensors", "training.safetensors")


def write_text(folder: Path) -> Path:
    """Six documents to train on."""
    folder.mkdir(parents=True)
    for number in range(6):
        document = bytes(random.Random(number).choices(b"abcdefgh \n", k=900 + 70 * number))
        (folder / f"{number}.txt").write_bytes(document)
    return folder


def survive(folder: Path, *, kills: int, steps: int, seed: int = 7) -> dict[str, Any]:
    """Train twice in `folder`, once killed `kills` times. Raises AssertionError when the two differ anywhere.

    Every kill falls at random after a step of its own was saved, so that the run goes forward: `steps` must be more
    than `kills`. Returns what happened: the step at which each kill fell, and how many tensors were compared.
    """
    if steps <= kills:
        raise ValueError(f"{kills} kills need more than {kills} steps, got {steps}")
    text = write_text(folder / "text")
    flags = f"--preset tiny --steps {steps} --rows 2 --length 24 --checkpoint-every 1 --threads 1".split()

    def train(out: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "nestling.cli", "train", "--data", str(text), "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *flags, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert train(folder / "whole").wait() == 0
    moments, killed = random.Random(seed), folder / "killed"

    def saved() -> Path | None:
        return newest(killed / "train") if killed.exists() else None

    fell: list[int] = []
    while len(fell) < kills:
        before = saved()
        run = train(killed, *(["--resume"] if before else []))
        while saved() == before and run.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.15)  # anywhere: in a step, in the middle of a write
        assert run.poll() is None, f"the run ended before kill {len(fell) + 1}: give it more steps"
        run.send_signal(signal.SIGKILL)
        run.wait()
        after = saved()
        assert after is not None
        fell.append(int(after.name))
    assert train(killed, "--resume").wait() == 0
    whole, resumed = newest(folder / "whole" / "train"), saved()
    assert whole is not None
    assert resumed is not None
    assert int(whole.name) == int(resumed.name) == steps
    compared = 0
    for file in FILES:
        one, two = load_file(whole / file), load_file(resumed / file)
        assert one.keys() == two.keys(), file
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), f"{file}: {name} differs"
            compared += 1
    return {"kills": kills, "steps": steps, "seed": seed, "killed_after_step": fell, "tensors_equal": compared}


def main() -> None:

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = survive(Path(folder), kills=asked.kills, steps=asked.steps, seed=asked.seed)
    result = {"what": "tests/kills.py"} | found
    write_result(asked.out, "kill", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
