"""The demo: pre-train a small Hope, let it live through two bodies of text, and say what it learned and forgot."""

import itertools
import lzma
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestling.learner import load_model, machine
from nestling.levels import LevelsState, Reader, level, mean_surprise, surprise_by_position
from nestling.memory import gradient_descent, mlp
from nestling.models import Decoder, ModelConfig, preset
from nestling.sequence import attention
from nestling.train import Stream, TrainConfig, Trainer, save_run

from .embedded import Body, embedded_bodies
from .footprint import footprint_bytes
from .record import commit

BITS = 1 / math.log(2)
ARMS = {
    "hope": "every level at its own period",
    "fastest": "every level at the fastest period: online fine-tuning",
    "matched": "every level at the fastest period, step sizes matched to the rate of its period",
    "frozen": "reads, and its levels do not learn",
}


DEMO_TRAIN = TrainConfig(steps=500, rows=2, length=256, learning_rate=4e-3, warmup_steps=10)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does, and how much of it."""

    model: ModelConfig = preset("hope")
    train: TrainConfig = DEMO_TRAIN
    python_bytes: int = 60_000  # read in life
    names_bytes: int = 8_000  # read in life, after Python
    held_out_bytes: int = 16_384  # of each body
    probe_bytes: int = 4_096  # of the held-out text, for the curves
    probes: int = 1  # inside each body
    long_bytes: int = 61_440  # of held-out English, for bits per byte by position
    seed: int = 0
    short: bool = False


def shortened(config: DemoConfig) -> DemoConfig:
    """A demo of about a minute: too little training to claim anything, enough to see that all of it runs."""
    train = replace(config.train, steps=20, rows=2, length=128, warmup_steps=5)
    return replace(
        config,
        train=train,
        python_bytes=12_288,
        names_bytes=8_192,
        held_out_bytes=4_096,
        probe_bytes=2_048,
        probes=1,
        long_bytes=16_384,
        short=True,
    )


Tell = Callable[[str, float, float, str], None]
"""(task, done, total, note): called as the work goes on."""


def run_demo(config: DemoConfig, folder: Path, tell: Tell) -> dict[str, Any]:
    """The whole demo; the measurements as plain data (see `report.write_report`).

    Two processes of one thread each: first the model beside its baseline, then the arms of the life, two by two.
    """
    began, held = time.perf_counter(), 0
    bodies = demo_bodies(config)
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(2, os.cpu_count() or 1))
    with context.Manager() as manager:
        queue = manager.Queue()
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:

            def together(jobs: dict[str, Future[Any]]) -> dict[str, Any]:
                nonlocal held
                for turn in itertools.count():
                    if all(job.done() for job in jobs.values()):
                        break
                    time.sleep(0.1)
                    _pass_on(queue, tell)
                    if turn % 50 == 0:  # every 5 seconds: to add up their pages holds the processes up
                        held = max(held, footprint_bytes())
                _pass_on(queue, tell)
                return {name: job.result() for name, job in jobs.items()}

            baseline = equal_transformer(config)
            trained = together(
                {
                    "hope": pool.submit(_pre_train, config, bodies, config.model, "hope", folder, queue),
                    "transformer": pool.submit(_pre_train, config, bodies, baseline, "transformer", folder, queue),
                }
            )
            after_training = time.perf_counter()
            jobs = {name: pool.submit(_live, config, bodies, name, folder, queue) for name in ARMS}
            arms = together({**jobs, "positions": pool.submit(_by_position, config, folder)})
    ended = time.perf_counter()
    first, positions = trained["hope"]["held_out"], arms.pop("positions")
    frozen, probe = arms["frozen"], trained["hope"]["probe"]  # what does not learn measures the same throughout
    frozen["held_out"] = {stage: first for stage in arms["hope"]["held_out"]}
    frozen["curve"] = [[tokens, probe] for tokens, _ in arms["hope"]["curve"]]
    for arm in arms.values():
        arm["held_out"] = {"after training": first, **arm["held_out"]}
        arm["curve"] = [[0, probe], *arm["curve"]]
    data = {
        "format": 1,
        "title": "A small Hope: pre-trained, then living on",
        "short": config.short,
        "seed": config.seed,
        "commit": commit(),
        "machine": {**machine(), "cores": os.cpu_count() or 1, "workers": workers},
        "seconds": {"pre-training": after_training - began, "life": ended - after_training, "all": ended - began},
        "peak_bytes": held,
        "model": {"expression": repr(config.model), "parameters": trained["hope"]["parameters"]},
        "baseline": {"expression": repr(baseline), "parameters": trained["transformer"]["parameters"]},
        "trained_tokens": config.train.steps * config.train.rows * config.train.length,
        "training_length": config.train.length,
        "bodies": {
            name: {"read": sum(map(len, b.read)), "held_out": sum(map(len, b.held_out)), "xz": xz(b.held_out)}
            for name, b in bodies.items()
        },
        "training": {name: part["curve"] for name, part in trained.items()},
        "trained": {name: part["held_out"] for name, part in trained.items()},
        "arms": arms,
        **positions,
    }
    return {**data, "claims": claims(data)}


def demo_bodies(config: DemoConfig) -> dict[str, Body]:
    """The text of the demo, leak-checked."""
    sizes = {"python": config.python_bytes, "names": config.names_bytes}
    return embedded_bodies(read_bytes=sizes, held_out_bytes=config.held_out_bytes, seed=config.seed)


def arm_config(config: ModelConfig, arm: str) -> ModelConfig:
    """The model of an arm: the same weights, other clocks."""
    levels = [block for block in config.levels if isinstance(block, level)]
    if len(levels) < len(config.levels):
        raise ValueError(f"the demo changes the clocks of blocks that are one level each, got {config.levels}")
    fastest = levels[0].period
    if arm == "fastest":
        return replace(config, levels=tuple(replace(lvl, period=fastest) for lvl in levels))
    if arm == "matched":
        matched = (replace(lvl, period=fastest, step_size=lvl.step_size * fastest / lvl.period) for lvl in levels)
        return replace(config, levels=tuple(matched))
    return config


def equal_transformer(config: DemoConfig) -> ModelConfig:
    """A Transformer of as many parameters: windowed attention with the same convolutions, one MLP a block."""
    wanted = count(Decoder(config.model))
    convolution = getattr(config.model.mixer, "convolution", 4)

    def build(expansion: float) -> ModelConfig:
        block = level(math.inf, structure=mlp(expansion=expansion, residual=False), rule=gradient_descent())
        mixer = attention(window=config.train.length, convolution=convolution)
        return replace(config.model, mixer=mixer, levels=(block,))

    per_unit = count(Decoder(build(2.0))) - count(Decoder(build(1.0)))
    expansion = 1.0 + (wanted - count(Decoder(build(1.0)))) / per_unit
    return build(round(expansion * config.model.dim) / config.model.dim)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def xz(documents: tuple[bytes, ...]) -> float:
    """Bits per byte of `xz -9` on the documents end to end."""
    text = b"".join(documents)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def claims(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What the demo is held against: each claim, its bound, what was measured, whether it holds."""
    english = data["trained"]
    found = [
        ("English held-out after pre-training", english["hope"]["english"], "at most 2.7", lambda x: x <= 2.7),
        (
            "Hope minus the Transformer of equal size, English held-out",
            english["hope"]["english"] - english["transformer"]["english"],
            "at most 0",
            lambda x: x <= 0,
        ),
    ]
    for body in ("python", "names"):
        stage = f"after {body}"
        gain = data["arms"]["frozen"]["held_out"][stage][body] - data["arms"]["hope"]["held_out"][stage][body]
        found.append((f"gained over the frozen model on {body}, right after it was read", gain, "at least 0.4", _gain))
    spans = [span for span in data["by_position"] if not math.isnan(span[2])]
    if len(spans) > 1:
        (_, _, before), (first, last, bits) = spans[-2:]
        claim = f"change at positions {first} to {last} from those before (trained at {data['training_length']})"
        found.append((claim, bits - before, "below 0", lambda x: x < 0))
    beyond, trained = data["beyond"], data["training_length"]
    if not math.isnan(beyond["on"]):  # where a text is long enough
        claim = f"positions from {beyond['first']:,} on, less the same bytes read afresh every {trained}"
        found.append((claim, beyond["on"] - beyond["afresh"], "below 0", lambda x: x < 0))
    found.append(("seconds in all", data["seconds"]["all"], "at most 480", lambda x: x <= 480))
    found.append(("GB of memory", data["peak_bytes"] / 1e9, "at most 3", lambda x: x <= 3))
    return [
        {"claim": claim, "measured": f"{value:.3f}", "bound": bound, "holds": bool(holds(value))}
        for claim, value, bound, holds in found
    ]


