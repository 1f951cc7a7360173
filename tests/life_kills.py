"""A life whose process is killed in the middle of everything it can do, and must lose nothing.

    python tests/life_kills.py --kills 100

Each action runs in a process forked from this one (nothing is loaded again) and dies by SIGKILL at a seeded random
moment between its start and a little after its end. Then the life is opened again: `verify` passes, with a replay; all
that was acknowledged is there; and every bit of the state is that of a life whose process was left alone, before the
action or after it. The result goes to benchmarks/results/kill_life.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's Adam loads it when it is first made: in every forked process anew, if not here

from nestling.learner import Learner, LifeConfig
from nestling.learner.verify import verify_life
from nestling.levels import Growing, level
from nestling.memory import momentum
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention
from nestling.sleep import SeedConfig, SleepConfig
from nestling.tasks.record import write_result

LEVELS = (level(24, rule=momentum()), level(60, rule=momentum()))
CONFIG = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=8), levels=LEVELS)
NIGHT = SleepConfig(dreams=2, held_out=1, length=4, rehearsal=0.5, seeding=SeedConfig(steps=1), least_recovered=-1e9)
KEEP = LifeConfig(snapshot_tokens=400, event_bytes=120)
SECRET = b"SECRET-4417"
DOCUMENTS = 6
Say = Callable[[str], None]


def text(seed: int, size: int = 200) -> bytes:
    return bytes(random.Random(seed).choices(b"abcdefgh \n", k=size))


def begin(folder: Path) -> None:
    """The life that every action starts from."""
    with Learner.create(folder, Growing(Decoder(CONFIG, seed=3), slots=2, rank=2), config=KEEP) as life:
        for number in range(4):
            life.learn(text(number) + (SECRET if number == 1 else b""), f"source {number}")
            if number == 2:
                life.snapshot("named")
    with Learner.open(folder) as life:
        life.accept(text(7), "waiting")


def learn(life: Learner, say: Say) -> None:
    for number in range(DOCUMENTS):
        life.accept(text(20 + number, 130), f"new {number}")
        say(f"accepted {number + 1}")
        life.catch_up()


def snapshot(life: Learner, say: Say) -> None:
    for name in "abcd":
        life.snapshot(name)
        say(f"written {name}")


def rollback(life: Learner, say: Say) -> None:
    life.rollback("named")
    say("back")


def forget(life: Learner, say: Say) -> None:
    life.forget("source 1")
    say("forgotten")


def fork(life: Learner, say: Say) -> None:
    life.fork(life.folder.with_name("fork")).close()
    say("forked")


def sleep(life: Learner, say: Say) -> None:
    life.sleep(NIGHT)
    say("slept")


ACTIONS: dict[str, Callable[[Learner, Say], None]] = {
    "learn": learn,
    "snapshot": snapshot,
    "rollback": rollback,
    "forget": forget,
    "fork": fork,
    "sleep": sleep,
}


@dataclass
class Child:
    """A process forked from this one: what it has said so far, and how to end it."""

    pid: int
    pipe: int
    said: str = ""

    def wait_for(self, word: str) -> None:
        while word not in self.said and "Traceback" not in self.said:
            got = os.read(self.pipe, 65536).decode()
            assert got, f"the child ended: {self.said}"
            self.said += got
        if "Traceback" in self.said:
            self.kill()

    def kill(self) -> list[str]:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        while got := os.read(self.pipe, 65536).decode():
            self.said += got
        os.close(self.pipe)
        assert "Traceback" not in self.said, self.said
        return self.said.splitlines()


def spawn(work: Callable[[Say], None]) -> Child:
    """Fork a process that works, says "done", and then waits to be killed."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads; the child uses one
        pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    try:
        torch.set_num_threads(1)
        work(lambda line: _say(writing, line))
        _say(writing, "done")
    except BaseException:
        _say(writing, traceback.format_exc())
    while True:
        time.sleep(60)


def _say(pipe: int, line: str) -> None:
    os.write(pipe, f"{line}\n".encode())


def act(folder: Path, action: str) -> Child:
    """The action on a life, in a process of its own that says "begun" once the life is open."""

    def work(say: Say) -> None:
        life = Learner.open(folder)
        say("begun")
        ACTIONS[action](life, say)

    return spawn(work)


