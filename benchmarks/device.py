"""Forward and backward of the blocks on one device, beside the rate that its matrix products reach.

    python benchmarks/device.py --device cuda --dtype bfloat16

The blocks are those of benchmarks/sequence.py, timed in turn at --batch, --length and --width. A narrower --dtype is
that of torch's autocast: what memories write and read stays in float32, and what gains are the products around them.
Reported beside times: the multiplications and additions of matrix products (as torch counts them) a second, and what
share they are of those that one large product of the same type does a second. --compiled: the blocks with memories
again, with what they do with a chunk by torch.compile. Results go to device_DEVICE_DTYPE.json.

Beside the blocks, the linear family as functions of q, k, v and gates at --lengths: this library's chunk form, the same
functions with way="kernels" (the extra `gpu`), flash-linear-attention's gated delta rule as its users call it, and
softmax attention (SDPA). What cannot run says why in the place of its times.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sequence import CHUNK, Hope, Mixed, TransformerBlock, interleaved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nestling.memory import mlp
from nestling.sequence import (
    compile_steps,
    delta_rule,
    gated_delta_rule,
    gated_linear_attention,
    kda,
    linear_attention,
    self_modifying,
    sequence_memory,
)
from nestling.tasks.record import write_result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(dim: int, heads: int, compiled: bool) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {"transformer block": TransformerBlock(dim=dim, heads=heads)}
    for ending in ("", ", compiled")[: 1 + compiled]:
        own: dict[str, nn.Module] = {
            "titans mixer": Mixed(sequence_memory(mlp(expansion=2.0), chunk=CHUNK), dim, heads),
            "self-modifying mixer": Mixed(self_modifying(chunk=CHUNK, projection_chunk=CHUNK), dim, heads),
            "hope block": Hope(dim, heads),
        }
        for name, block in own.items():
            if ending:
                compile_steps(block)
            made[name + ending] = block
    return made


def wait(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of one product of large square matrices: the median."""
    size = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        a @ b
        wait(device)

    return 2.0 * size**3 / statistics.median(interleaved({"": multiply}, repeats, time.perf_counter)[""])


def operations(run: Callable[[], None]) -> int:
    """Multiplications and additions in the matrix products of one run."""

    def batched(total: torch.Size, a: torch.Size, b: torch.Size, **rest: Any) -> int:
        return 2 * a.numel() * b[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: batched}) as counter:
        run()
    return counter.get_total_flops()