def _gain(gain: float) -> bool:
    return gain >= 0.4


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _pass_on(queue: Any, tell: Tell) -> None:
    while not queue.empty():
        tell(*queue.get())


def _held_out(model: Decoder, bodies: dict[str, Body], levels: LevelsState | None, cap: int) -> dict[str, float]:
    weights = None if levels is None else levels.weights
    return {
        name: mean_surprise(model, _first(body.held_out, cap), weights=weights) * BITS for name, body in bodies.items()
    }


def _first(documents: tuple[bytes, ...], size: int) -> list[bytes]:
    """The documents up to `size` bytes in all."""
    chosen = []
    for document in documents:
        if size <= 0:
            break
        chosen.append(document[:size])
        size -= len(document)
    return chosen


def _pre_train(
    config: DemoConfig, bodies: dict[str, Body], model_config: ModelConfig, name: str, folder: Path, queue: Any
) -> dict[str, Any]:
    model, train = Decoder(model_config, seed=config.seed), config.train
    stream = Stream.of(
        bodies["english"].read, rows=train.rows, length=train.length, reset_share=train.reset_share, seed=train.seed
    )
    trainer = Trainer(model, train)
    curve, recent = [], []
    while trainer.step < train.steps:
        recent.append(trainer.run_step(stream).loss * BITS)
        queue.put((f"pre-training {name}", trainer.step, train.steps, f"{recent[-1]:.3f} bits/byte"))
        if trainer.step % 5 == 0 or trainer.step == train.steps:
            curve.append([trainer.step * train.rows * train.length, sum(recent) / len(recent)])
            recent = []
    save_run(folder / name, trainer, {"demo": name})
    return {
        "parameters": count(model),
        "curve": curve,
        "held_out": _held_out(model, bodies, None, config.held_out_bytes),
        "probe": _held_out(model, bodies, None, config.probe_bytes),
    }


