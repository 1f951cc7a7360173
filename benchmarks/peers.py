"""The Titans mixer beside titans-pytorch's NeuralMemory set to the same: forward + backward, and peak memory.

    pip install titans-pytorch
    python benchmarks/peers.py [--repeats 5] [--out benchmarks/results]

Both: width 256, 4 heads, 4 rows of 1,024 tokens, a memory of two maps of expansion 2, momentum and retention, chunks
of 64 with gradients at each chunk's start. Theirs reads once a chunk and has no convolution, norm and gate around
it; ours reads at every token and has. Timed in turn, round after round; medians, and the median of each round's ratio.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from sequence import BATCH, BLOCKS, CHUNK, DIM, HEADS, LENGTH, both, interleaved, most_kb
from torch import Tensor, nn

from nestling.tasks.record import write_result


class NeuralMemory(nn.Module):
    """titans-pytorch's, with a new set of weights for every chunk (batch_size)."""

    def __init__(self) -> None:
        super().__init__()
        from titans_pytorch import MemoryMLP
        from titans_pytorch import NeuralMemory as Theirs

        width = DIM // HEADS
        model = MemoryMLP(width, depth=2, expansion_factor=2.0)
        self.memory = Theirs(DIM, chunk_size=CHUNK, batch_size=CHUNK, dim_head=width, heads=HEADS, model=model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.memory(x)[0]


CASES = {
    "transformer block": BLOCKS["transformer block"],
    "nestling titans mixer": BLOCKS["titans mixer"],
    "titans-pytorch NeuralMemory": NeuralMemory,
}


def alone(case: str) -> None:
    """Print the peak memory of one forward + backward above that of an idle process, in MB."""
    block, x = CASES[case](), torch.randn(BATCH, LENGTH, DIM)
    idle = most_kb()
    both(block, x)
    print((most_kb() - idle) / 1024)


def peak_mb(case: str) -> float:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import peers; peers.alone({case!r})"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return float(found.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    if importlib.util.find_spec("titans_pytorch") is None:
        raise SystemExit("titans-pytorch is not installed: pip install titans-pytorch")
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, DIM)
    built = {name: build() for name, build in CASES.items()}
    times = interleaved({name: lambda block=block: both(block, x) for name, block in built.items()}, asked.repeats)  # type: ignore[misc]
    ours, theirs = times["nestling titans mixer"], times["titans-pytorch NeuralMemory"]
    result = {
        "threads": asked.threads,
        "repeats": asked.repeats,
        "forward+backward": {
            name: {"seconds": round(statistics.median(found), 4), "peak_mb": round(peak_mb(name), 1)}
            for name, found in times.items()
        },
        "times as fast as titans-pytorch": round(
            statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3
        ),
    }
    print(json.dumps(result, indent=2))
    write_result(asked.out, "peers", result)


if __name__ == "__main__":
    main()
