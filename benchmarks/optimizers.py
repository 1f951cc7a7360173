"""Whole optimizer steps on the parameters of a Transformer of 12 layers and width 512, beside torch.optim's.

    python benchmarks/optimizers.py [--rounds 5] [--layers 12] [--device cuda]

AdamW beside torch's loop, foreach and fused forms; Muon, and M3 at period 100, beside torch's Muon (matrices only).
Rounds are interleaved; medians, medians of the rounds' ratios and ratios of the medians are reported, with the bounds
that were set, which hold if the worse of the two does. Memory is told three times, in MB above parameters and
gradients, each optimizer in a process of its own: `state_mb` is what its state holds, `held_mb` the peak of a few steps
where every tensor has pages of its own (what is needed), `peak_mb` the peak as glibc's heap has it, with holes that
nothing is in (what is taken). On a GPU, whose allocator has no such holes, `held_mb` alone.
Results go to benchmarks/results/optimizers.json, those of a GPU to optimizers_cuda.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sequence import interleaved, most_kb
from torch import nn

from nestling.optim import M3, AdamW, Muon
from nestling.tasks.record import write_result

DIM, LAYERS = 512, 12


def parameters(layers: int, device: str) -> list[nn.Parameter]:
    """The block's four projections, two maps of its MLP and two norms, with gradients."""
    shapes = [(DIM, DIM)] * 4 + [(4 * DIM, DIM), (DIM, 4 * DIM), (DIM,), (DIM,)]
    made = [nn.Parameter(torch.randn(shape, device=device) * DIM**-0.5) for _ in range(layers) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ALL: dict[str, Make] = {
    "torch AdamW, loop": partial(torch.optim.AdamW, foreach=False),
    "torch AdamW, foreach": partial(torch.optim.AdamW, foreach=True),
    "torch AdamW, fused": partial(torch.optim.AdamW, fused=True),
    "AdamW": AdamW,
}
MATRICES: dict[str, Make] = {
    "torch Muon": torch.optim.Muon,
    "Muon": Muon,
    "M3, period 100": partial(M3, periods=100),
    "M3 as printed, period 100": partial(M3, periods=100, mode="paper"),
}
BOUNDS = {
    "AdamW": ("torch AdamW, loop", 1.5),
    "Muon": ("torch Muon", 1.0),
    "M3, period 100": ("torch Muon", 1.5),
    "M3 as printed, period 100": ("torch Muon", 1.5),
}


def whole_step(optimizer: torch.optim.Optimizer, device: str) -> None:
    optimizer.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def build(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name in MATRICES:
        return MATRICES[name]([p for p in params if p.dim() == 2])
    return ALL[name](params)


def alone(name: str, layers: int, device: str) -> None:
    """Prints the peak above what was there before the first step, and the size of the state."""
    optimizer = build(name, parameters(layers, device))
    cuda = device.startswith("cuda")
    idle = torch.cuda.memory_allocated() if cuda else most_kb()
    for _ in range(3):
        optimizer.step()
    most = (torch.cuda.max_memory_allocated() - idle) / 2**20 if cuda else (most_kb() - idle) / 1024
    state = sum(t.nbytes for own in optimizer.state.values() for t in own.values() if isinstance(t, torch.Tensor))
    print(most, state / 2**20)


def memory(name: str, layers: int, device: str) -> dict[str, float]:
    asked = [sys.executable, __file__, "--alone", name, "--layers", str(layers), "--device", device]
    told = {}
    for key, more in (("held_mb", {"MALLOC_MMAP_THRESHOLD_": "65536"}), ("peak_mb", {})):
        if key == "held_mb" or device == "cpu":
            done = subprocess.run(asked, capture_output=True, text=True, check=True, env=os.environ | more)
            told[key], told["state_mb"] = (round(float(word), 1) for word in done.stdout.split())
    return told


def judged(own: list[float], theirs: list[float], bound: float) -> dict[str, float | bool]:
    """Both ratios, and whether the worse of them is within the bound."""
    paired = statistics.median(a / b for a, b in zip(own, theirs, strict=True))
    apart = statistics.median(own) / statistics.median(theirs)
    ratios = {"median_of_ratios": round(paired, 3), "ratio_of_medians": round(apart, 3)}
    return {**ratios, "bound": bound, "within": max(paired, apart) <= bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.alone:
        return alone(asked.alone, asked.layers, asked.device)
    torch.manual_seed(0)
    params, rows = parameters(asked.layers, asked.device), []
    for family in (ALL, MATRICES):
        steps = {name: partial(whole_step, build(name, params), asked.device) for name in family}
        clock = time.perf_counter if asked.device.startswith("cuda") else None  # which waits for the card
        times = interleaved(steps, asked.rounds, clock)
        for name, own in times.items():
            row = {"optimizer": name, "ms": round(1e3 * statistics.median(own), 1)}
            if name in BOUNDS:
                beside, bound = BOUNDS[name]
                row |= {"beside": beside, **judged(own, times[beside], bound)}
            rows.append(row | memory(name, asked.layers, asked.device))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "benchmarks/optimizers.py",
        "shape": {
            "dim": DIM,
            "layers": asked.layers,
            "numbers": sum(p.numel() for p in params),
            "threads": 1,
            "dtype": "float32",
            "device": torch.cuda.get_device_name() if asked.device.startswith("cuda") else asked.device,
        },
        "rounds": asked.rounds,
        "rows": rows,
    }
    return write_result(asked.out, "optimizers" if asked.device == "cpu" else f"optimizers_{asked.device}", result)


if __name__ == "__main__":
    main()
