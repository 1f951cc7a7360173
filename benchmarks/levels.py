"""What learning while reading costs: levels in the stream, levels in context, and the updates of peers' unit.

    python benchmarks/levels.py [--tokens 2048] [--rounds 5]

One model of two blocks (sliding attention or self-modifying Titans, four levels), the same tokens, every case in
turn; medians of processor seconds of one thread, and their ratios; peak memory in processes of their own. Results go to
benchmarks/results/levels.json.

Peers' unit is the forward pass of a Transformer block, four rows of 1,024 tokens. The nearest peer's update pass steps
four levels every 8, 32, 128 and 512 positions of four rows, so once in 32 to 2,048 tokens; its 14.1 units come on top
of the forward and backward pass that find the errors, and in them the block is computed once more. Here one forward and
backward pass is all there is, so that there are three readings of what learning costs:

* beyond forward and backward, as the peer's figure is: adding gradients up, and stepping on them;
* beyond reading: the backward pass as well;
* all: reading as well.

One block, with the levels as four MLPs in a chain (as the peer has them), or as the neurons of one MLP of the same
width; over four rows as the peer has them, and by a `Reader` of one row, whose clock counts tokens, with those periods
and with 8 to 512 tokens. "floor" is the multiplications of a reading over those of the unit: no code that computes at
the unit's own speed is below it.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from sequence import DIM, HEADS, LENGTH, TransformerBlock, interleaved, most_kb
from torch import Tensor
from torch.nn import functional as F

from nestling.levels import InContext, Reader, begin, level, neurons
from nestling.levels.judging import Own
from nestling.levels.judging import learn as step_levels
from nestling.levels.reading import awake, constant_parameters
from nestling.levels.writing import backward, tapped
from nestling.memory import mlp
from nestling.memory.state import detach
from nestling.models import Decoder, ModelConfig
from nestling.sequence import Mixer, attention, self_modifying
from nestling.tasks.record import write_result

MIXERS: dict[str, Mixer] = {
    "attention": attention(window=256),
    "self_modifying": self_modifying(chunk=64, projection_chunk=64),
}
PERIODS = (128, 512, 2048, 8192)
PEERS = (8, 32, 128, 512)  # of the nearest peer's published block, in positions of four rows
IN_UNITS = ("block", "periods", "four rows")  # in the names of cases that are told in peers' unit alone
ROWS = 8
SHAPE = mlp(expansion=4, residual=False)


def model(mixer: str, periods: tuple[float, ...] = PERIODS, blocks: int = 2) -> Decoder:
    levels = tuple(level(period, structure=SHAPE, step_size=1e-3) for period in periods)
    return Decoder(ModelConfig(dim=DIM, heads=HEADS, blocks=blocks, mixer=MIXERS[mixer], levels=levels))


def divided(mixer: str, periods: tuple[float, ...]) -> Decoder:
    """One block, the levels of which are the neurons of one MLP."""
    block = neurons(tuple(level(period, structure=SHAPE, step_size=1e-3) for period in periods))
    return Decoder(ModelConfig(dim=DIM, heads=HEADS, blocks=1, mixer=MIXERS[mixer], levels=(block,)))


def text(rows: int, tokens: int) -> Tensor:
    return torch.randint(0, 256, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read(made: Decoder, tokens: Tensor, segment: int = PERIODS[0]) -> None:
    """The forward pass alone, a segment at a time, as reading does it."""
    state = None
    for part in tokens.split(segment, 1):
        _, state = made(part, state)


def learn(made: Decoder, tokens: Tensor, segment: int | None = None) -> None:
    reader = Reader(made, segment=segment)
    reader.read(reader.begin(), tokens[0])


def descend(made: Decoder, tokens: Tensor) -> None:
    """Ordinary forward, backward and SGD on the weights of the levels, a segment at a time."""
    weights = [w for maps in made.level_weights() for w in maps]
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer, state, segment = torch.optim.SGD(weights, lr=1e-6), None, int(min(PERIODS))
    for first in range(0, tokens.shape[1] - 1, segment):
        part = tokens[:, first : first + segment + 1]
        logits, state = made(part[:, :-1], state)
        state = detach(state)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").backward()
        optimizer.step()


def in_context(made: Decoder, tokens: Tensor, depth: float, outer: bool) -> None:
    reader = InContext(made, depth)
    if outer:
        made.zero_grad(set_to_none=True)
        reader.accumulate(reader.begin(len(tokens)), tokens[:, :-1], tokens[:, 1:])
    else:
        reader.read(reader.begin(len(tokens)), tokens[:, :-1], tokens[:, 1:])


def cases(mixer: str, tokens: int) -> dict[str, Callable[[], None]]:
    """All that is timed, over the same number of tokens."""
    one, eight = text(1, tokens), text(ROWS, tokens // ROWS)
    block, x = TransformerBlock(), torch.randn(max(1, tokens // LENGTH), min(tokens, LENGTH), DIM)

    def reference() -> None:
        with torch.no_grad():
            block(x)

    def awake(*periods: float) -> Callable[[], None]:
        made = model(mixer, periods)
        return lambda: learn(made, one, segment=128)

    plain, trained = model(mixer), model(mixer)
    return {
        "Transformer block, forward": reference,
        "read": lambda: read(plain, one[:, :-1]),
        "learn": lambda: learn(plain, one),
        "forward, backward, SGD": lambda: descend(trained, one),
        "learn, slow levels off": awake(128, math.inf, math.inf, math.inf),
        "learn, slow levels off their clocks": awake(128, 1 << 20, 1 << 20, 1 << 20),
        "in context, 8 rows, no outer gradient": lambda: in_context(model(mixer), eight, 0, outer=False),
        "in context, 8 rows, first order": lambda: in_context(model(mixer), eight, 0, outer=True),
        "in context, 8 rows, through one update": lambda: in_context(model(mixer), eight, 1, outer=True),
        "in context, 8 rows, second order": lambda: in_context(model(mixer), eight, math.inf, outer=True),
    } | in_peers_unit(mixer, one)


def in_peers_unit(mixer: str, tokens: Tensor) -> dict[str, Callable[[], None]]:
    """Reading, and learning while reading, in one block with the peer's periods: tokens of one row, and of four rows as
    many; and positions of four rows, with what stands between the two."""
    made: dict[str, Callable[[], None]] = {}
    for times in (1, 4):
        periods = tuple(times * period for period in PEERS)
        for name, one in {"chain": model(mixer, periods, 1), "neurons": divided(mixer, periods)}.items():
            about = f"{name}, periods {periods[0]} to {periods[-1]}"
            made[f"read, {about}"] = lambda one=one, periods=periods: read(one, tokens[:, :-1], periods[0])  # type: ignore[misc]
            made[f"learn, {about}"] = lambda one=one: learn(one, tokens)  # type: ignore[misc]
            if times == 4:
                four = text(4, (tokens.shape[1] - 1) // 4)
                for way in ("read", "errors", "learn"):
                    run = partial(four_rows, one, four, PEERS[0], way)
                    made[f"{way}, {name}, four rows"] = run
    return made


def four_rows(made: Decoder, tokens: Tensor, segment: int, way: str) -> None:
    """Four rows that share their levels: the forward pass ("read"), with the backward pass ("errors"), and with what is
    done with those ("learn"); clocks count the tokens of all rows."""
    levels, state = begin(made.levels, made.level_weights()), None
    own = Own(levels)
    with constant_parameters(made):
        for first in range(0, tokens.shape[1] - 1, segment):
            part, taps = tokens[:, first : first + segment + 1], []
            with torch.set_grad_enabled(way != "read"):
                weights = levels.weights if way == "read" else awake(made.levels, levels)
                given = None if way == "read" else taps
                logits, state = made(part[:, :-1], state, weights=weights, taps=given)
                state = detach(state)
                loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            if way == "errors":
                torch.autograd.grad(loss, tapped(made.levels, taps))
            if way == "learn":
                found = backward(made.levels, loss, taps)
                with torch.no_grad():
                    count = part[:, 1:].numel()
                    levels, _ = step_levels(made.levels, levels, found, loss.detach(), count, own, None)


def floors(name: str) -> dict[str, float]:
    """Multiplications a token of each reading over those of the unit, in squares of the width; attention over tokens,
    which both have, and norms are left out of both."""
    hidden = 8 * (len(PEERS) if name == "chain" else 1)  # two maps of four times the width, for each MLP
    head, unit = 256 / DIM, 12
    forward, gradients = 4 + hidden + head, hidden
    errors = hidden - 4 + head  # nothing asks for that of the first input
    return {
        "beyond forward and backward": gradients / unit,
        "beyond reading": (errors + gradients) / unit,
        "all": (forward + errors + gradients) / unit,
    }


def alone(mixer: str, case: str, tokens: int) -> None:
    """Prints the peak memory of one case in MB, above what this process held before it."""
    run = cases(mixer, tokens)[case]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    idle = most_kb()
    run()
    print((most_kb() - idle) / 1024)


def peak_mb(mixer: str, case: str, tokens: int) -> float:
    folder = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {folder!r}); import levels; levels.alone({mixer!r}, {case!r}, {tokens})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(found.stdout)


def measure(mixer: str, tokens: int, rounds: int) -> dict[str, Any]:
    seconds = {
        name: statistics.median(times)
        for name, times in interleaved(cases(mixer, tokens), rounds, time.process_time).items()
    }
    base, context = seconds["read"], seconds["learn"]
    ratios = {
        "learn / read": context / base,
        "learn / (forward, backward, SGD)": context / seconds["forward, backward, SGD"],
        "slow levels: off their clocks / off": seconds["learn, slow levels off their clocks"]
        / seconds["learn, slow levels off"],
        "in context / stream": seconds["in context, 8 rows, no outer gradient"] / context,
        "in context with the outer gradient / stream": seconds["in context, 8 rows, first order"] / context,
    }
    unit = seconds["Transformer block, forward"]
    for name in ("chain", "neurons"):
        four, every = f"{name}, four rows", [n for n in seconds if n.startswith(f"learn, {name}, periods")]
        learned = seconds[f"learn, {four}"]
        told = {
            "beyond forward and backward": (learned - seconds[f"errors, {four}"]) / unit,
            "beyond reading": (learned - seconds[f"read, {four}"]) / unit,
            "all": learned / unit,
        }
        for reading, floor in floors(name).items():
            ratios[f"{four}: {reading} / peers' unit"] = told[reading]
            ratios[f"{four}: {reading} / peers' unit, floor"] = floor
        for case in every:
            about = case.removeprefix("learn, ")
            ratios[f"{about}: beyond reading / peers' unit"] = (seconds[case] - seconds[f"read, {about}"]) / unit
            ratios[f"{about}: all / peers' unit"] = seconds[case] / unit
    peaks = {name: peak_mb(mixer, name, tokens) for name in seconds if not any(word in name for word in IN_UNITS)}
    return {"seconds": seconds, "tokens_per_s": {k: tokens / s for k, s in seconds.items()}} | {
        "ratios": ratios,
        "peak_mb": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    told = parser.parse_args()
    found = {mixer: measure(mixer, told.tokens, told.rounds) for mixer in told.mixers}
    write_result(told.out, "levels", {"tokens": told.tokens, "rounds": told.rounds, "mixers": found})
    print(json.dumps({mixer: result["ratios"] for mixer, result in found.items()}, indent=2))


if __name__ == "__main__":
    main()