def peak_mb(run: Callable[[], None], device: torch.device) -> float | None:
    """Peak memory of one run above what is held before it; None where torch does not keep count."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def measure(x: Tensor, blocks: dict[str, nn.Module], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    def runner(block: nn.Module) -> Callable[[], None]:
        def run() -> None:
            block.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                loss = block(x).square().mean()
            loss.backward()
            wait(x.device)

        return run

    cases = {name: runner(block) for name, block in blocks.items()}
    rate = matrix_rate(x.device, dtype, max(repeats, 10))
    times = interleaved(cases, repeats, time.perf_counter)
    rows: dict[str, Any] = {}
    for name, own in times.items():
        seconds, done = statistics.median(own), operations(cases[name.removesuffix(", compiled")])
        ratios = [a / b for a, b in zip(own, times["transformer block"], strict=True)]
        rows[name] = {
            "ms": round(1e3 * seconds, 2),
            "tokens_per_s": round(x.shape[0] * x.shape[1] / seconds),
            "times_transformer": round(statistics.median(ratios), 3),
            "operations": done,
            "teraflops_per_s": round(done / seconds / 1e12, 3),
            "share_of_matrix_rate": round(done / seconds / rate, 4),
            "peak_mb": peak_mb(cases[name], x.device),
        }
    return {"matrix_rate_teraflops_per_s": round(rate / 1e12, 3), "forward+backward": rows}


Streams = dict[str, Tensor]
FAMILY: dict[str, Callable[..., Tensor]] = {
    "linear attention": lambda x, way: linear_attention(x["q"], x["k"], x["v"], way=way)[0],
    "linear attention, decay": lambda x, way: gated_linear_attention(x["q"], x["k"], x["v"], x["decay"], way=way)[0],
    "gla": lambda x, way: gated_linear_attention(x["q"], x["k"], x["v"], x["by_channel"], way=way)[0],
    "delta rule": lambda x, way: delta_rule(x["q"], x["k"], x["v"], x["step"], way=way)[0],
    "gated delta rule": lambda x, way: gated_delta_rule(x["q"], x["k"], x["v"], x["step"], x["decay"], way=way)[0],
    "kda": lambda x, way: kda(x["q"], x["k"], x["v"], x["step"], x["by_channel"], way=way)[0],
}


def softmax_attention(x: Streams) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def their_gated_delta_rule(x: Streams) -> Tensor:
    theirs = importlib.import_module("fla.ops").chunk_gated_delta_rule
    return theirs(x["q"], x["k"], x["v"], g=x["decay"], beta=x["step"])[0]


def streams(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Streams:
    """Unit queries and keys, values and gates of the linear family: [b, t, h, k] and [b, t, h]."""
    each = (batch, length, heads)
    drawn = {name: torch.randn(*each, width // heads, device=device).to(dtype) for name in ("q", "k", "v")}
    drawn |= {name: F.normalize(drawn[name], dim=-1) for name in ("q", "k")}
    drawn["step"] = torch.rand(*each, device=device)
    drawn["decay"] = F.logsigmoid(torch.randn(*each, device=device) + 3.0)
    drawn["by_channel"] = F.logsigmoid(torch.randn(*each, width // heads, device=device) + 3.0)
    return {name: x.requires_grad_() for name, x in drawn.items()}


def linear_cases(x: Streams) -> dict[str, Callable[[], Tensor]]:
    cases: dict[str, Callable[[], Tensor]] = {"softmax attention": lambda: softmax_attention(x)}
    for name, function in FAMILY.items():
        for way in ("chunked", "kernels"):
            cases[f"{name}, {way}"] = lambda function=function, way=way: function(x, way)  # type: ignore[misc]
    return {**cases, "gated delta rule, fla": lambda: their_gated_delta_rule(x)}


def measure_linear(x: Streams, repeats: int) -> dict[str, Any]:
    """Forward and backward of every function, timed in turn, and its peak memory."""
    device, leaves = x["q"].device, list(x.values())

    def runner(case: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            y = case()
            torch.autograd.grad(y.float().sum(), leaves, allow_unused=True)
            wait(device)

        return run

    cases, rows = {name: runner(case) for name, case in linear_cases(x).items()}, {}
    for name in list(cases):
        try:
            cases[name]()
        except (ValueError, ImportError, AssertionError, RuntimeError) as error:
            rows[name] = str(error).splitlines()[0]
            del cases[name]
    for name, own in interleaved(cases, repeats, time.perf_counter).items():
        rows[name] = {"ms": round(1e3 * statistics.median(own), 2), "peak_mb": peak_mb(cases[name], device)}
    return {name: rows[name] for name in linear_cases(x)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536], help="of the linear family")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args(arguments)
    if asked.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no such device here; --device cpu runs everywhere")
    torch.manual_seed(0)
    x = torch.randn(asked.batch, asked.length, asked.width, device=asked.device)
    blocks = {name: block.to(asked.device) for name, block in build(asked.width, asked.heads, asked.compiled).items()}
    result = {
        "what": "benchmarks/device.py",
        "device": torch.cuda.get_device_name(asked.device) if asked.device.type == "cuda" else asked.device.type,
        "dtype": asked.dtype,
        "shape": {name: getattr(asked, name) for name in ("batch", "length", "width", "heads")} | {"chunk": CHUNK},
        "repeats": asked.repeats,
        **measure(x, blocks, DTYPES[asked.dtype], asked.repeats),
        "linear family, forward+backward": {},
    }
    del x, blocks
    for length in asked.lengths:
        given = streams(asked.batch, length, asked.heads, asked.width, DTYPES[asked.dtype], asked.device)
        result["linear family, forward+backward"][length] = measure_linear(given, asked.repeats)
    write_result(asked.out, f"device_{asked.device.type}_{asked.dtype}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
