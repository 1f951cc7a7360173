"""What a life on disk costs: tokens a second with the journal on beside reading alone, and the time of each step.

    python benchmarks/life.py [--tokens 16384] [--rounds 3] [--read 1000000] [--conversations 1000]

Learning through a life (journal, guards, snapshots) and through `nestling.levels` alone are timed in turn, round after
round; medians, and the median of each round's ratio. Memory is that of one process which then reads `--read` tokens in
documents of 4,096 through a life of a smaller model and opens `--conversations` conversations. Results go to
benchmarks/results/life.json.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nestling.learner import Learner, LifeConfig
from nestling.learner.machine import flushing
from nestling.levels import Reader, level
from nestling.models import Decoder, ModelConfig, preset
from nestling.sequence import attention
from nestling.tasks.embedded import embedded_bodies
from nestling.tasks.record import write_result

DOCUMENT = 4096  # tokens
SMALLER = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=16), levels=(level(512), level(2048)))


def english(size: int) -> bytes:
    text = b"\n".join(embedded_bodies(held_out_bytes=4096)["english"].read)
    return (text * (size // len(text) + 1))[:size]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def used_mb() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def alone(model: Decoder, documents: list[bytes]) -> None:
    reader = Reader(model)
    state = reader.begin()
    with flushing():
        for document in documents:
            state, _ = reader.read(state, torch.tensor(list(document)))
            state, _ = reader.end_document(state)


def through_a_life(life: Learner, documents: list[bytes], name: str) -> None:
    for number, document in enumerate(documents):
        life.learn(document, f"{name} {number}")


def speed(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    model = Decoder(preset("hope"), seed=0)
    text = english(tokens)
    documents = [text[at : at + DOCUMENT] for at in range(0, tokens, DOCUMENT)]
    times: dict[str, list[float]] = {"levels alone": [], "life": []}
    alone(model, documents[:1])
    with Learner.create(folder / "speed", model) as life:
        through_a_life(life, documents[:1], "first")
        for number in range(rounds):
            times["levels alone"].append(seconds(lambda: alone(model, documents)))
            times["life"].append(seconds(lambda name=f"round {number}": through_a_life(life, documents, name)))  # type: ignore[misc]
    ratios = [b / a for a, b in zip(times["levels alone"], times["life"], strict=True)]
    return {
        "model": "preset hope",
        "tokens": tokens,
        "rounds": rounds,
        "tokens_a_second": {name: round(tokens / statistics.median(found), 1) for name, found in times.items()},
        "times slower with a life": round(statistics.median(ratios), 3),
        "of each round": [round(ratio, 3) for ratio in ratios],
    }


def steps(folder: Path, repeats: int = 5) -> dict[str, Any]:
    """Seconds of each step of a life of the hope preset; nothing is learned again in any of them."""
    life = Learner.create(folder / "steps", Decoder(preset("hope"), seed=0))
    life.learn(english(DOCUMENT), "text")
    life.snapshot("named")
    taken: dict[str, list[float]] = {name: [] for name in ("snapshot", "close and open", "fork", "rollback")}
    for number in range(repeats):
        taken["snapshot"].append(seconds(life.snapshot))

        def reopen() -> None:
            nonlocal life
            life.close()
            life = Learner.open(folder / "steps")

        taken["close and open"].append(seconds(reopen))
        taken["fork"].append(seconds(lambda name=f"fork {number}": life.fork(folder / name).close()))  # type: ignore[misc]
        taken["rollback"].append(seconds(lambda: life.rollback("named")))
    sizes = life.status()["bytes"]
    life.close()
    return {"seconds": {name: round(statistics.median(found), 4) for name, found in taken.items()}, "bytes": sizes}


def memory(folder: Path, read: int, conversations: int) -> dict[str, Any]:
    """Resident MB along 1M tokens and 1,000 conversations."""
    text, marks, talks = english(1 << 20), [], []
    with Learner.create(folder / "memory", Decoder(SMALLER, seed=0), config=LifeConfig()) as life:
        began = time.perf_counter()
        for number, at in enumerate(range(0, read, DOCUMENT)):
            start = at % (len(text) - DOCUMENT)
            life.learn(text[start : start + DOCUMENT], f"source {number % 50}")
            if number % max(1, read // DOCUMENT // 10) == 0:
                marks.append([at, round(used_mb(), 1)])
        took = time.perf_counter() - began
        for number in range(conversations):
            with life.conversation(f"talk-{number}") as talk:
                talk.hear(torch.tensor(list(b"hello there")))
                list(talk.answer(4))
            if number % max(1, conversations // 10) == 0:
                talks.append([number, round(used_mb(), 1)])
        sizes = life.status()["bytes"]
    return {
        "tokens": read,
        "tokens_a_second": round(read / took, 1),
        "resident_mb_by_tokens": marks,
        "resident_mb_by_conversations": talks,
        "growth_mb_over_tokens": round(marks[-1][1] - marks[1][1], 1),
        "growth_mb_over_conversations": round(talks[-1][1] - talks[0][1], 1),
        "bytes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", type=int, default=1_000_000)
    parser.add_argument("--conversations", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"what": "benchmarks/life.py"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["speed"] = speed(folder, asked.tokens, asked.rounds)
        print(json.dumps(result["speed"]), flush=True)
        result["steps"] = steps(folder)
        print(json.dumps(result["steps"]), flush=True)
        result["memory"] = memory(folder, asked.read, asked.conversations)
        print(json.dumps(result["memory"]), flush=True)
    write_result(asked.out, "life", result)


if __name__ == "__main__":
    main()
