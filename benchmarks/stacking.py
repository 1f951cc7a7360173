"""What it costs a pre-trained model to learn while it reads: time and memory, beside a forward pass and training.

    python benchmarks/stacking.py [--width 512] [--layers 8] [--rounds 5]

A Llama with random weights reads 1,024 tokens, in segments of 128: without learning (forward), with levels stacked in
its MLPs in each of the three ways (four periods: 128, 512, 2,048, 8,192), and as ordinary training of the same MLPs
does (forward, backward, SGD on their weights, a step a segment). Medians of processor seconds, of interleaved rounds.
Memory is the most that tensors took above the model's own weights, as torch's profiler counts it. Results go to
benchmarks/results/stacking.json.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nestling.levels import Reader, stack
from nestling.levels.layouts import find_feedforwards
from nestling.tasks.record import write_result

PERIODS, SEGMENT, TOKENS = [128, 512, 2048, 8192], 128, 1024


def base(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, max_position_embeddings=TOKENS)).eval()


def reading(model: LlamaForCausalLM, how: str | None) -> Callable[[], None]:
    reader = Reader(stack(model, PERIODS, how or "layers"), learning=how is not None, segment=SEGMENT)
    text = torch.randint(0, 1024, (TOKENS + 1,), generator=torch.Generator().manual_seed(1))

    def go() -> None:
        state = reader.begin()
        for part in text.split(SEGMENT) if how is None else [text]:
            state, _ = reader.read(state, part)

    return go


def training(model: LlamaForCausalLM) -> Callable[[], None]:
    """The same segments after the same cache, cut from the graph between them."""
    model.requires_grad_(False)
    paths = [each.path for found in find_feedforwards(model) for each in found.maps]
    moved = [model.get_parameter(f"{path}.weight").requires_grad_() for path in paths]
    optimizer = torch.optim.SGD(moved, lr=1e-3)
    text = torch.randint(0, 1024, (TOKENS + 1,), generator=torch.Generator().manual_seed(1))

    def go() -> None:
        cache = DynamicCache()
        for start in range(0, TOKENS, SEGMENT):
            logits = model(text[None, start : start + SEGMENT], past_key_values=cache, use_cache=True).logits[0]
            F.cross_entropy(logits, text[start + 1 : start + SEGMENT + 1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    return go


WAYS: dict[str, Callable[[LlamaForCausalLM], Callable[[], None]]] = {
    "forward": lambda model: reading(model, None),
    "layers": lambda model: reading(model, "layers"),
    "neurons": lambda model: reading(model, "neurons"),
    "low_rank": lambda model: reading(model, "low_rank"),
    "training": training,
}


def peak(name: str, width: int, layers: int) -> int:
    """Bytes of tensors above those that there were before a round, at most."""
    go = WAYS[name](base(width, layers))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        go()
    taken = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(taken))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = {name: peak(name, args.width, args.layers) for name in WAYS}
    runs = {name: build(base(args.width, args.layers)) for name, build in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for go in runs.values():
        go()
    for _ in range(args.rounds):
        for name, go in runs.items():
            start = time.process_time()
            go()
            times[name].append(time.process_time() - start)
    median = {name: statistics.median(found) for name, found in times.items()}
    mlps = sum(w.numel() * 4 for maps in stack(base(args.width, args.layers), PERIODS).level_weights() for w in maps)
    result = {
        "width": args.width,
        "layers": args.layers,
        "tokens": TOKENS,
        "segment": SEGMENT,
        "ms_a_token": {name: round(1e3 * value / TOKENS, 3) for name, value in median.items()},
        "times_forward": {name: round(value / median["forward"], 2) for name, value in median.items()},
        "times_training": {name: round(value / median["training"], 2) for name, value in median.items()},
        "mlp_weights_mb": round(mlps / 2**20, 1),
        "memory_above_the_model_mb": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "rounds": times,
    }
    write_result(args.out, "stacking", result)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=2))


if __name__ == "__main__":
    main()