def look(folder: Path) -> dict[str, Any]:
    """What a life is once it is opened again, found out in a process of its own."""

    def work(say: Say) -> None:
        with Learner.open(folder) as life:
            found = _told(life)
        found["problems"] = verify_life(folder, replay=True).problems
        say(json.dumps(found))

    child = spawn(work)
    child.wait_for("done")
    return dict(json.loads(child.kill()[0]))


def _told(life: Learner) -> dict[str, Any]:
    names = sorted(s["name"] for s in life.status()["snapshots"] if s["name"])
    path = len(life.journal.path_ids(life.at))
    return {"digest": life.digest, "sources": sorted(life.sources()), "path": path, "names": names}


def survive(folder: Path, action: str, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill an action `kills` times. Raises AssertionError where anything was lost or differs by a bit."""
    folder.mkdir()
    first = spawn(lambda _: begin(folder / "begun"))
    first.wait_for("done")
    first.kill()
    untouched = folder / "untouched" / "life"
    shutil.copytree(folder / "begun", untouched)
    before = look(untouched)
    after, seconds = _unkilled(folder, action)
    moments, fractions, ended = random.Random(f"{seed} {action}"), [], 0
    for number in range(kills):
        where = folder / str(number)
        shutil.copytree(folder / "begun", where / "life")
        child = act(where / "life", action)
        child.wait_for("begun")
        fraction = moments.random() * 1.1
        time.sleep(fraction * seconds)
        said = child.kill()
        fractions.append(round(fraction, 3))
        ended += "done" in said
        _check(where, action, said, before, after)
        shutil.rmtree(where)
    return {"kills": kills, "seconds": round(seconds, 3), "after_the_end": ended, "moments": fractions}


def _unkilled(folder: Path, action: str) -> tuple[list[dict[str, Any]], float]:
    """What a life is after the action (for learn: after each document), and how long the action takes."""
    where = folder / "unkilled" / "life"
    shutil.copytree(folder / "begun", where)

    def work(say: Say) -> None:
        with Learner.open(where) as life:
            if action != "learn":
                ACTIONS[action](life, say)
                return
            for number in range(DOCUMENTS):
                life.learn(text(20 + number, 130), f"new {number}")
                say(json.dumps(_told(life)))

    child = spawn(work)
    child.wait_for("done")
    lines = child.kill()
    states = [{**json.loads(line), "problems": []} for line in lines[:-1]] if action == "learn" else [look(where)]
    where = folder / "timed" / "life"
    shutil.copytree(folder / "begun", where)
    child = act(where, action)
    child.wait_for("begun")
    began = time.perf_counter()
    child.wait_for("done")
    seconds = time.perf_counter() - began
    child.kill()
    return states, seconds


def _check(where: Path, action: str, said: list[str], before: dict[str, Any], after: list[dict[str, Any]]) -> None:
    found = look(where / "life")
    assert found["problems"] == [], (action, said, found)
    if action == "learn":
        accepted = sum(line.startswith("accepted") for line in said)
        learned = sum(source.startswith("new ") for source in found["sources"])
        assert learned >= accepted, (said, found)
        assert {**found, "names": []} == {**(after[learned - 1] if learned else before), "names": []}, (said, found)
    elif action == "snapshot":
        assert found["digest"] == before["digest"]
        written = {line.split()[1] for line in said if line.startswith("written")}
        assert written | {"named"} <= set(found["names"]), (said, found)
    else:
        same = [found["digest"] == state["digest"] for state in (before, after[0])]
        assert any(same), (action, said, found)
        assert same[1] or "done" not in said, (action, said)
    if action == "forget" and "source 1" not in found["sources"]:
        for file in (where / "life").rglob("*"):
            assert file.is_dir() or SECRET not in file.read_bytes(), file
    if action == "fork":
        if (where / "fork").exists():
            assert look(where / "fork")["digest"] == before["digest"]
        else:
            assert "done" not in said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"what": "tests/life_kills.py", "seed": asked.seed}
    for action in ACTIONS:
        with tempfile.TemporaryDirectory() as folder:
            result[action] = survive(Path(folder) / "life", action, kills=asked.kills, seed=asked.seed)
        print(action, result[action]["kills"], "kills,", result[action]["after_the_end"], "after the end", flush=True)
    write_result(asked.out, "kill_life", result)


if __name__ == "__main__":
    main()
