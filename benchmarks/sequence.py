"""Tokens per second and peak memory of the mixers beside a Transformer block of the same width, in one run.

    python benchmarks/sequence.py [--repeats 7] [--out benchmarks/results]
    python benchmarks/sequence.py --zoo [NAME ...] [--length 1024] [--lengths 1024 4096 16384 32768]

Every case is timed in turn, round after round, so that what else the machine does falls on all of them; medians and
ratios are reported. --zoo: every named model, or those given, in place of the blocks: forward + backward and peak
memory, and a second table of forward passes over --lengths tokens. --compiled: Titans, self-modifying Titans and Hope
with and without torch.compile, whose first calls take minutes. Results go to files (sequence, zoo, compiled) that name
the machine and the commit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.levels import Continuum, Reader, level
from nestling.memory import Structure, matrix, mlp
from nestling.models import Decoder, ModelConfig
from nestling.sequence import compile_steps, self_modifying, sequence_memory
from nestling.sequence.zoo import zoo
from nestling.tasks.record import write_result

DIM, HEADS, BATCH, LENGTH, CHUNK = 256, 4, 4, 1024, 64
LENGTHS = [1024, 4096, 16_384, 32_768]
LEVELS = (
    level(128, structure=mlp(expansion=4, residual=False)),
    level(512, structure=mlp(expansion=4, residual=False)),
)


K = TypeVar("K")


class TransformerBlock(nn.Module):
    """The yardstick: causal scaled-dot-product attention and an MLP of four times the width, pre-normed."""

    def __init__(self, mlp_too: bool = True, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        self.first, self.second = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.mlp_too, self.heads = mlp_too, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.second(x)))) if self.mlp_too else x


class Hope(nn.Module):
    """The Hope block: self-modifying mixer and two levels."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, gate_structure: Structure | None = None) -> None:
        super().__init__()
        mixer = self_modifying(chunk=CHUNK, projection_chunk=CHUNK, gate_structure=gate_structure)
        self.mixer = mixer.build(dim, heads)
        self.continuum = Continuum(dim, LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.continuum(x + self.mixer(F.rms_norm(x, x.shape[-1:]))[0])


class Mixed(nn.Module):
    """A mixer alone, with its norm and residual."""

    def __init__(self, expression: Any, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__()
        self.mixer = expression.build(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(F.rms_norm(x, x.shape[-1:]))[0]


def forward(block: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        block(x)


def both(block: nn.Module, x: Tensor) -> None:
    block.zero_grad(set_to_none=True)
    block(x).square().mean().backward()


def interleaved(
    cases: dict[K, Callable[[], None]], repeats: int, clock: Callable[[], float] | None = None
) -> dict[K, list[float]]:
    """Seconds of every case, one repeat of each in turn, after one to warm up. With one thread they are the
    processor's, unless another clock is given: that leaves out what other processes take."""
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    times: dict[K, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, run in cases.items():
            began = clock()
            run()
            if round_:
                times[name].append(clock() - began)
    return times


def peak_mb(case: str, length: int = LENGTH) -> float:
    """Peak memory of forward + backward of one case in a process of its own, above that of an idle one, in MB."""
    folder = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {folder!r}); import sequence; sequence.alone({case!r}, {length})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(found.stdout)


def alone(case: str, length: int) -> None:
    block, x = ALL[case](), torch.randn(BATCH, length, DIM)
    idle = most_kb()
    both(block, x)
    print((most_kb() - idle) / 1024)


def most_kb() -> int:
    """The most memory this process has held; unlike getrusage, nothing of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "transformer block": TransformerBlock,
    "attention alone": lambda: TransformerBlock(mlp_too=False),
    "titans mixer": lambda: Mixed(sequence_memory(mlp(expansion=2.0), chunk=CHUNK)),
    "self-modifying mixer": lambda: Mixed(self_modifying(chunk=CHUNK, projection_chunk=CHUNK)),
    "hope block": Hope,
    "self-modifying mixer, linear gates": lambda: Mixed(
        self_modifying(chunk=CHUNK, projection_chunk=CHUNK, gate_structure=matrix())
    ),
    "hope block, linear gates": lambda: Hope(gate_structure=matrix()),
}
RECOMPUTED: dict[str, Callable[[], nn.Module]] = {
    "titans mixer, recomputed": lambda: Mixed(sequence_memory(mlp(expansion=2.0), chunk=CHUNK, checkpoint=True)),
    "self-modifying mixer, recomputed": lambda: Mixed(
        self_modifying(chunk=CHUNK, projection_chunk=CHUNK, checkpoint=True)
    ),
}
ZOO: dict[str, Callable[[], nn.Module]] = {
    f"zoo {name}": lambda model=model: Mixed(model.mixer)  # type: ignore[misc]
    for name, model in zoo.items()
}
COMPILED = ("titans mixer", "self-modifying mixer", "hope block")


def compiled(name: str) -> nn.Module:
    block = BLOCKS[name]()
    compile_steps(block)
    return block


ALL = BLOCKS | RECOMPUTED | ZOO | {f"{name}, compiled": partial(compiled, name) for name in COMPILED}


def blocks(names: Iterable[str], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, DIM)
    built = {name: ALL[name]() for name in names}
    cases: dict[str, Callable[[], None]] = {}
    for name, block in built.items():
        cases[f"{name}, forward"] = lambda block=block: forward(block, x)  # type: ignore[misc]
        cases[f"{name}, forward+backward"] = lambda block=block: both(block, x)  # type: ignore[misc]
    times = interleaved(cases, repeats)
    rows = {}
    for name in built:
        row: dict[str, Any] = {"peak_mb": round(peak_mb(name), 1)}
        for kind in ("forward", "forward+backward"):
            own, reference = times[f"{name}, {kind}"], times[f"transformer block, {kind}"]
            row[kind] = {
                "tokens_per_s": round(BATCH * LENGTH / statistics.median(own)),
                "times_transformer": round(statistics.median(a / b for a, b in zip(own, reference, strict=True)), 3),
            }
        rows[name] = row
    return rows


def recomputation(repeats: int) -> dict[str, Any]:
    """Time with checkpoint=True over time without, and peak memory of both at two lengths."""
    torch.manual_seed(0)
    x, rows = torch.randn(BATCH, LENGTH, DIM), {}
    for name in ("titans mixer", "self-modifying mixer"):
        plain, again = BLOCKS[name](), RECOMPUTED[f"{name}, recomputed"]()
        times = interleaved({"plain": lambda: both(plain, x), "again": lambda: both(again, x)}, repeats)  # noqa: B023
        ratios = [a / b for a, b in zip(times["again"], times["plain"], strict=True)]
        rows[name] = {
            "times_the_plain": round(statistics.median(ratios), 3),
            "peak_mb": {
                kind: {length: round(peak_mb(case, length), 1) for length in (LENGTH, 4 * LENGTH)}
                for kind, case in (("plain", name), ("recomputed", f"{name}, recomputed"))
            },
        }
    return rows


def lengths(repeats: int) -> dict[str, float]:
    """Time at length 16K over time at 4K, forward, one row."""
    rows = {}
    for name, expression in (
        ("titans mixer", sequence_memory(mlp(expansion=2.0))),
        ("self-modifying mixer", self_modifying()),
    ):
        block = Mixed(expression)
        long, short = torch.randn(1, 16_384, DIM), torch.randn(1, 4_096, DIM)
        times = interleaved({"long": lambda: forward(block, long), "short": lambda: forward(block, short)}, repeats)  # noqa: B023
        ratios = [a / b for a, b in zip(times["long"], times["short"], strict=True)]
        rows[name] = round(statistics.median(ratios), 3)
    return rows


def learning(repeats: int) -> dict[str, float]:
    """Reading with the levels learning over reading alone: one row, two levels, no labels but the text."""
    model = Decoder(ModelConfig(dim=DIM, heads=HEADS, blocks=2, levels=LEVELS))
    tokens = torch.randint(0, 256, (2049,), generator=torch.Generator().manual_seed(0))

    def reader(learning: bool) -> Callable[[], None]:
        one = Reader(model, learning=learning)
        return lambda: one.read(one.begin(), tokens) and None

    def in_segments() -> None:
        with torch.no_grad():
            state = None
            for segment in tokens[:2048].split(128):
                _, state = model(segment[None], state)

    times = interleaved({"learning": reader(True), "reading": reader(False), "segments": in_segments}, repeats)
    return {
        "learning_over_reading": round(
            statistics.median(a / b for a, b in zip(times["learning"], times["reading"], strict=True)), 3
        ),
        "learning_over_reading_in_segments": round(
            statistics.median(a / b for a, b in zip(times["learning"], times["segments"], strict=True)), 3
        ),
        "learning_tokens_per_s": round(2048 / statistics.median(times["learning"])),
    }


def zoo_rows(names: list[str], repeats: int, length: int) -> dict[str, Any]:
    """Forward + backward of the named models beside the Transformer block, and their peak memory."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, length, DIM)
    built = {"transformer block": TransformerBlock()} | {name: ALL[f"zoo {name}"]() for name in names}
    times = interleaved({name: lambda block=block: both(block, x) for name, block in built.items()}, repeats)  # type: ignore[misc]
    rows = {}
    for name, own in times.items():
        case = name if name in BLOCKS else f"zoo {name}"
        ratios = [a / b for a, b in zip(own, times["transformer block"], strict=True)]
        rows[name] = {
            "ms": round(1e3 * statistics.median(own), 1),
            "times_transformer": round(statistics.median(ratios), 3),
            "peak_mb": round(peak_mb(case, length), 1),
        }
    return rows


def zoo_lengths(names: list[str], repeats: int, lengths: list[int]) -> dict[str, Any]:
    """Milliseconds of a forward pass of one row by length, and the time at each length over that at a quarter of it."""
    rows, generator = {}, torch.Generator().manual_seed(0)
    whole = torch.randn(1, max(lengths), DIM, generator=generator)
    for name in names:
        block = Mixed(zoo[name].mixer)
        cases = {length: lambda block=block, x=whole[:, :length]: forward(block, x) for length in lengths}  # type: ignore[misc]
        times = interleaved(cases, repeats)
        rows[name] = {
            "ms": {length: round(1e3 * statistics.median(own), 1) for length, own in times.items()},
            "over_a_quarter": {
                long: round(statistics.median(a / b for a, b in zip(own, times[long // 4], strict=True)), 3)
                for long, own in times.items()
                if long // 4 in times
            },
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--zoo", nargs="*", metavar="NAME")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens, of the zoo's first table")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, of the zoo's second table")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_flush_denormal(True)
    if asked.zoo is not None:
        measure_zoo(asked.zoo or list(zoo), asked)
        return
    if asked.compiled:
        measure_compiled(asked)
        return
    result = {
        "what": "benchmarks/sequence.py",
        "shape": {"batch": BATCH, "length": LENGTH, "dim": DIM, "heads": HEADS, "chunk": CHUNK},
        "repeats": asked.repeats,
        "blocks": blocks(BLOCKS, asked.repeats),
        "recomputation": recomputation(max(3, asked.repeats // 2)),
        "time_16k_over_4k": lengths(max(3, asked.repeats // 2)),
        "learning": learning(asked.repeats),
    }
    write_result(asked.out, "sequence", result)
    print(json.dumps(result, indent=2))


def measure_compiled(asked: argparse.Namespace) -> None:
    names = ["transformer block", *COMPILED, *(f"{name}, compiled" for name in COMPILED)]
    result = {
        "what": "benchmarks/sequence.py --compiled",
        "shape": {"batch": BATCH, "length": LENGTH, "dim": DIM, "heads": HEADS, "chunk": CHUNK},
        "repeats": asked.repeats,
        "threads": asked.threads,
        "blocks": blocks(names, asked.repeats),
    }
    write_result(asked.out, "compiled", result)
    print(json.dumps(result, indent=2))


def measure_zoo(names: list[str], asked: argparse.Namespace) -> None:
    result = {
        "what": "benchmarks/sequence.py --zoo",
        "shape": {"batch": BATCH, "length": asked.length, "dim": DIM, "heads": HEADS},
        "repeats": asked.repeats,
        "threads": asked.threads,
        "models": zoo_rows(names, asked.repeats, asked.length),
        "lengths": zoo_lengths(names, max(1, asked.repeats // 3), asked.lengths),
    }
    write_result(asked.out, "zoo", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