def _by_position(config: DemoConfig, folder: Path) -> dict[str, Any]:
    """Bits per byte by position of English text far longer than what was trained on."""
    model, edges = load_model(folder / "hope").model, [0, 64, 256, 512, 1024, 2047]
    size = edges[-1] + 1
    longer = embedded_bodies(held_out_bytes=config.long_bytes, seed=config.seed)["english"].held_out
    pieces = [text[at : at + size] for text in longer for at in range(0, len(text) - edges[-1], size)]
    bits = surprise_by_position(model, pieces, piece=size) * BITS  # the same texts at every position
    return {
        "by_position": [[a, b, float(bits[:, a:b].nanmean())] for a, b in itertools.pairwise(edges)],
        "beyond": _beyond(model, pieces, bits, edges[-2], config.train.length),
    }


def _beyond(model: Decoder, pieces: list[bytes], bits: Tensor, first: int, length: int) -> dict[str, Any]:
    """What a context beyond the training length is worth: bits per byte of the same bytes, from position `first` on,
    read on, and read afresh every `length` bytes (of which those with at least half of that before them count)."""
    on, afresh = [], []
    for at in range(first, bits.shape[1] - length + 2, length):
        on.append(bits[:, at + length // 2 : at + length - 1])
        cut = surprise_by_position(model, [piece[at : at + length] for piece in pieces], piece=length)
        afresh.append(cut[:, length // 2 :] * BITS)
    return {"first": first, "on": float(torch.cat(on, 1).mean()), "afresh": float(torch.cat(afresh, 1).mean())}


def _live(config: DemoConfig, bodies: dict[str, Body], arm: str, folder: Path, queue: Any) -> dict[str, Any]:
    """One arm of the life: read the two bodies, one after the other."""
    saved = load_model(folder / "hope").model
    model = Decoder(arm_config(config.model, arm))
    model.load_state_dict(saved.state_dict())
    reader = Reader(model, learning=arm != "frozen")
    state = reader.begin()
    lives = [bodies["python"], bodies["names"]]
    total = sum(len(document) for body in lives for document in body.read)
    done = 0
    held_out: dict[str, Any] = {}
    prequential, curve, moved = {}, [], []
    for body in lives:
        nats, counted, size = 0.0, 0, sum(map(len, body.read))
        probe_every, read, probed = size // (config.probes + 1), 0, 0
        for document in body.read:
            first = True
            for part in torch.frombuffer(bytearray(document), dtype=torch.uint8).long().split(2048):
                state, out = reader.read(state, part)
                known = out.nll[1 if first else 0 :].double()  # nothing predicts a document's first byte
                first = False
                nats, counted = nats + float(known.sum()), counted + known.numel()
                moved += out.moved.tolist()
                done, read = done + part.numel(), read + part.numel()
                queue.put((f"life: {arm}", done, total, f"{body.name} {nats * BITS / max(1, counted):.3f} bits/byte"))
                if reader.learning and read >= (probed + 1) * probe_every and probed < config.probes:
                    probed += 1
                    curve.append([done, _held_out(model, bodies, state.levels, config.probe_bytes)])
            state, closing = reader.end_document(state)
            moved += closing.moved.tolist()
        prequential[body.name] = nats * BITS / max(1, counted)
        if reader.learning:
            held_out[f"after {body.name}"] = _held_out(model, bodies, state.levels, config.held_out_bytes)
            curve.append([done, _held_out(model, bodies, state.levels, config.probe_bytes)])
    return {
        "label": ARMS[arm],
        "levels": [repr(lvl) for lvl in model.config.levels],
        "held_out": held_out,
        "prequential": prequential,
        "curve": curve,
        "moved": _by_level(moved, len(model.levels) // config.model.blocks),
        "level_names": [f"{lvl.period:,.0f} tokens" for block in model.config.levels for lvl in block.levels],
    }


def _by_level(moved: list[list[float]], levels: int) -> list[list[float]]:
    """Update sizes of the same level in all blocks as one: their root mean square."""
    rows = []
    for position, *sizes in moved:
        blocks = [sizes[at : at + levels] for at in range(0, len(sizes), levels)]
        rows.append([position, *(math.sqrt(sum(x * x for x in one) / len(one)) for one in zip(*blocks, strict=True))])
    return rows
