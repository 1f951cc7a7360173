"""The command line: nestling train | stack | learn | generate | info | check | zoo | demo."""

import os

# Threads that spin for long while they wait are many times slower on a machine that does anything else; those
# that sleep at once are a fifth slower than those that spin for less than a millisecond.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import json
import math
import sys
import tempfile
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nestling.checks import check
from nestling.learner import (
    SavedStack,
    is_stacked,
    load_model,
    load_stacked,
    newest,
    open_life,
    reader_of,
    save_life,
    save_stacked,
)
from nestling.levels import Level, Loss, Reader, StackConfig, StackedDecoder, level
from nestling.memory import Part, known, parse
from nestling.models import Decoder, ModelConfig, generate, preset
from nestling.models.data import from_data, to_data
from nestling.sequence.named import FAR, Model, error, size
from nestling.sequence.zoo import rows, zoo
from nestling.tasks.demo import DEMO_TRAIN, DemoConfig, run_demo, shortened
from nestling.tasks.report import print_report, write_report
from nestling.train import Stream, TrainConfig, Trainer, load_run, read_documents, save_run

BITS = 1 / math.log(2)
app = tyro.extras.SubcommandApp()
registry = tyro.constructors.ConstructorRegistry()
console = Console(stderr=True)


@registry.primitive_rule
def _part_from_flag(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Parts are given on the command line as the expression that builds them."""
    if not (isinstance(info.type, type) and issubclass(info.type, Part)):
        return None
    family = info.type

    def build(words: list[str]) -> Part:
        return parse(words[0], family)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="EXPRESSION",
        instance_from_str=build,
        is_instance=lambda value: isinstance(value, family),
        str_from_instance=lambda part: [repr(part)],
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Every field of a run, as it can stand in a TOML file under [model] and [train]."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


Flat = tyro.conf.OmitArgPrefixes
Presets = Literal["hope", "small", "tiny", "twin", "transformer"]


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _train(arguments: list[str]) -> None:
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

    with registry:
        asked = tyro.cli(Train, args=arguments, prog="nestling train", description="Pre-train a model on text.")
    if asked.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be >= 1 step, got {asked.checkpoint_every}")
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
    if resume:
        _check_same(out, model_config, config)
    trainer = Trainer(Decoder(model_config, seed=config.seed), config)
    if resume:
        for difference in load_run(out, trainer):
            console.print(f"[yellow]this machine differs, the run will not go on bit for bit: {difference}[/]")
    run = {"data": [str(path) for path in data], "bytes": sum(map(len, documents))}
    out.mkdir(parents=True, exist_ok=True)
    with progress() as bars, open(out / "metrics.jsonl", "a") as log:
        task = bars.add_task("training", total=config.steps, completed=trainer.step, note="")
        while trainer.step < config.steps:
            report = trainer.run_step(stream)
            log.write(json.dumps(report._asdict()) + "\n")
            bars.update(task, completed=trainer.step, note=f"{report.loss * BITS:.3f} bits/byte")
            if trainer.step % checkpoint_every == 0 or trainer.step == config.steps:
                log.flush()
                save_run(out, trainer, run)
    console.print(f"{out}: {trainer.step} steps, {trainer.step * config.rows * config.length:,} tokens")


def _check_same(out: Path, model_config: ModelConfig, config: TrainConfig) -> None:
    folder = newest(out / "train")
    assert folder is not None
    saved = json.loads((folder / "config.json").read_text())
    for name, now in (("model", to_data(model_config)), ("train", to_data(config))):
        for key, value in now.items():
            was = saved[name].get(key)
            if was != value and not (name == "train" and key == "steps"):
                raise ValueError(f"--resume: {key} was {was!r} in {out}, and is {value!r} now; a run goes on unchanged")


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


def _reader(directory: Path, *, learning: bool) -> tuple[Any, Any, Any]:
    saved = load_stacked(directory) if is_stacked(directory) else load_model(directory)
    if isinstance(saved, SavedStack):
        reader = reader_of(saved.model, learning=learning)
    else:
        reader = Reader(saved.model, learning=learning)
    return saved, reader, open_life(directory, saved, reader)


@app.command(name="stack")
def stack_command(
    base: tyro.conf.Positional[Path],
    *,
    out: Path,
    periods: tuple[float, ...] = (128, 512, 2048),
    levels: tuple[Level, ...] = (),
    how: Literal["layers", "neurons", "low_rank"] = "layers",
    step_size: float = 0.1,
    rank: int = 8,
    context: int | None = None,
    overlap: int = 0,
    loss: Loss | None = None,
    seed: int = 0,
) -> None:
    """Put levels into a pre-trained model of transformers, to `learn` and `generate` with. The model is not copied.

    Args:
        base: the model's folder, as transformers writes it.
        out: the new folder: what is stacked, and later the life.
        periods: of the levels, in tokens, fast to slow.
        levels: in place of periods: expressions, such as "level(128, step_size=0.5)" or "spectrum(16, 2048)".
        how: layer j at level j mod K; or each MLP's neurons divided; or low-rank levels beside each MLP.
        step_size: of the levels that are given by their periods.
        rank: of each low-rank level.
        context: tokens that the attention cache holds at most.
        overlap: tokens that it keeps when it is cut.
        loss: what an encoder learns from, such as "masked_tokens(103)".
        seed: of the low-rank levels.
    """
    chosen = levels or tuple(level(period, step_size=step_size) for period in periods)
    config = StackConfig(levels=chosen, how=how, rank=rank, context=context, overlap=overlap, loss=loss, seed=seed)
    model = save_stacked(out, base, config)
    moving = sum(weight.numel() for maps in model.level_weights() for weight in maps)
    print(f"{out}: {len(model.levels)} levels of {moving:,} weights in {len(model.feedforwards)} MLPs of {base}")


@app.command(name="learn")
def learn(directory: tyro.conf.Positional[Path], paths: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Let a model read files or folders, learning as it reads.

    Args:
        directory: a model's folder, from `nestling train`.
        paths: files or folders of text; every file is one document.
    """
    if not paths:
        raise ValueError("learn: name at least one file or folder to read")
    documents = read_documents(paths)
    torch.set_flush_denormal(True)
    saved, reader, state = _reader(directory, learning=True)
    total, counted = 0.0, 0
    with progress() as bars:
        task = bars.add_task("reading", total=sum(map(len, documents)), note="")
        for document in documents:
            tokens = saved.encode(document)
            a_token = len(document) / max(1, tokens.numel())
            for part in tokens.split(4096):
                state, out = reader.read(state, part)
                seen = out.nll[out.nll.isfinite()].double()
                total, counted = total + float(seen.sum()), counted + seen.numel() * a_token
                note = f"{total * BITS / max(1, counted):.3f} bits/byte"
                bars.update(task, advance=part.numel() * a_token, note=note)
            state, _ = reader.end_document(state)
    save_life(directory, saved, state, {"documents": [str(path) for path in paths]})
    print(f"read {counted:,.0f} bytes at {total * BITS / max(1, counted):.3f} bits/byte, predicted before learned")


@app.command(name="generate")
def generate_command(
    directory: tyro.conf.Positional[Path],
    *,
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> None:
    """Go on from a prompt. Nothing is learned: levels stay as they are, the sequence state is this call's own.

    Args:
        directory: a model's folder; with a life in it, the life's levels are used.
        prompt: what comes before.
        tokens: how many bytes to write.
        temperature: 0 takes the most likely byte each time.
        seed: of the sampling.
    """
    saved, _, state = _reader(directory, learning=False)
    torch.set_flush_denormal(True)
    if isinstance(saved, SavedStack):
        if not isinstance(saved.model, StackedDecoder):
            raise ValueError(f"{directory}: {saved.name} is an encoder, and does not write")
        torch.manual_seed(seed)
        choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        given = saved.encode(prompt.encode())[None]
        written = saved.model.generate(given, weights=state.levels.weights, max_new_tokens=tokens, **choice)
        sys.stdout.write(prompt + saved.decode(written[0, given.shape[1] :]).decode(errors="replace") + "\n")
        return
    words = generate(
        saved.model, prompt.encode(), tokens, weights=state.levels.weights, temperature=temperature, seed=seed
    )
    sys.stdout.write(prompt)
    for byte in words:
        sys.stdout.flush()
        sys.stdout.buffer.write(bytes([byte]))
    sys.stdout.write("\n")


@app.command(name="info")
def info(directory: tyro.conf.Positional[Path]) -> None:
    """Say what a model is, how it was trained and what its life has read.

    Args:
        directory: a model's folder.
    """
    table = Table(title=str(directory), show_header=False)
    if is_stacked(directory):
        stacked = load_stacked(directory)
        table.add_row("pre-trained model", stacked.name)
        for name, value in vars(stacked.model.config).items():
            table.add_row(name, Text(repr(value)))
        table.add_row("model hash", stacked.hash)
        table.add_row("life", _life(directory))
        Console().print(table)
        return
    saved = load_model(directory)
    config = saved.model.config
    table.add_row("mixer", repr(config.mixer))
    for lvl in config.levels:
        table.add_row("level", repr(lvl))
    for field in fields(config):
        if field.name not in ("mixer", "levels"):
            table.add_row(field.name, str(getattr(config, field.name)))
    table.add_row("parameters", f"{sum(p.numel() for p in saved.model.parameters()):,}")
    table.add_row("model hash", saved.hash)
    table.add_row("trained steps", str(saved.generation.data["training"]["step"]))
    table.add_row("life", _life(directory))
    Console().print(table)


def _life(directory: Path) -> str:
    life = newest(directory / "life")
    return "none yet" if life is None else f"{int(life.name):,} tokens read"


@app.command(name="check")
def check_command(
    directory: tyro.conf.Positional[Path], *, only: tuple[str, ...] = (), steps: int = 300, seed: int = 0
) -> None:
    """Run the correctness kit on a model: causality, gradients, invariances, the entropy floor and more.

    Args:
        directory: a model's folder.
        only: names of checks; all of them, where none is named.
        steps: of training on random tokens, for entropy_floor (nearly all of the time).
        seed: of the tokens and the small perturbation of the weights.
    """
    saved = load_model(directory)
    torch.set_flush_denormal(True)
    report = check(saved.model, seed=seed, only=only or None, steps=steps)
    Console().print(report)
    if not report.passed:
        raise ValueError(f"{directory}: {', '.join(f.name for f in report if f.passed is False)} failed")


@app.command(name="zoo")
def zoo_command(name: tyro.conf.Positional[str | None] = None, *, check: bool = False) -> None:
    """List the named models as points in Miras' space of four choices, tell of one, or check all.

    Args:
        name: of a model to tell more of.
        check: run every model against its oracle, in each of its ways, and print how far they are apart.
    """
    shown = {name: known(name, zoo, "model")} if name is not None else dict(rows())
    if check:
        Console().print(checked(shown))
    elif name is None:
        Console().print(listed(shown))
    else:
        model = shown[name]
        parts = zip(("structure", "attentional bias", "retention", "algorithm"), model.choices, strict=True)
        told = {"": f"{model.equation}", "from": model.source, "expression": f"{model.mixer}", **dict(parts)}
        told |= {"runs": ", ".join(model.ways), "note": model.note}
        table = Table(title=name, show_header=False)
        for word, text in told.items():
            if text:
                table.add_row(word, Text(text))
        Console().print(table)


def listed(models: dict[str, Model]) -> Table:
    """A row a model: the four choices, numbers of state and products a token, of one head of 64."""
    columns = ("model", "structure", "attentional bias", "retention", "algorithm", "ways", "state", "FLOPs/token")
    table = Table(*columns, caption="one head of 64; FLOPs of a forward pass with projections")
    for name, model in models.items():
        cost = size(model.mixer)
        cells = (name, *model.choices, ", ".join(model.ways), f"{cost.state:,}", f"{cost.flops:,}")
        table.add_row(*map(Text, cells))
    return table


def checked(models: dict[str, Model]) -> Table:
    """A row a model and way: the largest relative difference from its oracle. Raises ValueError where one is large."""
    table = Table("model", "way", "error", "note")
    far = []
    for name, model in models.items():
        for way in model.ways if model.oracle is not None else ():
            found = error(model, way)
            table.add_row(name, way, f"{found:.1e}", "")
            far += [] if found <= FAR else [f"{name} {way}"]
        if model.oracle is None:
            table.add_row(name, "", "", Text(model.note, style="dim"))
    if far:
        Console().print(table)
        raise ValueError(f"not as their oracles: {', '.join(far)}")
    return table


@app.command(name="demo")
def demo(*, out: Path = Path("runs/demo"), short: bool = False, seed: int = 0) -> None:
    """Pre-train a small Hope on text that every Python ships with, let it read two other bodies of text, and
    report what it learned and what it forgot.

    Args:
        out: where report.html, report.json and the model go.
        short: a few steps of everything, for a quick check that it runs.
        seed: of the weights, the split of the text, the order of the stream.
    """
    config = DemoConfig(seed=seed, train=replace(DEMO_TRAIN, seed=seed))
    if short:
        config = shortened(config)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out needs a folder")
    with tempfile.TemporaryDirectory() as scratch, progress() as bars:
        tasks: dict[str, Any] = {}

        def tell(name: str, done: float, total: float, note: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, note="")
            bars.update(tasks[name], completed=done, note=note)

        data = run_demo(config, Path(scratch), tell)
        out.mkdir(parents=True, exist_ok=True)
    print_report(data, Console())
    html, numbers = write_report(data, out)
    print(f"{html}\n{numbers}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 with one line on stderr for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["train"]:
            _train(arguments[1:])
        else:
            with registry:
                app.cli(prog="nestling", description=__doc__, args=arguments)
    except (ValueError, OSError) as error:
        print(f"nestling: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nestling: stopped; the last checkpoint stands", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
