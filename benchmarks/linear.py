"""Forward + backward of the delta rules beside softmax attention of the same width, and beside plain autograd.

    python benchmarks/linear.py [--repeats 9] [--threads 1] [--out benchmarks/results]

Every case is timed in turn, round after round, so that what else the machine does falls on all of them; medians, and
medians of each round's ratio to attention, are reported. `plain` is the same chunk form as autograd has it, chunk
after chunk, at the shorter length alone. There too, where flash-linear-attention is installed (a package of its own
and einops; its kernels and Triton are not needed), the chunk references that it has in plain PyTorch are timed beside
ours, at their own chunk sizes. Results go to a file that names the machine and the commit.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.sequence.linear import delta_rule, gated_delta_rule, gated_linear_attention, kda, linear_attention
from nestling.sequence.linear_chunk import Given, plain
from nestling.tasks.record import write_result

BATCH, HEADS, WIDTH, CHUNK = 4, 4, 64, 64
AIMS = {1024: 1.15, 8192: 0.5}  # of the gated delta rule's time over attention's
REFERENCE_CHUNKS = (16, 32, 64)
REFERENCE_AIM = 1.3  # of the reference's time at its best chunk size over the delta rule's


def inputs(length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = (BATCH, length, HEADS)
    given = {
        "q": F.normalize(torch.randn(*shape, WIDTH), dim=-1),
        "k": F.normalize(torch.randn(*shape, WIDTH), dim=-1),
        "v": torch.randn(*shape, WIDTH),
        "step_size": torch.rand(*shape),
        "log_retention": F.logsigmoid(torch.randn(*shape) + 3.0),
        "by_channel": F.logsigmoid(torch.randn(*shape, WIDTH) + 3.0),
    }
    return {name: x.requires_grad_() for name, x in given.items()}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def plain_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, log_retention: Tensor) -> Tensor:
    b, a = step_size[..., None], log_retention.exp()[..., None]
    state = v.new_zeros(BATCH, HEADS, WIDTH, WIDTH)
    return plain(Given(q * WIDTH**-0.5, k, v * b, log_retention, k * (a * b), None, state), CHUNK, False)[0]


def cases(x: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    q, k, v, b, a, by_channel = x.values()
    return {
        "attention": lambda: attention(q, k, v),
        "linear attention": lambda: linear_attention(q, k, v, chunk=CHUNK)[0],
        "gated linear attention": lambda: gated_linear_attention(q, k, v, by_channel, chunk=CHUNK)[0],
        "delta rule": lambda: delta_rule(q, k, v, b, chunk=CHUNK)[0],
        "gated delta rule": lambda: gated_delta_rule(q, k, v, b, a, chunk=CHUNK)[0],
        "kda": lambda: kda(q, k, v, b, by_channel, chunk=CHUNK)[0],
    }


def slow_cases(x: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """What takes minutes at the longer length."""
    q, k, v, b, a, _ = x.values()
    return {"gated delta rule, plain": lambda: plain_gated_delta_rule(q, k, v, b, a)} | reference_cases(x)


def reference(rule: str) -> Any:
    """flash-linear-attention's file of plain PyTorch functions for a rule, by its path: the package itself imports
    Triton, those files do not. None where it is not installed."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        return None
    places = (Path(folder) / "ops" / rule / "naive.py" for folder in found.submodule_search_locations)
    file = next((place for place in places if place.exists()), None)
    if file is None:
        return None
    spec = importlib.util.spec_from_file_location(f"reference_{rule}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_cases(x: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    q, k, v, b, a, _ = x.values()
    plain_delta, plain_gated = reference("delta_rule"), reference("gated_delta_rule")
    found: dict[str, Callable[[], Tensor]] = {}
    if plain_delta is None or plain_gated is None:
        return found

    def delta(chunk: int) -> Tensor:
        turned = (part.transpose(1, 2) for part in (q, k, v, b))  # this one has heads first
        return plain_delta.delta_rule_chunkwise(*turned, chunk_size=chunk)[0].transpose(1, 2)

    def gated(chunk: int) -> Tensor:
        return plain_gated.naive_chunk_gated_delta_rule(q, k, v, a, b, chunk_size=chunk)[0]

    for chunk in REFERENCE_CHUNKS:
        found[f"delta rule, reference, chunk {chunk}"] = partial(delta, chunk)
        found[f"gated delta rule, reference, chunk {chunk}"] = partial(gated, chunk)
    return found


def against_reference(times: dict[str, list[float]], x: dict[str, Tensor]) -> dict[str, Any]:
    """How many times as long the reference takes at its best chunk size, and how far the answers are apart."""
    told: dict[str, Any] = {}
    ours, theirs = cases(x), reference_cases(x)
    for rule in ("delta rule", "gated delta rule"):
        names = [name for name in theirs if name in times and name.startswith(f"{rule}, reference")]
        if names:
            best = min(names, key=lambda name: statistics.median(times[name]))
            ratio = statistics.median(a / b for a, b in zip(times[best], times[rule], strict=True))
            apart = float((ours[rule]() - theirs[best]()).detach().abs().max())
            told[rule] = {"best": best, "times_ours": round(ratio, 3), "apart": apart, "met": ratio >= REFERENCE_AIM}
    return told


def both(x: dict[str, Tensor], run: Callable[[], Tensor], grad: Tensor) -> float:
    """Seconds of one forward + backward; of the processor, where there is one thread."""
    for part in x.values():
        part.grad = None
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run().backward(grad)
    return clock() - began


def measured(length: int, repeats: int) -> dict[str, Any]:
    x = inputs(length)
    grad = torch.randn(BATCH, length, HEADS, WIDTH)
    runs = cases(x) | (slow_cases(x) if length == min(AIMS) else {})
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            seconds = both(x, run, grad)
            if round_:
                times[name].append(seconds)
    rows: dict[str, Any] = {}
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["attention"], strict=True))
        rows[name] = {"ms": round(1e3 * statistics.median(own), 1), "times_attention": round(ratio, 3)}
    aim = AIMS[length]
    return {
        "repeats": repeats,
        "cases": rows,
        "aim": aim,
        "aim_met": rows["gated delta rule"]["times_attention"] <= aim,
        "reference": against_reference(times, x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_flush_denormal(True)
    result = {
        "what": "benchmarks/linear.py",
        "shape": {"batch": BATCH, "heads": HEADS, "width": WIDTH, "chunk": CHUNK},
        "lengths": {
            length: measured(length, asked.repeats if length == 1024 else max(3, asked.repeats // 3)) for length in AIMS
        },
    }
    write_result(asked.out, "linear", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
