"""nestling train: pre-train a model on text."""

import json
import math
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from nestling.learner import newest, read_generation, write_file
from nestling.models import Decoder, ModelConfig, preset
from nestling.models.data import from_data, to_data
from nestling.train import StepReport, Stream, TrainConfig, Trainer, digest, load_run, read_documents, save_run

from .shared import BITS, console, in_one_line, progress, registry


@dataclass(frozen=True, kw_only=True)
class Run:
    """Every field of a run, as it can stand in a TOML file under [model] and [train]."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


Flat = tyro.conf.OmitArgPrefixes
Presets = Literal["hope", "small", "tiny", "twin", "transformer"]


def train_command(arguments: list[str]) -> None:
    """Pre-train a model on text."""
    base = _base_run(_base_words(arguments))

    @dataclass(frozen=True, kw_only=True)
    class Train:
        data: tuple[Path, ...]  # files or folders of text
        out: Path  # the model's folder
        preset: Presets = "hope"  # which configuration to start from
        config: Path | None = None  # a TOML file with [model] and [train] tables
        resume: bool = False  # go on from the newest checkpoint in --out, bit for bit
        checkpoint_every: int = 50  # steps
        threads: int = 0  # 0: as many as torch takes
        model: Annotated[ModelConfig, Flat] = base.model
        train: Annotated[TrainConfig, Flat] = base.train

    with registry, in_one_line():
        asked = tyro.cli(Train, args=arguments, prog="nestling train", description="Pre-train a model on text.")
    if asked.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be >= 1 step, got {asked.checkpoint_every}")
    if asked.threads < 0:
        raise ValueError(f"threads must be >= 0 (0: as many as torch takes), got {asked.threads}")
    if asked.train.compile and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("--compile: torch.compile needs a C++ compiler, and there is none (g++, clang++ or c++)")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.set_flush_denormal(True)
    documents = read_documents(asked.data)
    started = newest(asked.out / "train") if asked.out.is_dir() else None
    if started is not None and not asked.resume:
        raise ValueError(f"{asked.out}: holds a run already; go on with --resume, or choose another folder")
    if started is None and asked.resume:
        raise ValueError(f"{asked.out}: nothing to resume: no checkpoint in it")
    if asked.out.exists() and not asked.out.is_dir():
        raise ValueError(f"{asked.out}: is a file; --out needs a folder")
    run_training(asked.model, asked.train, documents, asked.out, asked.checkpoint_every, asked.resume, asked.data)


def run_training(
    model_config: ModelConfig,
    config: TrainConfig,
    documents: list[bytes],
    out: Path,
    checkpoint_every: int,
    resume: bool,
    data: tuple[Path, ...],
) -> None:
    """Train, log to DIR/metrics.jsonl, and write checkpoints."""
    if model_config.vocabulary != 256:
        raise ValueError(f"vocabulary must be 256 to train on bytes, got {model_config.vocabulary}")
    stream = Stream.of(
        documents, rows=config.rows, length=config.length, reset_share=config.reset_share, seed=config.seed
    )
    text = {"data": [str(path) for path in data], "bytes": sum(map(len, documents)), "sha256": digest(documents)}
    if resume:
        _check_same(out, model_config, config, text)
    trainer = Trainer(Decoder(model_config, seed=config.seed), config)
    if resume:
        for difference in load_run(out, trainer):
            console.print(f"[yellow]this machine differs, the run will not go on bit for bit: {difference}[/]")
    if trainer.step > config.steps:
        raise ValueError(f"--steps {config.steps}: {out} has come to step {trainer.step}; ask for at least as many")
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    write_file(metrics, "".join(_metrics(metrics, trainer.step)).encode())
    with progress() as bars, open(metrics, "a") as log:
        task = bars.add_task("training", total=config.steps, completed=trainer.step, note="")
        while trainer.step < config.steps:
            report = _one_step(trainer, stream)
            log.write(json.dumps(report._asdict()) + "\n")
            bars.update(task, completed=trainer.step, note=f"{report.loss * BITS:.3f} bits/byte")
            if trainer.step % checkpoint_every == 0 or trainer.step == config.steps:
                log.flush()
                save_run(out, trainer, text)
    console.print(f"{out}: {trainer.step} steps, {trainer.step * config.rows * config.length:,} tokens")


def _one_step(trainer: Trainer, stream: Stream) -> StepReport:
    try:
        return trainer.run_step(stream)
    except FloatingPointError as error:
        raise ValueError(f"{error}; a smaller --learning-rate or --clip may help, and --resume goes on") from None


def _metrics(path: Path, step: int) -> list[str]:
    """The lines of the steps up to `step`: those after it were made by a run that was killed, and are made again."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if _step(line) <= step]


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a kill


def _check_same(out: Path, model_config: ModelConfig, config: TrainConfig, text: dict[str, Any]) -> None:
    folder = newest(out / "train")
    assert folder is not None
    saved = read_generation(folder).data.get("config", {})
    if not {"model", "train", "run"} <= set(saved):
        raise ValueError(f"{folder}/config.json: not a training run's: it needs model, train and run")
    for name, now, new in (("model", model_config, ModelConfig()), ("train", config, TrainConfig())):
        before = to_data(new) | saved[name]  # runs begun before there was a field have its default
        for key, value in to_data(now).items():
            was = before.get(key)
            if was != value and not (name == "train" and key == "steps"):
                raise ValueError(f"--resume: {key} was {was!r} in {out}, and is {value!r} now; a run goes on unchanged")
    was = saved["run"]
    if was.get("sha256", text["sha256"]) != text["sha256"]:  # runs begun before it was kept have none
        told = " and ".join(f"{', '.join(t['data'])} ({t['bytes']:,} bytes, {t['sha256'][:8]})" for t in (was, text))
        raise ValueError(f"--resume: the text of {out} and this one differ: {told}; a run goes on with its own text")
    if (out / "life").is_dir():
        raise ValueError(
            f"{out}: a life has begun in it, of the model as it is; train into another folder, or move life/ away"
        )


def _base_words(arguments: list[str]) -> dict[str, str]:
    """The words after --preset and --config, which decide the defaults of everything else."""
    found: dict[str, str] = {}
    for index, word in enumerate(arguments):
        for name in ("--preset", "--config"):
            if word == name and index + 1 < len(arguments):
                found[name] = arguments[index + 1]
            elif word.startswith(name + "="):
                found[name] = word.partition("=")[2]
    return found


def _base_run(found: dict[str, str]) -> Run:
    name = found.get("--preset", "hope")
    base = Run(model=preset(name))
    if "--config" not in found:
        return base
    path = Path(found["--config"])
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        told = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    data = to_data(base)
    for table, values in told.items():
        if table not in data or not isinstance(values, dict):
            raise ValueError(f"{path}: unknown table {table!r}; known: model, train")
        data[table] = {**data[table], **values}
    return from_data(Run, data, path=str(path))
