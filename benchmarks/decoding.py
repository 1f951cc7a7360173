"""Tokens per second one at a time after 1K, 8K and 64K tokens, beside a Transformer with a cache of keys and values.

    python benchmarks/decoding.py [--tokens 64] [--rounds 5]

The state of a nestling model does not grow, so that its context is read once and only its cost per token is compared;
the cache is filled with random keys and values. Rounds are interleaved; medians and ratios are reported. Results go to
benchmarks/results/decoding.json.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sequence import interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory import matrix, mlp
from nestling.memory.state import flatten
from nestling.models import Decoder, ModelConfig
from nestling.sequence import self_modifying, sequence_memory
from nestling.tasks.record import write_result

DIM, HEADS, BLOCKS, CONTEXTS = 256, 4, 2, (1024, 8192, 65_536)


class Cached(nn.Module):
    """A Transformer of the same width and depth, decoding from a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(256, DIM) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(DIM, 3 * DIM, bias=False),
                    "out": nn.Linear(DIM, DIM, bias=False),
                    "up": nn.Linear(DIM, 4 * DIM, bias=False),
                    "down": nn.Linear(4 * DIM, DIM, bias=False),
                }
            )
            for _ in range(BLOCKS)
        )

    def forward(self, token: Tensor, cache: list[tuple[Tensor, Tensor]], at: int) -> Tensor:
        x = self.embedding[token]
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            q, k, v = block["qkv"](F.rms_norm(x, (DIM,))).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
            keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
            y = F.scaled_dot_product_attention(q, keys[:, :, : at + 1], values[:, :, : at + 1])
            x = x + block["out"](y.transpose(1, 2).flatten(-2))
            x = x + block["down"](F.gelu(block["up"](F.rms_norm(x, (DIM,)))))
        return x @ self.embedding.mT


def cached(context: int, tokens: int) -> Callable[[], None]:
    model = Cached()
    width = (1, HEADS, context + tokens, DIM // HEADS)
    cache = [(torch.randn(width), torch.randn(width)) for _ in range(BLOCKS)]

    def run() -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        for at in range(context, context + tokens):
            token = model(token, cache, at).argmax(-1)

    return run


def recurrent(mixer: Any, context: int, tokens: int) -> tuple[Callable[[], None], int]:
    """The decoding of a model that has read `context` tokens, and the numbers in its state."""
    model = Decoder(ModelConfig(dim=DIM, heads=HEADS, blocks=BLOCKS, mixer=mixer))
    text = torch.randint(256, (1, context), generator=torch.Generator().manual_seed(0))
    state = None
    for piece in text.split(1024, 1):
        _, state = model(piece, state)

    def run() -> None:
        own, token = state, torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(tokens):
            logits, own = model(token, own)
            token = logits.argmax(-1)

    return run, sum(tensor.numel() for tensor in flatten(state).values())


MIXERS = {
    "titans, matrix": sequence_memory(matrix()),
    "titans, mlp": sequence_memory(mlp()),
    "self-modifying titans": self_modifying(),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    for context in CONTEXTS:
        cases = {"transformer": cached(context, asked.tokens)}
        numbers = {"transformer": 2 * BLOCKS * DIM * context}
        for name, mixer in MIXERS.items():
            cases[name], numbers[name] = recurrent(mixer, context, asked.tokens)
        times = interleaved(cases, asked.rounds)
        for name, own in times.items():
            ratios = [a / b for a, b in zip(times["transformer"], own, strict=True)]
            rows.append(
                {
                    "context": context,
                    "model": name,
                    "tokens_per_s": round(asked.tokens / statistics.median(own), 1),
                    "times_the_transformer": round(statistics.median(ratios), 3),
                    "numbers_in_state": numbers[name],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "benchmarks/decoding.py",
        "shape": {"dim": DIM, "heads": HEADS, "blocks": BLOCKS, "rows": 1, "threads": 1},
        "rounds": asked.rounds,
        "rows": rows,
    }
    write_result(asked.out, "decoding", result)


if __name__ == "__main__":
    main()
